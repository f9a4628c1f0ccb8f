"""The Pallas kernels that benchmarks compare with: interpreted, the same as the ops in jnp."""

import jax
import jax.numpy as jnp
import pytest
import torch
from xla_checking import assert_close, draw, to_jax

from benchmarks import xla_pallas
from bit_kernels import xla


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hwnc", [False, True])
# Several chunks of rows and blocks of channels; rows that aren't cut; a group of a whole block.
@pytest.mark.parametrize("shape, groups", [((8, 16, 16, 256), 32), ((8, 5, 3, 128), 1)])
def test_group_norm_relu(shape, groups, hwnc, dtype):
    x = to_jax((draw(shape) * 2 + 3).to(dtype))
    weight, bias = to_jax([draw(shape[-1:], seed, torch.float32) for seed in (1, 2)])
    ours = xla_pallas.group_norm_relu(x, weight, bias, groups, hwnc=hwnc, interpret=True)
    right = xla.group_norm_relu(x, groups, weight, bias)
    # Sums in another order, before a result is rounded.
    assert_close([ours], [right], 1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("rows", [384, 27])
def test_standardize_weight(rows):
    weight = to_jax(draw((rows, 256), dtype=torch.float32) * 0.02 + 0.01)
    ours = xla_pallas.standardize_weight(weight, interpret=True)
    assert_close([ours], [xla.standardize_weight(weight, dtype=jnp.bfloat16)], 2**-8)


@pytest.mark.parametrize("rows", [384, 27])
def test_sgd(rows):
    weight, grad, momentum = to_jax([draw((rows, 256), i, torch.float32) for i in range(3)])
    given = weight * 0.02 + 0.01, grad, momentum
    *ours, kept = xla_pallas.sgd(*given, interpret=True)
    *right, right_kept = jax.jit(xla_pallas.sgd_jnp)(*given)
    assert_close(ours, right, 1e-5)
    assert_close([kept], [right_kept], 2**-8)
