"""The study behind a transfer result: is pre-training worth it, and by how much?

One network is pre-trained on a source. Then, for every target, number of images a class and seed,
it is fine-tuned, trained from scratch (same network, images, updates and schedule), and compared
with classifiers on raw pixels. Learning rates, where there is a choice, are chosen on validation
images by mean per-class accuracy; test images are only scored.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

from matplotlib.figure import Figure

from bit import pixels, plots, runlog
from bit.config import Config, Flat, Images, Job, Network, Run, Schedule, check, short_name
from bit.data import Dataset
from bit.folder import check_folder, write_config
from bit.task import load_dataset, make_task
from bit.train import Result, Stopped, TrainingFailed, run

TRANSFER, SCRATCH = "transfer", "from scratch"
PIXEL_METHODS = {
    "logistic regression": pixels.logistic_regression,
    "nearest neighbour": pixels.nearest_neighbour,
}
METHODS = (TRANSFER, SCRATCH, *PIXEL_METHODS)
METRICS = {"top1": "top-1", "mean_per_class": "mean per-class accuracy"}
PIXEL_SIDE = 32  # px, at most, for the classifiers on raw pixels


@dataclass(frozen=True)
class Study:
    """Pre-train once, transfer to several data sets, compare with training from scratch."""

    source: str = "digits"
    """Data set to pre-train on: a registered name, or the path of an image folder or archive."""
    targets: tuple[str, ...] = ()
    """Data sets to transfer to, likewise."""
    shots: tuple[int, ...] = (10,)
    """Training images a class; each number is a row of the table."""
    seeds: int = 3
    """Repetitions: each draws its own few-shot images, batches and fresh weights."""
    transfer_lrs: tuple[float, ...] = (0.003,)
    """Learning rates that transfer may choose from on the validation images of seed 0."""
    scratch_lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Learning rates that training from scratch may choose from, likewise."""
    pretrain: Job = field(default_factory=lambda: PRETRAIN)
    finetune: Job = field(default_factory=Job)
    """Transfer and training from scratch alike; the study sets network, shots and base_lr."""
    run: Annotated[Run, Flat] = field(default_factory=Run)


PRETRAIN = Job(
    images=Images(augment="inception"),
    network=Network(model="R26x0.25", stem="small"),
    schedule=Schedule(rule="BiT-S", batch=256),
)


@dataclass(frozen=True)
class Row:
    """One method on one target with one seed."""

    target: str
    shots: int
    seed: int
    method: str
    images: int  # in the test split
    top1: float  # on those, as share of 1
    mean_per_class: float
    setting: str  # learning rate or C, where the method has one
    seconds: float
    run: str  # folder of the run, "" for a method without one


