"""GroupNorm, ReLU and the convolutions that read the result, as one node for backward.

    a = max(0, (x - mean) * rstd * gamma + beta)        group_norm_relu
    y_i = conv(a, w_i) + b_i                            w_i standardized first where it has an eps
    y_0 += residual                                     if there is one

Convolutions are PyTorch's own. Kept for backward: x, float32 statistics and the parameters as they
are; a and the standardized weights are computed again, a once for all convolutions. A convolution
of `None` hands x on, as a residual unit's shortcut, whose gradient is added in the pass that writes
the gradient of x. The residual sum takes the statistics that the next GroupNorm needs in the pass
that it makes anyway.

Memory passes beside the convolutions: forward 2 (read x, write a; x a second time if its statistics
aren't known), the sum 3; backward 2 for a and 3, or 4 with a shortcut (read x, da and dy, write dx).

Implementations: the kernels of group_norm_relu and standardize_weight, and PyTorch's convolution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops import group_norm_relu as normalisation
from bit_kernels.ops import standardize_weight as standardization
from bit_kernels.ops._layout import empty_output, memory_format
from bit_kernels.ops._library import apply_node, autocast_dtype, library
from bit_kernels.ops._statistics import recall, remember


class Norm(NamedTuple):
    """A GroupNorm and its ReLU. weight, bias: (C,) or None."""

    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    relu: bool = True


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
        next_norm: groups and eps of the GroupNorm that reads the sum: its statistics are taken with
            the sum, and found by group_norm_relu and this function. Needs a residual.
        backend: None chooses; "cpp" or "reference" insists.

    Returns:
        A tensor for each of `convs`, (N, C_out, H', W') as F.conv2d gives it. Under autocast they
        and the normalised input have its dtype, statistics are float32.

    Deterministic where PyTorch's convolution is. Double backward runs as plain PyTorch, except with
    `standardized` weights.

    Raises:
        ValueError: an argument's shape, dtype or device is none of these.
    """
    _check(input, norm, convs, residual, next_norm)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    served_by = choose("norm_relu_conv", input, backend)
    transformed = torch._C._are_functorch_transforms_active()
    if backend == "reference" or (transformed and not torch.compiler.is_compiling()):
        return reference.norm_relu_conv(input, norm, convs, residual)
    spec = _Spec(
        norm.num_groups,
        norm.eps,
        norm.relu,
        tuple(None if c is None else (*c[2:6], c.eps) for c in convs),
        next_norm,
        served_by == "cpp",
    )
    tensors = [norm.weight, norm.bias, residual]
    for conv in convs:
        tensors += (None, None, None) if conv is None else (conv.weight, conv.bias, conv[7])
    if torch.compiler.is_compiling():
        return _compiled(input, spec, tensors, convs)
    statistics = recall(input, norm.num_groups, norm.eps)
    if torch.is_grad_enabled():
        outputs = apply_node(_NormReLUConv, input, spec, statistics, *tensors)
        sums = spec.sums  # left there by the forward
    else:
        outputs, _, _, sums = _forward(input, spec, statistics, tensors)
    if next_norm is not None:
        remember(outputs[0], *next_norm, *sums)
    return list(outputs)


def _check(input, norm, convs, residual, next_norm):
    normalisation._check(input, norm.num_groups, norm.weight, norm.bias)
    if input.dim() != 4:
        raise ValueError(f"input has shape {tuple(input.shape)}; it must be (N, C, H, W)")
    if all(conv is None for conv in convs) or list(convs).count(None) > 1:
        raise ValueError(
            f"convs holds {list(convs).count(None)} None among {len(convs)}; it must hold at least "
            "one Conv and at most one None"
        )
    for at, conv in enumerate(convs):
        if conv is not None:
            _check_conv(f"convs[{at}]", input, conv)
    if residual is not None and convs[0] is None:
        raise ValueError("residual is added to the first of convs, which is None")
    if residual is None:
        if next_norm is not None:
            raise ValueError(f"next_norm is {next_norm}; without a residual it must be None")
        return
    shape = _output_shape(input, convs[0])
    if tuple(residual.shape) != shape or residual.device != input.device:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} on {residual.device}; with this input and "
            f"convolution it must be {shape} on {input.device}"
        )
    if next_norm is not None and (next_norm[0] <= 0 or shape[1] % next_norm[0] != 0):
        raise ValueError(
            f"next_norm has {next_norm[0]} groups; it must divide the sum's {shape[1]} channels"
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
    if min(_output_shape(input, conv)[2:]) <= 0:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; with padding {conv.padding} it is smaller than "
            f"the kernel of {name}, {tuple(weight.shape[2:])} with dilation {conv.dilation}"
        )


