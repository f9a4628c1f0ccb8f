"""norm_relu_conv made of other ops' kernels, plain ones or a GPU's, around PyTorch's convolution.

The functions here take the arguments of the ops norm_relu_conv and norm_relu_conv_backward.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bit_kernels.ops import group_norm_relu as normalisation
from bit_kernels.ops import standardize_weight as standardization
from bit_kernels.ops._layout import memory_format
from bit_kernels.ops._library import gpu_kernels

NUMBERS = 9  # of the geometry of one convolution


class Conv(NamedTuple):
    """A 2-d convolution. weight: (C_out, C_in / groups, kh, kw), bias: (C_out,) or None.

    eps: standardize the weight with it first, or None.
    standardized: the standardized weight, where somebody (bit_kernels.optim.SGD) keeps it; what
        arrives in the weight's gradient is then the gradient of the standardized weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float | None = 1e-10
    standardized: Tensor | None = None

    def output_shape(self, input: Tensor) -> tuple[int, ...]:
        sides = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                input.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation
            )
        ]
        return (input.shape[0], self.weight.shape[0], *sides)


def convs_of(
    tensors: Sequence[Tensor], geometry: Sequence[int], weight_eps: Sequence[float]
) -> list[Conv]:
    """The convolutions that an op's conv_tensors, geometry and weight_eps stand for."""
    convs, present = [], iter(tensors)
    for at, eps in enumerate(weight_eps):
        *sides, groups, has_bias, has_standardized = geometry[NUMBERS * at : NUMBERS * (at + 1)]
        convs.append(
            Conv(
                next(present),
                next(present) if has_bias else None,
                *(tuple(sides[i : i + 2]) for i in (0, 2, 4)),
                groups,
                None if eps < 0 else eps,
                next(present) if has_standardized else None,
            )
        )
    return convs


class Parts(NamedTuple):
    """The kernels; arguments and results are those of the ops of these names."""

    group_norm_relu: Callable
    group_norm_relu_apply: Callable
    add_group_statistics: Callable
    group_norm_relu_backward: Callable
    standardize_weight: Callable
    standardize_weight_backward: Callable

    def used_weight(self, conv: Conv, dtype: torch.dtype):
        """The weight to convolve with, and the statistics that made it if that was done here."""
        if conv.standardized is not None:
            return conv.standardized.to(dtype), None, None
        if conv.eps is None:
            return conv.weight.to(dtype), None, None
        return self.standardize_weight(conv.weight, conv.eps, dtype)


PLAIN = Parts(
    normalisation.plain,
    normalisation.plain_apply,
    normalisation.plain_add,
    normalisation.plain_backward,
    standardization.plain,
    standardization.plain_backward,
)
GPU = Parts(
    normalisation._gpu_forward,
    normalisation._gpu_apply,
    normalisation._gpu_add,
    normalisation._gpu_backward,
    standardization._gpu_forward,
    standardization._gpu_backward,
)


def forward(
    parts, input, mean, rstd, residual, weight, bias, conv_tensors, num_groups, eps, relu, geometry,
    weight_eps, next_groups, next_eps,
):  # fmt: skip
    none = list(normalisation.empty_statistics(input, 0))
    if mean is None:
        normal, *statistics = parts.group_norm_relu(input, num_groups, weight, bias, eps, relu)
    else:
        normal = parts.group_norm_relu_apply(input, mean, rstd, weight, bias, relu)
        statistics = none
    outputs = []
    for conv in convs_of(conv_tensors, geometry, weight_eps):
        shift = None if conv.bias is None else conv.bias.to(normal.dtype)
        used, *_ = parts.used_weight(conv, normal.dtype)
        output = torch.conv2d(normal, used, shift, *conv[2:6])
        outputs.append(output.contiguous(memory_format=memory_format(input)))
    if residual is not None and next_groups:
        none = parts.add_group_statistics(outputs[0], residual, next_groups, next_eps)
    elif residual is not None:
        outputs[0].add_(residual)
    return outputs, *statistics, *none


def gpu_forward(
    input, mean, rstd, residual, weight, bias, conv_tensors, num_groups, eps, relu, geometry,
    weight_eps, next_groups, next_eps,
):  # fmt: skip
    """`forward`, or one kernel a convolution where that was measured to be faster."""
    convs = convs_of(conv_tensors, geometry, weight_eps)
    fused = gpu_kernels("norm_relu_conv")
    tiles = fused.choose(input, convs, residual is not None, mean is not None)
    if tiles is None:
        return forward(
            GPU, input, mean, rstd, residual, weight, bias, conv_tensors, num_groups, eps, relu,
            geometry, weight_eps, next_groups, next_eps,
        )  # fmt: skip
    statistics = next_statistics = normalisation.empty_statistics(input, 0)
    if mean is None:
        mean, rstd = statistics = gpu_kernels("group_norm_relu").statistics(input, num_groups, eps)
    else:
        normalisation._check_statistics(input, mean, rstd)
    scaled = fused.coefficients(mean, rstd, weight, input.shape[1])
    next_norm = (next_groups, next_eps) if next_groups else None
    outputs = []
    for conv, tile in zip(convs, tiles, strict=True):
        used, *_ = GPU.used_weight(conv, input.dtype)
        output, *found = fused.convolve(
            input, scaled, bias, relu, used, conv.bias, *conv[2:5], tile, residual, next_norm
        )  # fmt: skip
        outputs.append(output)
        next_statistics = found or next_statistics
        residual = next_norm = None  # the first convolution's alone
    return outputs, *statistics, *next_statistics


def backward(
    parts, grad_outputs, grad_skip, input, mean, rstd, needs, weight, bias, conv_tensors, relu,
    geometry, weight_eps,
):  # fmt: skip
    needs_normal, wanted, todo = any(needs[:3]), iter(needs[3:]), []
    for grad, conv in zip(grad_outputs, convs_of(conv_tensors, geometry, weight_eps), strict=True):
        needs_weight, needs_bias = next(wanted), conv.bias is not None and next(wanted)
        if conv.standardized is not None:
            next(wanted)
        if needs_normal or needs_weight or needs_bias:
            todo.append((grad, conv, needs_weight, needs_bias))
    # For the input's gradient alone a convolution needs its input's shape, not its values.
    normal = input
    if any(needs_weight for _, _, needs_weight, _ in todo):
        normal = parts.group_norm_relu_apply(input, mean, rstd, weight, bias, relu)

    grad_normal, of_convs = None, []
    for grad, conv, needs_weight, needs_bias in todo:
        used, *statistics = parts.used_weight(conv, input.dtype)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, normal, used, [used.shape[0]], *conv[2:5], False, (0, 0), conv.groups,
            (needs_normal, needs_weight, needs_bias),
        )  # fmt: skip
        if needs_normal and grad_normal is None:
            grad_normal = grad_input
        elif needs_normal:
            grad_normal.add_(grad_input)
        if needs_weight:
            if statistics[0] is not None:
                grad_weight = parts.standardize_weight_backward(
                    grad_weight, conv.weight, *statistics
                )
            layout = memory_format(conv.weight)
            of_convs.append(grad_weight.to(conv.weight.dtype).contiguous(memory_format=layout))
        if needs_bias:
            of_convs.append(grad_bias.to(conv.bias.dtype))
    if not needs_normal:
        return of_convs
    del normal  # the activation, before the last allocation
    found = parts.group_norm_relu_backward(
        grad_normal, input, mean, rstd, weight, bias, relu, grad_skip
    )
    likes = (input, weight, bias)
    return [
        grad.to(like.dtype) for grad, like, need in zip(found, likes, needs[:3]) if need
    ] + of_convs
