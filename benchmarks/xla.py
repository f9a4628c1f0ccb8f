"""The suite `xla`: what a TPU's compiler says of a training step, and both engines side by side.

`step/MODEL/TOPOLOGY`: `bit.xla` and the same step in plain JAX (xla_plain.py), 8 images of 224 px a
device, 21,843 classes, compiled for TPUs that aren't there. Cycles are the compiler's estimates, of
the work on a device; it has none for what goes between devices. Metrics:

  cycles_m, cycles_KIND_m  estimated for a step, in millions, and those of a kind of work
  peak_gib                 the most memory that a device needs
  summed_TYPE_gb           added up over the devices (gathered_TYPE_gb: sent to all)
  compile_s                seconds of compiling here, a process started included
  cycles_over_plain, peak_over_plain

`parity/DTYPE`: the largest difference of the losses of 20 updates, from the same weights on the same
batches (mixup, decay, micro-batches) between `bit.train`'s two engines, as a share of the loss
(`xla`), and between 1 device and 8 (`xla_8_devices`). `accuracy/...` (--full): top-1 on the test images by both engines.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.figure

from bit.packages import missing

if absent := missing("jax", "flax", "optax", "orbax"):
    raise ModuleNotFoundError(f"it needs {' and '.join(absent)}; pip install 'bit-kernels[xla]'")
# Before jax is there: 8 devices of a CPU, and no look for others.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import tables, xla_pallas, xla_plain  # noqa: E402
from benchmarks.accuracy import train  # noqa: E402
from benchmarks.report import Row  # noqa: E402
from benchmarks.runner import Count, Figure, Refusal  # noqa: E402
from bit import hyperrule, models  # noqa: E402
from bit.config import Config, Images, Network, Run, Schedule, resolve  # noqa: E402
from bit.task import Task, load_dataset, make_task  # noqa: E402
from bit.train import Trainer, make_optimizer  # noqa: E402
from bit.xla import plan, program, topology  # noqa: E402
from bit.xla.step import mesh_of  # noqa: E402
from bit.xla.topology import GiB  # noqa: E402
from bit.xla.train import XlaTrainer  # noqa: E402

CLASSES, IMAGES, SIDE = 21_843, 8, 224
TOPOLOGIES = ("v3:16x16", "v4:8x8x4", "v5e:16x16", "v5p:8x8x4", "v6e:16x16")
PALLAS_TOPOLOGIES = ("v3:2x2", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
STEPS = 20
PARITY = Config(
    data="digits",
    images=Images(crop=16, resize=20, val_fraction=0.0),
    network=Network(model="R14x0.25", stem="small"),
    schedule=Schedule(
        batch=24,
        micro_batch=5,
        steps=STEPS,
        base_lr=0.02,
        warmup=4,
        decays=(12,),
        weight_decay=1e-3,
        mixup=0.3,
    ),
    run=Run(outputs="minimal"),
)
ACCURACY = Config(
    data="fashion-mnist",
    images=Images(crop=28, resize=28, val_fraction=0.0),
    network=Network(model="R14x0.25", stem="small"),
    schedule=Schedule(batch=128, micro_batch=128, steps=400, base_lr=0.05, weight_decay=1e-4),
    run=Run(outputs="minimal"),
)
SEEDS = 3


def cases(
    *,
    threads: list[int],
    dtypes: list[str],
    quick: bool = False,
    compiled: bool = False,
    device: str = "cpu",
    full: bool = False,
) -> list[Count]:
    """Steps of R50x1, parity, ops in Pallas; with `full` also R152x4, and accuracy."""
    if device != "cpu":
        return []
    steps = [("R50x1", name) for name in TOPOLOGIES]
    if quick:
        steps = [("R14x0.5", "v3:2x2")]
    elif full:
        steps += [("R152x4", name) for name in TOPOLOGIES]
    found = []
    for model, name in steps:
        take = functools.partial(_step_figures, model, name)
        found.append(_count(f"step/{model}/{name}", "bfloat16", take))
    for dtype in ("float64", "float32"):
        found.append(_count(f"parity/{dtype}", dtype, functools.partial(_parity, dtype)))
    if not quick:
        found += xla_pallas.cases(PALLAS_TOPOLOGIES)
    if full:
        found.append(_count("accuracy/fashion-mnist", "float32", _accuracy))
    return found


def _count(name: str, dtype: str, take: Callable[[], Iterator[Figure | Refusal]]) -> Count:
    return Count("xla", name, dtype, 0, take)


def _exactly(provider: str, metric: str, value: float, unit: str) -> Figure:
    return Figure(provider, metric, value, value, value, unit)


# ---- compiled for TPUs


def compiled_step(model: str, name: str, provider: str) -> program.Program:
    """`provider`'s training step ("plain" or "bit"), compiled for the TPUs of `name`.

    Raises plan.TooLarge if it doesn't fit them.
    """
    described = topology.describe(name)
    question = plan.Question(name, model, CLASSES, IMAGES, SIDE)
    if provider == "bit":
        lowered = plan.training(question, described.devices).lower(SIDE)
    else:
        depth = int(re.match(r"R(\d+)", model)[1])
        base = models.shape_of(model)[1]
        mesh = mesh_of(described.devices)
        lowered = xla_plain.lower(mesh, depth, base, CLASSES, IMAGES, SIDE)
    return program.read(plan.compile_or_refuse(lowered, question))


def _step_figures(model: str, name: str) -> Iterator[Figure | Refusal]:
    found: dict[str, program.Program] = {}
    for provider in ("plain", "bit"):
        began = time.perf_counter()
        # In a process of its own: the compiler of a large step takes gigabytes and keeps some.
        command = [sys.executable, "-m", __name__, model, name, provider]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            fits = not last.startswith("does not fit")
            reason = f"exit code {done.returncode}: {last}" if fits else last
            yield Refusal(provider, reason, red=fits or provider == "bit")
            continue
        found[provider] = one = program.from_dict(json.loads(done.stdout))
        seconds = time.perf_counter() - began
        yield _exactly(provider, "cycles_m", one.total_cycles / 1e6, "million")
        for kind, cycles in one.cycles.items():
            yield _exactly(provider, f"cycles_{kind}_m", cycles / 1e6, "million")
        yield _exactly(provider, "peak_gib", one.peak / GiB, "GiB")
        for what, by_type in (("summed", one.summed_in), ("gathered", one.gathered_in)):
            for dtype, nbytes in by_type.items():
                yield _exactly(provider, f"{what}_{dtype}_gb", nbytes / 1e9, "GB")
        yield _exactly(provider, "compile_s", seconds, "s")
    if len(found) == 2:
        plain, ours = found["plain"], found["bit"]
        ratio = ours.total_cycles / plain.total_cycles
        yield _exactly("bit", "cycles_over_plain", ratio, "1")
        yield _exactly("bit", "peak_over_plain", ours.peak / plain.peak, "1")


# ---- both engines


class Wide(Trainer):
    """bit.train's engine on PyTorch in float64."""

    def prepare(self) -> None:
        super().prepare()
        self.model.double()
        self.optimizer = make_optimizer(self.model, self.config)

    def loss_of(self, images, targets):
        return super().loss_of(images.double(), targets)


