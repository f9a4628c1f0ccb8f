"""sgd of JAX: against plain float64 code, and in a network against torch.optim.SGD; spread."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from checking import assert_as_good
from jax.sharding import PartitionSpec
from xla_checking import (
    DTYPES,
    assert_close,
    assert_same,
    draw,
    hwio,
    mesh,
    oihw,
    to_jax,
    to_torch,
    x64,
)

from bit_kernels import reference
from bit_kernels.xla import SGDState, sgd, standardize_weight, used

OPTIONS = [
    dict(),
    dict(weight_decay=0.02),
    dict(momentum=0.9),
    dict(momentum=0.9, weight_decay=0.02),
    dict(momentum=0.9, weight_decay=0.02, nesterov=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(options, project, dtype):
    """A step from a momentum that is there."""
    shape = (3, 2, 20, 7)
    tensors = [draw(shape) * 0.02 + 0.01, draw(shape, 1) * 0.01, draw(shape, 2) * 0.01]
    tensors = [tensor.to(dtype) for tensor in tensors]

    @jax.jit
    def ours(weight, grad, momentum):
        optimizer = sgd(0.1, **options, standardized=project)
        state = optimizer.init(weight)._replace(momentum=momentum)
        updates, state = optimizer.update(grad, state, weight)
        assert updates.dtype == weight.dtype
        return optax.apply_updates(weight, updates), state.momentum, state.standardized

    def theirs(tensors):
        weight, grad, momentum = (oihw(tensor).clone() for tensor in tensors)
        kept = [torch.empty_like(weight)] if project else []
        reference.sgd([weight], [grad], [momentum], kept, lr=0.1, project=project, **options)
        return [hwio(tensor) for tensor in (weight, momentum, *kept)]

    with x64(dtype):
        found = to_torch(ours(*to_jax(tensors)))
    right = theirs([tensor.double() for tensor in tensors])
    if dtype == torch.float64:
        assert_same(found, right)
    else:
        names = ["weight", "momentum", "standardized"][: len(found)]
        assert_as_good(names, found, theirs(tensors), right)


STEPS = 10


def is_kernel(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def parameters():
    """Of two layers; rows for eight devices."""
    sizes = {"first": (8, 16), "second": (16, 4)}
    return {
        name: {"kernel": draw(size, i) * 0.1, "bias": draw(size[1:], 2 + i)}
        for i, (name, size) in enumerate(sizes.items())
    }


def loss(params, x, y, relu):
    hidden = relu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return ((hidden @ params["second"]["kernel"] + params["second"]["bias"] - y) ** 2).mean()


def batch(step):
    return draw((5, 8), 10 + step), draw((5, 4), 30 + step)


def with_torch(standardized, rates, weight_decay=0.0, decays=("kernel",), **options):
    """The parameters after each step. standardized: names of layers; decays: of parameters."""
    params = jax.tree.map(lambda x: x.requires_grad_(), parameters())
    named = [pair for layer in params.values() for pair in layer.items()]
    groups = [
        {"params": [x for name, x in named if name in decays], "weight_decay": weight_decay},
        {"params": [x for name, x in named if name not in decays]},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, **options)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        called = {
            name: layer | {"kernel": hwio(reference.standardize_weight(oihw(layer["kernel"])))}
            if name in standardized
            else layer
            for name, layer in params.items()
        }
        optimizer.zero_grad()
        loss(called, *batch(step), torch.relu).backward()
        optimizer.step()
        yield jax.tree.map(torch.clone, params)


def with_jax(optimizer, rates=None, dtype=torch.float64):
    """(parameters, state) after each step."""
    params, batches = to_jax(
        jax.tree.map(lambda x: x.to(dtype), (parameters(), [batch(i) for i in range(STEPS)]))
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch, **given):
        grads = jax.grad(loss)(used(params, state), *batch, jax.nn.relu)
        updates, state = optimizer.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    for i, each in enumerate(batches):
        given = {} if rates is None else {"learning_rate": rates[i]}
        params, state = step(params, state, each, **given)
        yield params, state


def assert_trains_alike(ours, theirs):
    with x64(torch.float64):
        for (params, _), right in zip(ours, theirs, strict=True):
            assert_same(to_torch(params), [x.detach() for x in jax.tree.leaves(right)], 1e-10)


@pytest.mark.parametrize("standardized", [("first",), ("first", "second")], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_network_trains_as_with_torch(options, standardized):
    mask = {name: {"kernel": name in standardized, "bias": False} for name in ("first", "second")}
    optimizer = sgd(0.3, **options, standardized=mask)
    assert_trains_alike(with_jax(optimizer), with_torch(standardized, [0.3] * STEPS, **options))


def test_decays():
    options = dict(momentum=0.9, weight_decay=0.05)
    everything = sgd(0.3, **options, decays=lambda params: jax.tree.map(lambda _: True, params))
    assert_trains_alike(
        with_jax(everything), with_torch((), [0.3] * STEPS, **options, decays=("kernel", "bias"))
    )


@pytest.mark.parametrize("how", ["schedule", "argument", "argument before what was given"])
def test_learning_rate(how):
    rates = [0.3 / (1 + step) for step in range(STEPS)]
    options = dict(momentum=0.9, standardized=is_kernel)
    ours = {
        "schedule": lambda: with_jax(sgd(lambda count: 0.3 / (1 + count), **options)),
        "argument": lambda: with_jax(sgd(**options), rates),
        "argument before what was given": lambda: with_jax(sgd(7.0, **options), rates),
    }[how]()
    assert_trains_alike(ours, with_torch(("first", "second"), rates, momentum=0.9))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_kept_kernels_are_those_of_the_parameters(dtype, compiled):
    """Bit for bit; but for a rounding where the compiler makes one of two operations."""
    optimizer = sgd(0.3, momentum=0.9, weight_decay=0.02, standardized=is_kernel, dtype=dtype)
    with jax.disable_jit(not compiled):
        for params, state in with_jax(optimizer, dtype=torch.float32):
            for name, layer in used(params, state).items():
                right = standardize_weight(params[name]["kernel"], dtype=dtype)
                assert_close(layer["kernel"], right, 2 * jnp.finfo(right.dtype).eps * compiled)
                assert layer["bias"] is params[name]["bias"]


@pytest.mark.parametrize("spread", [("first", "second"), ("second",)], ids=str)
def test_rows_spread_over_devices(spread):
    """The same as on one, where some kernels or all are in parts."""
    options = dict(momentum=0.9, weight_decay=0.02, nesterov=True, standardized=is_kernel)
    mask = {name: {"kernel": name in spread, "bias": False} for name in ("first", "second")}

    def steps(optimizer, params, all_grads):
        state = optimizer.init(params)
        for grads in all_grads:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    specs = jax.tree.map(lambda on: PartitionSpec("rows") if on else PartitionSpec(), mask)
    kept = {name: {"kernel": spec["kernel"], "bias": None} for name, spec in specs.items()}
    optimizer = sgd(0.1, **options, axis_name="rows", spread=mask)
    on_many = jax.shard_map(
        functools.partial(steps, optimizer),
        mesh=mesh("rows"),
        in_specs=(specs, [specs] * 3),
        out_specs=(specs, SGDState(PartitionSpec(), specs, kept)),
    )
    on_one = functools.partial(steps, sgd(0.1, **options))
    with x64(torch.float64):
        params = to_jax(parameters())
        grads = [jax.tree.map(lambda x, i=i: jnp.sin(99 * x + i), params) for i in range(3)]
        assert_close(jax.jit(on_many)(params, grads), jax.jit(on_one)(params, grads))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(momentum=-0.1), "momentum is -0.1; it must be at least 0 and finite"),
        (dict(momentum=float("nan")), "momentum is nan; it must be at least 0 and finite"),
        (dict(weight_decay=float("inf")), "weight_decay is inf; it must be at least 0 and finite"),
        (dict(nesterov=True), "nesterov is True; it needs a momentum of more than 0"),
        (
            dict(spread=is_kernel),
            "spread is given, but axis_name is None; it must name a mesh axis",
        ),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        sgd(0.1, **change)


def test_update_refuses():
    weight = jnp.ones((2, 3))
    state = sgd().init(weight)
    with pytest.raises(ValueError, match="params is None; it must be the parameters that grads"):
        sgd(0.1).update(weight, state)
    with pytest.raises(
        ValueError, match="learning_rate is None; it must be given to sgd or to upd"
    ):
        sgd().update(weight, state, weight)
