"""A training step compiled for TPUs that aren't there: does it fit, what does it cost, and where.

`python -m bit.plan --topology v3:16x16 --recipe bit_m --model R152x4` is this; bit/plan.py has the
command line. Nothing is run and no network is asked. Memory is the compiler's own accounting, which
refuses what doesn't fit; cycles are its estimates, by which it chooses, and not measured. It has
none for what goes between devices: that is counted in bytes, and in time at the links' full rate.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, replace

import jax
import jax.extend
import jax.numpy as jnp

from bit import hyperrule
from bit.xla import program, topology
from bit.xla.models import ResNetV2, shapes
from bit.xla.step import Training, mesh_of
from bit.xla.topology import GiB


@dataclass(frozen=True)
class Recipe:
    """A pre-training of the paper, sections 3.1 and 3.2. images: of one epoch."""

    rule: str
    images: int
    classes: int
    loss: str


RECIPES = {
    "bit_s": Recipe("BiT-S", 1_281_167, 1000, "softmax"),  # ILSVRC-2012
    "bit_m": Recipe("BiT-M", 14_197_122, 21_843, "sigmoid"),  # ImageNet-21k
    "bit_l": Recipe("BiT-L", 300_000_000, 18_291, "sigmoid"),  # JFT-300M, about
}
RECIPE_BATCH = 4096

# Passes over a convolution's result, about, that GroupNorm can't do without. Forward: written, read
# for sums, read by what follows. Backward: read for sums and for the gradient; of its gradient,
# written, read for sums, read by the convolutions before it.
ACTIVATION_PASSES = 8


@dataclass(frozen=True)
class Question:
    """What is asked. batch: images a device. dtype: float32 or bfloat16."""

    topology: str
    model: str
    classes: int
    batch: int
    size: int = 224
    stem: str = "imagenet"
    dtype: str = "bfloat16"
    loss: str = "softmax"
    sharded: bool = True
    remat: bool = False

    def __str__(self) -> str:
        """The choices that can be made otherwise."""
        spread = (
            "weights and momenta spread" if self.sharded else "weights and momenta on every one"
        )
        again = ", units run again in backward (--remat)" if self.remat else ""
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{images} a device, {spread}{again}"


@dataclass(frozen=True)
class Answer:
    """A step that fits. parameters: of the network. flops: multiplications and additions of its
    convolutions and head on a device, three times those of the forward pass. moved: bytes that a
    step must read and write of a device's memory, about.
    """

    question: Question
    devices: int
    device: topology.Device
    parameters: int
    program: program.Program
    flops: float
    moved: float

    @property
    def seconds(self) -> float | None:
        """Estimated, of the work on a device; None where the clock isn't known."""
        clock = self.device.clock
        return clock and self.program.total_cycles / clock

    @property
    def matrix_floor(self) -> float:
        """Seconds of the matrix units at their full rate."""
        return self.flops / self.device.flops

    @property
    def memory_floor(self) -> float:
        """Seconds of the memory at its full rate."""
        return self.moved / self.device.bandwidth

    @property
    def link_seconds(self) -> float:
        """Seconds of the links at their full rate, as in a ring: each sends on one half of it."""
        share = (self.devices - 1) / self.devices
        return share * sum(c.sent for c in self.program.collectives) / self.device.links


class TooLarge(Exception):
    """A step that the compiler refuses. needed, limit: bytes of a device."""

    def __init__(self, question: Question, needed: float, limit: float) -> None:
        super().__init__(f"{needed / GiB:.2f} GiB of {limit / GiB:.2f}")
        self.question, self.needed, self.limit = question, needed, limit


def training(question: Question, devices: list) -> Training:
    """The step that is asked for, on these devices."""
    network = ResNetV2(
        question.model,
        question.classes,
        question.stem,
        jnp.dtype(question.dtype),
        standardized=True,
        remat=question.remat,
    )
    return Training(
        network,
        mesh_of(devices),
        batch=question.batch * len(devices),
        micro_batch=question.batch,
        momentum=hyperrule.MOMENTUM,
        weight_decay=hyperrule.PRETRAIN_WEIGHT_DECAY,
        loss=question.loss,
        sharded=question.sharded,
    )


