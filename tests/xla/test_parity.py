"""Both engines of bit.train give the same losses; the bounds are those that the README names."""

import pytest

from benchmarks import xla
from bit.data import few_shot
from bit.task import load_dataset, make_task

# The network makes 1e-3 of the roundings of 20 updates in float32: two numbers of devices are as
# far apart as two engines.
BOUNDS = {"float64": 1e-9, "float32": 5e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_losses_of_20_updates(dtype):
    found = xla.parity(dtype)
    assert found.keys() == {"xla", "xla_8_devices"}
    assert max(found.values()) <= BOUNDS[dtype]


def test_both_draw_the_same_samples(tmp_path):
    """They share `bit.data`: what is checked is that XLA's engine takes what that draws."""
    config = xla.replace(xla.PARITY, images=xla.replace(xla.PARITY.images, shots=5, shots_seed=3))
    task = make_task(load_dataset(config.data, config.images), config.images)
    whole = make_task(load_dataset(config.data, xla.PARITY.images), xla.PARITY.images)
    assert (task.train.labels == few_shot(whole.train, 5, 3).labels).all()
    run = xla.replace(config.run, out=str(tmp_path))
    config = xla.resolve(
        xla.replace(config, run=run), num_examples=len(task.train), native_size=task.native_size
    )
    theirs, ours = xla.Trainer(config, task), xla.XlaTrainer(config, task)
    for batch, placed in zip(theirs.batches.iterate(0, 3), ours.stream(0, 3, None), strict=True):
        parts = list(batch.micro(5))
        for start, (images, labels, partners) in zip(range(0, 24, 5), parts):
            end = start + len(labels)
            assert placed.images[start:end].tolist() == images.permute(0, 2, 3, 1).tolist()
            assert placed.labels[start:end].tolist() == labels.tolist()
            assert placed.partners[start:end].tolist() == partners.tolist()
        assert placed.lam[0] == pytest.approx(batch.lam, rel=1e-7)
