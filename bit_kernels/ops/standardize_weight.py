"""Weight standardization: (w - mean) * rstd for each output channel's kernel.

mean and rstd = 1 / sqrt(var + eps) are taken over (C_in, *kernel), with the biased variance and eps
inside the root, as in Big Transfer's release (Qiao et al., arXiv 1903.10520; arXiv 1912.11370).

Memory passes: 2 forward (read w, write the result), 3 backward (read w and the gradient, write
dw). Kept for backward: w and the float32 statistics (C_out,).

Implementations: csrc/cpu/standardize_weight.cpp, bit_kernels/triton/standardize_weight.py,
bit_kernels/reference.py.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bit_kernels import reference
from bit_kernels.backends import choose
from bit_kernels.ops._layout import empty_output
from bit_kernels.ops._library import (
    REFUSALS,
    apply_node,
    call_kernel,
    gpu_kernels,
    implement,
    library,
)

library.define(
    "standardize_weight(Tensor weight, float eps, ScalarType? dtype=None) "
    "-> (Tensor output, Tensor mean, Tensor rstd)"
)
library.define(
    "standardize_weight_backward(Tensor grad_output, Tensor weight, Tensor mean, Tensor rstd) "
    "-> Tensor grad_weight"
)
_forward_op = torch.ops.bit_kernels.standardize_weight.default
_backward_op = torch.ops.bit_kernels.standardize_weight_backward.default


def standardize_weight(
    weight: Tensor | Sequence[Tensor],
    eps: float = 1e-10,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Each output channel's kernel with mean 0 and variance 1.

    >>> w = standardize_weight(torch.randn(64, 3, 7, 7))
    >>> w.mean((1, 2, 3)).abs().max() < 1e-6
    tensor(True)

    Args:
        weight: (C_out, C_in, *kernel), floating, contiguous or channels_last (anything else is
            copied first). Keep it in float32: half types lose small kernels. Or many of them: on a
            GPU those of one dtype take one launch for each length of rows, and so do their gradients.
        eps: added to the variance, inside the root.
        dtype: of the result, the weight's if None; a float32 weight may give a half type.
        backend: None chooses; "cpp", "triton" or "reference" insists.

    Returns:
        The weight's shape and layout; a list for many.

    Deterministic: the same input gives the same bits, whatever the number of threads. Statistics
    are float32 or wider. Double backward runs as plain PyTorch.

    Raises:
        ValueError: the weight's shape or a dtype is none of these.
    """
    if not isinstance(weight, Tensor):
        return _standardize_many(list(weight), eps, dtype, backend)
    try:
        served_by = choose("standardize_weight", weight, backend)
        if served_by == "reference":
            _check_dtype(weight, dtype)
            return reference.standardize_weight(weight, eps, dtype)
        if torch.compiler.is_compiling():
            return _forward_op(weight, eps, dtype)[0]
        if not torch.is_grad_enabled():
            return _KERNELS[served_by][0](weight, eps, dtype)[0]
        # A node of our own costs less than the dispatcher's path to the same backward.
        return apply_node(_StandardizeWeight, weight, eps, dtype, served_by)
    except REFUSALS:
        # Nothing was computed; this says why in the words of this function's arguments.
        _check(weight, dtype)
        raise


def _standardize_many(weights, eps, dtype, backend):
    alike = {(weight.dtype, weight.device) for weight in weights}
    served_by = {choose("standardize_weight", weight, backend) for weight in weights}
    if len(alike) > 1 or served_by != {"triton"} or torch.compiler.is_compiling():
        return [standardize_weight(w, eps, dtype=dtype, backend=backend) for w in weights]
    for weight in weights:
        _check(weight, dtype)
    if not torch.is_grad_enabled():
        return gpu_kernels("standardize_weight").forward_many(weights, eps, dtype)[0]
    return list(apply_node(_StandardizeWeights, eps, dtype, *weights))


def _gpu_forward(weight, eps, dtype=None):
    _check(weight, dtype)
    return gpu_kernels("standardize_weight").forward(weight, eps, dtype)


def _gpu_backward(grad_output, weight, mean, rstd):
    _check(weight)
    rows = (weight.shape[0],)
    for name, tensor, shape in (
        ("grad_output", grad_output, weight.shape),
        ("mean", mean, rows),
        ("rstd", rstd, rows),
    ):
        if tensor.shape != shape or tensor.device != weight.device:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; with this weight it "
                f"must be {tuple(shape)} on {weight.device}"
            )
    return gpu_kernels("standardize_weight").backward(grad_output, weight, mean, rstd)