def _output_shape(input: Tensor, conv: Conv) -> tuple[int, ...]:
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            input.shape[2:], conv.weight.shape[2:], conv.stride, conv.padding, conv.dilation
        )
    ]
    return (input.shape[0], conv.weight.shape[0], *sides)


class _Spec:
    """What isn't a tensor. convs: (stride, padding, dilation, groups, eps) or None of each."""

    __slots__ = ("convs", "eps", "native", "next_norm", "num_groups", "relu", "sums")

    def __init__(self, num_groups, eps, relu, convs, next_norm, native):
        self.num_groups, self.eps, self.relu, self.convs = num_groups, eps, relu, convs
        self.next_norm, self.native, self.sums = next_norm, native, None


class _Kernels:
    normalize = normalisation._forward_op
    apply = normalisation._apply_op
    add = normalisation._add_op
    normalize_backward = normalisation._backward_op
    standardize = standardization._forward_op
    standardize_backward = standardization._backward_op


class _Plain:
    normalize = staticmethod(normalisation.plain)
    apply = staticmethod(normalisation.plain_apply)
    add = staticmethod(normalisation.plain_add)
    normalize_backward = staticmethod(normalisation.plain_backward)
    standardize = staticmethod(standardization.plain)
    standardize_backward = staticmethod(standardization.plain_backward)


def _forward(input, spec, statistics, tensors):
    """(outputs, mean, rstd, statistics of the sum or None)."""
    with torch._C._AutoDispatchBelowAutograd():
        ops = _Kernels if spec.native else _Plain
        gamma, beta, residual = tensors[:3]
        if statistics is None:
            normal, mean, rstd = ops.normalize(
                input, spec.num_groups, gamma, beta, spec.eps, spec.relu
            )
        else:
            mean, rstd = statistics
            normal = ops.apply(input, mean, rstd, gamma, beta, spec.relu)
        outputs = []
        for at, conv in enumerate(spec.convs):
            if conv is None:
                outputs.append(input)
                continue
            weight, bias, kept = tensors[3 + 3 * at : 6 + 3 * at]
            stride, padding, dilation, groups, eps = conv
            used = _used_weight(ops, weight, kept, eps, normal.dtype)[0]
            if bias is not None:
                bias = bias.to(normal.dtype)
            outputs.append(
                torch.convolution(
                    normal, used, bias, stride, padding, dilation, False, (0, 0), groups
                )
            )
        if residual is None:
            return outputs, mean, rstd, None
        if spec.next_norm is None:
            outputs[0].add_(residual)
            return outputs, mean, rstd, None
        return outputs, mean, rstd, ops.add(outputs[0], residual, *spec.next_norm)


def _used_weight(ops, weight, kept, eps, dtype):
    """The weight that is convolved with, and the statistics that made it if that was done here."""
    if kept is not None:
        return kept.to(dtype), None, None
    if eps is None:
        return weight.to(dtype), None, None
    return ops.standardize(weight, eps, None if weight.dtype == dtype else dtype)


def _backward(spec, grads, needs, input, mean, rstd, tensors):
    """The gradients of (input, gamma, beta, residual, weight, bias, None, weight, ...).

    grads: those of the outputs, or None. needs: which of the above are wanted.
    """
    ops = _Kernels if spec.native else _Plain
    gamma, beta, _ = tensors[:3]
    found = [None] * len(needs)
    needs_normal = any(needs[:3])
    used_at = [at for at, conv in enumerate(spec.convs) if conv and grads[at] is not None]
    # For the input's gradient alone a convolution needs its input's shape, not its values.
    normal = input
    if any(needs[4 + 3 * at] for at in used_at):
        normal = ops.apply(input, mean, rstd, gamma, beta, spec.relu)
    grad_normal = None
    for at in used_at:
        slot = 4 + 3 * at
        if not (needs_normal or needs[slot] or needs[slot + 1]):
            continue
        weight, _, kept = tensors[slot - 1 : slot + 2]
        stride, padding, dilation, groups, eps = spec.convs[at]
        used, *statistics = _used_weight(ops, weight, kept, eps, input.dtype)
        grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grads[at], normal, used, [weight.shape[0]], stride, padding, dilation, False, (0, 0),
            groups, (needs_normal, needs[slot], needs[slot + 1]),
        )  # fmt: skip
        if needs_normal:
            grad_normal = grad if grad_normal is None else grad_normal.add_(grad)
        if needs[slot] and statistics[0] is not None:
            grad_weight = ops.standardize_backward(grad_weight, weight, *statistics)
        if needs[slot]:
            found[slot] = grad_weight.to(weight.dtype)
        if needs[slot + 1]:
            found[slot + 1] = grad_bias
    del normal
    skip = grads[spec.convs.index(None)] if None in spec.convs else None
    if grad_normal is not None:
        found[:3] = ops.normalize_backward(
            grad_normal, input, mean, rstd, gamma, beta, spec.relu, skip
        )
    elif needs[0]:
        found[0] = skip
    for at, parameter in ((1, gamma), (2, beta)):
        found[at] = found[at].to(parameter.dtype) if needs[at] and found[at] is not None else None
    found[3] = grads[0] if needs[3] else None
    return found


