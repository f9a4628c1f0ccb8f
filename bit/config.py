"""What can be set for one training run, what it may be, and what the rules make of it.

A `Config` is a tree of frozen dataclasses; every field is one command-line flag of the same name
(`--base-lr` for `base_lr`) and its docstring is the help text. A field that is None is filled in by
`resolve`, from the BiT-HyperRule or from a pre-training recipe; the resolved tree is what a run
saves as `config.json`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from bit import hyperrule

Rule = Literal["hyperrule", "BiT-S", "BiT-M", "BiT-L"]
Variant = Literal["paper", "released"]
Stem = Literal["imagenet", "small"]
Head = Literal["drop", "keep"]
Loss = Literal["softmax", "sigmoid"]
Dtype = Literal["float32", "bfloat16"]
AugmentKind = Literal["crop", "inception"]
Outputs = Literal["full", "minimal"]
Engine = Literal["torch", "xla"]

Flat = tyro.conf.arg(name="")  # a section's flags carry no prefix: --crop, not --images.crop


@dataclass(frozen=True)
class Images:
    """Which of the images, and how they are prepared."""

    root: str | None = None
    """Folder that holds the files of a registered data set, where its usual place won't do."""
    strict: bool = False
    """Stop at the first image file that can't be decoded, instead of reporting and skipping it."""
    test_fraction: float = 0.2
    """Share of the images that becomes the test split, where a folder has none of its own."""
    split_seed: int = 0
    """Seed of the test and validation splits. It is apart from `seed`, so that runs with other
    seeds are scored on the same images."""
    classes: tuple[str, ...] = ()
    """Names of the classes to use, in any order; all of them if none is given."""
    val_fraction: float = 0.1
    """Share of the training images set aside for validation, on which the best checkpoint is
    chosen; 0 = no validation split, and no best checkpoint."""
    shots: int | None = None
    """Training images a class, drawn after the validation split; None = all that there are."""
    shots_seed: int = 0
    """Seed of the few-shot draw."""
    augment: AugmentKind = "crop"
    """crop = resize to a square, then cut a random one (transfer); inception = random area and
    aspect of the raw image (pre-training)."""
    resize: int | None = None
    """Side of the square that an image is resized to before the crop, px; None = by the rule."""
    crop: int | None = None
    """Side of what the network sees, px; evaluation resizes to it directly; None = by the rule."""
    flip: bool = True
    """Mirror half of the training images; off where left and right carry meaning."""


@dataclass(frozen=True)
class Network:
    """Which network, and from which weights it starts."""

    model: str | None = None
    """R{depth}x{width}, for instance R50x1 or R26x0.25; None = as in the checkpoint."""
    stem: Stem | None = None
    """imagenet = 7x7 stride 2 and a pool; small = 3x3 stride 1, for images of about 32 px; None =
    as in the checkpoint, or imagenet."""
    checkpoint: str | None = None
    """Weights to start from, .safetensors or a released .npz; None = random ones."""
    head: Head = "drop"
    """What becomes of the checkpoint's head: drop = a new one, all zeros; keep = the classes must
    be the same."""


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and on what loss."""

    rule: Rule = "hyperrule"
    """What fills in the fields left at None: the fine-tuning HyperRule or a pre-training recipe."""
    variant: Variant = "paper"
    """Where the paper and its released code differ: paper = 384 px (R152x4 480), short runs decay
    at 150, 300, 450; released = 480 px, 200, 300, 400."""
    batch: int = hyperrule.BATCH
    """Images an update."""
    micro_batch: int = 64
    """Images a forward and backward pass; gradients are accumulated over the batch. Memory depends
    on it, the result only by rounding."""
    steps: int | None = None
    """Updates; another number than the rule's keeps the shape of its schedule; None = by rule."""
    epochs: float | None = None
    """Length in passes over the training images, in place of `steps`."""
    base_lr: float | None = None
    """Learning rate after warm-up; None = 0.003 (HyperRule) or 0.03 * batch / 256 (recipes)."""
    warmup: int | None = None
    """Updates of linear warm-up; None = by the rule."""
    decays: tuple[int, ...] | None = None
    """Updates after which the learning rate is divided by 10; None = by the rule."""
    momentum: float = hyperrule.MOMENTUM
    """Momentum of SGD."""
    weight_decay: float | None = None
    """L2 penalty on convolution and head weights, added to the gradient before momentum; None =
    0 (HyperRule) or 1e-4 (recipes)."""
    mixup: float | None = None
    """Alpha of mixup's Beta(alpha, alpha), 0 = off; None = by the rule, and 0 for recipes."""
    loss: Loss = "softmax"
    """softmax = one class an image; sigmoid = independent classes, summed (ImageNet-21k), with a
    head bias of -10 at the start."""