def answer(question: Question) -> Answer:
    """Compile the step. Raises TooLarge, or ValueError for what there is no network or TPU for."""
    for name in ("batch", "size", "classes"):
        if getattr(question, name) < 1:
            raise ValueError(f"{name} is {getattr(question, name)}; it must be at least 1")
    described = topology.describe(question.topology)
    step = training(question, described.devices)
    forward = _forward_work(step.network, question.size)
    compiled = compile_or_refuse(step.lower(question.size), question)
    count, found = len(described.devices), program.read(compiled)
    weights = sum(math.prod(p.shape) for p in jax.tree.leaves(step.shapes))
    item = jnp.dtype(question.dtype).itemsize
    # Kernels are read forward and backward, gradients written and read; of the update's own reads
    # and writes a device has its share, where kernels are spread.
    spread = sum(
        math.prod(p.shape)
        for p, s in zip(jax.tree.leaves(step.shapes), jax.tree.leaves(step.spread))
        if s
    )
    kernels = weights * (3 * item + 8) + 16 * (weights - spread + spread / count)
    activations = forward.outputs * question.batch * item * ACTIVATION_PASSES
    return Answer(
        question,
        count,
        described.device,
        weights,
        found,
        flops=3 * forward.flops * question.batch,
        moved=kernels + activations,
    )


def compile_or_refuse(lowered: jax.stages.Lowered, question: Question) -> jax.stages.Compiled:
    """Compile, or raise TooLarge."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        amount = r"\(?([\d.]+)([KMG])\)?"
        words = rf"{amount} exceeds available HBM {amount}|[Uu]sed {amount} of {amount}"
        found = re.search(words, str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        units = {"K": 2**10, "M": 2**20, "G": GiB}
        parts = [part for part in found.groups() if part is not None]
        needed, limit = (float(parts[i]) * units[parts[i + 1]] for i in (0, 2))
        raise TooLarge(question, needed, limit) from error


def what_fits(question: Question) -> Answer | None:
    """The nearest choice that fits, tried in turn: spread, run again, fewer images a device."""
    choices = []
    if not question.sharded:
        choices.append(replace(question, sharded=True))
    last = choices[-1] if choices else question
    if not last.remat:
        choices.append(replace(last, remat=True))
    last = choices[-1] if choices else question
    while last.batch > 1:
        last = replace(last, batch=last.batch // 2)
        choices.append(last)
    for choice in choices:
        try:
            return answer(choice)
        except TooLarge:
            continue
    return None


@dataclass(frozen=True)
class _Work:
    flops: float
    outputs: int


def _forward_work(network: ResNetV2, size: int) -> _Work:
    """Of one image: operations of convolutions and head, and elements of their results."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    traced = jax.make_jaxpr(network.apply)({"params": shapes(network)}, images)
    flops, outputs = 0, 0

    def walk(jaxpr) -> None:
        nonlocal flops, outputs
        for equation in jaxpr.eqns:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)
            if equation.primitive.name in ("conv_general_dilated", "dot_general"):
                kernel, result = equation.invars[1].aval, equation.outvars[0].aval
                flops += 2 * result.size * kernel.size / kernel.shape[-1]
                outputs += result.size

    walk(traced.jaxpr)
    return _Work(flops, outputs)


# ---- what is told


def text(found: Answer, recipe: Recipe | None) -> str:
    """The answer as lines for a reader."""
    question, compiled, device = found.question, found.program, found.device
    total = compiled.total_cycles
    lines = [
        f"{question.model}, {question.classes:,} classes, {found.parameters:,} parameters, on "
        f"{found.devices} devices of {question.topology}",
        f"{question}; images of {question.size} px, {question.dtype}",
        "",
        f"memory       {compiled.peak / GiB:8.2f} GiB a device of {device.memory / GiB:.2f} "
        f"({compiled.arguments / GiB:.2f} weights, momenta and images)",
        f"cycles       {total / 1e6:8.2f} million a step, estimated by the compiler",
    ]
    lines += [
        f"  {kind:16} {cycles / 1e6:8.2f} {cycles / total:7.1%}"
        for kind, cycles in compiled.cycles.items()
    ]
    lines.append(
        f"matrix floor {found.matrix_floor * 1e3:8.1f} ms at {device.flops / 1e12:.3g} TFLOP/s"
    )
    lines.append(
        f"memory floor {found.memory_floor * 1e3:8.1f} ms at {device.bandwidth / 1e9:.3g} GB/s"
    )
    if found.seconds is None:
        lines.append(f"a step       unknown: {device.generation}'s clock isn't known here")
    else:
        lines.append(
            f"a step       {found.seconds * 1e3:8.1f} ms by its cycles at "
            f"{device.clock / 1e9:.2f} GHz, "
            f"{found.devices * question.batch / found.seconds:,.0f} images/s in all"
        )
    for moved in compiled.collectives:
        lines.append(
            f"{'summed' if moved.what == 'sum' else 'gathered':12} {moved.nbytes / 1e6:8.1f} MB "
            f"over the devices, in {moved.dtype}, by {moved.how}"
        )
    lines.append(
        f"links        {found.link_seconds * 1e3:8.1f} ms at their full rate, more where it isn't "
        f"reached; in part behind the work"
    )
    if recipe is not None:
        lines += ["", _recipe_line(found, recipe)]
    return "\n".join(lines)


