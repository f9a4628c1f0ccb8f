"""Weight standardization (Qiao et al., arXiv 1903.10520) of a kernel, which alone is kept.

    wh = (w - mean) / sqrt(var + eps)

for each output channel, the last axis here, with the biased variance and eps inside the root as Big
Transfer has it. Memory passes: forward reads w twice and writes wh, backward reads g and w twice and
writes; an optimizer that keeps wh (`sgd`) needs neither in the network.

Rows of a kernel may be spread over devices; `axis_name` then joins their sums.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from bit_kernels.xla.group_norm_relu import wide


def standardize_weight(
    weight: Array, eps: float = 1e-10, dtype=None, *, axis_name: str | None = None
) -> Array:
    """(w - mean) / sqrt(var + eps) for each output channel.

    Args:
        weight: (..., C_out), floating: (kh, kw, C_in, C_out) of a convolution.
        eps: added to the variance.
        dtype: of the result, None = the weight's.
        axis_name: of the mesh axis over which the leading dimension is spread, inside
            `jax.shard_map`; None = all of the kernel is here.

    Returns:
        As the weight in shape. Computed in float32, or in float64 for that; the gradient is in the
        weight's dtype.

    Raises:
        ValueError: the weight is none of these.
    """
    if weight.ndim < 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"weight is {weight.dtype} {weight.shape}; it must be floating, (..., C_out)"
        )
    return _standardize_weight(weight, eps, jnp.dtype(dtype or weight.dtype), axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
@jax.named_scope("standardize_weight")
def _standardize_weight(weight, eps, dtype, axis_name):
    centred, rstd = _centred(weight, eps, axis_name)
    return (centred * rstd).astype(dtype)


def _forward(weight, eps, dtype, axis_name):
    return _standardize_weight(weight, eps, dtype, axis_name), weight


def _backward(eps, dtype, axis_name, weight, grad):
    return (project_gradient(grad, weight, eps, axis_name=axis_name).astype(weight.dtype),)


_standardize_weight.defvjp(_forward, _backward)


@jax.named_scope("standardize_weight")
def project_gradient(
    grad: Array, weight: Array, eps: float = 1e-10, *, axis_name: str | None = None
) -> Array:
    """The gradient of a weight from that of its standardized form: standardization's backward.

    rstd * (g - mean(g) - wh * mean(g * wh)) for each output channel, in float32 or wider.
    """
    centred, rstd = _centred(weight, eps, axis_name)
    grad = grad.astype(centred.dtype)
    # Not of the standardized weight, so that it is added up in one pass with the variance.
    along = rstd * _row_mean(grad * centred, axis_name)
    return rstd * (grad - _row_mean(grad, axis_name) - centred * rstd * along)


def _centred(weight, eps, axis_name):
    w = weight.astype(wide(weight.dtype))
    centred = w - _row_mean(w, axis_name)
    return centred, lax.rsqrt(_row_mean(jnp.square(centred), axis_name) + eps)


def _row_mean(x: Array, axis_name: str | None) -> Array:
    means = x.mean(tuple(range(x.ndim - 1)))
    return means if axis_name is None else lax.pmean(means, axis_name)