# forward and backward of a backend; arguments and results are those of the ops.
_KERNELS = {
    "cpp": (functools.partial(call_kernel, _forward_op), _backward_op),
    "triton": (_gpu_forward, _gpu_backward),
}


def _check_dtype(weight: Tensor, dtype: torch.dtype | None) -> None:
    if dtype not in (None, weight.dtype) and not (
        weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"dtype is {dtype}; with a weight of {weight.dtype} it may be None or that"
            + (", or a half type" if weight.dtype == torch.float32 else "")
        )


def _check(weight: Tensor, dtype: torch.dtype | None = None) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}; it may be a floating dtype")
    if weight.dim() < 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be (C_out, C_in, *kernel)"
        )
    _check_dtype(weight, dtype)


@torch.library.register_fake("bit_kernels::standardize_weight", lib=library)
def _fake(weight, eps, dtype=None):
    _check(weight, dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean = weight.new_empty((weight.shape[0],), dtype=wide)
    return empty_output(weight, dtype), mean, torch.empty_like(mean)


@torch.library.register_fake("bit_kernels::standardize_weight_backward", lib=library)
def _backward_fake(grad_output, weight, mean, rstd):
    return empty_output(weight)


def _save(ctx, inputs, mean, rstd):
    weight, eps, _ = inputs
    ctx.save_for_backward(weight, mean, rstd)
    ctx.eps = eps
    ctx.backward_kernel = _backward_op


def _setup_context(ctx, inputs, output):
    _, mean, rstd = output
    _save(ctx, inputs, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, *_grad_statistics):
    weight, mean, rstd = ctx.saved_tensors
    rest = (None,) * (len(ctx.needs_input_grad) - 1)
    if grad_output is None:
        return None, *rest
    if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
        (grad,) = reference.gradients(
            lambda w: reference.standardize_weight(w, ctx.eps, grad_output.dtype),
            (weight,),
            grad_output,
        )
        return grad, *rest
    return ctx.backward_kernel(grad_output, weight, mean, rstd), *rest


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *inputs, served_by = inputs
        forward, backward = _KERNELS[served_by]
        output, mean, rstd = forward(*inputs)
        _save(ctx, inputs, mean, rstd)
        ctx.backward_kernel = backward
        return output

    backward = staticmethod(_backward)


class _StandardizeWeights(torch.autograd.Function):
    """Many weights on a GPU; mean and rstd are of all their rows."""

    @staticmethod
    def forward(ctx, eps, dtype, *weights):
        outputs, mean, rstd = gpu_kernels("standardize_weight").forward_many(weights, eps, dtype)
        ctx.save_for_backward(mean, rstd, *weights)
        ctx.eps, ctx.dtype = eps, dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        mean, rstd, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable

            def outputs(*weights):
                return [reference.standardize_weight(w, ctx.eps, ctx.dtype) for w in weights]

            return None, None, *reference.gradients(outputs, weights, grads)
        kernels = gpu_kernels("standardize_weight")
        return None, None, *kernels.backward_many(grads, weights, mean, rstd)


torch.library.register_autograd(
    "bit_kernels::standardize_weight", _backward, setup_context=_setup_context, lib=library
)


# Where no kernel is registered for a device, the op itself still runs.


def plain(weight, eps, dtype=None):
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    var, mean = torch.var_mean(wide, 1, correction=0)
    output = reference.standardize_weight(weight, eps, dtype)
    return empty_output(weight, dtype).copy_(output), mean, torch.rsqrt(var + eps)


def plain_backward(grad_output, weight, mean, rstd):
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    axes = tuple(range(1, weight.dim()))
    scale = rstd.to(wide).reshape(shape)
    normal = (weight.to(wide) - mean.to(wide).reshape(shape)) * scale
    grad = grad_output.to(wide)
    plain, along = grad.mean(axes, keepdim=True), (grad * normal).mean(axes, keepdim=True)
    return empty_output(weight).copy_(scale * (grad - plain - normal * along))


implement("standardize_weight", "standardize_weight", plain, _gpu_forward)
implement("standardize_weight_backward", "standardize_weight", plain_backward, _gpu_backward)
