"""How much memory a training step takes, counted without taking it, and does it fit a device.

    python -m bit.plan --model R152x4 --batch 8 --size 224 --dtype bfloat16 --memory 80

exits with 0 if it fits, 1 if it doesn't, 2 for a wrong argument. `bit.train` asks the same of the
GPU that it is given.

    python -m bit.plan --topology v3:16x16 --recipe bit_m --model R152x4

compiles the step of `bit.train --engine xla` for TPUs that needn't be there, and says what the
compiler says of it: bit/xla/plan.py.

What autograd keeps is counted by running the forward on tensors that have shapes and storages but
no bytes (FakeTensorMode), with the optimizer that `bit.train` uses. What a pass takes for a moment
is estimated, and so are the libraries; `account` says how. torch.compile keeps other tensors, and
is not counted.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

if __name__ == "__main__":
    from bit.packages import require

    require("python -m bit.plan", "tyro")

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bit import models
from bit.config import Config, Dtype, Stem
from bit.device import is_cpu
from bit.metrics import autocast
from bit.prefetch import AHEAD
from bit_kernels.optim import SGD

PROG = "python -m bit.plan"
GB = 1e9

# Backward of a residual unit has at once: the gradient of its sum, the activation made again, that
# activation's gradient, and the gradient of its input.
PASSING_MAPS = 4
# Not known before a run. cuDNN's fastest algorithms may ask for much, and leave what isn't free.
CONVOLUTION_WORKSPACE = 1.0 * GB
# Of a process on a GPU: context, kernels, cuBLAS's and cuDNN's own.
CONTEXT = 1.0 * GB


# ---- what autograd keeps


@dataclass(frozen=True)
class Saved:
    """Bytes of distinct storages that a forward pass keeps for its backward.

    activations, weights: made by the pass. kept: there before it, parameters and buffers apart.
    largest: of the activations.
    """

    activations: int
    weights: int
    kept: int
    largest: int = field(default=0, compare=False)


def saved_bytes(
    network: nn.Module, images: Tensor, labels: Tensor, loss_of: Callable[[], Tensor]
) -> Saved:
    """What `network` keeps of a forward pass and the loss; of parameters nothing is counted.

    loss_of: runs the network on images and labels and returns the loss. It is called twice: what a
    second pass keeps in the same place wasn't made by the first. Of the rest, a tensor with as many
    elements as a kernel, and a first dimension that isn't the batch, is made of weights.
    """
    passes = [_packed(loss_of) for _ in range(2)]
    own = {
        _storage(tensor)
        for tensor in itertools.chain(network.parameters(), network.buffers(), (labels,))
    }
    sizes = {parameter.numel() for parameter in network.parameters() if parameter.ndim > 1}
    stays = {_storage(tensor) for tensor in passes[1][0]} | {_storage(images)}
    counted = {"activations": 0, "weights": 0, "kept": 0}
    seen, largest = set(own), 0
    for tensor in passes[0][0]:
        if _storage(tensor) in seen:
            continue
        seen.add(_storage(tensor))
        nbytes = tensor.untyped_storage().nbytes()
        if _storage(tensor) in stays and _storage(tensor) != _storage(images):
            kind = "kept"
        elif tensor.numel() in sizes and tensor.shape[0] != len(images):
            kind = "weights"
        else:
            kind, largest = "activations", max(largest, nbytes)
        counted[kind] += nbytes
    return Saved(**counted, largest=largest)


def _packed(loss_of: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """The tensors that one pass hands to autograd, and the loss, which holds on to them."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    return packed, loss


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def claim_cpu(network: nn.Module) -> None:
    """Inside FakeTensorMode: weights of the meta device become a CPU's, still without bytes.

    The ops then keep what their kernels keep, which is the same on every device.
    """
    for module in network.modules():
        for name, tensor in module.named_parameters(recurse=False):
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            setattr(module, name, nn.Parameter(fake))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))


# ---- a training step


@dataclass(frozen=True)
class Part:
    """Something that takes memory in a step. scales: with the images of a pass."""

    name: str
    nbytes: float
    scales: bool
    what: str


@dataclass(frozen=True)
class Plan:
    """Memory of a training step of `images` images a pass, in bytes, by part."""

    images: int
    parts: tuple[Part, ...]

    @property
    def total(self) -> float:
        return sum(part.nbytes for part in self.parts)

    @property
    def fixed(self) -> float:
        """What doesn't depend on the images."""
        return sum(part.nbytes for part in self.parts if not part.scales)

    def largest(self, capacity: float) -> int:
        """The most images a pass that fit into `capacity` bytes; 0 if not one does."""
        each = (self.total - self.fixed) / self.images
        return max(0, int((capacity - self.fixed) / each))


