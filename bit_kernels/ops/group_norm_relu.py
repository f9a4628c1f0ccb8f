"""GroupNorm, then ReLU: max(0, (x - mean) * rstd * weight + bias).

mean and rstd = 1 / sqrt(var + eps) are those of each sample's groups of channels (Wu and He,
arXiv 1803.08494), with the biased variance. N samples, C channels, G groups, * any dimensions.

Memory passes: 2 forward (read x, write y), 3 backward (read x and dy, write dx). Kept for backward:
x, weight, bias and the float32 statistics (N, G); the ReLU's mask is recomputed from x.

Parts that other ops are made of: group_norm_relu_apply is the forward with known statistics (2
passes, nothing read twice), add_group_statistics a sum in place that takes its own statistics as it
passes, and the backward adds another gradient of x, if there is one, to what it writes.

Implementations: csrc/cpu/group_norm_relu.cpp, bit_kernels/triton/group_norm_relu.py,
csrc/cuda/group_norm_relu.cu, bit_kernels/reference.py.
"""

import functools

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops import _cuda
from bit_kernels.ops._layout import empty_output
from bit_kernels.ops._library import (
    REFUSALS,
    apply_node,
    call_kernel,
    gpu_kernels,
    implement,
    library,
)
from bit_kernels.ops._statistics import recall

