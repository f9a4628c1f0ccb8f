"""group_norm_relu of JAX: against plain float64 code, forward and backward; transformed; exported."""

import jax
import jax.numpy as jnp
import pytest
import torch
from xla_checking import (
    DTYPES,
    HALF,
    assert_as_reference,
    assert_close,
    assert_exports,
    assert_second_gradients,
    draw,
    nchw,
    nhwc,
    to_jax,
    x64,
)

from bit_kernels import reference
from bit_kernels.xla import group_norm_relu

# Why each is here: input and groups.
SAMPLES = {
    "unit": ((2, 8, 8, 64), 32),
    "odd": ((3, 7, 5, 30), 5),
    "one_group": ((2, 5, 3, 7), 1),
    "groups_of_one": ((2, 3, 4, 6), 6),
    "one_pixel": ((4, 1, 1, 32), 8),
    "two_dimensions": ((5, 12), 3),
    "five_dimensions": ((2, 3, 4, 2, 6), 2),
}


def make(sample, dtype=torch.float64, given=("weight", "bias"), mean=0.5):
    """(JAX's function, the reference, tensors, gradient of the result); tensors by name."""
    shape, groups = SAMPLES[sample]
    tensors = {"input": draw(shape) * 2 + mean}
    for seed, name in enumerate(given, 1):
        tensors[name] = draw(shape[-1:], seed)
    return (
        lambda **given: group_norm_relu(num_groups=groups, **given),
        lambda input, **given: nhwc(reference.group_norm_relu(nchw(input), groups, **given)),
        {name: x.to(dtype) for name, x in tensors.items()},
        draw(shape, 3, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype):
    assert_as_reference(*make(sample, dtype))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)], ids=str)
def test_without_parameters_or_relu(given, relu):
    ours, theirs, *rest = make("odd", given=given)
    options = dict(relu=relu, eps=0.1)
    assert_as_reference(
        lambda **given: ours(**given, **options), lambda **given: theirs(**given, **options), *rest
    )


@pytest.mark.parametrize("sample", ["unit", "one_group"])
def test_mean_far_from_zero(sample):
    """A variance of E[x^2] - E[x]^2 would be noise."""
    assert_as_reference(*make(sample, torch.float32, mean=1000))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_input_with_float32_parameters(dtype):
    ours, theirs, tensors, grad = make("odd", torch.float32)
    tensors["input"], grad = tensors["input"].to(dtype), grad.to(dtype)
    assert_as_reference(ours, theirs, tensors, grad)


def test_second_gradient():
    assert_second_gradients(*make("odd"))


def test_transformed():
    """Not compiled, under checkpoint, differentiated for each sample: the same numbers."""
    ours, _, tensors, grad = make("odd")
    with x64(torch.float64):
        *given, grad = to_jax([*tensors.values(), grad])

        def loss(input, weight, bias, grad):
            return (ours(input=input, weight=weight, bias=bias) * grad).sum()

        gradients = jax.grad(loss, (0, 1, 2))
        right = jax.jit(gradients)(*given, grad)
        assert_close(gradients(*given, grad), right)
        assert_close(jax.grad(jax.checkpoint(loss), (0, 1, 2))(*given, grad), right)
        each = jax.vmap(gradients, (0, None, None, 0))(given[0][:, None], *given[1:], grad[:, None])
        assert_close((each[0][:, 0], each[1].sum(0), each[2].sum(0)), right)


def test_empty():
    for shape in ((0, 5, 3, 8), (0, 8), (2, 0, 8)):
        x, parameter = jnp.zeros(shape), jnp.ones(8)
        output, backward = jax.vjp(
            lambda *given: group_norm_relu(given[0], 4, *given[1:]), x, parameter, parameter
        )
        grads = backward(output)
        assert output.shape == grads[0].shape == shape
        assert not grads[1].any() and not grads[2].any()


def test_exports():
    arrays = to_jax([make("odd", torch.float32)[2][name] for name in ("input", "weight", "bias")])
    assert_exports(
        lambda x, weight, bias: group_norm_relu(x, 5, weight, bias),
        ["b, 7, 5, 30", "30", "30"],
        arrays,
    )


X = jnp.zeros((2, 5, 8))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(input=X.astype(int)),
            r"input is int32 \(2, 5, 8\); it must be floating, \(N, \..., C",
        ),
        (dict(input=X[0, 0]), r"input is float32 \(8,\); it must be floating, \(N, \..., C\)"),
        (dict(num_groups=3), "num_groups is 3; it must divide the 8 channels"),
        (dict(num_groups=0), "num_groups is 0; it must divide the 8 channels"),
        (dict(weight=jnp.ones(7)), r"weight is \(7,\); it must be \(8,\) or None"),
        (dict(bias=jnp.ones((8, 1))), r"bias is \(8, 1\); it must be \(8,\) or None"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_relu(**dict(input=X, num_groups=4) | change)