class _NormReLUConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, spec, statistics, *tensors):
        outputs, mean, rstd, spec.sums = _forward(input, spec, statistics, tensors)
        gamma, beta, _, *of_convs = tensors
        ctx.spec = spec
        ctx.save_for_backward(input, mean, rstd, gamma, beta, *of_convs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        input, mean, rstd, gamma, beta, *of_convs = ctx.saved_tensors
        tensors = (gamma, beta, None, *of_convs)
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            found = _differentiable_gradients(ctx.spec, grads, input, tensors)
        else:
            needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
            found = _backward(ctx.spec, grads, needs, input, mean, rstd, tensors)
        return found[0], None, None, *found[1:]


def _differentiable_gradients(spec, grads, input, tensors):
    gamma, beta, _, *of_convs = tensors
    if any(kept is not None for kept in of_convs[2::3]):
        raise RuntimeError(
            "norm_relu_conv: there is no double backward while an optimizer keeps the standardized "
            "weights; call the optimizer's release() first"
        )
    given = [at for at, grad in enumerate(grads) if grad is not None]

    def outputs(input, gamma, beta, *of_convs):
        norm = Norm(spec.num_groups, gamma, beta, spec.eps, spec.relu)
        convs = _convs(spec.convs, of_convs)
        results = reference.norm_relu_conv(input, norm, convs)
        return [results[at] for at in given]

    found = reference.gradients(
        outputs, (input, gamma, beta, *of_convs), [grads[at] for at in given]
    )
    return [*found[:3], grads[0], *found[3:]]


def _convs(specs, of_convs):
    """The Convs (or None) whose tensors `of_convs` are: weight, bias, standardized of each."""
    return [
        None if conv is None else Conv(weight, bias, *conv, kept)
        for conv, weight, bias, kept in zip(
            specs, of_convs[0::3], of_convs[1::3], of_convs[2::3], strict=True
        )
    ]


# ---- what a compiler sees: one op, which takes its statistics itself

# conv_tensors: of each convolution the weight, and the bias and the standardized weight if it has
# them. geometry: stride, padding, dilation (2 numbers each), groups, has a bias, has a standardized
# weight. weight_eps: negative where the weight isn't standardized.
_ARGUMENTS = (
    "Tensor? weight, Tensor? bias, Tensor[] conv_tensors, int num_groups, float eps, "
    "bool relu, int[] geometry, float[] weight_eps"
)
_NUMBERS = 9
library.define(
    f"norm_relu_conv(Tensor input, Tensor? residual, {_ARGUMENTS}) "
    "-> (Tensor[] outputs, Tensor mean, Tensor rstd)"
)
library.define(
    "norm_relu_conv_backward(Tensor?[] grad_outputs, Tensor input, Tensor mean, Tensor rstd, "
    f"bool[] needs, {_ARGUMENTS}) -> Tensor[]"
)


def _compiled(input, spec, tensors, convs):
    gamma, beta, residual, *_ = tensors
    present = [conv for conv in convs if conv is not None]
    geometry = []
    for conv in present:
        geometry += [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
        geometry += [int(conv.bias is not None), int(conv.standardized is not None)]
    outputs = torch.ops.bit_kernels.norm_relu_conv(
        input,
        residual,
        gamma,
        beta,
        [t for c in present for t in (c.weight, c.bias, c.standardized) if t is not None],
        spec.num_groups,
        spec.eps,
        spec.relu,
        geometry,
        [-1.0 if conv.eps is None else conv.eps for conv in present],
    )[0]
    outputs = iter(outputs)
    return [input if conv is None else next(outputs) for conv in convs]


def _parse(input, conv_tensors, num_groups, eps, relu, geometry, weight_eps):
    """The _Spec, and weight, bias, standardized (or None) of each convolution."""
    convs, of_convs, present = [], [], iter(conv_tensors)
    for at, of_weight in enumerate(weight_eps):
        *sides, groups, has_bias, has_standardized = geometry[_NUMBERS * at : _NUMBERS * (at + 1)]
        stride, padding, dilation = (tuple(sides[i : i + 2]) for i in (0, 2, 4))
        convs.append((stride, padding, dilation, groups, None if of_weight < 0 else of_weight))
        of_convs.append(next(present))
        of_convs += [next(present) if has else None for has in (has_bias, has_standardized)]
    native = choose("norm_relu_conv", input) == "cpp"
    return _Spec(num_groups, eps, relu, tuple(convs), None, native), of_convs


def _op(input, residual, weight, bias, conv_tensors, *rest):
    spec, of_convs = _parse(input, conv_tensors, *rest)
    outputs, mean, rstd, _ = _forward(input, spec, None, (weight, bias, residual, *of_convs))
    layout = memory_format(input)
    return [output.contiguous(memory_format=layout) for output in outputs], mean, rstd


def _op_backward(grad_outputs, input, mean, rstd, needs, weight, bias, conv_tensors, *rest):
    spec, of_convs = _parse(input, conv_tensors, *rest)
    # One entry a tensor, here and in the answer; the residual's gradient is one that came in, which
    # an op can't hand on.
    wanted = iter(needs[3:])
    of_convs_wanted = [next(wanted) if tensor is not None else False for tensor in of_convs]
    found = _backward(
        spec,
        grad_outputs,
        [*needs[:3], False, *of_convs_wanted],
        input,
        mean,
        rstd,
        (weight, bias, None, *of_convs),
    )
    results = []
    for like, grad, want in zip(
        (input, weight, bias, *of_convs), (*found[:3], *found[4:]), (*needs[:3], *of_convs_wanted)
    ):
        if want:
            grad = torch.zeros_like(like) if grad is None else grad.to(like.dtype)
            results.append(grad.contiguous(memory_format=memory_format(like)))
    return results


@torch.library.register_fake("bit_kernels::norm_relu_conv", lib=library)
def _fake(input, residual, weight, bias, conv_tensors, *rest):
    spec, of_convs = _parse(input, conv_tensors, *rest)
    convs = _convs(spec.convs, of_convs)
    _check(input, Norm(spec.num_groups, weight, bias), convs, residual, None)
    layout = memory_format(input)
    outputs = [
        input.new_empty(_output_shape(input, conv)).contiguous(memory_format=layout)
        for conv in convs
    ]
    return outputs, *normalisation._empty_statistics(input, spec.num_groups)


@torch.library.register_fake("bit_kernels::norm_relu_conv_backward", lib=library)
def _backward_fake(grad_outputs, input, mean, rstd, needs, weight, bias, conv_tensors, *rest):
    tensors = (input, weight, bias, *conv_tensors)
    return [empty_output(like) for like, want in zip(tensors, needs, strict=True) if want]


def _setup_context(ctx, inputs, output):
    input, _residual, weight, bias, conv_tensors, *ctx.rest = inputs
    _, mean, rstd = output
    ctx.save_for_backward(input, mean, rstd, weight, bias, *conv_tensors)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _op_autograd(ctx, grad_outputs, *_grad_statistics):
    input, mean, rstd, weight, bias, *conv_tensors = ctx.saved_tensors
    of_input, of_residual, of_weight, of_bias, of_convs, *_ = ctx.needs_input_grad
    needs = [of_input, of_weight, of_bias, *of_convs]
    results = iter(
        torch.ops.bit_kernels.norm_relu_conv_backward(
            grad_outputs, input, mean, rstd, needs, weight, bias, conv_tensors, *ctx.rest
        )
    )
    of_input, of_weight, of_bias, *of_convs = (next(results) if need else None for need in needs)
    residual = grad_outputs[0] if of_residual else None
    return of_input, residual, of_weight, of_bias, of_convs, None, None, None, None, None


torch.library.register_autograd(
    "bit_kernels::norm_relu_conv", _op_autograd, setup_context=_setup_context, lib=library
)
library.impl("norm_relu_conv", _op, "CompositeExplicitAutograd")
library.impl("norm_relu_conv_backward", _op_backward, "CompositeExplicitAutograd")
