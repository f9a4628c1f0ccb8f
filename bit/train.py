"""The training loop, for pre-training and fine-tuning alike.

    python -m bit.train                                   the demo
    python -m bit.train pretrain --data PATH ...          train from random weights
    python -m bit.train finetune --data PATH --checkpoint FILE ...
    python -m bit.train --help                            everything else

A run leaves a folder: config.json (resolved), log.jsonl, tensorboard/, curves.png,
best.safetensors (by validation top-1, where there is a validation split), last.safetensors, and
result.json with the scores on the test images once it is finished. state.safetensors (with
`--engine xla` the folder state/) is what `--resume` reads; it goes when the run is finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsFloat

if __name__ == "__main__":
    from bit.packages import require

    require("python -m bit.train", "matplotlib", "safetensors", "tqdm", "tyro")

import torch
from torch import Tensor, nn

from bit import checkpoint, hyperrule, models, plan, state
from bit.config import Config, Run, check, resolve
from bit.data import Augment, Batch, Dataset, Split, TrainBatches
from bit.data.threads import Clock
from bit.device import Reading, check_device, is_short_of_memory, set_up
from bit.folder import check_folder, write_config
from bit.graphs import Eager, Graphed, Targets
from bit.interrupt import StopSignals
from bit.metrics import Metrics, autocast, evaluate
from bit.packages import missing
from bit.prefetch import LoadedBatch, loaded
from bit.runlog import RunLog
from bit.task import Task, check_same_classes, load_dataset, make_task
from bit_kernels.data import mixup_cross_entropy
from bit_kernels.optim import SGD

SIGMOID_HEAD_BIAS = -10.0  # at 0, 21,843 classes would start at a loss of 21,843 ln 2 an image


class TrainingFailed(Exception):
    """The run can't go on; the message names the update and what is left on disk."""


