"""The CUDA C++ kernels as ops of their own: csrc/cuda, where it is built.

What they do that Triton's don't: GroupNorm and ReLU read everything once, because what is normalised
together stays in the shared memory of a cluster of blocks; an optimizer's step takes its tensors from
a table among the kernel's parameters. Arguments and results are those of the ops without `_cuda` in
bit_kernels/ops. None is differentiable: they are what an autograd node calls.

`group_norm_relu_refusal` says beforehand whether a shape can be served.
"""

import torch
from torch import Tensor

from bit_kernels.ops._layout import empty_output, memory_format
from bit_kernels.ops._library import UNCAPTURED, library

library.define(
    "group_norm_relu_cuda(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool relu) -> (Tensor output, Tensor mean, Tensor rstd)"
)
library.define(
    "group_norm_relu_backward_cuda(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool relu, Tensor? grad_skip=None) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
library.define(
    "sgd_cuda(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, "
    "Tensor(c!)[] standardized, float lr, float momentum, float dampening, float weight_decay, "
    "bool nesterov, bool maximize, bool fresh, bool project, float eps) -> ()",
    tags=UNCAPTURED,
)
library.define(
    "sgd_gradient_norm_cuda(Tensor[] weights, Tensor[] grads, float eps) -> Tensor", tags=UNCAPTURED
)

group_norm_relu = torch.ops.bit_kernels.group_norm_relu_cuda.default
group_norm_relu_backward = torch.ops.bit_kernels.group_norm_relu_backward_cuda.default
sgd = torch.ops.bit_kernels.sgd_cuda.default
sgd_gradient_norm = torch.ops.bit_kernels.sgd_gradient_norm_cuda.default


@torch.library.register_fake("bit_kernels::group_norm_relu_cuda", lib=library)
def _forward_fake(input, num_groups, weight, bias, eps, relu):
    mean = input.new_empty((input.shape[0], num_groups), dtype=torch.float32)
    return empty_output(input), mean, torch.empty_like(mean)


@torch.library.register_fake("bit_kernels::group_norm_relu_backward_cuda", lib=library)
def _backward_fake(grad_output, input, mean, rstd, weight, bias, relu, grad_skip=None):
    channels = input.new_empty((input.shape[1],), dtype=torch.float32)
    return empty_output(input), channels, torch.empty_like(channels)


@torch.library.register_fake("bit_kernels::sgd_cuda", lib=library)
def _sgd_fake(weights, grads, momenta, standardized, *options):
    return None


@torch.library.register_fake("bit_kernels::sgd_gradient_norm_cuda", lib=library)
def _norm_fake(weights, grads, eps):
    return weights[0].new_empty((len(weights),), dtype=torch.float32)


# Shared memory that one block may have, in KiB, from NVIDIA's table of compute capabilities.
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99}
_SHARED_KIB |= {(9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227, (12, 0): 99, (12, 1): 99}
_CLUSTER_BLOCKS = 8
_MOST_BLOCKS = 2**31 - 1


def group_norm_relu_refusal(
    input: Tensor, num_groups: int, capability: tuple[int, int], *, backward: bool
) -> str | None:
    """Why the kernels can't serve an input, in words; None if they can.

    Asks for shape, strides and dtype alone: a meta tensor will do. The kernels cut tensors by the
    same rule, csrc/cuda/group_norm_relu_plan.cuh.

    Args:
        input: (N, C, *), floating.
        num_groups: a divisor of C.
        capability: of the GPU, as torch.cuda.get_device_capability gives it.
        backward: of the backward, which keeps twice as much on the chip.
    """
    if capability not in _SHARED_KIB:
        return f"the CUDA kernels are not planned for compute capability {_dotted(capability)}"
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the CUDA kernels take float32, bfloat16 and float16, not {input.dtype}"
    samples, channels = input.shape[:2]
    pixels = input.shape[2:].numel()
    if samples * pixels == 0:
        return None
    if memory_format(input) == torch.contiguous_format and pixels > 1 and channels > 1:
        return "the CUDA kernels take channels_last inputs"
    # The smallest slice: some whole groups, of at least the bytes that memory is read in.
    depth, size = channels // num_groups, input.element_size()
    sizes = [g for g in range(1, num_groups + 1) if num_groups % g == 0]
    sizes = [g for g in sizes if g * depth * size >= 32 or g == num_groups]
    clusters = [1, 2, 4, 8] if capability >= (9, 0) else [1]
    shared = _SHARED_KIB[capability] * 1024
    cuts = [(g, cluster) for g in sizes for cluster in clusters if cluster <= pixels]
    least = min(
        _shared_bytes(pixels, depth, size, g, channels, cluster, backward) for g, cluster in cuts
    )
    if least > shared:
        return (
            f"a slice of {pixels} pixels takes {least >> 10} KiB of shared memory in each of "
            f"{clusters[-1]} block{'s' if clusters[-1] > 1 else ''}; a GPU of compute capability "
            f"{_dotted(capability)} has {shared >> 10}"
        )
    if samples * (num_groups // sizes[0]) * clusters[-1] > _MOST_BLOCKS:
        return f"{samples} samples make more blocks than a grid may have"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _shared_bytes(pixels, depth, size, slice_groups, channels, cluster, backward) -> int:
    """plan_for and shared_bytes of csrc/cuda/group_norm_relu_plan.cuh."""
    sums = 2 if backward else 1
    width = slice_groups * depth
    wide = 16 // size
    vector = wide if width % wide == 0 and channels % wide == 0 else 1
    data = sums * -(-pixels // cluster) * width * size
    threads = 256 if backward or data <= 48 * 1024 else 512
    columns = width // vector
    span = min(columns, threads)
    lanes = threads // span
    partials = lanes // (32 // span) if 32 % span == 0 else lanes
    floats = sums * partials * span * vector + sums * sums * width + 2 * width + 4 * slice_groups
    return -(-data // 16) * 16 + 4 * floats
