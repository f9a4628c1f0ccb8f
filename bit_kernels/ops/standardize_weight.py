"""Weight standardization: (w - mean) * rstd for each output channel's kernel.

mean and rstd = 1 / sqrt(var + eps) are taken over (C_in, *kernel), with the biased variance and eps
inside the root, as in Big Transfer's release (Qiao et al., arXiv 1903.10520; arXiv 1912.11370).

Memory passes: 2 forward (read w, write the result), 3 backward (read w and the gradient, write
dw). Kept for backward: w and the float32 statistics (C_out,).

All weights of a network given at once are one autograd node, and on a GPU one launch for each length of
rows.

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
    >>> a, b = standardize_weight([torch.randn(64, 3, 7, 7), torch.randn(64, 64, 1, 1)])

    Args:
        weight: (C_out, C_in, *kernel), floating, contiguous or channels_last (anything else is
            copied first). Keep it in float32: half types lose small kernels. Or a sequence of such
            weights, all of one dtype and on one device: on a GPU one launch then does many.
        eps: added to the variance, inside the root.
        dtype: of the result, the weight's if None; a float32 weight may give a half type.
        backend: None chooses; "cpp", "triton" or "reference" insists.

    Returns:
        The weight's shape and layout; for a sequence a list, of the bits that each alone gives.

    Deterministic: the same input gives the same bits, whatever the number of threads. Statistics
    are float32 or wider. Double backward runs as plain PyTorch.

    Raises:
        ValueError: the weight's shape or a dtype is none of these.
    """
    if not isinstance(weight, Tensor):
        return _many(list(weight), eps, dtype, backend)
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


def _many(weights: list[Tensor], eps, dtype, backend) -> list[Tensor]:
    if not weights:
        return []
    for weight in weights:
        _check(weight, dtype)
        if weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise ValueError(
                f"weight has {weight.dtype} on {weight.device} beside {weights[0].dtype} on "
                f"{weights[0].device}; all may be of one dtype and on one device"
            )
    served_by = choose("standardize_weight", weights[0], backend)
    if served_by != "triton" or torch.compiler.is_compiling():
        return [standardize_weight(w, eps, dtype=dtype, backend=backend) for w in weights]
    if not torch.is_grad_enabled():
        return gpu_kernels("standardize_weight").forward_many(weights, eps, dtype)[0]
    return list(apply_node(_StandardizeWeights, eps, dtype, *weights))


def _gpu_forward(weight, eps, dtype=None):
    _check(weight, dtype)
    return gpu_kernels("standardize_weight").forward(weight, eps, dtype)


def _gpu_backward(grad_output, weight, mean, rstd):
    _check_backward(grad_output, weight, mean, rstd)
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


def _check_backward(grad_output: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _check(weight)
    if grad_output.shape != weight.shape or grad_output.device != weight.device:
        raise ValueError(
            f"grad_output is {tuple(grad_output.shape)} on {grad_output.device}; with this weight it "
            f"must be {tuple(weight.shape)} on {weight.device}"
        )
    if grad_output.dtype != weight.dtype and not (
        weight.dtype == torch.float32 and grad_output.dtype in (torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"grad_output has dtype {grad_output.dtype}; with a weight of {weight.dtype} it may be "
            "that, or a half type beside float32"
        )
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        fits = tensor.dtype == torch.float32 and tensor.is_contiguous()
        if tensor.shape != weight.shape[:1] or tensor.device != weight.device or not fits:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; it must be "
                f"torch.float32 ({weight.shape[0]},) on {weight.device}, contiguous"
            )


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
    weight, eps = inputs[:2]
    ctx.save_for_backward(weight, mean, rstd)
    ctx.eps, ctx.backward_kernel = eps, _backward_op


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
        return _differentiable_gradient(weight, ctx.eps, grad_output), *rest
    return ctx.backward_kernel(grad_output, weight, mean, rstd), *rest


def _differentiable_gradient(weight, eps, grad_output):
    (grad,) = reference.gradients(
        lambda w: reference.standardize_weight(w, eps, grad_output.dtype), (weight,), grad_output
    )
    return grad


class _StandardizeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        forward, backward = _KERNELS[inputs[-1]]
        output, mean, rstd = forward(*inputs[:3])
        _save(ctx, inputs, mean, rstd)
        ctx.backward_kernel = backward
        return output

    backward = staticmethod(_backward)


class _StandardizeWeights(torch.autograd.Function):
    """Of many weights, on a GPU."""

    @staticmethod
    def forward(ctx, eps, dtype, *weights):
        kernels = gpu_kernels("standardize_weight")
        outputs, mean, rstd = kernels.forward_many(weights, eps, dtype)
        ctx.save_for_backward(mean, rstd, *weights)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        mean, rstd, *weights = ctx.saved_tensors
        grads = [None] * len(weights)
        wanted = [
            i
            for i, grad in enumerate(grad_outputs)
            if grad is not None and ctx.needs_input_grad[2 + i]
        ]
        if torch.is_grad_enabled():  # create_graph: the gradient must itself be differentiable
            for i in wanted:
                grads[i] = _differentiable_gradient(weights[i], ctx.eps, grad_outputs[i])
        elif wanted:
            backward_many = gpu_kernels("standardize_weight").backward_many
            made = backward_many(
                [grad_outputs[i] for i in wanted],
                [weights[i] for i in wanted],
                *_rows_of(weights, wanted, mean, rstd),
            )
            for i, grad in zip(wanted, made, strict=True):
                grads[i] = grad
        return None, None, *grads


def _rows_of(weights, wanted, *statistics):
    """Statistics of all rows, those of the wanted weights alone."""
    if len(wanted) == len(weights):
        return statistics
    lengths = [weight.shape[0] for weight in weights]
    parts = [statistic.split(lengths) for statistic in statistics]
    return [torch.cat([part[i] for i in wanted]) for part in parts]


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
