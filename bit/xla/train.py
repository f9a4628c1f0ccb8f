"""The engine of `python -m bit.train ... --engine xla`: the same run, on JAX's devices.

Configuration, recipes, images, logs, curves and checkpoints are those of `bit.train`; weights start
from the same numbers. What differs is here: the update (bit/xla/step.py) runs on all devices of a
platform, each of which takes an equal part of the batch, `micro_batch` images at a time at most, and
the state for a resume is an orbax checkpoint in the folder state/.

On several hosts every process is started alike, with --distributed, on a folder that all of them
see. The first one writes the run's files; the others log into process-N in it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import torch
from jax.experimental import multihost_utils
from torch import Tensor, nn

from bit import data, models, state
from bit.config import Config, Run
from bit.data.threads import in_order
from bit.interrupt import StopSignals
from bit.runlog import RunLog
from bit.train import Trainer, TrainingFailed, build
from bit.xla import weights
from bit.xla.models import ResNetV2
from bit.xla.step import Batch, Training, mesh_of, put

STATE = "state"


class XlaTrainer(Trainer):
    """`Trainer` on XLA; what its methods are for stands there.

    devices: how many it takes of those that there are, None = all.
    """

    devices: int | None = None
    state_name = STATE

    @staticmethod
    def warning(config: Config, classes: int) -> str | None:
        return None  # of TPUs python -m bit.plan --topology tells, by compiling for minutes

    def prepare(self) -> None:
        schedule, settings = self.config.schedule, self.config.run
        # Drawn by PyTorch, or read by its readers; it serves to write checkpoints, too.
        self.model = build(self.config, len(self.task.classes))
        network = ResNetV2(
            self.config.network.model,
            len(self.task.classes),
            self.config.network.stem,
            self.dtype,
            standardized=True,
            remat=settings.remat,
        )
        self.training = Training(
            network,
            mesh_of(devices_of(settings.device)[: self.devices]),
            batch=schedule.batch,
            micro_batch=schedule.micro_batch,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            loss=schedule.loss,
            sharded=settings.sharded,
        )
        with self.memory_advice("a smaller model"):
            self.state = self.training.start(weights.from_torch(self.model))

    @property
    def dtype(self) -> jnp.dtype:
        """What the network computes in."""
        return jnp.dtype(self.config.run.dtype)

    @property
    def leads(self) -> bool:
        return jax.process_index() == 0

    @property
    def log_folder(self) -> Path:
        if self.leads:
            return self.folder
        folder = self.folder / f"process-{jax.process_index()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def agreed(self, stop: StopSignals) -> StopSignals | Agreed:
        return Agreed(stop) if jax.process_count() > 1 else stop

    def begin(self) -> None:
        # The others may still be asking whether the folder is free.
        self.meet("checked")
        super().begin()
        self.meet("begun")

    def meet(self, where: str) -> None:
        """Wait for the other processes."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(where)

    def smaller_micro_batch(self) -> str:
        images = self.training.passes[1]
        if images > 1:
            return f"--micro-batch of less than {images}, which changes results by rounding only"
        remat = "" if self.config.run.remat else "--remat, "
        return f"{remat}a smaller model or crop, or more devices, as each has 1 image at a time"

    def stream(self, start: int, total: int, log: RunLog) -> Iterator[Batch]:
        return in_order(self.placed, self.batches.iterate(start, total), workers=1)

    def placed(self, batch: data.Batch) -> Batch:
        """This process's images of a batch, padded and on its devices."""
        training, wide = self.training, self.training.dtype
        count = training.images // jax.process_count()
        first = count * jax.process_index()
        own = slice(first, min(first + count, len(batch.labels)))
        side = self.config.images.crop
        images = np.zeros((count, side, side, 3), np.float32)
        labels, partners = np.zeros((2, count), np.int32)
        present = np.zeros(count, wide)
        if (filled := own.stop - own.start) > 0:
            # In the memory that goes to the devices, as the data op writes channels last.
            _, *found = batch.collate(own, lambda shape, dtype: _as_torch(images[:filled]))
            labels[:filled], partners[:filled] = (labels.numpy() for labels in found)
            present[:filled] = 1
        local = Batch(images, labels, partners, np.full(count, batch.lam, wide), present)
        return jax.tree.map(
            lambda own, like: jax.make_array_from_process_local_data(
                like.sharding, own, like.shape
            ),
            local,
            training.described_batch(side),
        )

    def update(self, batch: Batch, lr: float) -> Loss:
        """Start one update; the devices are at it when this returns."""
        with self.memory_advice(self.smaller_micro_batch()):
            self.state, loss = self.training.update(
                self.state, batch, np.asarray(lr, self.training.dtype)
            )
        return Loss(self, loss, self.progress.step + 1, lr)

    def scored(self) -> dict[str, Any]:
        return {"model": Scored(self), "device": "cpu", "dtype": "float32"}

    def weights(self) -> models.ResNetV2:
        return weights.to_torch(self.training.params(self.state), self.model)

    def write(self, name: str, metadata: dict[str, Any] | None) -> None:
        error = None
        try:
            super().write(name, metadata)
        except TrainingFailed as failed:
            error = failed
        failed = np.array(error is not None)
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(failed).any()
        if failed:
            raise error or TrainingFailed(f"another process could not write {self.folder / name}")

    # ---- the state of a run

    @cached_property
    def checkpoints(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        return ocp.CheckpointManager((self.folder / STATE).absolute(), options=options)

    def has_state(self) -> bool:
        return (self.folder / STATE).is_dir() and self.checkpoints.latest_step() is not None

    def load_state(self) -> state.Progress:
        described = self.training.state
        found = self.checkpoints.restore(
            self.checkpoints.latest_step(),
            args=ocp.args.Composite(
                trained=ocp.args.StandardRestore(
                    {"weights": described.weights, "momentum": described.momentum}
                ),
                progress=ocp.args.JsonRestore(),
            ),
        )
        self.state = self.training.resume(**found.trained)
        return state.Progress(**found.progress)

    def save_state(self) -> None:
        trained = {"weights": self.state.weights, "momentum": self.state.momentum}
        # Numbered by saves: orbax refuses a number twice, and an update may be saved twice, when a
        # signal comes just then. The older one goes when the newer one is whole.
        number = self.checkpoints.latest_step()
        with _os_error():
            self.checkpoints.save(
                0 if number is None else number + 1,
                args=ocp.args.Composite(
                    trained=ocp.args.StandardSave(trained),
                    progress=ocp.args.JsonSave(dataclasses.asdict(self.progress)),
                ),
            )
            self.checkpoints.wait_until_finished()

    def drop_state(self) -> None:
        if "checkpoints" in self.__dict__:
            self.checkpoints.close()
            del self.checkpoints
        if self.leads:
            shutil.rmtree(self.folder / STATE, ignore_errors=True)


class Loss:
    """The loss of an update that the devices may still be at; float() waits for it.

    Reading it an update late keeps them busy: the next one is in their queue before this one ends.
    """

    def __init__(self, trainer: XlaTrainer, value: jax.Array, step: int, lr: float) -> None:
        value.copy_to_host_async()
        self._trainer, self._value, self._step, self._lr = trainer, value, step, lr

    def __float__(self) -> float:
        with self._trainer.memory_advice(self._trainer.smaller_micro_batch()):
            loss = float(self._value)
        if not np.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} at update {self._step} (learning rate {self._lr:g}); "
                f"{self._trainer.on_disk()}"
            )
        return loss


