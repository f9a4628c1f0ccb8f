"""Big Transfer in small: pre-train on five digits, learn the other five from a few images.

`python -m bit.train` without an argument. The images come with scikit-learn: 1,797 handwritten
digits of 8 x 8 px, shown to the network at 24. It is a `transfer.Study` like any other, with a
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
    return transfer.Study(
        source="digits",
        targets=("digits",),
        shots=(5, 10),
        pretrain=Job(
            # The inception crop would leave too little of 8 x 8 px. A mirrored 2 is no 2.
            images=Images(classes=SEEN, crop=24, flip=False),
            network=Network(model="R14x0.25", stem="small"),
            schedule=Schedule(rule="BiT-S", batch=64, steps=300, base_lr=0.03),
        ),
        finetune=Job(
            images=Images(classes=UNSEEN, crop=24, flip=False, val_fraction=0.3),
            schedule=Schedule(batch=32, steps=100),
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
        f"Digits {UNSEEN[0]} to {UNSEEN[-1]}: accuracy on {report.rows[0].images} test images in %, "
        f"mean ± standard deviation of {study.seeds} seeds\n\n{report.markdown()}\n\n"
        "transfer starts from the network pre-trained on the other digits; from scratch is the\n"
        "same network, images, updates and schedule from random weights. Learning rates and C\n"
        "were chosen on validation images.\n\n"
        f"Took {minutes:.1f} minutes. Picture: {folder / 'study.png'}\n"
        f"Every number, log and checkpoint: {folder}\n\n"
        "The same on your own images, in folders like PATH/CLASS/FILE.jpg:\n"
        f"  {own_images(study, folder)}"
    )


def own_images(study: transfer.Study, folder: Path) -> str:
    """Return the command that fine-tunes the demo's network on a folder of images."""
    schedule, images = study.finetune.schedule, study.finetune.images
    return (
        f"python -m bit.train finetune --data PATH "
        f"--checkpoint {folder / 'pretrain' / 'last.safetensors'} "
        f"--crop {images.crop} --batch {schedule.batch} --steps {schedule.steps}"
    )


def free_folder() -> str:
    """Return runs/demo, or the first of runs/demo-2, runs/demo-3, ... that does not exist."""
    names = itertools.chain(["runs/demo"], (f"runs/demo-{n}" for n in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())


def say(text: str) -> None:
    print(text, file=sys.stderr)
