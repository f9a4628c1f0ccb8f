"""The suite `data`: the op that prepares a batch, and what is left of it in a training step.

The op's rivals are declared in `benchmarks/ops/mixup.py`. The share of a step that waits for data
is that of the project's own training loop: the same updates, on batches that the loader's thread
prepares meanwhile (`loaded`), and on batches that are tensors already (`at_hand`).

On a GPU the op takes images on the device and in the host's pinned memory, and updates are those of
bfloat16, with batches that lie on the device already, or are copied there meanwhile.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from benchmarks.ops import mixup
from benchmarks.runner import Case
from bit import packages
from bit.data import Batch, Split

LOADED, AT_HAND = "loaded", "at_hand"
UPDATES = 8  # in one call: more than the loader prepares ahead while others are timed
PICTURE = ("times_limit", 1.0)


@dataclass(frozen=True)
class WaitCase:
    """name: of the network; images, side: of a batch, px; quick: in `--quick` instead."""

    name: str
    images: int
    side: int
    stem: str = "imagenet"
    quick: bool = False
    workers: int = 1


CASES = [
    WaitCase("R50x1", 8, 224),
    WaitCase("R26x0.25", 128, 32, stem="small"),
    WaitCase("R14x0.25", 16, 32, stem="small", quick=True),
]


CUDA_DTYPES = ("bfloat16", "float32")


GPU_CASES = [
    WaitCase("R50x1", 128, 224, workers=8),
    WaitCase("R14x0.25", 16, 32, stem="small", quick=True),
]
NEEDED = ("tyro", "tqdm")  # by bit.train, and not by the op and its rivals


def left_out(device: str) -> list[str]:
    absent = packages.missing(*NEEDED)
    return [f"wait/, which trains: {' and '.join(absent)} are missing"] if absent else []


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """The op's cases, then training with and without loading, in float32.

    On a GPU training comes first: the op's float64 reference takes the host seconds a case.
    """
    if device == "cuda":
        waits = [
            _case(case, 1, "cuda")
            for case in GPU_CASES
            if case.quick == quick and "bfloat16" in dtypes and not left_out(device)
        ]
        return waits + mixup.gpu_cases(dtypes=dtypes, quick=quick)
    found = mixup.cases(threads=threads, dtypes=dtypes, quick=quick, compiled=compiled)
    return found + [
        _case(case, max(threads)) for case in CASES if case.quick == quick and "float32" in dtypes
    ]


def _case(case: WaitCase, threads: int, device: str = "cpu") -> Case:
    return Case(
        suite="data",
        name=f"wait/{case.name}/{case.images}x3x{case.side}x{case.side}",
        dtype="float32" if device == "cpu" else "bfloat16",
        threads=threads,
        providers=(LOADED, AT_HAND),
        baselines=(AT_HAND,),
        prepare=functools.partial(WaitWorkload, case, threads, device),
        limits=(AT_HAND,),
        images=case.images * UPDATES,
        device=device,
    )


class WaitWorkload:
    """A network in training, and random images; see benchmarks.runner.Workload.

    Both rivals run the same updates of `bit.train`, so there is nothing to compare before.
    """

    def __init__(self, case: WaitCase, threads: int, device: str = "cpu"):
        from bit.config import Config, Images, Network, Run, Schedule, resolve
        from bit.task import Task
        from bit.train import Trainer

        on_cpu = device == "cpu"
        run = Run(
            out="unused",
            device=device,
            dtype="float32" if on_cpu else "bfloat16",
            threads=threads if on_cpu else None,
            workers=case.workers,
            outputs="minimal",
        )
        count, side = case.images * UPDATES, case.side * 8 // 7
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        split = Split(pixels, np.arange(count) % 10, [str(label) for label in range(10)])
        task = Task([str(label) for label in range(10)], split, None, split, side)
        config = Config(
            data="random",
            images=Images(crop=case.side, resize=side, val_fraction=0.0),
            network=Network(model=case.name, stem=case.stem),
            schedule=Schedule(batch=case.images, micro_batch=case.images, steps=1000, mixup=0.1),
            run=run,
        )
        self._trainer = Trainer(resolve(config, num_examples=count, native_size=side), task)

    def reference(self) -> dict[str, Tensor]:
        return {}

    def outputs(self, provider: str) -> dict[str, Tensor]:
        return {}

    def calls(self, provider: str) -> list[Callable[[], object]]:
        from bit.prefetch import loaded

        settings, batches = self._trainer.config.run, self._trainer.batches
        if provider == AT_HAND:
            ready = [_at_hand(batches.batch(step), settings.device) for step in range(UPDATES)]
            return [functools.partial(self._train, lambda: ready)]
        micro = self._trainer.config.schedule.micro_batch

        def load():
            return loaded(batches.iterate(0, UPDATES), micro, settings.device)

        return [functools.partial(self._train, load)]

    def _train(self, batches: Callable) -> None:
        for batch in batches():
            self._trainer.update(batch, 0.003)


def _at_hand(batch: Batch, device: str) -> SimpleNamespace:
    """A batch on its device that is cropped, normalised and mixed, as `Trainer.update` takes it."""
    micro = batch.micro(len(batch.labels))
    whole = [tuple(tensor.to(device) for tensor in tensors) for tensors in micro]
    return SimpleNamespace(labels=batch.labels, lam=batch.lam, micro=lambda size: whole)
