"""Fashion-MNIST from random weights on a CPU."""

from bit.config import Config, Images, Network, Run, Schedule


def config() -> Config:
    """Train a small BiT on Fashion-MNIST's 60,000 images on a CPU.

    Command   python -m bit.train fashion-mnist
    Data      Debian's dataset-fashion-mnist, or --root FOLDER with its four IDX files
    Hardware  not run yet
    Time      not run yet
    Result    not run yet

    The schedule is the HyperRule's for a medium task, squeezed from 10,000 updates of 512 images
    to the number below: 5 % warm-up, decays at 30, 60 and 90 %, mixup 0.1.
    """
    return Config(
        data="fashion-mnist",
        images=Images(crop=28, resize=32, val_fraction=0.05),
        network=Network(model="R26x0.25", stem="small"),
        schedule=Schedule(batch=128, micro_batch=128, steps=2400, base_lr=0.05, weight_decay=1e-4),
        run=Run(out="runs/fashion-mnist"),
    )
