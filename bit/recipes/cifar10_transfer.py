"""Pre-training on CIFAR-10, few-shot transfer to other images, on a CPU."""

from bit.config import Images, Job, Network, Run, Schedule
from bit.transfer import Study


def config() -> Study:
    """Pre-train on CIFAR-10, transfer to other images with 10 a class, on a CPU.

    Command   python -m bit.train cifar10-transfer --source CIFAR10 --targets TARGET TARGET ...
              (folders or archives of train/CLASS/FILE and test/CLASS/FILE)
    Hardware  2 cores of an AMD EPYC with AVX2
    Time      44 minutes
    Result    hand signs 75.6 %, blood cells 94.5 %, Omniglot alphabets 46.2 % mean per class, and
              70.7, 89.2 and 35.1 from scratch (benchmarks/results/cifar10-transfer.csv)

    These are of ranges of learning rates one step lower than below, where the chosen ones lay at
    the upper end.

    Against the same network from scratch, with the same images, updates and schedule, and its
    learning rate chosen on validation images likewise; 3 seeds.
    """
    return Study(
        shots=(10,),
        seeds=3,
        transfer_lrs=(0.01, 0.03, 0.1),
        scratch_lrs=(0.03, 0.1, 0.3),
        pretrain=Job(
            images=Images(crop=64, resize=72, val_fraction=0.02),
            network=Network(model="R26x0.5"),
            schedule=Schedule(rule="BiT-S", batch=128, micro_batch=128, steps=2400, base_lr=0.03),
        ),
        finetune=Job(
            images=Images(crop=64, resize=72, val_fraction=0.2),
            schedule=Schedule(batch=64, micro_batch=64, steps=100),
        ),
        run=Run(out="runs/cifar10-transfer"),
    )
