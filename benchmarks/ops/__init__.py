"""The suite `ops`: each op of bit_kernels against PyTorch, forward and backward.

`benchmarks/ops/<op>.py` declares and never times. It has:
  CASES        list of OpCase
  RIVALS       name -> function of the inputs that gives the output; the first is ours
  BASELINES    the names among RIVALS that are eager PyTorch, the plainest first
  COMPILED     name of the rival that `--compile` also runs through torch.compile
  REFERENCE    the op in plain PyTorch, run in float64
  make_inputs  (case, generator) -> name -> float32 tensor. The first is the large one: it takes
               the case's layout and rotates. The others are parameters, shared by all copies.
  gate_gradient  (inputs, gradient) -> the gradient with which the gate compares backward
  passes       (case, itemsize, threads, l2_bytes) -> times that a tensor of the large input's
               size must be read or written
  GPU_CASES, GPU_RIVALS   likewise on a GPU, the most important case first; a rival raises
               runner.Absent where it isn't installed or can't serve the call

Optimizers have neither forward nor backward: `benchmarks/ops/sgd.py` declares its cases whole.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import cuda, machine
from benchmarks.ops import sgd
from benchmarks.runner import Absent, Case
from bit_kernels.backends import choose

OPS = ("group_norm_relu", "standardize_weight")
GPU_OPS = ("group_norm_relu", "norm_relu_conv", "standardize_weight")
GPU_BACKENDS = ("triton", "cuda")
CUDA_DTYPES = ("bfloat16", "float32", "float16")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ROTATED_BYTES = 128 << 20  # of inputs, and about as many of outputs: 4 times a 32 MiB cache each
MAX_COPIES = 4096  # 64 MiB of the smallest kernel in R50x1
MAX_GPU_COPIES = 1024  # nodes of a graph, each with an output of its own
CACHED_COPIES = 64  # of inputs so small that MAX_COPIES of them would still lie in a cache


@dataclass(frozen=True)
class OpCase:
    """why: the reason that the shape is here ("r50x1", "batch1", "tiny", ...); shape: of the large
    input; layout: a key of LAYOUTS; direction: "forward" or "backward"; quick: in `--quick` too;
    kernel: (C_out, C_in, kH, kW) of the op's convolution, if it has one.
    """

    why: str
    shape: tuple[int, ...]
    layout: str
    direction: str
    quick: bool = False
    kernel: tuple[int, ...] | None = None

    @property
    def size(self) -> str:
        """The shapes as part of a name, for instance "8x64x56x56" or "8x64x56x56-256x64x1x1"."""
        return "-".join("x".join(map(str, s)) for s in (self.shape, self.kernel) if s)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Convolutions here keep the map's size."""
        samples, channels, *rest = self.shape
        return (samples, self.kernel[0] if self.kernel else channels, *rest)


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """All cases of the suite; `compiled` adds torch.compile's rival, `quick` leaves the few."""
    if device == "cuda":
        return _gpu_cases(dtypes, quick, compiled)
    return [
        _case(declaration, case, dtype, count, compiled)
        for declaration in map(_declaration, OPS)
        for case in declaration.CASES
        for dtype in dtypes
        for count in threads
        if case.quick or not quick
    ] + sgd.cases(threads=threads, dtypes=dtypes, quick=quick, compiled=compiled)


def _gpu_cases(dtypes: list[str], quick: bool, compiled: bool) -> list[Case]:
    """Op after op in turns, each in its own order, so that a run cut short has some of each."""
    lists = [
        [
            _case(declaration, case, dtype, 1, compiled, "cuda")
            for dtype in dtypes
            for case in declaration.GPU_CASES
            if case.quick or not quick
        ]
        for declaration in map(_declaration, GPU_OPS)
    ]
    lists.append(sgd.gpu_cases(dtypes=dtypes, quick=quick))
    turns = itertools.zip_longest(*lists)
    return [case for turn in turns for case in turn if case is not None]


