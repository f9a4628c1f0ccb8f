"""The suite `accuracy`: what networks learn, fused and unfused, and with which normalization.

`fused`: the network of `bit.models` and the same one in plain PyTorch (benchmarks/networks.py),
trained by `bit.train` from the same weights on the same batches. `norms`: BatchNorm or GroupNorm,
with and without weight standardization, at a large and at a micro-batch a device, gradients
accumulated over the same batch (Qiao et al., Weight Standardization, arXiv 1903.10520; Kolesnikov
et al., arXiv 1912.11370, section 4.1). Metrics:

  loss_at_N    training loss after update N, the mean over a tenth of the run, over seeds
  top1         share of the test images after the last update, over seeds
"""

import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.figure
import torch
from torch import nn

from benchmarks import networks, tables
from benchmarks.report import Row
from benchmarks.runner import Count, Figure
from bit.allocator import keep_memory
from bit.config import Config, Images, Network, Run, Schedule, resolve
from bit.interrupt import StopSignals
from bit.runlog import RunLog
from bit.task import Task, load_dataset, make_task
from bit.train import Stopped, Trainer, make_optimizer

POINTS = 10  # of a loss curve
COLORS = ("#0072b2", "#e69f00", "#009e73", "#999999")


@dataclass(frozen=True)
class Plan:
    """config: of every run, but for its seed and micro-batch; micro: the micro-batch of `norms`;
    seeds: of `fused`, of `norms` at the whole batch, at micro-batches.
    """

    config: Config
    micro: int
    seeds: tuple[int, int, int]


# 15 minutes at the rates of 2 cores of an AMD EPYC: 220 to 370 images a second, 90 to 170 in
# micro-batches of 4, and 18 runs of 10,240 images.
FULL = Plan(
    Config(
        data="fashion-mnist",
        images=Images(crop=28, resize=28, val_fraction=0.0),
        network=Network(model="R14x0.25", stem="small"),
        schedule=Schedule(
            batch=128, micro_batch=128, steps=80, base_lr=0.05, weight_decay=1e-4, mixup=0.0
        ),
        run=Run(outputs="minimal"),
    ),
    micro=4,
    seeds=(3, 2, 1),
)
QUICK = Plan(
    Config(
        data="digits",
        images=Images(crop=8, resize=8, val_fraction=0.0, flip=False),
        network=Network(model="R14x0.25", stem="small"),
        schedule=Schedule(
            batch=32, micro_batch=32, steps=20, base_lr=0.02, weight_decay=1e-4, mixup=0.0
        ),
        run=Run(outputs="minimal"),
    ),
    micro=8,
    seeds=(1, 1, 1),
)

FUSED = {"bit": None, "eager": networks.create}
NORMS = {
    f"{norm}_norm{'_ws' if standardize else ''}": functools.partial(
        networks.create, norm=norm, standardize=standardize
    )
    for norm in ("batch", "group")
    for standardize in (False, True)
}


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    data: str | None = None,
    device: str = "cpu",
) -> list[Count]:
    """Fused against plain, then the norms at each batch; float32 and eager networks only.

    data: trained on at 32 px in place of Fashion-MNIST; a name or a path, as for `bit.train`.
    """
    if "float32" not in dtypes:
        return []
    plan = QUICK if quick else FULL
    if data:
        sides = {} if quick else {"crop": 32, "resize": 32}
        images = replace(plan.config.images, flip=True, **sides)
        plan = replace(plan, config=replace(plan.config, data=data, images=images))
    run = replace(plan.config.run, device=device)
    plan = replace(plan, config=replace(plan.config, run=run))
    batch = plan.config.schedule.batch
    found = []
    for count in threads:
        for name, rivals, micro, seeds in (
            (f"fused/batch{batch}", FUSED, batch, plan.seeds[0]),
            (f"norms/batch{batch}", NORMS, batch, plan.seeds[1]),
            (f"norms/micro{plan.micro}", NORMS, plan.micro, plan.seeds[2]),
        ):
            take = functools.partial(_take, plan.config, rivals, micro, seeds, count)
            found.append(Count("accuracy", name, "float32", count, take, device))
    return found


