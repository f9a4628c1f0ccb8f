"""Runs of seconds, and what they leave."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bit import checkpoint, hyperrule
from bit.config import Config, Images, Network, Run, Schedule
from bit.data import Dataset, Split


def noise():
    """Three classes of noisy 8 px images, each brighter in another channel."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = np.arange(count) % 3
        images = rng.integers(0, 200, (count, 8, 8, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 55
        return Split(images, labels, ["blue", "green", "red"])

    return Dataset("noise", split(30), split(12))


def tiny(out, *, steps=12, **changes):
    """A run of seconds that uses everything: mixup, accumulation, decay, crops and flips."""
    base = Config(
        images=Images(crop=8, val_fraction=0.2),
        network=Network(model="R14x0.125", stem="small"),
        schedule=Schedule(
            batch=8,
            micro_batch=3,
            steps=steps,
            base_lr=0.05,
            warmup=2,
            decays=(6, 9),
            weight_decay=1e-3,
            mixup=0.4,
        ),
        data="noise",
        run=Run(out=str(out), eval_every=4, save_every=4, threads=1),
    )
    sections = {}
    for name, value in changes.items():
        (section,) = (
            s for s in ("images", "network", "schedule", "run") if hasattr(getattr(base, s), name)
        )
        sections.setdefault(section, {})[name] = value
    return replace(base, **{s: replace(getattr(base, s), **v) for s, v in sections.items()})


def weights(folder, name="last"):
    return checkpoint.read_safetensors(Path(folder) / f"{name}.safetensors")[0]


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def at_step(monkeypatch, step, action):
    """Call `action` in the middle of update number `step`, counted from 0."""
    rate = hyperrule.learning_rate

    def hooked(at, *args):
        if at == step:
            action()
        return rate(at, *args)

    monkeypatch.setattr(hyperrule, "learning_rate", hooked)