def recipe_steps(found: Answer, recipe: Recipe) -> int:
    """Updates of a whole pre-training."""
    batch = found.devices * found.question.batch
    return hyperrule.pretrain_schedule(recipe.rule, recipe.images, batch)[0]


def _recipe_line(found: Answer, recipe: Recipe) -> str:
    steps = recipe_steps(found, recipe)
    line = (
        f"{recipe.rule}: {recipe.images:,} images, {hyperrule.PRETRAINING[recipe.rule][0]} epochs, "
        f"{steps:,} updates of {found.devices * found.question.batch}"
    )
    if found.seconds is None:
        return line
    least, most = (steps * s / 3600 for s in (found.seconds, found.seconds + found.link_seconds))
    return f"{line}: {least:.1f} hours by cycles, {most:.1f} if nothing that is sent is hidden"


def tree(found: Answer, recipe: Recipe | None) -> dict:
    """The answer for JSON: bytes, cycles, seconds."""
    steps = None if recipe is None else recipe_steps(found, recipe)
    return {
        **dataclasses.asdict(found.question),
        "fits": True,
        "devices": found.devices,
        "parameters": found.parameters,
        "memory": {
            "peak": found.program.peak,
            "arguments": found.program.arguments,
            "temporaries": found.program.temporaries,
            "limit": int(found.device.memory),
        },
        "cycles": {"total": found.program.total_cycles, **found.program.cycles},
        "collectives": [dataclasses.asdict(c) for c in found.program.collectives],
        "matrix_floor_s": found.matrix_floor,
        "memory_floor_s": found.memory_floor,
        "step_s": found.seconds,
        "links_s": found.link_seconds,
        "steps": steps,
        "recipe_s": steps and found.seconds and steps * found.seconds,
    }


def refusal(error: TooLarge, fitting: Answer | None) -> str:
    """By how much a step is too large, and what isn't."""
    question = error.question
    line = (
        f"{question.model} does not fit {question.topology}: {question} take at least "
        f"{error.needed / GiB:.2f} GiB of {error.limit / GiB:.2f}, "
        f"{(error.needed - error.limit) / GiB:.2f} too much"
    )
    if fitting is None:
        return f"{line}; neither --remat nor fewer images a device would fit"
    return f"{line}\nwould fit: {fitting.question}, {fitting.program.peak / GiB:.2f} GiB"


def picture(found: Answer, path: str) -> None:
    """Draw the cycles by kind and the memory, as a .png, .svg or .pdf."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    cycles, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    kinds = list(found.program.cycles)[::-1]
    bars = cycles.barh(kinds, [found.program.cycles[kind] / 1e6 for kind in kinds])
    total = found.program.total_cycles
    shares = [f" {found.program.cycles[kind] / total:.0%}" for kind in kinds]
    cycles.bar_label(bars, shares)
    cycles.set_xlabel("million cycles a step, estimated by the compiler")
    cycles.spines[["top", "right"]].set_visible(False)
    parts = {
        "weights, momenta,\nimages": found.program.arguments,
        "the rest": found.program.peak - found.program.arguments,
        "free": found.device.memory - found.program.peak,
    }
    below = 0.0
    for (name, nbytes), colour in zip(parts.items(), ("C0", "C1", "0.9"), strict=True):
        memory.bar([0], [nbytes / GiB], bottom=[below], color=colour, label=name)
        below += nbytes / GiB
    memory.set_xticks([])
    memory.set_ylabel("GiB a device")
    memory.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    memory.spines[["top", "right"]].set_visible(False)
    question = found.question
    figure.suptitle(
        f"{question.model}, {question.batch} images of {question.size} px a device, "
        f"{question.topology}"
    )
    figure.savefig(path, dpi=120)
