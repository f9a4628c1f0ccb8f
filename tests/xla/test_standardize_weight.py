"""standardize_weight of JAX: against plain float64 code, forward and backward; spread; exported."""

import functools

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.sharding import PartitionSpec
from xla_checking import (
    DTYPES,
    assert_as_reference,
    assert_close,
    assert_exports,
    assert_same,
    assert_second_gradients,
    draw,
    hwio,
    mesh,
    oihw,
    to_jax,
    to_torch,
    x64,
)

from bit_kernels import reference
from bit_kernels.xla import project_gradient, standardize_weight

# Why each is here.
SAMPLES = {
    "root": (7, 7, 3, 64),  # rows of 147: no multiple of a vector
    "one_by_one": (1, 1, 64, 16),
    "asymmetric": (3, 2, 40, 24),
    "short_rows": (1, 1, 5, 7),
    "one_row": (3, 3, 33, 1),
    "linear": (20, 6),
    "volume": (2, 3, 5, 3, 4),
}


def make(shape, dtype=torch.float64):
    """A kernel as small as trained ones, off centre, and the gradient of the result."""
    return {"weight": (draw(shape) * 0.02 + 0.01).to(dtype)}, draw(shape, 1, dtype)


def plain(weight, **options):
    return hwio(reference.standardize_weight(oihw(weight), **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_matches_reference(sample, dtype):
    assert_as_reference(standardize_weight, plain, *make(SAMPLES[sample], dtype))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_result(given):
    """It is rounded once, and the gradient is in the weight's."""
    weight, grad = make((3, 3, 8, 6), given)
    assert_as_reference(
        functools.partial(standardize_weight, eps=1e-6, dtype=jnp.float16),
        functools.partial(plain, eps=1e-6, dtype=torch.float16),
        weight,
        grad.half(),
    )


def test_eps_is_inside_the_root():
    weight = jnp.array([[1.0, 3.0], [-1.0, 3.0]])
    assert jnp.allclose(standardize_weight(weight, 3.0), jnp.array([[0.5, 0.0], [-0.5, 0.0]]))


def test_mean_far_from_zero():
    weight = draw((600, 4), dtype=torch.float32) + 1000
    assert_as_reference(standardize_weight, plain, {"weight": weight}, draw((600, 4)).float())


def test_constant_kernel_has_no_gradient():
    output, backward = jax.vjp(standardize_weight, jnp.full((8, 2), 0.25))
    assert not output.any() and not backward(jnp.ones_like(output))[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_gradient(dtype):
    """The gradient before it is rounded to the weight's dtype."""
    weight, grad = make((3, 2, 8, 6), dtype)
    weight = weight["weight"]
    right = hwio(reference.project_gradient(oihw(grad).double(), oihw(weight).double()))
    with x64(dtype):
        ours = project_gradient(*to_jax([grad, weight]))
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if wide == torch.float64 else 1e-6
    assert_same(to_torch(ours), [right.to(wide)], tolerance)


def test_second_gradient():
    (assert_same,)
    assert_second_gradients(standardize_weight, plain, *make((3, 2, 4, 5)))


def gradient(weight, grad, axis_name=None):
    output, backward = jax.vjp(functools.partial(standardize_weight, axis_name=axis_name), weight)
    return output, *backward(grad), project_gradient(grad, weight, axis_name=axis_name)


def test_transformed():
    """Many kernels as one, under checkpoint, and not compiled: the same numbers."""
    weights, grads = make((3, 2, 8, 5, 6))
    with x64(torch.float64):
        weights, grads = to_jax([weights["weight"], grads])
        together = jax.jit(jax.vmap(gradient))(weights, grads)
        for i, pair in enumerate(zip(weights, grads, strict=True)):
            assert_close([part[i] for part in together], list(gradient(*pair)))
        backward = jax.vjp(jax.checkpoint(standardize_weight), weights[0])[1]
        assert_close(backward(grads[0]), [together[1][0]])


def test_rows_spread_over_devices():
    weight, grad = make((24, 5))
    with x64(torch.float64):
        given = to_jax([weight["weight"], grad])
        rows = PartitionSpec("rows")
        spread = jax.shard_map(
            functools.partial(gradient, axis_name="rows"),
            mesh=mesh("rows"),
            in_specs=(rows, rows),
            out_specs=rows,
        )
        assert_close(jax.jit(spread)(*given), gradient(*given))


@pytest.mark.parametrize("shape", [(3, 3, 4, 0), (3, 3, 0, 4), (0, 0)], ids=str)
def test_empty(shape):
    output, backward = jax.vjp(standardize_weight, jnp.zeros(shape))
    assert output.shape == backward(output)[0].shape == shape


def test_exports():
    weight, _ = make((3, 2, 8, 6), torch.float32)
    assert_exports(standardize_weight, ["3, 2, b, 6"], to_jax([weight["weight"]]))


@pytest.mark.parametrize(
    "weight, message",
    [
        (jnp.zeros((3, 3), int), r"weight is int32 \(3, 3\); it must be floating, \(..., C_out\)"),
        (jnp.zeros(3), r"weight is float32 \(3,\); it must be floating, \(..., C_out\)"),
    ],
)
def test_refuses(weight, message):
    with pytest.raises(ValueError, match=message):
        standardize_weight(weight)
