"""Forward and backward of a micro-batch: launched one operation at a time, or as CUDA graphs.

A small network, or few images, leave a GPU waiting for Python. A CUDA graph is all launches of one
pass at one go, with their arguments as they were when it was captured: the same shapes at the same
addresses. So inputs are copied to where they were then, and gradients come to lie where they did.

Not in a graph:
- the optimizer's step. It takes a learning rate that differs each time as a number, must not run
  for a loss that is not finite, and is a few launches for all weights together as it is;
- the choice to standardize a weight anew that somebody has changed (a graph asks nothing): it is
  made before every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bit_kernels.optim import SGD

WARM_UPS = 3  # passes in which libraries, compilers and cuDNN's choices settle

Targets = tuple[Tensor, Tensor, Tensor | float]  # labels, partners' labels, weight of the former


class Eager:
    """The passes as PyTorch makes them.

    loss_of: (images, targets) -> loss, of no dimension.
    """

    def __init__(self, loss_of: Callable[[Tensor, Targets], Tensor]) -> None:
        self.forward = loss_of

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of what `forward` returned to those of the parameters."""
        loss.backward()


@dataclass
class _Captured:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    loss: Tensor  # where the forward writes it
    grads: list[Tensor] | None  # where the backward writes them; None if it adds to what is there


class Graphed:
    """The same passes as CUDA graphs, for images of one shape; others run as with `Eager`.

    Forward and backward are two graphs, so that the loss can be read while the backward runs. If
    parameters have no gradient, the backward makes it; otherwise it adds to that gradient, which
    must then be the one that it has made. Each of both is a pair of graphs; all share one pool of
    memory, which stays taken as long as this lives.

    Args:
        loss_of: as for `Eager`; runs only while capturing, so it must not depend on anything else
            that changes.
        optimizer: whose parameters get the gradients. None may have one now; all must stay where
            they are in memory, and may be changed there.
        shape: (N, 3, H, W) of the images.
        adds: capture also the backward that adds.
        device: cuda or cuda:N, the current one.
        say: told once, when images of another shape come.
    """

    def __init__(
        self,
        loss_of: Callable[[Tensor, Targets], Tensor],
        optimizer: SGD,
        shape: tuple[int, int, int, int],
        *,
        adds: bool,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        self._loss_of, self._optimizer, self._say = loss_of, optimizer, say
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        images = torch.zeros(shape, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.zeros((2, shape[0]), dtype=torch.int64, device=device)
        self._lam = torch.ones((), device=device)
        self._captured: dict[bool, _Captured] = {}  # by whether the backward adds
        self._replayed: _Captured | None = None
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._warm_up(stream)
        for more in (False, True) if adds else (False,):
            self._captured[more] = self._capture(stream, pool, more)
        self._drop_grads()

    def forward(self, images: Tensor, targets: Targets) -> Tensor:
        """The loss, in memory that the next forward writes to."""
        captured = self._captured.get(self._parameters[0].grad is not None)
        if captured is None or images.shape != self._images.shape:
            self._tell(images)
            self._replayed = None
            return self._loss_of(images, targets)
        labels, partners, lam = targets
        self._images.copy_(images)
        self._labels[0].copy_(labels)
        self._labels[1].copy_(partners)
        self._lam.fill_(lam)
        self._optimizer.restandardize()
        captured.forward.replay()
        self._replayed = captured
        return captured.loss

    def backward(self, loss: Tensor) -> None:
        """Make the gradients of what `forward` returned last, or add them to those there are."""
        captured = self._replayed
        if captured is None:
            loss.backward()
            return
        captured.backward.replay()
        if captured.grads is not None:
            for parameter, grad in zip(self._parameters, captured.grads, strict=True):
                parameter.grad = grad

    def _inputs(self) -> tuple[Tensor, Targets]:
        return self._images, (*self._labels.unbind(), self._lam)

    def _warm_up(self, stream: torch.cuda.Stream) -> None:
        # On the stream that captures, where autograd will expect gradients to come from.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._loss_of(*self._inputs()).backward()
                self._drop_grads()
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, stream: torch.cuda.Stream, pool: tuple[int, int], more: bool) -> _Captured:
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=pool, stream=stream):
            loss = self._loss_of(*self._inputs())
        with torch.cuda.graph(backward, pool=pool, stream=stream):
            loss.backward()
        grads = None if more else [parameter.grad for parameter in self._parameters]
        return _Captured(forward, backward, loss.detach(), grads)

    def _drop_grads(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _tell(self, images: Tensor) -> None:
        say, self._say = self._say, lambda _: None
        say(
            f"micro-batches of {len(images)} run without a CUDA graph; it was captured for "
            f"{len(self._images)} images"
        )