class WideXla(XlaTrainer):
    """The one on XLA in float64."""

    dtype = jnp.dtype("float64")


class OneDevice(XlaTrainer):
    """On the first device alone."""

    devices = 1


class OneDeviceWide(WideXla, OneDevice):
    pass


def loss_curve(engine: type[Trainer], config: Config, task: Task) -> list[float]:
    """The losses of a run's updates, in this process and without files.

    config: with `data`'s task; it is resolved here.
    """
    config = resolve(config, num_examples=len(task.train), native_size=task.native_size)
    trainer = engine(config, task)
    schedule = config.schedule
    losses = []
    for step, batch in enumerate(trainer.stream(0, schedule.steps, None)):
        rate = hyperrule.learning_rate(
            step, schedule.base_lr, schedule.steps, schedule.warmup, schedule.decays
        )
        losses.append(float(trainer.update(batch, rate)))
    return losses


def parity(dtype: str) -> dict[str, float]:
    """The largest relative difference of losses: of the engines, and of 1 device and 8."""
    wide = dtype == "float64"
    task = make_task(load_dataset(PARITY.data, PARITY.images), PARITY.images)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(PARITY, run=replace(PARITY.run, out=folder, threads=1))
        theirs = loss_curve(Wide if wide else Trainer, config, task)
        config = replace(config, run=replace(config.run, engine="xla"))
        jax.config.update("jax_enable_x64", wide)  # jax.enable_x64 is of one thread
        try:
            one = loss_curve(OneDeviceWide if wide else OneDevice, config, task)
            eight = loss_curve(WideXla if wide else XlaTrainer, config, task)
        finally:
            jax.config.update("jax_enable_x64", False)
    return {"xla": _apart(theirs, one), "xla_8_devices": _apart(one, eight)}