def _take(
    config: Config,
    rivals: dict[str, Callable[..., nn.Module] | None],
    micro: int,
    seeds: int,
    threads: int,
) -> Iterator[Figure]:
    """The figures of each rival in turn, after its last seed."""
    keep_memory()
    task = make_task(load_dataset(config.data, config.images), config.images)
    for provider, create in rivals.items():
        curves, top1 = [], []
        for seed in range(seeds):
            schedule = replace(config.schedule, micro_batch=micro)
            run = replace(config.run, seed=seed, threads=threads)
            losses, score = train(replace(config, schedule=schedule, run=run), task, create)
            curves.append(losses)
            top1.append(score)
        length = len(curves[0])
        ends = [length * point // POINTS for point in range(POINTS + 1)]
        for start, end in zip(ends, ends[1:]):
            if start < end:
                means = [statistics.fmean(losses[start:end]) for losses in curves]
                yield Figure.of(provider, f"loss_at_{end}", means, "nats")
        yield Figure.of(provider, "top1", top1, "1")


def train(
    config: Config,
    task: Task,
    create: Callable[..., nn.Module] | None,
    engine: type[Trainer] = Trainer,
) -> tuple[list[float], float]:
    """The loss of each update, and top-1 on the test images, of one run of `bit.train`.

    create: what builds the network that takes the place of bit's, on bit's weights; None for bit's.
    engine: what trains.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, out=folder))
        config = resolve(config, num_examples=len(task.train), native_size=task.native_size)
        trainer = engine(config, task)
        if create is not None:
            chosen = config.network
            network = create(chosen.model, len(task.classes), stem=chosen.stem)
            network.to(config.run.device)
            # BatchNorm's running statistics aren't among bit's weights.
            network.load_state_dict(trainer.model.state_dict(), strict=False)
            trainer.model = network.to(memory_format=torch.channels_last)
            trainer.optimizer = make_optimizer(trainer.model, config)
        schedule = config.schedule
        with (
            StopSignals() as stop,
            RunLog(
                Path(folder), total=schedule.steps, batch=schedule.batch, label="", full=False
            ) as log,
        ):
            try:
                result = trainer.fit(log, stop)
            except Stopped as stopped:
                raise KeyboardInterrupt from stopped
        return [row["loss"] for row in log.rows if row["kind"] == "train"], result.test.top1


def markdown(rows: Sequence[Row]) -> str:
    """The table without the curves: the last loss and the accuracy of each rival."""
    last = max((row.metric for row in rows if _point(row.metric)), key=_point, default=None)
    return tables.markdown([row for row in rows if not _point(row.metric) or row.metric == last])


def draw(rows: Sequence[Row], path: Path) -> None:
    """Loss over the updates and final accuracy, a column of panels a case."""
    cases = list(dict.fromkeys(row.case for row in rows if row.metric == "top1"))
    if not cases:
        return
    figure = matplotlib.figure.Figure(figsize=(4 * len(cases), 6), dpi=120, layout="constrained")
    for case, (curves, bars) in zip(cases, figure.subplots(2, len(cases), squeeze=False).T):
        found = [row for row in rows if row.case == case]
        providers = list(dict.fromkeys(row.provider for row in found))
        for number, (provider, color) in enumerate(zip(providers, COLORS)):
            points = [row for row in found if row.provider == provider and _point(row.metric)]
            steps = [_point(row.metric) for row in points]
            # Dashed over solid: equal curves lie on each other.
            style = "-" if number == 0 else "--"
            curves.plot(steps, [row.p50 for row in points], style, color=color, label=provider)
            curves.fill_between(
                steps,
                [row.p20 for row in points],
                [row.p80 for row in points],
                color=color,
                alpha=0.15,
            )
            (top1,) = [row for row in found if row.provider == provider and row.metric == "top1"]
            spread = [[top1.p50 - top1.p20], [top1.p80 - top1.p50]]
            bars.bar(provider, top1.p50, yerr=spread, color=color, error_kw={"ecolor": tables.INK})
        curves.set_title(case, size=10)
        curves.set_xlabel("update")
        curves.set_ylabel("training loss")
        curves.legend(frameon=False, fontsize=8)
        bars.set_ylabel("top-1 on test images")
        bars.tick_params("x", rotation=20, labelsize=8)
        bars.set_ylim(0, 1)
        for axes in (curves, bars):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _point(metric: str) -> int:
    """The update of a loss_at_N; 0 for other metrics."""
    name, _, update = metric.rpartition("_")
    return int(update) if name == "loss_at" else 0
