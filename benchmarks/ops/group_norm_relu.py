"""group_norm_relu: what is compared. Nothing here takes time; see benchmarks/ops/__init__.py."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import LAYOUTS, OpCase
from benchmarks.shapes import distinct, network_shapes
from bit_kernels import functional, reference

GROUPS = 32
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


def ours(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.group_norm_relu(input, GROUPS, weight, bias)


def eager(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.group_norm(input, GROUPS, weight, bias))


def plain(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.group_norm_relu(input, GROUPS, weight, bias)


RIVALS = {"bit_kernels": ours, "eager": eager}
BASELINES = ("eager",)
REFERENCE = plain
COMPILED = "eager"


def make_inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    channels = shape[1]
    return {
        "input": torch.randn(shape, generator=generator) * 2 + 0.5,
        "weight": torch.randn(channels, generator=generator) * 0.2 + 1,
        "bias": torch.randn(channels, generator=generator) * 0.2,
    }


def gate_gradient(inputs: list[Tensor], gradient: Tensor) -> Tensor:
    """Zero where the ReLU's argument is so near 0 that its sign is a matter of rounding."""
    before_relu = F.group_norm(inputs[0], GROUPS, *inputs[1:])
    return gradient.masked_fill(before_relu.abs() < 1e-4, 0)


def passes(case: OpCase, itemsize: int, threads: int, l2_bytes: int | None) -> int:
    """Forward reads x and writes y; backward reads x and dy and writes dx.

    What is normalised together is read a second time from memory if it can't stay in one core's
    L2. In NCHW that is a group, which always can here; in channels_last it is a sample, or a
    thread's part of it where there are fewer samples than threads.
    """
    samples, *rest = case.shape
    part = itemsize * math.prod(rest) / max(1, threads // samples)
    again = case.layout == "channels_last" and l2_bytes is not None and part > l2_bytes
    return {"forward": 3 if again else 2, "backward": 5 if again else 3}[case.direction]