def _declaration(op: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.ops.{op}")


def _case(
    op: ModuleType, case: OpCase, dtype: str, threads: int, compiled: bool, device: str = "cpu"
) -> Case:
    name = op.__name__.rpartition(".")[2]
    itemsize = DTYPES[dtype].itemsize
    passes = op.passes(case, itemsize, threads, machine.cache_bytes(2) if device == "cpu" else None)
    nbytes = math.prod(case.shape) * itemsize
    rivals = op.RIVALS if device == "cpu" else op.GPU_RIVALS
    past_cache = passes and copies_past_cache(case, nbytes, device)
    return Case(
        suite="ops",
        name=f"{name}/{case.why}/{case.size}/{case.layout}/{case.direction}",
        dtype=dtype,
        threads=threads,
        providers=(*rivals, "compiled") if compiled else tuple(rivals),
        baselines=op.BASELINES,
        prepare=functools.partial(OpWorkload, op, case, DTYPES[dtype], device),
        passes=passes,
        necessary_bytes=passes * nbytes if past_cache else None,
        device=device,
        # What a call costs the host is what "tiny" is about.
        capture=device != "cpu" and case.why != "tiny",
    )


def copies_past_cache(case: OpCase, nbytes: int, device: str = "cpu") -> int | None:
    """Copies of the inputs that together exceed the caches, at least 2; None if that's too many.

    nbytes: of the large input; backward's inputs are as many bytes of gradient again.
    """
    each = nbytes * (2 if case.direction == "backward" else 1)
    most = MAX_COPIES if device == "cpu" else MAX_GPU_COPIES
    wanted = ROTATED_BYTES if device == "cpu" else cuda.rotated_bytes()
    least = ROTATED_BYTES // 2 if device == "cpu" else 3 * cuda.l2_bytes()
    copies = min(most, max(2, math.ceil(wanted / each)))
    return copies if copies * each >= least else None


def on_backends(op: str, ours: Callable) -> dict[str, Callable]:
    """ours(*inputs, backend=...) on each backend of a GPU, Absent where it can't serve the op."""

    def rival(backend: str, *inputs: Tensor):
        serve(op, inputs[0], backend)
        try:
            return ours(*inputs, backend=backend)
        except ValueError as error:  # the op itself refuses some shapes and layouts
            if f"backend {backend!r} can't serve" not in str(error):
                raise
            raise Absent(str(error)) from None

    return {backend: functools.partial(rival, backend) for backend in GPU_BACKENDS}


def serve(op: str, input: Tensor, backend: str) -> None:
    """Raises Absent where `backend` can't serve `op` on `input`."""
    try:
        choose(op, input, backend)
    except ValueError as error:
        raise Absent(str(error)) from None


class OpWorkload:
    """One op's inputs in many copies; see benchmarks.runner.Workload."""

    def __init__(self, op: ModuleType, case: OpCase, dtype: torch.dtype, device: str = "cpu"):
        self._op, self._case = op, case
        self._rivals = op.RIVALS if device == "cpu" else op.GPU_RIVALS
        generator = torch.Generator(device).manual_seed(0)
        inputs = op.make_inputs(case, generator)
        self._names = tuple(inputs)
        large, *parameters = (tensor.to(dtype) for tensor in inputs.values())
        self._layout = LAYOUTS[case.layout]
        large = large.contiguous(memory_format=self._layout)
        self._parameters = [tensor.requires_grad_() for tensor in parameters]
        copies = copies_past_cache(case, large.nbytes, device) or CACHED_COPIES
        self._large = [large.clone().requires_grad_() for _ in range(copies)]
        backward = case.direction == "backward"
        gradient = self._gradient_of(large, generator)
        self._gradients = [gradient, *(gradient.clone() for _ in range(backward * (copies - 1)))]

    def _gradient_of(self, large: Tensor, generator: torch.Generator) -> Tensor:
        """Random, with strides as the input's, which is what the next layer's backward gives."""
        shape = self._case.output_shape
        gradient = torch.randn(shape, generator=generator, device=generator.device)
        if shape == self._case.shape:
            return torch.empty_like(large).copy_(gradient)
        return gradient.to(large.dtype).contiguous(memory_format=self._layout)

    def reference(self) -> dict[str, Tensor]:
        inputs = [
            tensor.detach().double().contiguous().requires_grad_() for tensor in self._inputs(0)
        ]
        return self._outputs(self._op.REFERENCE, inputs)

    def outputs(self, provider: str) -> dict[str, Tensor]:
        with cuda.without_tf32():  # whose rounding would hide what is a rival's own
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
        return self._compiled if provider == "compiled" else self._rivals[provider]

    @functools.cached_property
    def _compiled(self) -> Callable:
        torch.compiler.reset()
        # Compiled graphs otherwise refuse to run their backward twice.
        torch._functorch.config.donated_buffer = False
        return torch.compile(self._rivals[self._op.COMPILED], fullgraph=True, dynamic=False)
