"""The suite `ops`: each op of bit_kernels against PyTorch, forward and backward.

`benchmarks/ops/<op>.py` declares and never times. It has:
  CASES        list of OpCase
  RIVALS       name -> function of the inputs that gives the output; the first is ours
  BASELINES    the names among RIVALS that are eager PyTorch, the plainest first
  COMPILED     name of the rival that `--compile` also runs through torch.compile
  REFERENCE    the op in plain PyTorch, run in float64
  make_inputs  (shape, generator) -> name -> float32 tensor. The first is the large one: it takes
               the case's layout and rotates. The others are parameters, shared by all copies.
  gate_gradient  (inputs, gradient) -> the gradient with which the gate compares backward
  passes       (case, itemsize, threads, l2_bytes) -> times that a tensor of the large input's
               size must be read or written

Optimizers have neither forward nor backward: `benchmarks/ops/sgd.py` declares its cases whole.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.ops import sgd
from benchmarks.runner import Case

OPS = ("group_norm_relu", "standardize_weight")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ROTATED_BYTES = 128 << 20  # of inputs, and about as many of outputs: 4 times a 32 MiB cache each
MAX_COPIES = 4096  # 64 MiB of the smallest kernel in R50x1
CACHED_COPIES = 64  # of inputs so small that MAX_COPIES of them would still lie in a cache


@dataclass(frozen=True)
class OpCase:
    """why: the reason that the shape is here ("r50x1", "batch1", "tiny", ...); shape: of the large
    input; layout: a key of LAYOUTS; direction: "forward" or "backward"; quick: in `--quick` too.
    """

    why: str
    shape: tuple[int, ...]
    layout: str
    direction: str
    quick: bool = False


def cases(
    *, threads: list[int], dtypes: list[str], quick: bool = False, compiled: bool = False
) -> list[Case]:
    """All cases of the suite; `compiled` adds torch.compile's rival, `quick` leaves the few."""
    return [
        _case(declaration, case, dtype, count, compiled)
        for declaration in map(_declaration, OPS)
        for case in declaration.CASES
        for dtype in dtypes
        for count in threads
        if case.quick or not quick
    ] + sgd.cases(threads=threads, dtypes=dtypes, quick=quick, compiled=compiled)


def _declaration(op: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.ops.{op}")


def _case(op: ModuleType, case: OpCase, dtype: str, threads: int, compiled: bool) -> Case:
    name = op.__name__.rpartition(".")[2]
    itemsize = DTYPES[dtype].itemsize
    passes = op.passes(case, itemsize, threads, machine.cache_bytes(2))
    nbytes = math.prod(case.shape) * itemsize
    return Case(
        suite="ops",
        name=f"{name}/{case.why}/{'x'.join(map(str, case.shape))}/{case.layout}/{case.direction}",
        dtype=dtype,
        threads=threads,
        providers=(*op.RIVALS, "compiled") if compiled else tuple(op.RIVALS),
        baselines=op.BASELINES,
        prepare=functools.partial(OpWorkload, op, case, DTYPES[dtype]),
        passes=passes,
        necessary_bytes=passes * nbytes if copies_past_cache(case, nbytes) else None,
    )


def copies_past_cache(case: OpCase, nbytes: int) -> int | None:
    """Copies of the inputs that together exceed the caches, at least 2; None if that's too many.

    nbytes: of the large input; backward's inputs are as many bytes of gradient again.
    """
    each = nbytes * (2 if case.direction == "backward" else 1)
    copies = min(MAX_COPIES, max(2, math.ceil(ROTATED_BYTES / each)))
    return copies if copies * each >= ROTATED_BYTES // 2 else None


class OpWorkload:
    """One op's inputs in many copies; see benchmarks.runner.Workload."""

    def __init__(self, op: ModuleType, case: OpCase, dtype: torch.dtype):
        self._op, self._case = op, case
        generator = torch.Generator().manual_seed(0)
        inputs = op.make_inputs(case.shape, generator)
        self._names = tuple(inputs)
        large, *parameters = (tensor.to(dtype) for tensor in inputs.values())
        large = large.contiguous(memory_format=LAYOUTS[case.layout])
        gradient = torch.randn(case.shape, generator=generator).to(large)
        self._parameters = [tensor.requires_grad_() for tensor in parameters]
        copies = copies_past_cache(case, large.nbytes) or CACHED_COPIES
        self._large = [large.clone().requires_grad_() for _ in range(copies)]
        # Strides as the input's, which is what the next layer's backward hands over.
        self._gradients = [
            torch.empty_like(large).copy_(gradient)
            for _ in range(copies if case.direction == "backward" else 1)
        ]

    def reference(self) -> dict[str, Tensor]:
        inputs = [
            tensor.detach().double().contiguous().requires_grad_() for tensor in self._inputs(0)
        ]
        return self._outputs(self._op.REFERENCE, inputs)

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return self._outputs(self._rival(provider), self._inputs(0))

    def calls(self, provider: str) -> list[Callable[[], object]]:
        rival = self._rival(provider)
        if self._case.direction == "forward":
            return [
                functools.partial(rival, *self._inputs(index)) for index in range(len(self._large))
            ]
        return [
            functools.partial(
                torch.autograd.grad,
                rival(*self._inputs(index)),
                self._inputs(index),
                gradient,
                retain_graph=True,
            )
            for index, gradient in enumerate(self._gradients)
        ]

    def _inputs(self, index: int) -> list[Tensor]:
        return [self._large[index], *self._parameters]

    def _outputs(self, rival: Callable, inputs: list[Tensor]) -> dict[str, Tensor]:
        output = rival(*inputs)
        gradient = self._gate_gradient.to(output.dtype)
        gradients = torch.autograd.grad(output, inputs, gradient)
        names = [f"gradient of {name}" for name in self._names]
        return {"output": output.detach(), **dict(zip(names, gradients))}

    @functools.cached_property
    def _gate_gradient(self) -> Tensor:
        wide = [tensor.detach().double() for tensor in self._inputs(0)]
        return self._op.gate_gradient(wide, self._gradients[0])

    def _rival(self, provider: str) -> Callable:
        return self._compiled if provider == "compiled" else self._op.RIVALS[provider]

    @functools.cached_property
    def _compiled(self) -> Callable:
        torch.compiler.reset()
        # Compiled graphs otherwise refuse to run their backward twice.
        torch._functorch.config.donated_buffer = False
        return torch.compile(self._op.RIVALS[self._op.COMPILED], fullgraph=True, dynamic=False)