library.define(
    "group_norm_relu(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, "
    "bool relu) -> (Tensor output, Tensor mean, Tensor rstd)"
)
library.define(
    "group_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, "
    "Tensor? weight, Tensor? bias, bool relu, Tensor? grad_skip=None) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)
library.define(
    "group_norm_relu_apply(Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool relu) -> Tensor output"
)
library.define(
    "add_group_statistics(Tensor(a!) input, Tensor other, int num_groups, float eps) "
    "-> (Tensor mean, Tensor rstd)"
)
_forward_op = torch.ops.bit_kernels.group_norm_relu.default
_backward_op = torch.ops.bit_kernels.group_norm_relu_backward.default
_apply_op = torch.ops.bit_kernels.group_norm_relu_apply.default


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

    Where the statistics of the input are known already (`bit_kernels.norm_relu_conv` with a
    residual takes those of its sum) they are not taken again.

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
        backend: None chooses; "cpp", "triton", "cuda" or "reference" insists.

    Returns:
        (N, C, *), of the input's dtype and layout.

    Deterministic: the same input gives the same bits, whatever the number of threads. Statistics
    and sums are float32 or wider. Double backward runs as plain PyTorch.

    Raises:
        ValueError: an argument's shape, dtype or device is none of these.
    """
    try:
        served_by = choose("group_norm_relu", input, backend)
        if served_by == "reference":
            return reference.group_norm_relu(input, num_groups, weight, bias, eps, relu=relu)
        if torch.compiler.is_compiling():
            return _forward_op(input, num_groups, weight, bias, eps, relu)[0]
        statistics = recall(input, num_groups, eps)
        if not torch.is_grad_enabled():
            return _forward(input, num_groups, weight, bias, eps, relu, statistics, served_by)[0]
        # A node of our own costs less than the dispatcher's path to the same backward.
        return apply_node(
            _GroupNormReLU, input, num_groups, weight, bias, eps, relu, statistics, served_by
        )
    except REFUSALS:
        # Nothing was computed; this says why in the words of this function's arguments.
        _check(input, num_groups, weight, bias)
        raise


def _forward(input, num_groups, weight, bias, eps, relu, statistics, served_by):
    forward, apply, _ = _KERNELS[served_by]
    if statistics is None:
        return forward(input, num_groups, weight, bias, eps, relu)
    mean, rstd = statistics
    return apply(input, mean, rstd, weight, bias, relu), mean, rstd


def _gpu_forward(input, num_groups, weight, bias, eps, relu):
    _check(input, num_groups, weight, bias)
    return gpu_kernels("group_norm_relu").forward(input, num_groups, weight, bias, eps, relu)


def _gpu_apply(input, mean, rstd, weight, bias, relu):
    _check(input, mean.shape[1], weight, bias)
    _check_statistics(input, mean, rstd)
    return gpu_kernels("group_norm_relu").apply(input, mean, rstd, weight, bias, relu)


def _gpu_add(input, other, num_groups, eps):
    _check(input, num_groups, None, None)
    _check_like(input, "other", other)
    return gpu_kernels("group_norm_relu").add(input, other, num_groups, eps)


def _gpu_backward(grad_output, input, mean, rstd, weight, bias, relu, grad_skip=None):
    _check(input, mean.shape[1], weight, bias)
    _check_statistics(input, mean, rstd)
    _check_like(input, "grad_output", grad_output)
    if grad_skip is not None:
        _check_like(input, "grad_skip", grad_skip)
    return gpu_kernels("group_norm_relu").backward(
        grad_output, input, mean, rstd, weight, bias, relu, grad_skip
    )


def _cuda_forward(input, num_groups, weight, bias, eps, relu):
    _check(input, num_groups, weight, bias)
    why_not = _cuda_refusal(input, num_groups, backward=False)
    if why_not is not None:
        raise ValueError(f"backend 'cuda' can't serve bit_kernels.group_norm_relu: {why_not}")
    return _cuda.group_norm_relu(input, num_groups, weight, bias, eps, relu)


def _cuda_backward(grad_output, input, mean, rstd, weight, bias, relu, grad_skip=None):
    arguments = (grad_output, input, mean, rstd, weight, bias, relu, grad_skip)
    if _cuda_refusal(input, mean.shape[1], backward=True) is not None:  # it keeps twice as much
        return _gpu_backward(*arguments)
    return _cuda.group_norm_relu_backward(*arguments)


def _cuda_refusal(input, num_groups, *, backward):
    capability = torch.cuda.get_device_capability(input.device)
    return _cuda.group_norm_relu_refusal(input, num_groups, capability, backward=backward)


# forward, apply and backward of a backend; arguments and results are those of the ops.
_KERNELS = {
    "cpp": (
        functools.partial(call_kernel, _forward_op),
        functools.partial(call_kernel, _apply_op),
        _backward_op,
    ),
    "triton": (_gpu_forward, _gpu_apply, _gpu_backward),
    "cuda": (_cuda_forward, _gpu_apply, _cuda_backward),
}


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


def _check_like(input: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.shape != input.shape or tensor.dtype != input.dtype or tensor.device != input.device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; with this input it "
            f"must be {input.dtype} {tuple(input.shape)} on {input.device}"
        )


def _check_statistics(input: Tensor, mean: Tensor, rstd: Tensor) -> None:
    shape = (input.shape[0], mean.shape[1])
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor.shape != shape or tensor.dtype != torch.float32 or tensor.device != input.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be "
                f"torch.float32 {shape} on {input.device}"
            )


@torch.library.register_fake("bit_kernels::group_norm_relu", lib=library)
def _fake(input, num_groups, weight, bias, eps, relu):
    _check(input, num_groups, weight, bias)
    return empty_output(input), *empty_statistics(input, num_groups)


def empty_statistics(input, num_groups):
    wide = torch.promote_types(input.dtype, torch.float32)
    mean = input.new_empty((input.shape[0], num_groups), dtype=wide)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("bit_kernels::group_norm_relu_backward", lib=library)
def _backward_fake(grad_output, input, mean, rstd, weight, bias, relu, grad_skip=None):
    channels = input.new_empty((input.shape[1],), dtype=mean.dtype)
    return empty_output(input), channels, torch.empty_like(channels)


@torch.library.register_fake("bit_kernels::group_norm_relu_apply", lib=library)
def _apply_fake(input, mean, rstd, weight, bias, relu):
    return empty_output(input)


@torch.library.register_fake("bit_kernels::add_group_statistics", lib=library)
def _add_fake(input, other, num_groups, eps):
    return empty_statistics(input, num_groups)


def _save(ctx, inputs, mean, rstd):
    input, _, weight, bias, eps, relu = inputs
    ctx.save_for_backward(input, weight, bias, mean, rstd)
    ctx.eps, ctx.relu = eps, relu
    ctx.backward_kernel = _backward_op


def _setup_context(ctx, inputs, output):
    _, mean, rstd = output
    _save(ctx, inputs, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_grad_statistics):
    input, weight, bias, mean, rstd = ctx.saved_tensors
    if grad_output is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
        grads = reference.gradients(
            lambda x, w, b: reference.group_norm_relu(
                x, mean.shape[1], w, b, ctx.eps, relu=ctx.relu
            ),
            (input, weight, bias),
            grad_output,
        )
        return _for_inputs(ctx, *grads)
    grad_input, grad_weight, grad_bias = ctx.backward_kernel(
        grad_output, input, mean, rstd, weight, bias, ctx.relu
    )
    needs = ctx.needs_input_grad
    return _for_inputs(
        ctx,
        grad_input if needs[0] else None,
        grad_weight.to(weight.dtype) if needs[2] else None,
        grad_bias.to(bias.dtype) if needs[3] else None,
    )


def _for_inputs(ctx, grad_input, grad_weight, grad_bias):
    rest = (None,) * (len(ctx.needs_input_grad) - 4)
    return grad_input, None, grad_weight, grad_bias, *rest


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output, mean, rstd = _forward(*inputs)
        _save(ctx, inputs[:6], mean, rstd)
        ctx.backward_kernel = _KERNELS[inputs[-1]][2]
        ctx.statistics = mean, rstd  # for a convolution that makes the output again
        return output

    backward = staticmethod(_backward)


torch.library.register_autograd(
    "bit_kernels::group_norm_relu", _backward, setup_context=_setup_context, lib=library
)


# Where no C++ kernel is registered for a device, the op itself still runs; statistics are float32, or
# float64 for float64.


def plain_statistics(input: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd (N, G) of the groups of an input (N, C, *)."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    groups = wide.reshape(input.shape[0], num_groups, -1)
    var, mean = torch.var_mean(groups, 2, correction=0)
    return mean, torch.rsqrt(var + eps)


def plain(input, num_groups, weight, bias, eps, relu):
    output = reference.group_norm_relu(input, num_groups, weight, bias, eps, relu=relu)
    return empty_output(input).copy_(output), *plain_statistics(input, num_groups, eps)


class _Plain:
    """The input normalised with given statistics, and what its gradients are made of."""

    def __init__(self, input, mean, rstd, weight, bias):
        self.wide = torch.promote_types(input.dtype, torch.float32)
        self.mean, self.shape = mean, input.shape
        channels = (1, input.shape[1]) + (1,) * (input.dim() - 2)
        self.rstd = self.expand(rstd)
        self.normal = (input.to(self.wide) - self.expand(mean)) * self.rstd
        self.scale = 1 if weight is None else weight.to(self.wide).reshape(channels)
        self.shift = 0 if bias is None else bias.to(self.wide).reshape(channels)

    def expand(self, statistic):
        width = self.shape[1] // self.mean.shape[1]
        per_channel = statistic.to(self.wide).repeat_interleave(width, dim=1)
        return per_channel.reshape(*self.shape[:2], *(1 for _ in self.shape[2:]))

    def group_mean(self, tensor):
        return self.expand(tensor.reshape(*self.mean.shape, -1).mean(2))


def plain_apply(input, mean, rstd, weight, bias, relu):
    of = _Plain(input, mean, rstd, weight, bias)
    output = of.normal * of.scale + of.shift
    return empty_output(input).copy_(output.relu_() if relu else output)


def plain_add(input, other, num_groups, eps):
    input.add_(other)
    return plain_statistics(input, num_groups, eps)


def plain_backward(grad_output, input, mean, rstd, weight, bias, relu, grad_skip=None):
    of = _Plain(input, mean, rstd, weight, bias)
    grad = grad_output.to(of.wide)
    if relu:
        grad = torch.where(of.normal * of.scale + of.shift <= 0, 0, grad)
    axes = [d for d in range(input.dim()) if d != 1]
    grad_weight, grad_bias = (grad * of.normal).sum(axes), grad.sum(axes)
    grad_normal = grad * of.scale
    grad_input = of.rstd * (
        grad_normal
        - of.group_mean(grad_normal)
        - of.normal * of.group_mean(grad_normal * of.normal)
    )
    if grad_skip is not None:
        grad_input += grad_skip
    return empty_output(input).copy_(grad_input), grad_weight, grad_bias


implement("group_norm_relu", "group_norm_relu", plain, _gpu_forward)
implement("group_norm_relu_apply", "group_norm_relu", plain_apply, _gpu_apply)
implement("add_group_statistics", "group_norm_relu", plain_add, _gpu_add)
implement("group_norm_relu_backward", "group_norm_relu", plain_backward, _gpu_backward)
