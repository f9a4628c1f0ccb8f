"""standardize_weight: what is compared. Nothing here takes time; see benchmarks/ops/__init__.py."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import LAYOUTS, OpCase, on_backends
from benchmarks.shapes import distinct, network_shapes
from bit_kernels import functional, reference

EPS = 1e-10
SHAPES = {
    "r50x1": distinct(network_shapes().kernels),  # every kernel of the network
    "tiny": ((8, 4, 1, 1), (16, 8, 3, 3)),  # the cost of a call
}
QUICK = {(512, 512, 3, 3), (2048, 1024, 1, 1), (16, 8, 3, 3)}
CASES = [
    OpCase(why, shape, layout, direction, quick=shape in QUICK)
    for why, shapes in SHAPES.items()
    for shape, layout, direction in itertools.product(shapes, LAYOUTS, ("forward", "backward"))
    # A 1x1 kernel lies in memory alike in both layouts.
    if layout == "NCHW" or shape[2:] != (1, 1)
]
# The largest first; autograd's and the optimizer's own ops do all of a network at once.
GPU_CASES = sorted(CASES, key=lambda case: (case.layout == "NCHW", -math.prod(case.shape)))


def ours(weight: Tensor, *, backend: str | None = None) -> Tensor:
    return functional.standardize_weight(weight, EPS, backend=backend)


def eager_var_mean(weight: Tensor) -> Tensor:
    var, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(var + EPS)


def eager_batch_norm(weight: Tensor) -> Tensor:
    """timm's StdConv2d: batch_norm in training mode over rows, each output channel a channel."""
    rows = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=EPS).reshape_as(weight)


def plain(weight: Tensor) -> Tensor:
    return reference.standardize_weight(weight, EPS)


RIVALS = {
    "bit_kernels": ours,
    "eager_var_mean": eager_var_mean,
    "eager_batch_norm": eager_batch_norm,
}
GPU_RIVALS = on_backends("standardize_weight", ours) | {
    "eager_var_mean": eager_var_mean,
    "eager_batch_norm": eager_batch_norm,
}
BASELINES = ("eager_var_mean", "eager_batch_norm")
REFERENCE = plain
COMPILED = "eager_var_mean"


def make_inputs(case: OpCase, generator: torch.Generator) -> dict[str, Tensor]:
    fan_in = math.prod(case.shape[1:])
    random = torch.randn(case.shape, generator=generator, device=generator.device)
    return {"weight": random * fan_in**-0.5 + 0.01}


def gate_gradient(inputs: list[Tensor], gradient: Tensor) -> Tensor:
    return gradient


def passes(case: OpCase, itemsize: int, threads: int, l2_bytes: int | None) -> int:
    """Forward reads w and writes its standardized form; backward reads w and dy and writes dw.

    An output channel (at most 74 kB in R152x4) always stays in a core's cache between two reads.
    """
    return {"forward": 2, "backward": 3}[case.direction]