@dataclass(frozen=True)
class Run:
    """Where it runs, and what it leaves behind."""

    out: str | None = None
    """Folder of the run; None = runs/RULE-DATA-MODEL."""
    resume: bool = False
    """Go on with the run in `out` where it stopped; start it if it never did."""
    seed: int = 0
    """Seed of the initial weights, of the order of the images, of crops, flips and mixup."""
    eval_every: int | None = None
    """Updates between evaluations on the validation split (the test split where there is none);
    None = a tenth of the run, or all of it with minimal outputs."""
    save_every: int | None = None
    """Updates between checkpoints; None = as often as evaluations."""
    eval_batch: int = 64
    """Images a forward pass in evaluation."""
    engine: Engine = "torch"
    """What trains: torch, or xla, which is JAX, on all devices of a kind at once."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; with engine xla cpu, cuda or tpu."""
    dtype: Dtype = "float32"
    """float32, or bfloat16 for autocast with float32 weights (NVIDIA GPUs from Ampere on; with
    engine xla anywhere). float32 on a GPU is torch's default there: convolutions in TF32, matrix
    products in full precision. On a TPU it is JAX's: factors are rounded to bfloat16 on the way into
    the matrix unit, unless JAX_DEFAULT_MATMUL_PRECISION=highest is set."""
    sharded: bool = True
    """With engine xla: spread weights and momenta over the devices, each of which updates its part."""
    remat: bool = False
    """With engine xla: keep of a residual unit its input alone, and run it again in backward."""
    distributed: bool = False
    """With engine xla: this is one process of several, one a host of a TPU pod, which find each
    other by jax.distributed; micro_batch is of each device."""
    channels_last: bool = True
    """Keep activations and weights channels-last in memory."""
    compile: bool = False
    """Train through torch.compile; evaluation does without. The first update takes longer, memory
    differs from what bit.plan says."""
    cuda_graph: bool = False
    """Capture forward and backward of a micro-batch once and replay them, for networks or
    micro-batches so small that a GPU waits for Python. A last micro-batch of another size runs
    without. Takes its memory for the whole run."""
    deterministic: bool = False
    """On a GPU, take only convolution algorithms that give the same bits every time, in place of
    the fastest by trial: then a resumed run is bit-identical there too, as on the CPU."""
    threads: int | None = None
    """CPU threads of torch; None = torch's own choice."""
    workers: int = 1
    """Threads that prepare batches ahead."""
    outputs: Outputs = "full"
    """full = checkpoints, TensorBoard and pictures; minimal = only config.json, log.jsonl and
    result.json, for the many short runs of a study (which then can't be resumed midway)."""


@dataclass(frozen=True)
class Job:
    """What is trained and how, apart from the data and the machine."""

    images: Annotated[Images, Flat] = field(default_factory=Images)
    network: Annotated[Network, Flat] = field(default_factory=Network)
    schedule: Annotated[Schedule, Flat] = field(default_factory=Schedule)


@dataclass(frozen=True)
class Config(Job):
    """One training run."""

    data: str = "digits"
    """Data set: a registered name (digits, fashion-mnist) or the path of an image folder, or of a
    .tar, .tar.gz, .tar.xz or .zip of one: train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE."""
    run: Annotated[Run, Flat] = field(default_factory=Run)


FINETUNE = Config()
PRETRAIN = Config(
    images=Images(augment="inception"),
    network=Network(model="R50x1"),
    schedule=Schedule(rule="BiT-S", batch=256),
)


def check(config: Config) -> None:
    """Raise ValueError, naming the field, what it is and what it may be, if a value is impossible.

    What depends on the images (enough for the shots, known classes) is checked when they are read.
    """
    images, schedule, run = config.images, config.schedule, config.run
    for section, name, choices in (
        (images, "augment", AugmentKind),
        (config.network, "head", Head),
        (schedule, "rule", Rule),
        (schedule, "variant", Variant),
        (schedule, "loss", Loss),
        (run, "dtype", Dtype),
        (run, "outputs", Outputs),
        (run, "engine", Engine),
    ):
        allowed = get_args(choices)
        _require(getattr(section, name) in allowed, section, name, f"one of {', '.join(allowed)}")
    stem = config.network.stem
    _require(stem in (None, *get_args(Stem)), config.network, "stem", "imagenet, small or None")

    _require(bool(config.data), config, "data", "a data set's name or a path")
    _require(0 < images.test_fraction < 1, images, "test_fraction", "between 0 and 1")
    _require(0 <= images.val_fraction < 1, images, "val_fraction", "at least 0 and less than 1")
    _require(len(images.classes) != 1, images, "classes", "none or at least two names")
    _require(len(set(images.classes)) == len(images.classes), images, "classes", "all different")

    for section, name, least in (
        (images, "shots", 1),
        (images, "crop", 1),
        (images, "resize", 1),
        (images, "split_seed", 0),
        (images, "shots_seed", 0),
        (schedule, "batch", 1),
        (schedule, "micro_batch", 1),
        (schedule, "steps", 1),
        (schedule, "warmup", 0),
        (schedule, "base_lr", 0),
        (schedule, "weight_decay", 0),
        (schedule, "mixup", 0),
        (run, "seed", 0),
        (run, "eval_every", 1),
        (run, "save_every", 1),
        (run, "eval_batch", 1),
        (run, "threads", 1),
        (run, "workers", 1),
    ):
        value = getattr(section, name)
        possible = value is None or least <= value < math.inf
        _require(possible, section, name, f"at least {least} and finite")
    if images.crop and images.resize:
        _require(images.resize >= images.crop, images, "resize", f"at least crop ({images.crop})")
    if schedule.epochs is not None:
        _require(0 < schedule.epochs < math.inf, schedule, "epochs", "more than 0 and finite")
        _require(schedule.steps is None, schedule, "steps", "None when epochs is given")
    _require(0 <= schedule.momentum < 1, schedule, "momentum", "at least 0 and less than 1")
    decays = schedule.decays or ()
    _require(
        list(decays) == sorted(set(decays)) and min(decays, default=0) >= 0,
        schedule,
        "decays",
        "ascending update numbers, 0 or more",
    )
    if run.engine == "xla":
        _require(run.device in ("cpu", "cuda", "tpu"), run, "device", "cpu, cuda or tpu")
        for name in ("compile", "cuda_graph", "deterministic"):
            _require(not getattr(run, name), run, name, "False with engine xla, which compiles all")
        _require(
            run.channels_last, run, "channels_last", "True with engine xla, which has no other"
        )
        return
    _require(
        re.fullmatch(r"cpu|cuda(:\d+)?", run.device) is not None, run, "device", "cpu, cuda, cuda:N"
    )
    _require(not run.cuda_graph or run.device != "cpu", run, "cuda_graph", "False on device cpu")
    for name in ("remat", "distributed"):
        _require(not getattr(run, name), run, name, "False with engine torch")


