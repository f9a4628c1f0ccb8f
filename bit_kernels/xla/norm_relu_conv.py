"""GroupNorm, ReLU and the convolutions that read the result, kept for backward as their input.

    a = max(0, (x - mean) * rstd * gamma + beta)        group_norm_relu
    y_i = conv(a, w_i) + b_i                            w_i standardized first where it has an eps
    y_0 += residual                                     if there is one

Kept: x, float32 statistics and the parameters; a is made again, where XLA fuses that into the
convolutions of backward. Gradients of kernels come out of the matrix unit in float32, also for
kernels in bfloat16, so that what follows (a sum over devices above all) loses nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bit_kernels.xla.group_norm_relu import activated, check, norm_backward, statistics, wide
from bit_kernels.xla.standardize_weight import project_gradient, standardize_weight

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
Padding = tuple[tuple[int, int], tuple[int, int]]


class Norm(NamedTuple):
    """A GroupNorm and its ReLU. weight, bias: (C,) or None."""

    num_groups: int
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    relu: bool = True


class Conv(NamedTuple):
    """A convolution. weight: (kh, kw, C_in / groups, C_out). bias: (C_out,) or None.

    stride, padding, dilation: of height and width. eps: of standardization; None = none is made.
    """

    weight: Array
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float | None = None


class _Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    eps: float | None


def norm_relu_conv(
    input: Array,
    norm: Norm,
    convs: Sequence[Conv | None],
    *,
    residual: Array | None = None,
) -> list[Array]:
    """The convolutions of group_norm_relu(input, ...), without keeping that for backward.

    Args:
        input: (N, H, W, C), floating. Kernels are cast to its dtype after standardization.
        norm: num_groups must divide C.
        convs: what reads the normalised input; None stands for the input itself.
        residual: (N, H', W', C_out), added to the first convolution's result.

    Returns:
        An array for each of `convs`, (N, H', W', C_out), in the input's dtype. The gradient of a
        half-type kernel without `eps` is float32, which a `lax.scan` over it can't be
        differentiated with: there differentiate inside the scan.

    Raises:
        ValueError: an argument is none of these.
    """
    if input.ndim != 4:
        raise ValueError(f"input is {input.shape}; it must be (N, H, W, C)")
    check(input, norm.num_groups, norm.weight, norm.bias)
    for i, conv in enumerate(convs):
        if conv is not None:
            check_conv(f"convs[{i}]", conv, input.shape[-1])
    if residual is not None and (not convs or convs[0] is None):
        raise ValueError("residual is given, but there is no first convolution to add it to")
    geometry = tuple(
        conv and _Geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.eps)
        for conv in convs
    )
    tensors = tuple(None if conv is None else (conv.weight, conv.bias) for conv in convs)
    settings = norm.num_groups, norm.eps, norm.relu
    if residual is not None:
        used = jax.ShapeDtypeStruct(tensors[0][0].shape, input.dtype)
        expected = jax.eval_shape(partial(_convolve, shape=geometry[0]), input, used).shape
        if residual.shape != expected:
            raise ValueError(f"residual is {residual.shape}; it must be {expected}")
    return _norm_relu_conv(input, norm.weight, norm.bias, tensors, residual, settings, geometry)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _norm_relu_conv(input, weight, bias, tensors, residual, settings, geometry):
    return _forward(input, weight, bias, tensors, residual, settings, geometry)[0]


def _forward(input, weight, bias, tensors, residual, settings, geometry):
    num_groups, eps, relu = settings
    found = statistics(input, num_groups, eps)
    normal = activated(input, found, weight, bias, relu)
    outputs = [
        input if shape is None else _convolve(normal, _kernel(own[0], shape, normal.dtype), shape)
        for own, shape in zip(tensors, geometry, strict=True)
    ]
    for i, own in enumerate(tensors):
        if own is not None and own[1] is not None:
            outputs[i] = outputs[i] + own[1].astype(input.dtype)
    if residual is not None:
        outputs[0] = outputs[0] + residual.astype(input.dtype)
    like = None if residual is None else jnp.zeros((0,), residual.dtype)  # its dtype
    return outputs, (input, weight, bias, tensors, like, found)


def _backward(settings, geometry, kept, grads):
    input, weight, bias, tensors, like, found = kept
    num_groups, _, relu = settings
    normal = activated(input, found, weight, bias, relu)
    into_normal, skip, grad_tensors = None, None, []
    for own, shape, grad in zip(tensors, geometry, grads, strict=True):
        if shape is None:
            skip = grad if skip is None else skip + grad
            grad_tensors.append(None)
            continue
        kernel, own_bias = own
        used = _kernel(kernel, shape, normal.dtype)
        into = input_gradient(grad, used, normal, shape)
        into_normal = into if into_normal is None else into_normal + into
        grad_kernel = kernel_gradient(normal, grad, kernel.shape, shape)
        if shape.eps is not None:
            grad_kernel = project_gradient(grad_kernel, kernel, shape.eps).astype(kernel.dtype)
        grad_tensors.append((grad_kernel, _bias_gradient(grad, own_bias)))
    if into_normal is None:
        into_normal = jnp.zeros_like(normal)
    grad_input, grad_weight, grad_bias = norm_backward(
        into_normal, input, found, weight, bias, num_groups, relu, skip
    )
    grad_residual = None if like is None else grads[0].astype(like.dtype)
    return grad_input, grad_weight, grad_bias, tuple(grad_tensors), grad_residual


_norm_relu_conv.defvjp(_forward, _backward)


def convolve(input: Array, conv: Conv) -> Array:
    """A convolution alone, with the same gradients; for a network's first.

    input: (N, H, W, C_in). Raises ValueError for a kernel that doesn't fit it.
    """
    check_conv("conv", conv, input.shape[-1])
    shape = _Geometry(conv.stride, conv.padding, conv.dilation, conv.groups, conv.eps)
    return _standardized_conv(input, conv.weight, conv.bias, shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _standardized_conv(input, kernel, bias, shape):
    output = _convolve(input, _kernel(kernel, shape, input.dtype), shape)
    return output if bias is None else output + bias.astype(output.dtype)


def _conv_forward(input, kernel, bias, shape):
    return _standardized_conv(input, kernel, bias, shape), (input, kernel, bias)


def _conv_backward(shape, kept, grad):
    input, kernel, bias = kept
    grad_input = input_gradient(grad, _kernel(kernel, shape, input.dtype), input, shape)
    grad_kernel = kernel_gradient(input, grad, kernel.shape, shape)
    if shape.eps is not None:
        grad_kernel = project_gradient(grad_kernel, kernel, shape.eps).astype(kernel.dtype)
    return grad_input, grad_kernel, _bias_gradient(grad, bias)


_standardized_conv.defvjp(_conv_forward, _conv_backward)


def _bias_gradient(grad: Array, bias: Array | None) -> Array | None:
    """Summed in float32 or wider, as JAX's own transpose of an addition is not."""
    if bias is None:
        return None
    return grad.sum((0, 1, 2), dtype=wide(grad.dtype)).astype(bias.dtype)


