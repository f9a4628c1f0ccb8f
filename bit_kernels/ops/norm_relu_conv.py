"""GroupNorm, ReLU and the convolutions that read the result, as one node for backward.

    a = max(0, (x - mean) * rstd * gamma + beta)        group_norm_relu
    y_i = conv(a, w_i) + b_i                            w_i standardized first where it has an eps
    y_0 += residual                                     if there is one

Convolutions are PyTorch's own. Kept for backward: x, float32 statistics and the parameters as they
are; a and the standardized weights are computed again, a once for all convolutions. A convolution
of `None` hands x on, as a residual unit's shortcut, whose gradient is added in the pass that writes
the gradient of x. Statistics that the next GroupNorm needs are taken in passes that are made anyway:
the residual sum, and a convolution by the kernel that does all of a forward.

Memory passes beside the convolutions: forward 2 (read x, write a; x a second time if its statistics
aren't known), the sum 3; backward 2 for a and 3, or 4 with a shortcut (read x, da and dy, write dx).

Implementations: csrc/cpu/norm_relu_conv.cpp and bit_kernels/ops/_composition.py, both made of other
ops' kernels and PyTorch's convolution; bit_kernels/triton/norm_relu_conv.py, where one kernel does
all of a forward; bit_kernels/reference.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops import _composition
from bit_kernels.ops import group_norm_relu as normalisation
from bit_kernels.ops._composition import NUMBERS, Conv, convs_of
from bit_kernels.ops._layout import empty_output, memory_format
from bit_kernels.ops._library import (
    REFUSALS,
    apply_node,
    autocast_dtype,
    call_kernel,
    implement,
    library,
)
from bit_kernels.ops._statistics import recall, remember

# conv_tensors: of each convolution the weight, and the bias and the standardized weight if it has
# them. geometry: stride, padding, dilation (2 numbers each), groups, has a bias, has a standardized
# weight. weight_eps: negative where the weight isn't standardized. Statistics that weren't asked
# for, or were given, or would take a pass of their own, come back empty.
library.define(
    "norm_relu_conv(Tensor input, Tensor? mean, Tensor? rstd, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor[] conv_tensors, int num_groups, float eps, bool relu, int[] geometry, "
    "float[] weight_eps, int next_groups, float next_eps) "
    "-> (Tensor[] outputs, Tensor mean, Tensor rstd, Tensor next_mean, Tensor next_rstd)"
)
# needs: whether a gradient is wanted of input, weight, bias and each of conv_tensors; those come.
library.define(
    "norm_relu_conv_backward(Tensor[] grad_outputs, Tensor? grad_skip, Tensor input, Tensor mean, "
    "Tensor rstd, int[] needs, Tensor? weight, Tensor? bias, Tensor[] conv_tensors, bool relu, "
    "int[] geometry, float[] weight_eps) -> Tensor[]"
)
_forward_op = torch.ops.bit_kernels.norm_relu_conv.default
_backward_op = torch.ops.bit_kernels.norm_relu_conv_backward.default


class Norm(NamedTuple):
    """A GroupNorm and its ReLU. weight, bias: (C,) or None."""

    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    relu: bool = True


def norm_relu_conv(
    input: Tensor,
    norm: Norm,
    convs: Sequence[Conv | None],
    *,
    residual: Tensor | None = None,
    next_norm: tuple[int, float] | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """The convolutions of F.relu(F.group_norm(input, ...)), without keeping that for backward.

    >>> x = torch.randn(2, 64, 14, 14)
    >>> w = torch.randn(128, 64, 3, 3)
    >>> (y,) = norm_relu_conv(x, Norm(32), [Conv(w, padding=(1, 1))])
    >>> y.shape
    torch.Size([2, 128, 14, 14])

    Args:
        input: (N, C, H, W), floating; contiguous and channels_last are used as they lie.
        norm: num_groups must divide C.
        convs: what reads the normalised input; None stands for the input itself.
        residual: (N, C_out, H', W'), added to the first convolution's result.
        next_norm: groups and eps of the GroupNorm that reads the first result, behind the residual:
            where its statistics can be had on the way, in the sum or in a fused convolution,
            group_norm_relu and this function find them. Changes no result.
        backend: None chooses; "cpp", "triton" or "reference" insists.

    Returns:
        A tensor for each of `convs`, (N, C_out, H', W') as F.conv2d gives it. Under autocast they
        and the normalised input have its dtype, statistics are float32.

    Deterministic where PyTorch's convolution is. Double backward runs as plain PyTorch, except with
    `standardized` weights.

    Raises:
        ValueError: an argument's shape, dtype or device is none of these.
    """
    _check_use(convs, residual, next_norm)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    try:
        served_by = choose("norm_relu_conv", input, backend)
        compiling = torch.compiler.is_compiling()
        if served_by == "reference" and (
            backend == "reference" or compiling or torch._C._are_functorch_transforms_active()
        ):
            return reference.norm_relu_conv(input, norm, convs, residual)
        return _run(input, norm, convs, residual, next_norm, compiling, served_by)
    except REFUSALS:
        # Nothing was computed; this says why in the words of this function's arguments.
        _check(input, norm, convs, residual, next_norm)
        raise


def _run(input, norm, convs, residual, next_norm, compiling, served_by):
    num_groups, weight, bias, eps, relu = norm
    tensors, geometry, weight_eps, shortcut = [], [], [], None
    for at, conv in enumerate(convs):
        if conv is None:
            shortcut = at
            continue
        kernel, shift, stride, padding, dilation, groups, kernel_eps, standardized = conv
        tensors.append(kernel)
        if shift is not None:
            tensors.append(shift)
        if standardized is not None:
            tensors.append(standardized.detach())  # its gradient is the weight's
        geometry += (
            *stride, *padding, *dilation, groups, shift is not None, standardized is not None
        )  # fmt: skip
        weight_eps.append(-1.0 if kernel_eps is None else kernel_eps)
    if compiling:  # a graph has nowhere to keep statistics
        next_norm = None
    rest = (num_groups, eps, relu, geometry, weight_eps, *(next_norm or (0, 0.0)))
    statistics = (None, None)
    if not compiling:
        statistics = recall(input, num_groups, eps) or statistics
    if compiling:
        outputs, *_ = _forward_op(input, None, None, residual, weight, bias, tensors, *rest)
    elif torch.is_grad_enabled():
        next_statistics = []
        outputs = apply_node(
            _NormReLUConv, input, residual, weight, bias, statistics, rest, served_by, shortcut,
            next_statistics, *tensors,
        )  # fmt: skip
        outputs = list(outputs)
    else:
        outputs, _, _, *next_statistics = _KERNELS[served_by].forward(
            input, *statistics, residual, weight, bias, tensors, *rest
        )
    if shortcut is not None and (compiling or not torch.is_grad_enabled()):
        outputs = [*outputs[:shortcut], input, *outputs[shortcut:]]
    if next_norm is not None and next_statistics[0].numel():
        remember(outputs[0], *next_norm, *next_statistics)
    return outputs


def _check_use(convs, residual, next_norm):
    shortcuts = sum(conv is None for conv in convs)
    if shortcuts > 1 or shortcuts == len(convs):
        raise ValueError(
            f"convs holds {shortcuts} None among {len(convs)}; it must hold at least one Conv and "
            "at most one None"
        )
    if residual is not None and convs[0] is None:
        raise ValueError("residual is added to the first of convs, which is None")
    if next_norm is not None and convs[0] is None:
        raise ValueError(f"next_norm is {next_norm}, of the first of convs, which is None")
    if next_norm is not None:
        _check_next_norm(convs[0].weight.shape[0], next_norm)


def _check_next_norm(channels, next_norm):
    if next_norm[0] <= 0 or channels % next_norm[0] != 0:
        raise ValueError(
            f"next_norm has {next_norm[0]} groups; it must divide the first result's {channels} "
            "channels"
        )


def _check(input, norm, convs, residual, next_norm):
    normalisation._check(input, norm.num_groups, norm.weight, norm.bias)
    if input.dim() != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}; it must be (N, C, H, W)")
    for at, conv in enumerate(convs):
        if conv is not None:
            _check_conv(f"convs[{at}]", input, conv)
    if convs[0] is None:
        return
    shape = convs[0].output_shape(input)
    if next_norm is not None:
        _check_next_norm(shape[1], next_norm)
    if residual is not None and (
        tuple(residual.shape) != shape
        or residual.device != input.device
        or residual.dtype != input.dtype
    ):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and is {residual.dtype} on "
            f"{residual.device}; with this input and convolution it must be {shape}, "
            f"{input.dtype} on {input.device}"
        )


def _check_conv(name, input, conv):
    weight, channels = conv.weight, input.shape[1]
    if weight.dim() != 4 or weight.shape[1] * conv.groups != channels:
        raise ValueError(
            f"{name}.weight has shape {tuple(weight.shape)}; with {channels} channels in "
            f"{conv.groups} groups it must be (C_out, {channels // conv.groups}, kh, kw)"
        )
    wide_enough = weight.dtype == input.dtype or weight.dtype == torch.float32
    if weight.device != input.device or not wide_enough or not weight.is_floating_point():
        raise ValueError(
            f"{name}.weight is {weight.dtype} on {weight.device}; with an input of {input.dtype} on "
            f"{input.device} it may be that, or float32 beside a half type"
        )
    if conv.bias is not None and conv.bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}.bias has shape {tuple(conv.bias.shape)}; it must be ({weight.shape[0]},)"
        )
    if min(conv.output_shape(input)[2:]) <= 0:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; with padding {conv.padding} it is smaller than "
            f"the kernel of {name}, {tuple(weight.shape[2:])} with dilation {conv.dilation}"
        )


class _NormReLUConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, residual, weight, bias, statistics, rest, served_by, shortcut,
        next_statistics, *tensors,
    ):  # fmt: skip
        kernels = _KERNELS[served_by]
        outputs, *found = kernels.forward(
            input, *statistics, residual, weight, bias, tensors, *rest
        )
        mean, rstd = found[:2] if statistics[0] is None else statistics
        next_statistics += found[2:]
        ctx.save_for_backward(input, mean, rstd, weight, bias, *tensors)
        ctx.rest, ctx.backward_kernel, ctx.shortcut = rest, kernels.backward, shortcut
        ctx.set_materialize_grads(False)
        if shortcut is not None:
            outputs.insert(shortcut, input)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        input, mean, rstd, weight, bias, *tensors = ctx.saved_tensors
        grads = list(grads)
        grad_skip = None if ctx.shortcut is None else grads.pop(ctx.shortcut)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4], *ctx.needs_input_grad[9:])
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            found = _differentiable_gradients(
                grads, grad_skip, input, weight, bias, tensors, *ctx.rest[:5]
            )
        else:
            found = _gradients(
                ctx.backward_kernel, grads, grad_skip, input, mean, rstd, needs, weight, bias,
                tensors, *ctx.rest[2:5],
            )  # fmt: skip
        of_residual = grads[0] if ctx.needs_input_grad[1] else None
        return found[0], of_residual, found[1], found[2], *(None,) * 5, *found[3:]


def _gradients(
    kernel, grads, grad_skip, input, mean, rstd, needs, weight, bias, tensors, relu, geometry,
    weight_eps,
):  # fmt: skip
    """The gradients of input, weight, bias and each of `tensors`, None where not needed."""
    if any(grad is None for grad in grads):
        return _gradients_of_some(
            kernel, grads, grad_skip, input, mean, rstd, needs, weight, bias, tensors, relu,
            geometry, weight_eps,
        )  # fmt: skip
    found = iter(
        kernel(
            grads, grad_skip, input, mean, rstd, needs, weight, bias, tensors, relu, geometry,
            weight_eps,
        )
    )  # fmt: skip
    return [next(found) if need else None for need in needs]


def _gradients_of_some(
    kernel, grads, grad_skip, input, mean, rstd, needs, weight, bias, tensors, relu, geometry,
    weight_eps,
):  # fmt: skip
    """`_gradients` where no gradient came back to some convolutions."""
    kept, some, numbers, some_eps, at = [], [], [], [], 0
    for conv, grad in enumerate(grads):
        of_conv = geometry[NUMBERS * conv : NUMBERS * (conv + 1)]
        count = 1 + of_conv[7] + of_conv[8]
        if grad is not None:
            kept += range(at, at + count)
            some.append(grad)
            numbers += of_conv
            some_eps.append(weight_eps[conv])
        at += count
    found = [None] * len(needs)
    if not some:
        found[0] = grad_skip if needs[0] else None
        return found
    results = _gradients(
        kernel, some, grad_skip, input, mean, rstd, (*needs[:3], *(needs[3 + i] for i in kept)),
        weight, bias, [tensors[i] for i in kept], relu, numbers, some_eps,
    )  # fmt: skip
    for i, grad in zip((0, 1, 2, *(3 + i for i in kept)), results, strict=True):
        found[i] = grad
    return found


def _differentiable_gradients(
    grads, grad_skip, input, weight, bias, tensors, num_groups, eps, relu, geometry, weight_eps
):
    if any(geometry[8::NUMBERS]):
        raise RuntimeError(
            "norm_relu_conv: there is no double backward while an optimizer keeps the standardized "
            "weights; call the optimizer's release() first"
        )
    given = [at for at, grad in enumerate(grads) if grad is not None]

    def outputs(input, weight, bias, *tensors):
        convs = convs_of(tensors, geometry, weight_eps)
        results = reference.norm_relu_conv(input, Norm(num_groups, weight, bias, eps, relu), convs)
        return [results[at] for at in given] + ([] if grad_skip is None else [input * 1])

    came = [grads[at] for at in given] + ([] if grad_skip is None else [grad_skip])
    return reference.gradients(outputs, (input, weight, bias, *tensors), came)


# ---- the op for a compiler


@torch.library.register_fake("bit_kernels::norm_relu_conv", lib=library)
def _fake(
    input, mean, rstd, residual, weight, bias, conv_tensors, num_groups, eps, relu, geometry,
    weight_eps, next_groups, next_eps,
):  # fmt: skip
    convs = convs_of(conv_tensors, geometry, weight_eps)
    next_norm = (next_groups, next_eps) if next_groups else None
    _check(input, Norm(num_groups, weight, bias), convs, residual, next_norm)
    layout = memory_format(input)
    outputs = [
        input.new_empty(conv.output_shape(input)).contiguous(memory_format=layout) for conv in convs
    ]
    none = normalisation.empty_statistics(input, 0)
    return (
        outputs,
        *(none if mean is not None else normalisation.empty_statistics(input, num_groups)),
        *normalisation.empty_statistics(input, 0 if residual is None else next_groups),
    )


@torch.library.register_fake("bit_kernels::norm_relu_conv_backward", lib=library)
def _backward_fake(
    grad_outputs, grad_skip, input, mean, rstd, needs, weight, bias, conv_tensors, relu, geometry,
    weight_eps,
):  # fmt: skip
    tensors = (input, weight, bias, *conv_tensors)
    return [empty_output(like) for like, want in zip(tensors, needs, strict=True) if want]


def _setup_context(ctx, inputs, output):
    input, mean, rstd, _residual, weight, bias, conv_tensors, *rest = inputs
    if mean is None:
        mean, rstd = output[1:3]
    ctx.save_for_backward(input, mean, rstd, weight, bias, *conv_tensors)
    ctx.rest = rest
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_outputs, *_grad_statistics):
    input, mean, rstd, weight, bias, *tensors = ctx.saved_tensors
    of_input, _, _, of_residual, of_weight, of_bias, of_tensors, *_ = ctx.needs_input_grad
    needs = (of_input, of_weight, of_bias, *of_tensors)
    if torch.is_grad_enabled():
        found = _differentiable_gradients(
            grad_outputs, None, input, weight, bias, tensors, *ctx.rest[:5]
        )
    else:
        found = _gradients(
            _backward_op, grad_outputs, None, input, mean, rstd, needs, weight, bias, tensors,
            *ctx.rest[2:5],
        )  # fmt: skip
    residual = grad_outputs[0] if of_residual else None
    return found[0], None, None, residual, found[1], found[2], found[3:], *(None,) * 7


torch.library.register_autograd(
    "bit_kernels::norm_relu_conv", _backward, setup_context=_setup_context, lib=library
)


# forward and backward of a backend; arguments and results are those of the ops.


class _Kernels(NamedTuple):
    forward: Callable
    backward: Callable


def _gpu_forward(*arguments):
    input, _, _, residual, weight, bias, tensors, num_groups, *_, next_groups, next_eps = arguments
    convs = convs_of(tensors, *arguments[10:12])
    next_norm = (next_groups, next_eps) if next_groups else None
    _check(input, Norm(num_groups, weight, bias), convs, residual, next_norm)
    return _composition.gpu_forward(*arguments)


_PLAIN = _Kernels(
    functools.partial(_composition.forward, _composition.PLAIN),
    functools.partial(_composition.backward, _composition.PLAIN),
)
_GPU = _Kernels(_gpu_forward, functools.partial(_composition.backward, _composition.GPU))
_KERNELS = {
    "cpp": _Kernels(functools.partial(call_kernel, _forward_op), _backward_op),
    "triton": _GPU,
    "reference": _PLAIN,
}

implement("norm_relu_conv", "norm_relu_conv", _PLAIN.forward, _GPU.forward)
implement("norm_relu_conv_backward", "norm_relu_conv", _PLAIN.backward, _GPU.backward)
