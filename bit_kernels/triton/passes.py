"""Memory passes of the kernels, counted from the addresses that they load from and store to.

    BIT_KERNELS_INTERPRET=1 python -m bit_kernels.triton.passes      of the table's cases, as JSON

Triton's interpreter runs the kernels, and each address on its way to memory is looked at: that it is
in one of the launch's tensors, that no element is written twice, and that none is read or written
by one program and written by another, in any order: on a GPU that would be a race. What is left are
counts: how many elements each launch loads and stores of each of its tensors.
"""

import functools
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from bit_kernels.triton import _launch
from bit_kernels.triton._launch import ceil_div
from bit_kernels.triton.cases import Case, cases, maker

_NOBODY, _SEVERAL = -1, -2


class _Region:
    """The memory of a tensor during one launch; elements are counted from its first."""

    def __init__(self, name: str, tensor: Tensor):
        self.name, self.tensor = name, tensor
        self.start, self.end = _span(tensor)
        self.itemsize = tensor.element_size()
        self.size = (self.end - self.start) // self.itemsize

    @functools.cached_property
    def reader(self) -> np.ndarray:
        """The program that read an element."""
        return np.full(self.size, _NOBODY, np.int32)

    @functools.cached_property
    def writer(self) -> np.ndarray:
        return np.full(self.size, _NOBODY, np.int32)

    @functools.cached_property
    def gaps(self) -> np.ndarray | None:
        """Elements between those of the tensor, if it does not lie dense."""
        if self.size == self.tensor.numel():
            return None
        gaps = torch.ones(self.size, dtype=torch.bool)
        gaps.as_strided(self.tensor.shape, self.tensor.stride()).fill_(False)
        return gaps.numpy()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first byte and past its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Traffic(NamedTuple):
    """What one launch loaded and stored: elements of each tensor, by the kernel's name for it."""

    kernel: str
    tensors: dict[str, Tensor]
    loaded: Counter[str]
    stored: Counter[str]

    def moved(self, of: Iterable[str]) -> int:
        return sum(self.loaded[name] + self.stored[name] for name in of)

    def large(self, elements: int) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.numel() >= elements]

    def passes(self, elements: int, least: int | None = None) -> float:
        """Loads and stores of tensors of at least `least` elements, over `elements`; None: as many."""
        return self.moved(self.large(least or elements)) / elements

    def bytes(self, names: Iterable[str]) -> int:
        return sum(self.moved([name]) * self.tensors[name].element_size() for name in names)


class Watch:
    """All launches inside `watch`."""

    def __init__(self, also: Sequence[Tensor]):
        self.launches: list[Traffic] = []
        self._also = list(also)
        self._written: dict[tuple[int, int], np.ndarray] = {}
        self._regions: list[_Region] = []

    def passes(self, elements: int, least: int | None = None) -> float:
        """Of all launches together."""
        return sum(launch.passes(elements, least) for launch in self.launches)

    def rest(self, least: int) -> float:
        """Bytes of all tensors of fewer elements over those of the others."""
        large = sum(launch.bytes(launch.large(least)) for launch in self.launches)
        return sum(launch.bytes(launch.tensors) for launch in self.launches) / large - 1

    def fully_written(self, tensor: Tensor) -> bool:
        """Has every element of a tensor of the launches been stored to?"""
        written = self._written.get(_span(tensor))
        if written is None:
            return False
        return bool(torch.from_numpy(written).as_strided(tensor.shape, tensor.stride()).all())

    def _begin(self, kernel: str, arguments: dict) -> None:
        tensors = {name: arg for name, arg in arguments.items() if isinstance(arg, Tensor)}
        regions: list[_Region] = []
        for name, tensor in sorted(tensors.items(), key=lambda item: _span(item[1])):
            region = _Region(name, tensor)
            if region.size == 0 or regions and _span(tensor) == _span(regions[-1].tensor):
                continue  # or the same under another name
            if regions and region.start < regions[-1].end:
                raise ValueError(f"{kernel}: {name} overlaps {regions[-1].name}")
            regions.append(region)
        starts = [region.start for region in regions]
        for i, tensor in enumerate(self._also):
            region = _Region(f"also {i}", tensor)
            at = bisect_left(starts, region.end) - 1  # the last argument that begins before its end
            if region.size and (at < 0 or regions[at].end <= region.start):
                tensors[region.name] = tensor
                regions.append(region)
        self._regions = sorted(regions, key=lambda region: region.start)
        self._starts = [region.start for region in self._regions]
        self.launches.append(Traffic(kernel, tensors, Counter(), Counter()))

    def _access(self, pointers: np.ndarray, mask: np.ndarray, store: bool) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        while addresses.size:
            at = bisect_right(self._starts, addresses.min()) - 1
            region = self._regions[at] if at >= 0 else None
            self._must(region is not None and addresses.min() < region.end, "is in no tensor")
            inside = addresses < region.end
            self._access_region(region, addresses[inside] - region.start, store)
            addresses = addresses[~inside]

    def _access_region(self, region: _Region, bytes: np.ndarray, store: bool) -> None:
        name = region.name
        self._must(not (bytes % region.itemsize).any(), f"is between two elements of {name}")
        index, program = bytes // region.itemsize, self._program()
        if region.gaps is not None:
            self._must(not region.gaps[index].any(), f"is between elements of {name}")
        (self.launches[-1].stored if store else self.launches[-1].loaded)[name] += index.size
        writers, readers = region.writer[index], region.reader[index]
        strange = (writers != _NOBODY) & (writers != program)
        if not store:
            self._must(not strange.any(), f"reads what another program has written, of {name}")
            region.reader[index] = np.where(
                (readers == _NOBODY) | (readers == program), program, _SEVERAL
            )
            return
        again = (writers != _NOBODY).any() or np.unique(index).size != index.size
        self._must(not again, f"writes an element of {name} a second time")
        strange = (readers != _NOBODY) & (readers != program)
        self._must(not strange.any(), f"writes what another program has read, of {name}")
        region.writer[index] = program
        span = region.start, region.end
        self._written.setdefault(span, np.zeros(region.size, bool))[index] = True

    def _program(self) -> int:
        (x, y, z), (columns, rows, _) = (
            interpreter.interpreter_builder.grid_idx,
            interpreter.interpreter_builder.grid_dim,
        )
        return x + columns * (y + rows * z)

    def _must(self, holds: bool, fault: str) -> None:
        if not holds:
            place = interpreter.interpreter_builder.grid_idx
            raise AssertionError(f"{self.launches[-1].kernel}, program {place}: {fault}")


