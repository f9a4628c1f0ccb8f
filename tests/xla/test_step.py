"""An update over several devices is the update on one, and sums gradients in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bit import models
from bit.xla import weights
from bit.xla.models import ResNetV2
from bit.xla.step import Batch, Training, mesh_of, put

MODEL, SIDE, BATCH = ("R14x0.25", 10, "small"), 16, 20
RUNS = {  # devices, images a device at a time, spread, units run again
    "one_device": (1, 64, True, False),
    "micro_batches": (1, 3, True, False),
    "spread": (8, 64, True, False),
    "whole": (8, 64, False, False),
    "all_at_once": (8, 1, True, True),
    "uneven": (3, 4, True, False),
}


def training(devices, micro_batch, sharded, remat, dtype=jnp.float64):
    network = ResNetV2(*MODEL, dtype=dtype, standardized=True, remat=remat)
    mesh = mesh_of(jax.devices()[:devices])
    return Training(network, mesh, BATCH, micro_batch, weight_decay=1e-3, sharded=sharded)


def batch_for(step):
    """Mixed images, padded with rubbish of weight 0."""
    rng = np.random.default_rng(0)
    padding = step.images - BATCH
    images = rng.uniform(-1, 1, (BATCH, SIDE, SIDE, 3)).astype(np.float32)
    labels = rng.integers(0, 10, BATCH).astype(np.int32)
    lam = rng.uniform(0, 1, BATCH).astype(step.dtype)
    arrays = images, labels, np.roll(labels, 1), lam, np.ones(BATCH, step.dtype)
    fill = np.concatenate([images, images])[:padding]
    padded = [np.concatenate([a, np.zeros((padding, *a.shape[1:]), a.dtype)]) for a in arrays]
    padded[0][BATCH:] = fill
    return Batch(*(put(a, like) for a, like in zip(padded, step.described_batch(SIDE))))


def fresh():
    torch.manual_seed(0)
    return weights.from_torch(models.create(*MODEL[:2], stem=MODEL[2], zero_head=False))


def losses(step, updates=6):
    state = step.start(fresh())
    found = []
    for _ in range(updates):
        state, loss = step.update(state, batch_for(step), 0.1)
        found.append(float(loss))
    return found, state


@pytest.fixture(scope="module")
def alone(x64):
    return losses(training(*RUNS["one_device"]))


@pytest.mark.parametrize("run", [name for name in RUNS if name != "one_device"])
def test_every_way_is_that_of_one_device(run, alone, x64):
    expected, alone_state = alone
    step = training(*RUNS[run])
    found, state = losses(step)
    assert found == pytest.approx(expected, rel=1e-10)
    one = training(*RUNS["one_device"]).params(alone_state)
    for mine, true in zip(jax.tree.leaves(step.params(state)), jax.tree.leaves(one), strict=True):
        assert np.abs(mine - true).max() <= 1e-9 * np.abs(true).max() + 1e-12


def test_what_is_spread_takes_less_of_a_device(x64):
    spread, whole = (training(8, 64, sharded, False) for sharded in (True, False))
    names = [name for name, s in jax.tree_util.tree_flatten_with_path(spread.spread)[0] if s]
    assert len(names) > 10 and not any(jax.tree.leaves(whole.spread))
    state = spread.start(fresh())
    kernel = state.weights["block4"]["unit01"]["conv2"]["kernel"]
    assert {part.data.shape[0] for part in kernel.addressable_shards} == {kernel.shape[0] // 8}


def test_kept_kernels_are_those_of_the_weights():
    step = training(8, 64, True, False, jnp.bfloat16)
    state = step.start(fresh())
    for _ in range(2):
        state, _ = step.update(state, batch_for(step), 0.1)
    assert {k.dtype for k in jax.tree.leaves(state.kept)} == {jnp.dtype(jnp.bfloat16)}
    anew = step.resume(state.weights, state.momentum)
    for mine, true in zip(jax.tree.leaves(state.kept), jax.tree.leaves(anew.kept), strict=True):
        assert jnp.array_equal(mine, true)


def test_predictions_are_the_network_s():
    step = training(8, 64, True, False, jnp.float32)
    params = fresh()
    images = batch_for(step).images
    logits = step.predict(step.start(params), images)
    expected = ResNetV2(*MODEL).apply({"params": params}, np.asarray(images))
    assert np.abs(np.asarray(logits) - expected).max() < 1e-5


def test_the_step_uses_its_state_up():
    step = training(2, 64, True, False, jnp.float32)
    state = step.start(fresh())
    step.update(state, batch_for(step), 0.1)
    assert state.momentum["block1"]["unit01"]["conv1"]["kernel"].is_deleted()
