"""Batches on their device; on a GPU they are there before they are asked for.

A thread makes each batch in pinned memory, from which a GPU copies by itself, and has it copied on
a stream of its own, beside the network's. The order and the bits are those of the CPU.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bit.data import Batch
from bit.data.batches import Job
from bit.data.threads import in_order
from bit.device import is_cpu

SLOTS = 2  # one is filled while the other is copied
AHEAD = 2  # batches on the device that nobody has asked for yet, at most: `in_order` with 1 worker


def on_device(jobs: Iterable[Job], device: str) -> Iterator[tuple[Tensor, ...]]:
    """What each of `jobs` makes, on `device`, in order."""
    if is_cpu(device):
        return (job() for job in jobs)
    return Prefetcher(Transfers(device)).iterate(jobs)


def loaded(batches: Iterable[Batch], size: int, device: str) -> Iterator[Batch | LoadedBatch]:
    """The batches, whose micro-batches of `size` lie on `device`, ahead across their ends too.

    All micro-batches of one are to be taken before the next is asked for.
    """
    if is_cpu(device):
        yield from batches
        return
    begun: deque[Batch] = deque()

    def jobs() -> Iterator[Job]:
        for batch in batches:
            begun.append(batch)
            for part in batch.parts(size):
                yield partial(batch.collate, part)

    tensors = on_device(jobs(), device)
    for first in tensors:
        batch = begun.popleft()
        rest = itertools.islice(tensors, len(batch.parts(size)) - 1)
        yield LoadedBatch(batch, itertools.chain([first], rest))


@dataclass
class LoadedBatch:
    """A `Batch` whose micro-batches are made by somebody else; they can be taken once."""

    batch: Batch
    parts: Iterator[tuple[Tensor, ...]]

    @property
    def lam(self) -> float:
        return self.batch.lam

    def micro(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        return self.parts


class Prefetcher:
    """Makes batches ahead of their use; see the module.

    transfers: how they get to the device.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._slots = itertools.cycle([_Slot(transfers.pinned) for _ in range(SLOTS)])

    def iterate(self, jobs: Iterable[Job]) -> Iterator[tuple[Tensor, ...]]:
        """What each of `jobs` makes, on the device, for the stream that is current here.

        An exception in a job is raised when its turn comes.
        """
        for sent in in_order(self._load, jobs, workers=1):
            yield self._transfers.receive(sent)

    def _load(self, job: Job) -> Sent:
        slot = next(self._slots)
        slot.reuse()
        images, *labels = job(slot.empty)
        labels = [slot.empty(t.shape, t.dtype).copy_(t) for t in labels]
        slot.sent = self._transfers.send([images, *labels])
        return slot.sent


class _Slot:
    """Pinned memory for one batch, used again for another once it has been copied.

    allocate: (elements, dtype) -> a flat pinned tensor.
    """

    def __init__(self, allocate: Callable[[int, torch.dtype], Tensor]) -> None:
        self._allocate = allocate
        self._buffers: list[Tensor] = []
        self._taken = 0
        self.sent: Sent | None = None  # the copy out of it

    def reuse(self) -> None:
        """Wait until nobody reads the memory any more."""
        if self.sent is not None:
            self.sent.arrived.synchronize()
        self.sent, self._taken = None, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next tensor of the batch; channels_last if it has four dimensions."""
        at, elements = self._taken, math.prod(shape)
        self._taken += 1
        if at == len(self._buffers):
            self._buffers.append(self._allocate(elements, dtype))
        elif len(self._buffers[at]) < elements or self._buffers[at].dtype != dtype:
            self._buffers[at] = self._allocate(elements, dtype)
        flat = self._buffers[at][:elements]
        if len(shape) != 4:
            return flat.view(shape)
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass
class Sent:
    """A batch on its way: tensors of the device, and the event after their copy."""

    tensors: list[Tensor]
    arrived: torch.cuda.Event


class Transfers:
    """Copies from pinned memory to one GPU, on a stream of their own.

    device: cuda or cuda:N.
    """

    def __init__(self, device: str) -> None:
        index = torch.device(device).index
        # Another thread has a current device of its own, so it is said by number.
        index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", index)
        self.side = torch.cuda.Stream(self.device)

    def pinned(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Flat memory that the device can copy from by itself."""
        with torch.cuda.device(self.device):
            return torch.empty(elements, dtype=dtype, pin_memory=True)

    def send(self, tensors: list[Tensor]) -> Sent:
        """Begin to copy pinned tensors, which must stay as they are until `arrived`."""
        with torch.cuda.stream(self.side):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return Sent(copies, self.side.record_event())

    def receive(self, sent: Sent) -> tuple[Tensor, ...]:
        """The copies, for the current stream, which waits for them; the host doesn't."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(sent.arrived)
        for tensor in sent.tensors:
            # Its memory is the side stream's: it must not go to another copy while we use it.
            tensor.record_stream(current)
        return tuple(sent.tensors)