class Stopped(Exception):
    """A signal stopped the run after an update; its state is in `folder`."""

    def __init__(self, message: str, folder: Path, signum: int) -> None:
        super().__init__(message)
        self.folder, self.signum = folder, signum


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    folder: str
    steps: int
    test: Metrics  # of the last weights
    val: Metrics | None  # of the last weights
    best_step: int | None  # updates behind best.safetensors
    best_val_top1: float | None
    seconds: float  # over all sittings
    classes: tuple[str, ...]

    def write(self) -> None:
        """Write result.json into the run's folder, which marks the run as finished."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        checkpoint.write_atomically(
            Path(self.folder) / "result.json", lambda file: file.write(text.encode())
        )

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """Return the result of the run in `folder`, or None if it is not finished."""
        path = folder / "result.json"
        if not path.exists():
            return None
        tree = json.loads(path.read_text(encoding="utf-8"))
        for split in ("test", "val"):
            tree[split] = tree[split] and Metrics.from_dict(tree[split])
        return cls(**tree | {"classes": tuple(tree["classes"])})


def run(config: Config, dataset: Dataset | None = None, *, label: str = "train") -> Result:
    """Train as `config` says and return the scores on the test images.

    dataset: already loaded, in place of reading `config.data`. label: shown with the progress.
    Raises ValueError for a configuration that can't be run, TrainingFailed for a loss or weights
    that are not finite, for a checkpoint that can't be written and where memory is not enough,
    Stopped after SIGINT or SIGTERM.
    """
    check(config)
    engine = engine_of(config.run)
    task = make_task(dataset or load_dataset(config.data, config.images), config.images)
    weights = config.network.checkpoint
    trained = checkpoint.read_metadata(weights) if weights else {}
    config = resolve(
        config,
        num_examples=len(task.train),
        native_size=task.native_size,
        trained=trained.get("config"),
    )
    if config.network.head == "keep" and "classes" in trained:
        check_same_classes(trained["classes"], task.classes, config.data)
    folder = Path(config.run.out)
    check_folder(folder, config, resume=config.run.resume)
    if (finished := Result.read(folder)) is not None:
        return finished
    if (warning := engine.warning(config, len(task.classes))) is not None:
        print(f"{label}: {warning}", file=sys.stderr)
    trainer = engine(config, task)
    trainer.begin()  # only now, so that what can't be run leaves nothing behind
    start = trainer.progress
    with (
        StopSignals() as stop,
        RunLog(
            trainer.log_folder,
            total=config.schedule.steps,
            batch=config.schedule.batch,
            start=start.step,
            seconds=start.seconds,
            label=label,
            full=trainer.keeps_files,
        ) as log,
    ):
        if start.step:
            log.say(f"resumed after update {start.step} of {config.schedule.steps}")
        return trainer.fit(log, trainer.agreed(stop))


def engine_of(settings: Run) -> type[Trainer]:
    """What trains: `Trainer`, which is PyTorch's, or its counterpart on XLA.

    Raises ValueError for packages or a device that aren't here.
    """
    if settings.engine == "torch":
        check_device(settings.device, settings.dtype)
        return Trainer
    if absent := missing("jax", "flax", "optax", "orbax"):
        raise ValueError(
            f"engine is 'xla', and {' and '.join(absent)} can't be imported; it must be torch, or "
            "pip install 'bit-kernels[xla]'"
        )
    from bit.xla.train import XlaTrainer, check_devices

    check_devices(settings)
    return XlaTrainer


class Trainer:
    """One run: the network, the optimizer, the batches, and how far it has come.

    This one trains with PyTorch; `bit.xla.train.XlaTrainer` puts other methods in the place of
    those that say so.

    config: resolved. leads: of several processes, whether this one writes the run's files.
    state_name: of what a resume reads, in the run's folder.
    """

    leads = True
    state_name = state.FILE

    def __init__(self, config: Config, task: Task) -> None:
        images, schedule, settings = config.images, config.schedule, config.run
        self.config, self.task, self.folder = config, task, Path(settings.out)
        self.keeps_files = settings.outputs == "full"
        self.progress = state.Progress(images=len(task.train))
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.prepare()
        self.batches = TrainBatches(
            task.train,
            Augment(images.resize, images.crop, images.flip, images.augment == "inception"),
            batch_size=schedule.batch,
            seed=settings.seed,
            mixup_alpha=schedule.mixup,
            workers=settings.workers,
        )
        self.data_clock = Clock()

    # ---- what an engine does in its own way

    @staticmethod
    def warning(config: Config, classes: int) -> str | None:
        """What to tell before a run that seems too large; None if it doesn't."""
        return plan.warning(config, classes)

    def prepare(self) -> None:
        """Make the network, fresh or from a checkpoint, and the optimizer."""
        settings = self.config.run
        set_up(settings.device, deterministic=settings.deterministic)
        with self.memory_advice("a smaller model"):
            self.model = build(self.config, len(self.task.classes)).to(settings.device)
        self.optimizer = make_optimizer(self.model, self.config)
        self.passes: Eager | Graphed = Eager(self.loss_of)

    @property
    def log_folder(self) -> Path:
        """Where this process logs."""
        return self.folder

    def agreed(self, stop: StopSignals) -> StopSignals:
        """What stops all processes of a run, from what stops this one."""
        return stop

    def stream(self, start: int, total: int, log: RunLog) -> Iterator[Any]:
        """What `update` takes, for updates start to total - 1, prepared ahead."""
        self.model.train()
        schedule, settings = self.config.schedule, self.config.run
        if settings.cuda_graph:
            self.passes = self.capture(log)
        return loaded(self.batches.iterate(start, total), schedule.micro_batch, settings.device)

    def scored(self) -> dict[str, Any]:
        """The weights of now as arguments of `evaluate`: model, device and dtype."""
        settings = self.config.run
        return {"model": self.model, "device": settings.device, "dtype": settings.dtype}

    def weights(self) -> nn.Module:
        """The network with the weights of now, to be saved."""
        return self.model

    def has_state(self) -> bool:
        """Whether the run's folder has a state to go on from."""
        return (self.folder / state.FILE).exists()

    def load_state(self) -> state.Progress:
        """Take up the state in the run's folder."""
        return state.load(self.folder, self.model, self.optimizer)

    def save_state(self) -> None:
        """Write the state into the run's folder, whole or not at all; OSError if it can't."""
        state.save(self.folder, self.model, self.optimizer, self.progress)

    def drop_state(self) -> None:
        """Remove it, at the end of a run."""
        (self.folder / state.FILE).unlink(missing_ok=True)

    # ---- PyTorch's passes

    @cached_property
    def network(self) -> nn.Module:
        """The model as training calls it, compiled where the config says so."""
        if not self.config.run.compile:
            return self.model
        # Runs that this process has done before don't count towards the compiler's limit of forms.
        torch.compiler.reset()
        return torch.compile(self.model, dynamic=False, fullgraph=True)

    def begin(self) -> None:
        """Make the run's folder, and go on from the state in it, where the config says so."""
        if self.leads:
            write_config(self.folder, self.config)
        if self.config.run.resume and self.has_state():
            self.progress = self.load_state()
            if self.progress.images != (count := len(self.task.train)):
                raise ValueError(
                    f"resume is True, but data {self.config.data!r} now has {count} training "
                    f"images; the run was started with {self.progress.images}"
                )

    def fit(self, log: RunLog, stop: StopSignals) -> Result:
        """Train to the end of the schedule, evaluating and saving on the way."""
        schedule, settings, progress = self.config.schedule, self.config.run, self.progress
        start, total = progress.step, schedule.steps
        if start and start % settings.eval_every == 0 and progress.evaluated < start < total:
            self.evaluate(log, stop)  # a signal came before this evaluation
        batches = self.data_clock.timed(self.stream(start, total, log))
        for step, batch in enumerate(batches, start):
            if stop:
                break
            lr = hyperrule.learning_rate(
                step, schedule.base_lr, total, schedule.warmup, schedule.decays
            )
            loss = self.update(batch, lr)
            progress.step = step + 1
            log.train(progress.step, loss, lr, self.data_clock.lap())
            if progress.step < total and not stop:
                if progress.step % settings.eval_every == 0:
                    self.evaluate(log, stop)
                if progress.step % settings.save_every == 0:
                    self.save(log)
        return self.finish(log, stop)

    def capture(self, log: RunLog) -> Graphed:
        """Capture the passes over a micro-batch, before anything else is on the device's streams."""
        schedule, crop = self.config.schedule, self.config.images.crop
        images = min(schedule.micro_batch, schedule.batch)
        with self.memory_advice(self.smaller_micro_batch()):
            return Graphed(
                self.loss_of,
                self.optimizer,
                (images, 3, crop, crop),
                adds=schedule.batch >= 2 * images,
                device=self.config.run.device,
                say=log.say,
            )

    def loss_of(self, images: Tensor, targets: Targets) -> Tensor:
        """The share of a micro-batch in the loss of its update, which is the mean over the batch."""
        schedule, settings = self.config.schedule, self.config.run
        if not settings.channels_last:
            images = images.contiguous()  # they come channels-last, and a network follows them
        with autocast(settings.device, settings.dtype):
            logits = self.network(images)
        loss = mixup_cross_entropy(logits, targets, loss=schedule.loss, reduction="sum")
        return loss / schedule.batch

    def update(self, batch: Batch | LoadedBatch, lr: float) -> SupportsFloat:
        """Make one update and return its loss, the mean over the batch.

        Another engine may return what float() waits for, and raises TrainingFailed if it isn't
        finite. Here the weights stay as they are, and TrainingFailed is raised, if the loss is not
        finite. So an update waits once for the device: for the loss of its last forward, when the
        backward after that is on its way; the optimizer's step is then launched while the backward
        runs.
        """
        schedule = self.config.schedule
        total_loss: Tensor | float = 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with self.memory_advice(self.smaller_micro_batch()):
            for images, labels, partners in self.data_clock.timed(
                batch.micro(schedule.micro_batch)
            ):
                loss = self.passes.forward(images, (labels, partners, batch.lam))
                total_loss = total_loss + loss.detach()
                reading = Reading(total_loss)  # that of the last micro-batch counts
                self.passes.backward(loss)
            mean_loss = reading.read()
            if not math.isfinite(mean_loss):
                raise TrainingFailed(
                    f"the loss is {mean_loss} at update {self.progress.step + 1} (learning rate "
                    f"{lr:g}): stopped before it reached the weights; {self.on_disk()}"
                )
            self.optimizer.step()
        return mean_loss

    def score(self, split: Split, stop: StopSignals) -> Metrics | None:
        """Score the weights of now on a split; None if a signal came in between."""
        settings = self.config.run
        with self.memory_advice(f"--eval-batch of less than {settings.eval_batch}"):
            return evaluate(
                split=split,
                size=self.config.images.crop,
                batch=settings.eval_batch,
                loss=self.config.schedule.loss,
                workers=settings.workers,
                stop=lambda: bool(stop),
                **self.scored(),
            )

    def evaluate(self, log: RunLog, stop: StopSignals) -> Metrics | None:
        """Score and log the weights of now; keep them if they are the best on validation."""
        log.settle()
        progress, val = self.progress, self.task.val
        split, name = (self.task.test, "test") if val is None else (val, "val")
        scores = self.score(split, stop)
        if scores is None:
            return None
        log.evaluated(progress.step, name, scores)
        progress.evaluated = progress.step
        if val is not None and scores.top1 > progress.best_val_top1:
            self.write("best.safetensors", {"val": dataclasses.asdict(scores)})
            progress.best_val_top1, progress.best_step = scores.top1, progress.step
        return scores

    def finish(self, log: RunLog, stop: StopSignals) -> Result:
        """Save, score the last weights on the test images and write result.json."""
        progress = self.progress
        has_val = self.task.val is not None
        latest = test = None
        if not stop:
            latest = self.evaluate(log, stop)
        self.save(log)
        if not stop:
            test = self.score(self.task.test, stop) if has_val else latest
        if stop:
            raise Stopped(
                f"stopped by {signal.Signals(stop.signum).name} after update {progress.step} of "
                f"{self.config.schedule.steps}; {self.on_disk()}",
                self.folder,
                stop.signum,
            )
        if has_val:
            log.evaluated(progress.step, "test", test)
        has_best = progress.best_step > 0
        result = Result(
            folder=str(self.folder),
            steps=progress.step,
            test=test,
            val=latest if has_val else None,
            best_step=progress.best_step if has_best else None,
            best_val_top1=progress.best_val_top1 if has_best else None,
            seconds=log.seconds,
            classes=tuple(self.task.classes),
        )
        if self.leads:
            result.write()
        self.drop_state()
        return result

    def save(self, log: RunLog) -> None:
        """Write last.safetensors, and the state that a resume needs."""
        log.settle()
        self.progress.seconds = log.seconds
        self.write("last.safetensors", {})
        self.progress.saved = self.progress.step
        self.write(self.state_name, None)

    def write(self, name: str, metadata: dict[str, Any] | None) -> None:
        """Write a checkpoint with `metadata`, or the state if that is None.

        An older file stays whole until the new one is; weights that are not finite are not written.
        """
        if not self.keeps_files:
            return
        step = self.progress.step
        try:
            if metadata is None:
                self.save_state()
                return
            model = self.weights()
            if not self.leads:
                return
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                raise TrainingFailed(
                    f"weights are not finite after update {step}; {self.on_disk()}"
                )
            checkpoint.save(model, self.folder / name, self.describe() | metadata)
        except OSError as error:
            raise TrainingFailed(
                f"could not write {self.folder / name} after update {step}: "
                f"{error.strerror or error}; {self.on_disk()}"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint tells about itself beside the network."""
        images = self.config.images
        return {
            "step": self.progress.step,
            "classes": self.task.classes,
            "preprocessing": {
                "resize": images.resize,
                "crop": images.crop,
                "mean": 127.5,
                "std": 127.5,
            },
            "run": dataclasses.asdict(self.config),
        }

    @contextmanager
    def memory_advice(self, less: str) -> Iterator[None]:
        """Turn a device's lack of memory into a TrainingFailed. less: what would take less."""
        try:
            yield
        except RuntimeError as error:
            if not is_short_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
            raise TrainingFailed(
                f"out of memory on {self.config.run.device}: try {less}; python -m bit.plan says "
                f"what fits; {self.on_disk()} ({said})"
            ) from error

    def smaller_micro_batch(self) -> str:
        """Say what takes less memory in an update."""
        images = min(self.config.schedule.micro_batch, self.config.schedule.batch)
        if images > 1:
            return f"--micro-batch of less than {images}, which changes results by rounding only"
        return "a smaller model or crop, as --micro-batch is 1 already"

    def on_disk(self) -> str:
        """Say which checkpoint can be relied on."""
        if not self.keeps_files or not self.progress.saved:
            return "no checkpoint was written yet"
        return f"{self.folder / 'last.safetensors'} is of update {self.progress.saved}"


def build(config: Config, num_classes: int) -> nn.Module:
    """Make the network of a resolved config, on the CPU, with its checkpoint's weights if any.

    Fresh weights are drawn there, too, so that a seed gives the same ones on every device.
    """
    network, settings = config.network, config.run
    model = models.create(network.model, num_classes, stem=network.stem)
    if network.checkpoint:
        checkpoint.load(model, network.checkpoint, head=network.head)
    if config.schedule.loss == "sigmoid" and not (network.checkpoint and network.head == "keep"):
        nn.init.constant_(model.head.bias, SIGMOID_HEAD_BIAS)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return model.to(memory_format=layout)


def make_optimizer(model: nn.Module, config: Config) -> SGD:
    """SGD whose weight decay reaches kernels (convolutions and head), not gains and biases.

    It keeps the standardized weights of the convolutions, in the dtype that they are used in.
    """
    schedule = config.schedule
    return SGD(
        model.parameters(),
        lr=schedule.base_lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        model=model,
        dtype=torch.bfloat16 if config.run.dtype == "bfloat16" else None,
    )


if __name__ == "__main__":
    from bit.cli import main  # which imports this file once more, as bit.train

    sys.exit(main())