def _kernel(kernel: Array, shape: _Geometry, dtype) -> Array:
    """The kernel as the convolution takes it."""
    return (
        kernel.astype(dtype) if shape.eps is None else standardize_weight(kernel, shape.eps, dtype)
    )


def _convolve(input: Array, kernel: Array, shape: _Geometry) -> Array:
    return lax.conv_general_dilated(
        input,
        kernel,
        shape.stride,
        [(p, p) for p in shape.padding],
        rhs_dilation=shape.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=shape.groups,
    )


def input_gradient(grad: Array, kernel: Array, input: Array, geometry: _Geometry) -> Array:
    """The gradient of a convolution's input from that of its result."""

    def transposed(grad: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: _convolve(x, kernel, geometry), input)(grad)[0]

    def plain(grad: Array, kernel: Array) -> Array:
        padding = []
        for axis in (0, 1):
            window = geometry.dilation[axis] * (kernel.shape[axis] - 1) + 1
            low = window - 1 - geometry.padding[axis]
            reach = geometry.stride[axis] * (grad.shape[1 + axis] - 1) + 1
            padding.append((low, input.shape[1 + axis] + window - 1 - reach - low))
        return lax.conv_general_dilated(
            grad,
            kernel[::-1, ::-1].transpose(0, 1, 3, 2),
            (1, 1),
            padding,
            lhs_dilation=geometry.stride,
            rhs_dilation=geometry.dilation,
            dimension_numbers=DIMENSIONS,
        )

    return _by_platform(plain, transposed, geometry, grad, kernel)


