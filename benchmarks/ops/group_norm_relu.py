"""group_norm_relu: what is compared. Nothing here takes time; see benchmarks/ops/__init__.py."""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import LAYOUTS, OpCase, on_backends
from benchmarks.runner import Absent
from benchmarks.shapes import distinct, network_shapes
from bit_kernels import functional, reference

GROUPS, EPS = 32, 1e-5
R50X1 = tuple((8, *shape) for shape in distinct(network_shapes().norm_inputs))
SHAPES = {
    "r50x1": R50X1,  # every GroupNorm's input, 8 images of 224 px
    "batch1": tuple((1, *shape[1:]) for shape in R50X1),  # N x groups is smallest
    "tiny": ((1, 32, 4, 4), (4, 64, 8, 8)),  # the cost of a call
}
QUICK = {(8, 256, 56, 56), (8, 1024, 14, 14), (1, 64, 56, 56), (1, 32, 4, 4)}
CASES = [
    OpCase(why, shape, layout, direction, quick=shape in QUICK)
    for why, shapes in SHAPES.items()
    for shape, layout, direction in itertools.product(shapes, LAYOUTS, ("forward", "backward"))
]
GPU_BATCHES = (32, 128, 8, 1)
GPU_QUICK = {(8, 256, 56, 56), (8, 1024, 14, 14), (1, 64, 56, 56), (1, 32, 4, 4)}
GPU_CASES = [
    OpCase(
        "r50x1" if batch > 1 else "batch1",
        (batch, *shape[1:]),
        layout,
        direction,
        quick=(batch, *shape[1:]) in GPU_QUICK,
    )
    for layout, batch, shape, direction in itertools.product(
        reversed(LAYOUTS), GPU_BATCHES, R50X1, ("forward", "backward")
    )
] + [case for case in CASES if case.why == "tiny"]


def ours(input: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    return functional.group_norm_relu(input, GROUPS, weight, bias, backend=backend)


def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.group_norm(input, GROUPS, weight, bias))


def plain(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.group_norm_relu(input, GROUPS, weight, bias)


def liger(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Liger-Kernel's GroupNorm, which takes contiguous tensors and has no activation."""
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError as error:
        raise Absent(f"Liger-Kernel is not installed ({error})") from None
    rows = input.contiguous().flatten(2)
    rows = LigerGroupNormFunction.apply(rows, weight, bias, input.shape[1], GROUPS, EPS)
    return F.relu(rows.reshape(input.shape))


def apex(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """apex's GroupNorm, whose kernels are for some shapes in channels_last."""
    if not input.is_contiguous(memory_format=torch.channels_last):
        raise Absent("apex's GroupNorm has no kernel for NCHW")
    module = _apex_module(input.shape[1])
    parameters = {"weight": weight, "bias": bias}
    return F.relu(torch.func.functional_call(module, parameters, (input,)))


@functools.cache
def _apex_module(channels: int) -> torch.nn.Module:
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError as error:
        raise Absent(f"apex's GroupNorm is not installed ({error})") from None
    return GroupNorm(GROUPS, channels, eps=EPS)


RIVALS = {"bit_kernels": ours, "eager": eager}
GPU_RIVALS = on_backends("group_norm_relu", ours) | {"eager": eager, "liger": liger, "apex": apex}
BASELINES = ("eager",)
REFERENCE = plain
COMPILED = "eager"


def make_inputs(case: OpCase, generator: torch.Generator) -> dict[str, Tensor]:
    channels = case.shape[1]
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    return {
        "input": normal(case.shape) * 2 + 0.5,
        "weight": normal(channels) * 0.2 + 1,
        "bias": normal(channels) * 0.2,
    }


def gate_gradient(inputs: list[Tensor], gradient: Tensor) -> Tensor:
    """Zero where the ReLU's argument is so near 0 that its sign is a matter of rounding."""
    before_relu = F.group_norm(inputs[0], GROUPS, *inputs[1:])
    return gradient.masked_fill(before_relu.abs() < 1e-4, 0)


def passes(case: OpCase, itemsize: int, threads: int, l2_bytes: int | None) -> int:
    """Forward reads x and writes y; backward reads x and dy and writes dx.

    What is normalised together is read a second time from memory if it can't stay in one core's
    L2. In NCHW that is a group, which always can here; in channels_last it is a sample, or a
    thread's part of it where there are fewer samples than threads. A GPU keeps part after part in
    its L2 or on chip: there nothing need be read twice (l2_bytes is None).
    """
    samples, *rest = case.shape
    part = itemsize * math.prod(rest) / max(1, threads // samples)
    again = case.layout == "channels_last" and l2_bytes is not None and part > l2_bytes
    return {"forward": 3 if again else 2, "backward": 5 if again else 3}[case.direction]
