"""SGD that keeps the standardized weights of a network up to date, as an optax transformation.

    g = project_gradient(g, w)             for a kernel that is kept standardized
    g += weight_decay * w                  for kernels, not for gains and biases
    m = momentum * m + g
    w -= lr * m
    wh = standardize_weight(w)             for a kernel that is kept standardized

The network is called with wh in place of w (`used`), so that forward and backward standardize
nothing, and read bfloat16 where the network computes in it. What a gradient is then of is wh.

>>> optimizer = sgd(0.03, momentum=0.9, standardized=lambda params: is_kernel, dtype=jnp.bfloat16)
>>> state = optimizer.init(params)
>>> grads = jax.grad(loss)(used(params, state))
>>> updates, state = optimizer.update(grads, state, params)
>>> params = optax.apply_updates(params, updates)

Memory passes of a kernel that is kept: it is read three times and its gradient twice beside the
update itself, as the sums of an output channel reach over all of it. Spread over the devices
(`axis_name`) that is divided by their number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from bit_kernels.xla.group_norm_relu import wide
from bit_kernels.xla.standardize_weight import project_gradient, standardize_weight

Tree = Any


class SGDState(NamedTuple):
    """momentum: like the parameters. standardized: likewise, None where nothing is kept.

    count: updates done, for a schedule of learning rates.
    """

    count: Array
    momentum: Tree
    standardized: Tree


def sgd(
    learning_rate: float | Callable[[Array], Array] | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    nesterov: bool = False,
    standardized: Tree | Callable[[Tree], Tree] | None = None,
    decays: Tree | Callable[[Tree], Tree] | None = None,
    dtype=None,
    eps: float = 1e-10,
    axis_name: str | None = None,
    spread: Tree | Callable[[Tree], Tree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """torch.optim.SGD's update, its weight decay added to the gradient before momentum.

    Args:
        learning_rate: a number, an optax schedule (update number -> rate), or None: then `update`
            is called with `learning_rate=`, which also goes before what is given here.
        momentum, nesterov: as in torch.optim.SGD.
        weight_decay: of the parameters that `decays` names.
        standardized: which kernels are kept standardized: booleans in a tree like the parameters,
            or a function from the parameters to it. None = none. Their gradients must be those of
            the standardized kernels, as `used` gives the network.
        decays: likewise, which parameters weight decay reaches; None = those of two dimensions or
            more.
        dtype: of the kept kernels, None = the parameter's.
        eps: of standardization.
        axis_name, spread: of the kernels that `spread` names only some rows are here, inside
            `jax.shard_map`; the others are on the devices of that mesh axis.

    Raises:
        ValueError: an argument is none of these.
    """
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be at least 0 and finite")
    if nesterov and momentum == 0:
        raise ValueError("nesterov is True; it needs a momentum of more than 0")
    if spread is not None and axis_name is None:
        raise ValueError("spread is given, but axis_name is None; it must name a mesh axis")

    def keep(weight: Array, kept: bool, spread_out: bool) -> Array | None:
        if not kept:
            return None
        axis = axis_name if spread_out else None
        return standardize_weight(weight, eps, dtype, axis_name=axis)

    def init(params: Tree) -> SGDState:
        masks = _mask(standardized, params), _mask(spread, params)
        return SGDState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.zeros_like, params) if momentum else None,
            jax.tree.map(keep, params, *masks),
        )

    @jax.named_scope("sgd")
    def update(grads, state, params=None, *, learning_rate=learning_rate, **_):
        if params is None:
            raise ValueError("params is None; it must be the parameters that grads are of")
        if learning_rate is None:
            raise ValueError("learning_rate is None; it must be given to sgd or to update")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        kept, spread_out = _mask(standardized, params), _mask(spread, params)
        decayed = _mask(_kernels if decays is None else decays, params)

        def raw(grad, weight, is_kept, is_spread, decay):
            compute = wide(weight.dtype)
            if is_kept:
                axis = axis_name if is_spread else None
                grad = project_gradient(grad, weight, eps, axis_name=axis)
            grad = grad.astype(compute)
            return grad + weight_decay * weight.astype(compute) if weight_decay and decay else grad

        grads = jax.tree.map(raw, grads, params, kept, spread_out, decayed)
        moments = state.momentum
        if momentum:
            moments = jax.tree.map(
                lambda m, g: (momentum * m.astype(g.dtype) + g).astype(m.dtype), moments, grads
            )
            if nesterov:
                grads = jax.tree.map(lambda m, g: g + momentum * m.astype(g.dtype), moments, grads)
            else:
                grads = moments
        # As apply_updates will have it, rounding included.
        updates = jax.tree.map(lambda g, w: (-rate * g).astype(w.dtype), grads, params)
        new = jax.tree.map(keep, optax.apply_updates(params, updates), kept, spread_out)
        return updates, SGDState(state.count + 1, moments, new)

    return optax.GradientTransformationExtraArgs(init, update)


def used(params: Tree, state: SGDState) -> Tree:
    """The parameters that a network is called with: those kept standardized in place of their own."""
    return jax.tree.map(
        lambda weight, kept: weight if kept is None else kept, params, state.standardized
    )


def _kernels(params: Tree) -> Tree:
    return jax.tree.map(lambda weight: weight.ndim > 1, params)


def _mask(given: Tree | Callable[[Tree], Tree] | None, params: Tree) -> Tree:
    if given is None:
        return jax.tree.map(lambda _: False, params)
    return given(params) if callable(given) else given
