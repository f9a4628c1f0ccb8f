"""norm_relu_conv: what is compared, on GPUs. Nothing here takes time; see benchmarks/ops/__init__.py.

Each convolution of R50x1 that keeps its map's size, with the GroupNorm and ReLU before it and the
standardization of its weight. Two rivals are the op in pieces: PyTorch's own, and ours before
PyTorch's convolution, which is what one kernel for all of it must be faster than.
"""

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cuda
from benchmarks.ops import (
    LAYOUTS,
    OpCase,
    group_norm_relu,
    on_backends,
    serve,
    standardize_weight,
)
from benchmarks.shapes import network_shapes
from bit_kernels import functional, reference

GROUPS, EPS, WEIGHT_EPS = group_norm_relu.GROUPS, group_norm_relu.EPS, standardize_weight.EPS
GPU_BATCHES = (32, 128, 8)
QUICK = {(64, 64, 56, 56), (2048, 512, 7, 7)}  # C_out, C, H, W


def _pairs() -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """(C, H, W) of a norm's input and the kernel of what reads it, each once."""
    norms, kernels = network_shapes().norm_inputs, network_shapes().kernels[1:]
    # A projection reads what the first convolution of its unit reads, and comes before it.
    own = [
        k for k, after in zip(kernels, (*kernels[1:], None)) if after is None or not _both(k, after)
    ]
    return tuple(
        dict.fromkeys(
            (norm, kernel)
            for norm, kernel, after in zip(norms, own, norms[1:], strict=False)
            if after[1:] == norm[1:]
        )
    )


def _both(kernel: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return kernel[1:] == after[1:] and kernel[2:] == (1, 1)


GPU_CASES = [
    OpCase(
        "r50x1",
        (batch, *norm),
        layout,
        direction,
        quick=batch == 8 and (kernel[0], *norm) in QUICK,
        kernel=kernel,
    )
    for layout, batch, (norm, kernel), direction in itertools.product(
        reversed(LAYOUTS), GPU_BATCHES, _pairs(), ("forward", "backward")
    )
]


def ours(
    input: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, *, backend: str | None = None
) -> Tensor:
    norm = functional.Norm(GROUPS, weight, bias, EPS)
    conv = functional.Conv(kernel, padding=_padding(kernel), eps=WEIGHT_EPS)
    (output,) = functional.norm_relu_conv(input, norm, [conv], backend=backend)
    return output


def pieces(input: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
    """Our GroupNorm and standardization, and PyTorch's convolution, as three nodes."""
    serve("group_norm_relu", input, "triton")
    activated = functional.group_norm_relu(input, GROUPS, weight, bias, EPS, backend="triton")
    standardized = functional.standardize_weight(kernel, WEIGHT_EPS, backend="triton")
    return F.conv2d(activated, standardized, padding=_padding(kernel))


def eager(input: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
    activated = F.relu(F.group_norm(input, GROUPS, weight, bias, EPS))
    if input.is_contiguous(memory_format=torch.channels_last):
        # CUDA's GroupNorm gives a contiguous output, which would be convolved by other algorithms.
        activated = activated.contiguous(memory_format=torch.channels_last)
    standardized = standardize_weight.eager_var_mean(kernel)
    return F.conv2d(activated, standardized, padding=_padding(kernel))


def plain(input: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> Tensor:
    norm = functional.Norm(GROUPS, weight, bias, EPS)
    conv = functional.Conv(kernel, padding=_padding(kernel), eps=WEIGHT_EPS)
    with cuda.untuned():
        return reference.norm_relu_conv(input, norm, [conv])[0]


def _padding(kernel: Tensor) -> tuple[int, int]:
    return kernel.shape[2] // 2, kernel.shape[3] // 2


RIVALS = {"bit_kernels": ours, "eager": eager}
GPU_RIVALS = on_backends("norm_relu_conv", ours) | {"pieces": pieces, "eager": eager}
BASELINES = ("eager",)
REFERENCE = plain
COMPILED = "eager"


def make_inputs(case: OpCase, generator: torch.Generator) -> dict[str, Tensor]:
    """Gains of about 0.1 and shifts of 1 or -1 leave no value so near to 0 that its sign, and with
    it a gradient that passes the ReLU, is a matter of rounding.
    """
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    channels = case.shape[1]
    return {
        "input": normal(case.shape) * 2 + 0.5,
        "weight": normal(channels) * 0.01 + 0.1,
        "bias": normal(channels).sign(),
        "kernel": normal(case.kernel) * math.prod(case.kernel[1:]) ** -0.5 + 0.01,
    }


def gate_gradient(inputs: list[Tensor], gradient: Tensor) -> Tensor:
    return gradient


def passes(case: OpCase, itemsize: int, threads: int, l2_bytes: int | None) -> None:
    """Most of these are bound by arithmetic as much as by memory: `pieces` is what tells."""
    return None