def kernel_gradient(input: Array, grad: Array, shape: Sequence[int], geometry: _Geometry) -> Array:
    """The gradient of a kernel of `shape` from that of the result: sums in float32 or wider.

    A convolution of the input by the gradient, over what were images and positions: JAX's own
    transpose would round the sums to the input's dtype.
    """
    padding = []
    for axis in (0, 1):
        low, dilation = geometry.padding[axis], geometry.dilation[axis]
        reach = geometry.stride[axis] * (grad.shape[1 + axis] - 1) + 1
        window = dilation * (shape[axis] - 1) + 1
        padding.append((low, window + reach - 1 - input.shape[1 + axis] - low))

    def convolved(input: Array, grad: Array, dimensions: Sequence[str]) -> Array:
        return lax.conv_general_dilated(
            input,
            grad,
            geometry.dilation,
            padding,
            rhs_dilation=geometry.stride,
            dimension_numbers=dimensions,
            batch_group_count=geometry.groups,
            preferred_element_type=wide(input.dtype),
        )

    def transposed(input: Array, grad: Array) -> Array:
        return convolved(input, grad, ("CHWN", "IHWO", "HWNC"))

    def plain(input: Array, grad: Array) -> Array:
        found = convolved(input.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3), DIMENSIONS)
        return found.transpose(1, 2, 0, 3)

    return _by_platform(plain, transposed, geometry, input, grad)


def _by_platform(plain: Callable, transposed: Callable, geometry: _Geometry, *arrays) -> Array:
    """One of two ways to the same: `plain` has the dimensions of a forward pass, by transposes.

    In a loop, as over micro-batches, XLA has fast code for that way alone on a CPU; elsewhere the
    choice is the compiler's.
    """
    if geometry.groups > 1:
        return transposed(*arrays)
    return lax.platform_dependent(*arrays, cpu=plain, default=transposed)


def check_conv(name: str, conv: Conv, channels: int) -> None:
    """Raise ValueError unless `conv` reads that many channels."""
    weight, groups = conv.weight, conv.groups
    if (
        weight.ndim != 4
        or not jnp.issubdtype(weight.dtype, jnp.floating)
        or groups < 1
        or weight.shape[2] * groups != channels
        or weight.shape[3] % groups
    ):
        raise ValueError(
            f"{name}.weight is {weight.dtype} {weight.shape} with {groups} groups; it must be "
            f"floating, (kh, kw, {channels} / groups, C_out), C_out a multiple of groups"
        )
    if conv.bias is not None and conv.bias.shape != weight.shape[3:]:
        raise ValueError(f"{name}.bias is {conv.bias.shape}; it must be ({weight.shape[3]},)")
    for field in ("stride", "padding", "dilation"):
        value, least = getattr(conv, field), 0 if field == "padding" else 1
        if len(value) != 2 or min(value) < least:
            raise ValueError(
                f"{name}.{field} is {value}; it must be two numbers of at least {least}"
            )
