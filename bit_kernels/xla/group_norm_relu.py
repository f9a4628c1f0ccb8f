"""GroupNorm and the ReLU behind it, kept for backward as its input and float32 statistics.

    y = max(0, (x - mean) * rstd * gamma + beta)

with mean and rstd over each sample's groups of channels. Sums are taken for each channel first, then
joined to groups in an (N, C) array: a reshape of the whole map to groups, as most codes have it,
leaves a TPU a few channels in lanes of 128, and twice the cycles of a network (docs/xla.md).

The variance is a sum of squares around the mean, not E[x^2] - E[x]^2. Whatever is elementwise here
XLA fuses into the convolutions around it; what is left are the passes that take sums.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Statistics(NamedTuple):
    """Of each sample's groups, one value a channel. mean, rstd: (N, 1, ..., 1, C)."""

    mean: Array
    rstd: Array


def group_norm_relu(
    input: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    relu: bool = True,
) -> Array:
    """Normalise each sample's groups of channels, scale and shift, then the ReLU (if `relu`).

    Args:
        input: (N, ..., C), floating. num_groups must divide C.
        weight, bias: (C,), or None for 1 and 0.
        eps: added to the variance.

    Returns:
        As the input in shape and dtype. Statistics are float32, or float64 for that.

    Raises:
        ValueError: an argument is none of these.
    """
    check(input, num_groups, weight, bias)
    return _group_norm_relu(input, weight, bias, num_groups, eps, relu)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm_relu(input, weight, bias, num_groups, eps, relu):
    return activated(input, statistics(input, num_groups, eps), weight, bias, relu)


def _forward(input, weight, bias, num_groups, eps, relu):
    found = statistics(input, num_groups, eps)
    return activated(input, found, weight, bias, relu), (input, weight, bias, found)


def _backward(num_groups, eps, relu, kept, grad):
    input, weight, bias, found = kept
    return norm_backward(grad, input, found, weight, bias, num_groups, relu)


_group_norm_relu.defvjp(_forward, _backward)


def wide(dtype) -> jnp.dtype:
    """The dtype that statistics and sums are taken in."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.named_scope("group_norm_relu")
def statistics(input: Array, num_groups: int, eps: float) -> Statistics:
    """Mean and 1 / sqrt(var + eps) of the groups of `input`, (N, ..., C)."""
    x = input.astype(wide(input.dtype))
    mean = group_means(x, num_groups)
    return Statistics(mean, lax.rsqrt(group_means(jnp.square(x - mean), num_groups) + eps))


def group_means(x: Array, num_groups: int) -> Array:
    """The mean of each sample's groups, at each of their channels: (N, ..., C) to (N, 1, ..., C)."""
    n, *middle, c = x.shape
    positions = tuple(range(1, x.ndim - 1))
    sums = x.sum(positions).reshape(n, num_groups, c // num_groups).sum(2)
    count = max(1, x.size // max(1, n * num_groups))
    means = jnp.repeat(sums / count, c // num_groups, axis=1)
    return means.reshape(n, *(1 for _ in middle), c)


@jax.named_scope("group_norm_relu")
def activated(x: Array, found: Statistics, weight, bias, relu: bool) -> Array:
    """The op, given its statistics."""
    y = _scaled(_normal(x, found), weight, bias)
    return (jnp.maximum(y, 0) if relu else y).astype(x.dtype)


@jax.named_scope("group_norm_relu")
def norm_backward(grad, x, found, weight, bias, num_groups, relu, skip=None):
    """The gradients of input, weight and bias from that of the output.

    skip: added to the input's gradient in the same pass, as a residual unit's shortcut asks for.
    """
    normal = _normal(x, found)
    grad = grad.astype(normal.dtype)
    if relu:
        grad = jnp.where(_scaled(normal, weight, bias) > 0, grad, 0)
    all_but_channels = tuple(range(x.ndim - 1))
    grad_bias = None if bias is None else grad.sum(all_but_channels)
    grad_weight = None if weight is None else (grad * normal).sum(all_but_channels)
    if weight is not None:
        grad = grad * weight.astype(grad.dtype)
    along = group_means(grad * normal, num_groups)
    grad_input = found.rstd * (grad - group_means(grad, num_groups) - normal * along)
    if skip is not None:
        grad_input = grad_input + skip.astype(grad_input.dtype)
    if weight is not None:
        grad_weight = grad_weight.astype(weight.dtype)
    if bias is not None:
        grad_bias = grad_bias.astype(bias.dtype)
    return grad_input.astype(x.dtype), grad_weight, grad_bias


def _normal(x: Array, found: Statistics) -> Array:
    return (x.astype(found.mean.dtype) - found.mean) * found.rstd


def _scaled(normal: Array, weight, bias) -> Array:
    if weight is not None:
        normal = normal * weight.astype(normal.dtype)
    return normal if bias is None else normal + bias.astype(normal.dtype)


def check(input, num_groups: int, weight, bias) -> None:
    """Raise ValueError unless these are what `group_norm_relu` takes."""
    if input.ndim < 2 or not jnp.issubdtype(input.dtype, jnp.floating):
        raise ValueError(f"input is {input.dtype} {input.shape}; it must be floating, (N, ..., C)")
    channels = input.shape[-1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} is {value.shape}; it must be ({channels},) or None")