def _apart(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def _parity(dtype: str) -> Iterator[Figure]:
    for provider, difference in parity(dtype).items():
        yield _exactly(provider, f"loss_difference_{STEPS}", difference, "1")


def _accuracy() -> Iterator[Figure]:
    task = make_task(load_dataset(ACCURACY.data, ACCURACY.images), ACCURACY.images)
    for engine, trainer in (("torch", Trainer), ("xla", OneDevice)):
        top1 = []
        for seed in range(SEEDS):
            run = replace(ACCURACY.run, seed=seed, engine=engine)
            top1.append(train(replace(ACCURACY, run=run), task, None, trainer)[1])
        yield Figure.of(engine, "top1", top1, "1")


# ---- what is told


def markdown(rows: Sequence[Row]) -> str:
    """The tables of the suite: steps by model and TPU, then the others."""
    steps = [row for row in rows if row.case.startswith("step/")]
    wanted = ("cycles_m", "cycles_over_plain", "peak_gib", "peak_over_plain")
    wanted += tuple(dict.fromkeys(r.metric for r in steps if "ed_" in r.metric[:9]))
    shown = [row for row in steps if row.metric in wanted]
    return "\n\n".join(
        tables.markdown(part) for part in (shown, [r for r in rows if r not in steps]) if part
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Estimated cycles by kind, plain over ours, a panel a model."""
    rows = [row for row in rows if re.fullmatch(r"cycles_[a-z]+_m", row.metric)]
    found = list(dict.fromkeys(row.case.split("/")[1] for row in rows))
    if not found:
        return
    figure = matplotlib.figure.Figure(figsize=(5 * len(found), 4), dpi=120, layout="constrained")
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#999999", "#dddddd")
    for model, axes in zip(found, figure.subplots(1, len(found), squeeze=False)[0]):
        bars = list(
            dict.fromkeys(
                (row.case.split("/")[2], row.provider)
                for row in rows
                if row.case.split("/")[1] == model
            )
        )
        below = [0.0] * len(bars)
        for kind, colour in zip(program.KINDS, colours):
            heights = [
                next(
                    row.p50
                    for row in rows
                    if row.case == f"step/{model}/{name}"
                    and row.provider == provider
                    and row.metric == f"cycles_{kind}_m"
                )
                for name, provider in bars
            ]
            axes.bar(range(len(bars)), heights, bottom=below, color=colour, label=kind)
            below = [a + b for a, b in zip(below, heights)]
        labels = [f"{name.split(':')[0]} {provider}" for name, provider in bars]
        axes.set_xticks(range(len(bars)), labels, rotation=60, ha="right", fontsize=8)
        axes.set_title(model, size=10)
        axes.set_ylabel("million cycles, estimated by the compiler")
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(model: str, name: str, provider: str) -> int:
    """Print a compiled step as JSON; 1, with the reason, if it doesn't fit."""
    try:
        print(json.dumps(dataclasses.asdict(compiled_step(model, name, provider))))
    except plan.TooLarge as error:
        print(f"does not fit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