@dataclass(frozen=True)
class Report:
    """What a study found."""

    folder: Path
    rows: list[Row]
    pretrained: Result

    def cells(self, metric: str) -> dict[tuple[str, int], dict[str, tuple[float, float]]]:
        """Return mean and standard deviation over seeds, by (target, shots) and method."""
        values: dict[tuple[str, int], dict[str, list[float]]] = {}
        for row in self.rows:
            methods = values.setdefault((row.target, row.shots), {})
            methods.setdefault(row.method, []).append(getattr(row, metric))
        return {
            place: {
                method: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0)
                for method, v in methods.items()
            }
            for place, methods in values.items()
        }

    def markdown(self, metric: str = "top1") -> str:
        """Return a table, one row a target and number of shots, mean ± deviation in percent."""
        table = [["target", "images a class", *METHODS]]
        for (target, shots), methods in self.cells(metric).items():
            cells = [f"{m:.1%} ± {s:.1%}".replace("%", "") for m, s in methods.values()]
            table.append([target, str(shots), *cells])
        widths = [max(map(len, column)) for column in zip(*table)]
        table.insert(1, ["-" * width for width in widths])
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
            for line in table
        )

    def text(self) -> str:
        """Return the tables of all metrics, as Markdown."""
        seeds = len({row.seed for row in self.rows})
        return "\n\n".join(
            f"{name} on test images in %, mean ± standard deviation of {seeds} seeds\n\n"
            f"{self.markdown(metric)}"
            for metric, name in METRICS.items()
        )

    def write(self) -> None:
        """Write results.csv (every row), results.md (the tables) and study.png."""
        with open(self.folder / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        (self.folder / "results.md").write_text(self.text() + "\n", encoding="utf-8")
        self.draw(self.folder / "study.png")

    def draw(self, path: Path) -> None:
        """Draw pre-training, fine-tuning and the comparison."""
        cells = self.cells("mean_per_class")
        wide = max(6.0, 1.6 * len(cells))
        figure = Figure(figsize=(8 + wide, 4.6), dpi=120, layout="constrained")
        source, target, bars = figure.subplots(1, 3, width_ratios=(4, 4, wide))
        plots.draw_scores(source, runlog.read(self.pretrained.folder))
        source.set_title("pre-training", color=plots.INK)
        plots.draw_losses(
            target,
            {
                method: [runlog.read(row.run) for row in self.rows if row.method == method]
                for method in (TRANSFER, SCRATCH)
            },
        )
        target.set_title("few-shot training", color=plots.INK)
        plots.draw_bars(
            bars,
            [f"{name}\n{shots} a class" for name, shots in cells],
            {method: [cell[method] for cell in cells.values()] for method in METHODS},
        )
        bars.set_title("mean per-class accuracy", color=plots.INK)
        figure.savefig(path)


def study(config: Study) -> Report:
    """Run a study, or go on with one; its folder gets config.json, every run, table and picture.

    Raises what `bit.train.run` raises; a Stopped then names the study's folder.
    """
    check_study(config)
    folder = Path(config.run.out or f"runs/transfer-{short_name(config.source)}")
    check_folder(folder, config, resume=config.run.resume)
    write_config(folder, config)
    try:
        pretrained = run(pretrain_config(config, folder), label="pre-training")
        report = Report(folder, [], pretrained)
        for target in config.targets:
            dataset = load_dataset(target, config.finetune.images)
            for shots in config.shots:
                report.rows.extend(_rows(config, folder, target, dataset, shots))
                report.write()
    except Stopped as stopped:
        raise Stopped(str(stopped), folder, stopped.signum) from None
    return report


def pretrain_config(config: Study, folder: Path) -> Config:
    """Return the study's pre-training run."""
    job = config.pretrain
    return Config(
        images=job.images,
        network=job.network,
        schedule=job.schedule,
        data=config.source,
        run=replace(config.run, out=str(folder / "pretrain"), resume=True),
    )


def finetune_config(
    config: Study, folder: Path, target: str, method: str, shots: int, lr: float, seed: int
) -> Config:
    """Return the study's run of one method on one target."""
    job, network = config.finetune, config.pretrain.network
    weights = folder / "pretrain" / "last.safetensors"
    return Config(
        images=replace(job.images, shots=shots, shots_seed=seed),
        network=replace(network, checkpoint=str(weights) if method == TRANSFER else None),
        schedule=replace(job.schedule, base_lr=lr),
        data=target,
        run=replace(
            config.run,
            out=str(folder / f"{short_name(target)}-{shots}" / f"{_slug(method)}-{lr:g}-{seed}"),
            resume=True,  # learning rates tried on validation images are run once
            seed=seed,
            eval_every=None,
            save_every=None,
            outputs="minimal",
        ),
    )


def check_study(config: Study) -> None:
    """Raise ValueError for what can't be run, before anything is."""
    if not config.targets:
        raise ValueError("targets is (); it must name at least one data set")
    names = [short_name(target) for target in config.targets]
    if len(set(names)) < len(names):
        raise ValueError(f"targets are called {', '.join(names)}; the names must differ")
    if config.seeds < 1:
        raise ValueError(f"seeds is {config.seeds}; it must be at least 1")
    for name in ("shots", "transfer_lrs", "scratch_lrs"):
        if not getattr(config, name):
            raise ValueError(f"{name} is (); it must hold at least one number")
    job = config.finetune
    if job.network != Network() or job.images.shots or job.schedule.base_lr:
        raise ValueError("finetune.model, .stem, .checkpoint, .shots and .base_lr are the study's")
    if job.images.val_fraction == 0:
        raise ValueError("finetune.val_fraction is 0; learning rates are chosen on these images")
    if config.run.outputs != "full":
        raise ValueError("outputs is 'minimal'; it must be full, as transfer needs the checkpoint")
    check(pretrain_config(config, Path()))
    for shots in config.shots:
        for lr in (*config.transfer_lrs, *config.scratch_lrs):
            check(finetune_config(config, Path(), config.targets[0], TRANSFER, shots, lr, 0))


def _rows(config: Study, folder: Path, target: str, dataset: Dataset, shots: int) -> Iterator[Row]:
    """Measure every method with every seed on one target and number of shots."""
    place = f"{short_name(target)}, {shots} a class"

    def train(method: str, lr: float, seed: int) -> Result:
        settings = finetune_config(config, folder, target, method, shots, lr, seed)
        return run(settings, dataset, label=f"{place}, {method}, lr {lr:g}, seed {seed}")

    def on_validation(method: str, lr: float) -> float:
        try:
            return train(method, lr, seed=0).val.mean_per_class
        except TrainingFailed:
            return -1.0  # too high a rate; if all are, the runs below say so

    for method, choices in ((TRANSFER, config.transfer_lrs), (SCRATCH, config.scratch_lrs)):
        lr = choices[0]
        if len(choices) > 1:
            lr = max(choices, key=lambda lr: on_validation(method, lr))
        for seed in range(config.seeds):
            result = train(method, lr, seed)
            yield _told(place, Row(
                target=short_name(target), shots=shots, seed=seed, method=method,
                images=result.test.images, top1=result.test.top1,
                mean_per_class=result.test.mean_per_class,
                setting=f"lr={lr:g}", seconds=result.seconds, run=result.folder,
            ))  # fmt: skip
    for method, classify in PIXEL_METHODS.items():
        for seed in range(config.seeds):
            began = time.monotonic()
            images = replace(config.finetune.images, shots=shots, shots_seed=seed)
            task = make_task(dataset, images)
            top1, mean_per_class, setting = classify(task, min(PIXEL_SIDE, task.native_size))
            yield _told(place, Row(
                target=short_name(target), shots=shots, seed=seed, method=method,
                images=len(task.test), top1=top1, mean_per_class=mean_per_class,
                setting=setting, seconds=time.monotonic() - began, run="",
            ))  # fmt: skip


def _told(place: str, row: Row) -> Row:
    print(
        f"{place}: {row.method}, seed {row.seed}: top-1 {row.top1:.1%}, mean per class "
        f"{row.mean_per_class:.1%}  {row.setting}",
        file=sys.stderr,
    )
    return row


def _slug(method: str) -> str:
    return method.replace(" ", "-")
