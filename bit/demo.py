"""Big Transfer in small: pre-train on five digits, learn the other five from a few images.

`python -m bit.train` without an argument. The images come with scikit-learn: 1,797 handwritten
digits of 8 x 8 px, shown to the network at 16. It is a `transfer.Study` like any other, with a
network and schedules that two CPU cores finish in about three minutes.
"""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

from bit import transfer
from bit.config import Images, Job, Network, Run, Schedule

SEEN, UNSEEN = tuple("01234"), tuple("56789")


def config() -> transfer.Study:
    """Return the demo's study."""
    rates = (0.01, 0.03, 0.1, 0.3)  # the rule's 0.003 is for batches of 512 and large networks
    return transfer.Study(
        source="digits",
        targets=("digits",),
        shots=(5, 10),
        seeds=3,
        transfer_lrs=rates,
        scratch_lrs=rates,
        pretrain=Job(
            images=Images(classes=SEEN, crop=16, flip=False),  # a mirrored 2 is no 2
            network=Network(model="R14x0.25", stem="small"),
            schedule=Schedule(rule="BiT-S", batch=64, steps=500, base_lr=0.06),
        ),
        finetune=Job(
            images=Images(classes=UNSEEN, crop=16, flip=False, val_fraction=0.3),
            schedule=Schedule(batch=32, steps=60),
        ),
        run=Run(),
    )


def show(study: transfer.Study) -> None:
    """Run the demo, print its table, and say what to do next."""
    began = time.monotonic()
    if study.run.out is None:
        study = replace(study, run=replace(study.run, out=free_folder()))
    say(
        f"Pre-training {study.pretrain.network.model} on the digits {', '.join(SEEN)}, then "
        f"learning {', '.join(UNSEEN)} from a few images each. Everything goes to "
        f"{study.run.out}."
    )
    report = transfer.study(study)
    minutes = (time.monotonic() - began) / 60
    folder = report.folder
    print(
        f"Digits {UNSEEN[0]} to {UNSEEN[-1]}: accuracy on {report.rows[0].images} test images, in "
        f"%, mean ± standard deviation of {study.seeds} seeds\n\n{report.markdown()}\n\n"
        "transfer starts from the network pre-trained on the other digits; from scratch is the\n"
        "same network, images, updates and schedule from random weights. Learning rates and C\n"
        "were chosen on validation images.\n\n"
        f"Took {minutes:.1f} minutes. Picture: {folder / 'study.png'}\n"
        f"Every number, log and checkpoint: {folder}\n\n"
        "The same on your own images, in folders like PATH/CLASS/FILE.jpg:\n"
        f"  {own_images(study, report)}"
    )


def own_images(study: transfer.Study, report: transfer.Report) -> str:
    """Return the command that fine-tunes the demo's network on a folder of images."""
    rate = next(row.setting for row in report.rows if row.method == transfer.TRANSFER)
    return (
        f"python -m bit.train finetune --data PATH "
        f"--checkpoint {report.folder / 'pretrain' / 'last.safetensors'} "
        f"--crop {study.finetune.images.crop} --batch {study.finetune.schedule.batch} "
        f"--steps 200 --base-lr {rate.removeprefix('lr=')}"
    )


def free_folder() -> str:
    """Return runs/demo, or the first of runs/demo-2, runs/demo-3, ... that does not exist."""
    names = itertools.chain(["runs/demo"], (f"runs/demo-{n}" for n in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def say(text: str) -> None:
    print(text, file=sys.stderr)