def resolve(
    config: Config, *, num_examples: int, native_size: int, trained: dict[str, Any] | None = None
) -> Config:
    """Return `config` with every field that the rules decide filled in.

    num_examples: training images actually used. native_size: typical side of the raw images, px.
    trained: `create()` arguments of the checkpoint's network, where there is one that tells.
    """
    trained = trained or {}
    model = config.network.model or trained.get("name")
    if model is None:
        raise ValueError(
            "model is None and no checkpoint tells it; it may be R{depth}x{width}, such as R50x1"
        )
    network = replace(
        config.network, model=model, stem=config.network.stem or trained.get("stem", "imagenet")
    )
    schedule = _resolve_schedule(config.schedule, num_examples)
    images = _resolve_resolution(config.images, schedule, native_size, model)
    parts = 10 if config.run.outputs == "full" else 1
    every = config.run.eval_every or max(1, schedule.steps // parts)
    run = replace(
        config.run,
        out=config.run.out or f"runs/{schedule.rule}-{short_name(config.data)}-{model}",
        eval_every=every,
        save_every=config.run.save_every or every,
    )
    return Config(images=images, network=network, schedule=schedule, data=config.data, run=run)


def short_name(data: str) -> str:
    """Name of a data set for a folder: the last part of a path, without the archive's suffixes."""
    return re.sub(r"\.(tar|tar\.\w+|tgz|zip)$", "", Path(data).name) or "data"


def _resolve_schedule(schedule: Schedule, num_examples: int) -> Schedule:
    total = schedule.steps
    if schedule.epochs is not None:
        total = max(1, round(schedule.epochs * num_examples / schedule.batch))
    if schedule.rule == "hyperrule":
        base_lr, weight_decay = hyperrule.BASE_LR, 0.0
        mixup = hyperrule.mixup_alpha(num_examples)
        if total is None:
            total = hyperrule.steps(num_examples)
            warmup = hyperrule.warmup(num_examples)
            decays = hyperrule.boundaries(num_examples, schedule.variant)
        else:
            warmup, decays = hyperrule.scaled(total, num_examples)
    else:
        base_lr = hyperrule.pretrain_base_lr(schedule.batch)
        weight_decay, mixup = hyperrule.PRETRAIN_WEIGHT_DECAY, 0.0
        total, warmup, decays = hyperrule.pretrain_schedule(
            schedule.rule, num_examples, schedule.batch, total
        )
    return replace(
        schedule,
        steps=max(1, total),
        epochs=None,
        base_lr=_given(schedule.base_lr, base_lr),
        warmup=_given(schedule.warmup, warmup),
        decays=_given(schedule.decays, decays),
        weight_decay=_given(schedule.weight_decay, weight_decay),
        mixup=_given(schedule.mixup, mixup),
    )


def _resolve_resolution(images: Images, schedule: Schedule, native_size: int, model: str) -> Images:
    if images.crop is not None:
        resize, crop = hyperrule.scaled_resolution(images.crop)
    elif schedule.rule == "hyperrule":
        resize, crop = hyperrule.resolution(native_size, native_size, schedule.variant, model)
    else:
        resize, crop = hyperrule.scaled_resolution(hyperrule.PRETRAIN_CROP)
    resize = _given(images.resize, resize)
    _require(resize >= crop, replace(images, resize=resize), "resize", f"at least crop ({crop})")
    return replace(images, resize=resize, crop=crop)


def _given(value, otherwise):
    return otherwise if value is None else value


def _require(ok: bool, section: Any, name: str, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {getattr(section, name)!r}; it must be {allowed}")