class Scored(nn.Module):
    """The weights of now, as `bit.metrics.evaluate` calls a network: PyTorch's images and logits."""

    def __init__(self, trainer: XlaTrainer) -> None:
        super().__init__()
        self._trainer = [trainer]  # not a part of this module

    def forward(self, images: Tensor) -> Tensor:
        (trainer,) = self._trainer
        training, count = trainer.training, len(images)
        devices = training.mesh.size
        # One shape, so that it is compiled once.
        rows = -(-max(count, trainer.config.run.eval_batch) // devices) * devices
        padded = np.zeros((rows, *images.shape[2:], 3), np.float32)
        padded[:count] = images.permute(0, 2, 3, 1).numpy()
        side = images.shape[2]
        like = jax.ShapeDtypeStruct(
            padded.shape, jnp.float32, sharding=training.described_batch(side).images.sharding
        )
        logits = training.predict(trainer.state, put(padded, like))
        return torch.from_numpy(np.array(logits[:count], np.float32))


class Agreed:
    """`StopSignals` of several processes: true in all of them once it is in one.

    All processes ask the same questions in the same order, and every EVERY-th is a meeting: at a
    meeting they wait for each other and for their devices, which should have work meanwhile.
    """

    EVERY = 8  # an update asks twice

    def __init__(self, own: StopSignals) -> None:
        self._own, self._said, self._asked = own, False, 0

    def __bool__(self) -> bool:
        self._asked += 1
        if not self._said and self._asked % self.EVERY == 0:
            self._said = bool(multihost_utils.process_allgather(np.array(bool(self._own))).any())
        return self._said

    @property
    def signum(self) -> int:
        return self._own.signum or signal.SIGTERM


@contextmanager
def _os_error() -> Iterator[None]:
    """What the system refuses orbax as OSError, without what orbax logs of it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
        logger.setLevel(level)


def check_devices(settings: Run) -> None:
    """Meet the other processes, if there are any, and find the devices; ValueError if none."""
    if settings.distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize()
    devices_of(settings.device)


def devices_of(name: str) -> list:
    """All of JAX's devices of a platform: cpu, cuda or tpu.

    Raises ValueError, with what JAX says, if there are none.
    """
    if not os.environ.get("JAX_PLATFORMS"):  # else JAX would start every platform that it has
        jax.config.update("jax_platforms", name if name == "cpu" else f"{name},cpu")
    try:
        return jax.devices(name)
    except RuntimeError as error:
        raise ValueError(
            f"device is {name!r}, of which JAX sees none: {str(error).splitlines()[0]}"
        ) from error


def _as_torch(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) as the data op takes it: (N, 3, H, W), channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)
