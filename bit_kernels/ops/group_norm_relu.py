"""GroupNorm, then ReLU: max(0, (x - mean) * rstd * weight + bias).

mean and rstd = 1 / sqrt(var + eps) are those of each sample's groups of channels (Wu and He,
arXiv 1803.08494), with the biased variance. N samples, C channels, G groups, * any dimensions.

Memory passes: 2 forward (read x, write y), 3 backward (read x and dy, write dx). Kept for backward:
x, weight, bias and the float32 statistics (N, G); the ReLU's mask is recomputed from x.

Implementations: csrc/cpu/group_norm_relu.cpp, bit_kernels/reference.py.
"""

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops._layout import empty_output
from bit_kernels.ops._library import REFUSALS, apply_node, call_kernel, library

library.define(
    "group_norm_relu(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool relu) -> (Tensor output, Tensor mean, Tensor rstd)"
)
library.define(
    "group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool relu) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
_forward_op = torch.ops.bit_kernels.group_norm_relu.default
_backward_op = torch.ops.bit_kernels.group_norm_relu_backward.default


def group_norm_relu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """F.relu(F.group_norm(input, num_groups, weight, bias, eps)) in one pass over memory.

    >>> x = torch.randn(8, 64, 56, 56).to(memory_format=torch.channels_last)
    >>> y = group_norm_relu(x, 32, torch.ones(64), torch.zeros(64))
    >>> y.shape, y.is_contiguous(memory_format=torch.channels_last)
    (torch.Size([8, 64, 56, 56]), True)

    Args:
        input: (N, C, *), floating, possibly without elements; contiguous and channels_last are used
            as they lie, anything else is copied first.
        num_groups: G, a divisor of C.
        weight, bias: (C,), of the input's dtype, or float32 with a bfloat16 or float16 input.
        eps: added to the variance.
        relu: False gives the normalisation alone.
        backend: None chooses; "cpp" or "reference" insists.

    Returns:
        (N, C, *), of the input's dtype and layout.

    Deterministic: the same input gives the same bits, whatever the number of threads. Statistics
    and sums are float32 or wider. Double backward runs as plain PyTorch.

    Raises:
        ValueError: an argument's shape, dtype or device is none of these.
    """
    try:
        if choose("group_norm_relu", input, backend) == "reference":
            return reference.group_norm_relu(input, num_groups, weight, bias, eps, relu=relu)
        if torch.compiler.is_compiling():
            return _forward_op(input, num_groups, weight, bias, eps, relu)[0]
        if not torch.is_grad_enabled():
            return call_kernel(_forward_op, input, num_groups, weight, bias, eps, relu)[0]
        # A node of our own costs less than the dispatcher's path to the same backward.
        return apply_node(_GroupNormReLU, input, num_groups, weight, bias, eps, relu)
    except REFUSALS:
        # Nothing was computed; this says why in the words of this function's arguments.
        _check(input, num_groups, weight, bias)
        raise


def _check(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    if not input.is_floating_point():
        raise ValueError(f"input has dtype {input.dtype}; it may be a floating dtype")
    if input.dim() < 2:
        raise ValueError(f"input has shape {tuple(input.shape)}; it must be (N, C, *)")
    channels = input.shape[1]
    if num_groups <= 0 or channels == 0 or channels % num_groups != 0:
        raise ValueError(
            f"num_groups is {num_groups}; it must divide the input's {channels} channels"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with this input it must be ({channels},)"
            )
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, the input on {input.device}")
        if tensor.dtype != input.dtype and not (
            tensor.dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        ):
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; with an input of {input.dtype} it may be that, "
                "or float32 beside a half type"
            )


@torch.library.register_fake("bit_kernels::group_norm_relu", lib=library)
def _fake(input, num_groups, weight, bias, eps, relu):
    _check(input, num_groups, weight, bias)
    statistics = input.new_empty((input.shape[0], num_groups), dtype=torch.float32)
    return empty_output(input), statistics, torch.empty_like(statistics)


@torch.library.register_fake("bit_kernels::group_norm_relu_backward", lib=library)
def _backward_fake(grad_output, input, mean, rstd, weight, bias, relu):
    channels = input.new_empty((input.shape[1],), dtype=torch.float32)
    return empty_output(input), channels, torch.empty_like(channels)


def _save(ctx, inputs, mean, rstd):
    input, _, weight, bias, eps, relu = inputs
    ctx.save_for_backward(input, weight, bias, mean, rstd)
    ctx.eps, ctx.relu = eps, relu


def _setup_context(ctx, inputs, output):
    _, mean, rstd = output
    _save(ctx, inputs, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_grad_statistics):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if grad_output is None:
        return None, None, None, None, None, None
    if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
        grads = reference.gradients(
            lambda x, w, b: reference.group_norm_relu(
                x, mean.shape[1], w, b, ctx.eps, relu=ctx.relu
            ),
            (input, weight, bias),
            grad_output,
        )
        return grads[0], None, grads[1], grads[2], None, None
    grad_input, grad_weight, grad_bias = _backward_op(
        grad_output, input, mean, rstd, weight, bias, ctx.relu
    )
    needs = ctx.needs_input_grad
    return (
        grad_input if needs[0] else None,
        None,
        grad_weight.to(weight.dtype) if needs[2] else None,
        grad_bias.to(bias.dtype) if needs[3] else None,
        None,
        None,
    )


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output, mean, rstd = call_kernel(_forward_op, *inputs)
        _save(ctx, inputs, mean, rstd)
        return output

    backward = staticmethod(_backward)


torch.library.register_autograd(
    "bit_kernels::group_norm_relu", _backward, setup_context=_setup_context, lib=library
)


# Where no kernel is registered for a device, the op itself still runs.


def _plain(input, num_groups, weight, bias, eps, relu):
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    groups = wide.reshape(input.shape[0], num_groups, -1)
    var, mean = torch.var_mean(groups, 2, correction=0)
    output = reference.group_norm_relu(input, num_groups, weight, bias, eps, relu=relu)
    return (
        empty_output(input).copy_(output),
        mean.to(torch.float32),
        torch.rsqrt(var + eps).to(torch.float32),
    )


def _plain_backward(grad_output, input, mean, rstd, weight, bias, relu):
    channels = input.shape[1]
    wide = torch.promote_types(input.dtype, torch.float32)
    shape = (1, channels) + (1,) * (input.dim() - 2)

    def expand(statistic):
        per_channel = statistic.to(wide).repeat_interleave(channels // mean.shape[1], dim=1)
        return per_channel.reshape(input.shape[0], *shape[1:])

    scale = 1 if weight is None else weight.to(wide).reshape(shape)
    shift = 0 if bias is None else bias.to(wide).reshape(shape)
    centred = input.to(wide) - expand(mean)
    normal = centred * expand(rstd)
    grad = grad_output.to(wide)
    if relu:
        grad = torch.where(normal * scale + shift <= 0, 0, grad)
    axes = [d for d in range(input.dim()) if d != 1]
    grad_weight, grad_bias = (grad * normal).sum(axes), grad.sum(axes)
    grad_normal = grad * scale

    def group_mean(tensor):
        return expand(tensor.reshape(input.shape[0], mean.shape[1], -1).mean(2))

    grad_input = expand(rstd) * (
        grad_normal - group_mean(grad_normal) - normal * group_mean(grad_normal * normal)
    )
    return (
        empty_output(input).copy_(grad_input),
        grad_weight.to(torch.float32),
        grad_bias.to(torch.float32),
    )


library.impl("group_norm_relu", _plain, "CompositeExplicitAutograd")
library.impl("group_norm_relu_backward", _plain_backward, "CompositeExplicitAutograd")