def account(
    model: str,
    images: int,
    side: int,
    *,
    classes: int = 1000,
    stem: str = "imagenet",
    dtype: str = "float32",
    device: str = "cuda",
) -> Plan:
    """Count what `bit.train` holds at the worst moment of a step.

    model, classes, stem: of `bit.models.create`. images: of a forward and backward pass, which is
    `micro_batch` where that is smaller than `batch`. side: of an image, px. dtype: float32 or
    bfloat16, for autocast. device: a GPU also holds the batches that are there ahead of their use,
    and a workspace for convolutions.

    An upper bound of what is counted, as gradients come while activations go. Estimated are what is
    alive for a moment in a pass (4 maps of the largest size, and the largest weight's gradient
    twice, in its dtype and the weight's) and, on a GPU, 1 GB of workspace for convolutions.

    Raises ValueError for a model that there is none of, or numbers below 1.
    """
    for name, value in (("images", images), ("side", side), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    with torch.device("meta"):
        network = models.create(model, classes, stem=stem).to(memory_format=torch.channels_last)
    with FakeTensorMode():
        claim_cpu(network)
        kept = torch.bfloat16 if dtype == "bfloat16" else None
        optimizer = SGD(network.parameters(), model=network, dtype=kept)
        batch = torch.empty(images, 3, side, side).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(images, dtype=torch.int64)
        saved = saved_bytes(
            network, batch, labels, functools.partial(_loss, network, batch, labels, dtype)
        )
        del optimizer  # had to live until here, as the standardized weights are its
        weights = sum(parameter.nbytes for parameter in network.parameters())
        largest = max(parameter.nbytes for parameter in network.parameters())
    parts = [
        Part("weights", weights, False, "float32"),
        Part("gradients", weights, False, "float32"),
        Part("momenta", weights, False, "float32"),
        Part("standardized weights", saved.kept, False, f"{dtype}, kept from step to step"),
        Part("cast weights", saved.weights, False, "of the head, for one pass"),
        Part("activations", saved.activations, True, "kept for backward, the images among them"),
        Part("passing maps", PASSING_MAPS * saved.largest, True, "estimate: 4 of the largest"),
        Part("passing gradients", 2 * largest, False, "estimate: the largest weight's, twice"),
    ]
    if not is_cpu(device):
        ahead = AHEAD * batch.nbytes
        parts += [
            Part("images ahead", ahead, True, f"{AHEAD} batches on the device before their use"),
            Part("workspace", CONVOLUTION_WORKSPACE, False, "estimate: of convolutions"),
        ]
    return Plan(images, tuple(parts))


def _loss(network: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    with autocast("cpu", dtype):
        logits = network(images)
    # Keeps what mixup_cross_entropy does, but doesn't look at labels, which have no values here.
    return F.cross_entropy(logits.float(), labels)


def warning(config: Config, classes: int) -> str | None:
    """What to tell before a run on a GPU that seems too small for it; None if it isn't, or a CPU.

    config: resolved. The GPU's free memory is asked for, which makes the process one of its users.
    """
    network, schedule, device = config.network, config.schedule, config.run.device
    if is_cpu(device):
        return None
    images = min(schedule.micro_batch, schedule.batch)
    free, _ = torch.cuda.mem_get_info(device)
    plan = account(
        network.model,
        images,
        config.images.crop,
        classes=classes,
        stem=network.stem,
        dtype=config.run.dtype,
        device=device,
    )
    if plan.total <= free:
        return None
    return (
        f"{device} has {free / GB:.1f} GB free, and this may take {plan.total / GB:.1f} GB with "
        f"micro_batch {images}; {advice(plan, free)}"
    )


def advice(plan: Plan, capacity: float) -> str:
    """Say which micro-batch would fit into `capacity` bytes."""
    fitting = plan.largest(capacity)
    if fitting:
        return f"--micro-batch {fitting} would fit"
    return f"no --micro-batch would fit: {plan.fixed / GB:.1f} GB don't depend on it"


# ---- the command line


@dataclass(frozen=True)
class Ask:
    """Say how much memory a training step takes, and whether it fits a device."""

    model: str = "R50x1"
    """R{depth}x{width}."""
    batch: int | None = None
    """Images a forward and backward pass: micro_batch of bit.train, or batch if that is less. None
    = 64; with --topology, of each device, 8, or its share of a recipe's 4096."""
    size: int = 224
    """Side of the images, px."""
    dtype: Dtype | None = None
    """float32, or bfloat16 for autocast with float32 weights; None = float32, and bfloat16 with
    --topology."""
    memory: float = 80.0
    """Of the device, GB of 10^9 bytes; a topology knows its own."""
    classes: int | None = None
    """Classes of the head; ImageNet-21k has 21843. None = the recipe's, or 1000."""
    stem: Stem = "imagenet"
    """imagenet or small."""
    device: str = "cuda"
    """cuda, or cpu for a run there, which needs no workspace."""
    topology: str | None = None
    """TPUs to compile the step for, GENERATION:AxB or AxBxC in chips: v2:2x2, v3:16x16, v4:8x8x8,
    v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1. Needs libtpu, a minute or more, no TPU."""
    recipe: Literal["bit_s", "bit_m", "bit_l"] | None = None
    """With --topology: a pre-training of the paper, for classes, loss, batch and whole time."""
    sharded: bool = True
    """With --topology: weights and momenta spread over the devices, as bit.train does it."""
    remat: bool = False
    """With --topology: run residual units again in backward."""
    json: bool = False
    """With --topology: print one JSON object instead of text."""
    picture: str | None = None
    """With --topology: draw it, too, into this .png, .svg or .pdf."""


def report(ask: Ask) -> tuple[str, bool]:
    """Return the table for `ask`, and whether it fits."""
    if not 0 < ask.memory < float("inf"):
        raise ValueError(f"memory is {ask.memory}; it must be more than 0 and finite")
    if ask.device not in ("cpu", "cuda"):
        raise ValueError(f"device is {ask.device!r}; it must be cpu or cuda")
    for name in ("recipe", "sharded", "remat", "json", "picture"):
        if (given := getattr(ask, name)) != getattr(Ask, name):
            raise ValueError(f"{name} is {given!r}; it is for --topology, which isn't given")
    batch, classes = _given(ask.batch, 64), _given(ask.classes, 1000)
    dtype = ask.dtype or "float32"
    plan = account(
        ask.model,
        batch,
        ask.size,
        classes=classes,
        stem=ask.stem,
        dtype=dtype,
        device=ask.device,
    )
    if ask.device == "cuda":
        context = Part("context", CONTEXT, False, "estimate: CUDA and its libraries")
        plan = Plan(plan.images, (*plan.parts, context))
    capacity, spare = ask.memory * GB, ask.memory * GB - plan.total
    width = max(len(part.name) for part in plan.parts)
    lines = [
        f"{ask.model}, {classes} classes, {batch} images of {ask.size} px a pass, {dtype}",
        "",
        *(f"{p.name:{width}}  {p.nbytes / GB:8.3f} GB  {p.what}" for p in plan.parts),
        f"{'total':{width}}  {plan.total / GB:8.3f} GB",
        "",
    ]
    if spare >= 0:
        lines.append(
            f"fits {ask.memory:g} GB, with {spare / GB:.1f} GB to spare; "
            f"{plan.largest(capacity)} images a pass would fit"
        )
    else:
        lines.append(
            f"does not fit {ask.memory:g} GB: {-spare / GB:.1f} GB too much; "
            f"{advice(plan, capacity)}"
        )
    return "\n".join(lines), spare >= 0


def topology_report(ask: Ask) -> tuple[str, bool]:
    """The same for TPUs that are described: see bit/xla/plan.py."""
    from bit.packages import missing

    if absent := missing("jax", "flax", "optax"):
        raise ValueError(
            f"topology is {ask.topology!r}, and {' and '.join(absent)} can't be imported; "
            "pip install 'bit-kernels[tpu]'"
        )
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is there isn't needed
    from bit.xla import plan as compiled
    from bit.xla import topology

    recipe = compiled.RECIPES[ask.recipe] if ask.recipe else None
    batch = ask.batch
    if batch is None and recipe is not None:
        devices = len(topology.describe(ask.topology).devices)
        batch = -(-compiled.RECIPE_BATCH // devices)
    question = compiled.Question(
        ask.topology,
        ask.model,
        classes=_given(ask.classes, recipe.classes if recipe else 1000),
        batch=_given(batch, 8),
        size=ask.size,
        stem=ask.stem,
        dtype=ask.dtype or "bfloat16",
        loss=recipe.loss if recipe else "softmax",
        sharded=ask.sharded,
        remat=ask.remat,
    )
    try:
        answer = compiled.answer(question)
    except compiled.TooLarge as error:
        fitting = compiled.what_fits(question)
        if not ask.json:
            return compiled.refusal(error, fitting), False
        tree = {"fits": False, "needed": error.needed, "limit": error.limit}
        tree["would_fit"] = None if fitting is None else compiled.tree(fitting, recipe)
        return json.dumps(tree), False
    if ask.picture:
        compiled.picture(answer, ask.picture)
    if ask.json:
        return json.dumps(compiled.tree(answer, recipe)), True
    return compiled.text(answer, recipe), True


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def main(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 fits, 1 doesn't, 2 wrong."""
    from bit.cli import guarded  # which imports bit.train, which imports this

    ask = tyro.cli(Ask, args=args, prog=PROG, config=(tyro.conf.FlagCreatePairsOff,))
    fits = []

    def command() -> None:
        text, fit = (topology_report if ask.topology else report)(ask)
        print(text)
        fits.append(fit)

    return guarded(PROG, command) or int(not fits[0])


if __name__ == "__main__":
    sys.exit(main())