@contextmanager
def watch(also: Sequence[Tensor] = ()) -> Iterator[Watch]:
    """Inside, each access of a kernel is checked and counted; atomics are refused.

    also: tensors from before that kernels reach by other ways than an argument, such as a table of
        pointers; those that are made inside are known.

    Raises:
        triton.runtime.errors.InterpreterError: of a kernel's launch: it accessed memory as it must
            not; the message says how.
    """
    watch = Watch(also)
    # Kept, so that none has the memory of an earlier one.
    known = {tensor.untyped_storage().data_ptr() for tensor in also}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def watched_load(self, pointers, mask, *args, **kwargs):
        watch._access(pointers.data, mask.data, store=False)
        return load(self, pointers, mask, *args, **kwargs)

    def watched_store(self, pointers, value, mask, *args, **kwargs):
        watch._access(pointers.data, mask.data, store=True)
        return store(self, pointers, value, mask, *args, **kwargs)

    def refused(self, *args):
        watch._must(False, "atomics: the order of their sums is not fixed")

    def watched_call(self, *args, **constexprs):
        watch._begin(_name(self.fn), dict(zip(self.arg_names, args, strict=False)))
        return call(self, *args, **constexprs)

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device.type == "cpu":
                storage = result.untyped_storage().data_ptr()
                if storage not in known:
                    known.add(storage)
                    watch._also.append(result)
            return result

    with (
        Noting(),
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(builder, "create_atomic_rmw", refused),
        mock.patch.object(builder, "create_atomic_cas", refused),
        mock.patch.object(executor, "__call__", watched_call),
    ):
        yield watch


def count(case: Case) -> Watch:
    """The launches of a case with few elements, and with as much fewer multiprocessors, so that the
    work is divided as it is with all."""
    few = ceil_div(_launch.WITHOUT_GPU * case.few_elements, case.elements)
    with mock.patch.object(_launch, "WITHOUT_GPU", few), watch() as seen:
        case.few(maker("cpu"))
    with _launch.recording() as launches:
        case.call(maker("meta"))
    expected = {_name(launch.kernel.fn) for launch in launches}
    if (found := {launch.kernel for launch in seen.launches}) != expected:
        raise ValueError(f"{case}: launches {expected}, with few elements {found}")
    return seen


def case_passes(case: Case, launch: Traffic) -> float:
    """Of one of the launches, in the case's own unit."""
    return launch.passes(case.few_elements, case.few_least)


def _name(function) -> str:
    return function.__name__.strip("_")


def main() -> None:
    """Prints kernel and memory passes of each launch, of each case of the table."""
    counted = {}
    for case in cases():
        if case.few is not None:
            launches = count(case).launches
            counted[str(case)] = [(each.kernel, case_passes(case, each)) for each in launches]
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
