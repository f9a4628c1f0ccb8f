"""Score a checkpoint.

    python -m bit.evaluate runs/demo/pretrain/last.safetensors
    python -m bit.evaluate BiT-M-R50x1-CIFAR10.npz --data PATH --model R50x1 --size 128

A checkpoint of `bit.train` knows its network, classes, size and images, so the first form needs no
more; any of them can be given. A released .npz knows nothing, so the second form says it all: its
classes are taken to be in the order of the data set's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    from bit.packages import require

    require("python -m bit.evaluate", "matplotlib", "safetensors", "tqdm", "tyro")

import torch
import tyro

from bit import checkpoint, metrics, models
from bit.cli import guarded
from bit.config import Dtype, Images, Stem
from bit.device import check_device, set_up
from bit.task import check_same_classes, load_dataset, make_task

PROG = "python -m bit.evaluate"


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on the images of a data set, each resized to a square, without a crop."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """File of weights: .safetensors or a released .npz."""
    data: str | None = None
    """Data set: a registered name or the path of an image folder or archive; None = what the
    checkpoint was trained on."""
    root: str | None = None
    """Folder that holds the files of a registered data set, where its usual place won't do."""
    classes: tuple[str, ...] | None = None
    """Names of the classes to use; None = as in training."""
    split: Literal["test", "val", "train"] = "test"
    """Which images; val and train are cut as in training, from its seeds."""
    size: int | None = None
    """Side of the square, px; None = as in training."""
    model: str | None = None
    """R{depth}x{width}; None = as the checkpoint says."""
    stem: Stem | None = None
    """imagenet or small; None = as the checkpoint says, or imagenet."""
    loss: Literal["softmax", "sigmoid"] | None = None
    """None = as in training, or softmax."""
    batch: int = 64
    """Images a forward pass."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    dtype: Dtype = "float32"
    """float32, or bfloat16 for autocast."""
    threads: int | None = None
    """CPU threads of torch; None = torch's own choice."""
    workers: int = 1
    """Threads that prepare batches ahead."""
    per_class: bool = False
    """Print the accuracy of every class as well."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Evaluation:
    """The scores, and what was scored."""

    checkpoint: str
    data: str
    split: str
    size: int
    classes: list[str]
    counts: list[int]  # images of each class
    scores: metrics.Metrics

    def text(self, per_class: bool) -> str:
        """Return the scores as lines for a reader."""
        s = self.scores
        lines = [
            f"{self.checkpoint} on {self.data}: {s.images} {self.split} images at {self.size} px",
            f"top-1           {s.top1:8.2%}",
            f"top-5           {s.top5:8.2%}",
            f"mean per class  {s.mean_per_class:8.2%}",
            f"loss            {s.loss:8.4f}",
        ]
        if per_class:
            width = max(map(len, self.classes))
            lines.append("")
            for name, count, accuracy in zip(self.classes, self.counts, s.per_class):
                shown = "-" if accuracy is None else f"{accuracy:.2%}"
                lines.append(f"{name:{width}}  {count:6} images  {shown:>8}")
        return "\n".join(lines)


def evaluate(options: Evaluate) -> Evaluation:
    """Score as `options` says.

    Raises ValueError if the checkpoint's classes aren't the data set's, listing the differences,
    and if neither the checkpoint nor `options` tells what is needed.
    """
    check_device(options.device, options.dtype)
    known = checkpoint.read_metadata(options.checkpoint)
    trained, network = known.get("run", {}), known.get("config", {})
    data = _told("data", options.data, trained.get("data"))
    size = _told("size", options.size, known.get("preprocessing", {}).get("crop"))
    name = _told("model", options.model, network.get("name"))
    stem = options.stem or network.get("stem", "imagenet")
    loss = options.loss or trained.get("schedule", {}).get("loss", "softmax")
    for field in ("size", "batch", "threads", "workers"):
        value = getattr(options, field)
        if value is not None and value < 1:
            raise ValueError(f"{field} is {value}; it must be at least 1")

    images = _images(trained.get("images"))
    if options.data is not None and options.data != trained.get("data"):
        images = replace(images, root=None)
    if options.root is not None:
        images = replace(images, root=options.root)
    if options.classes is not None:
        images = replace(images, classes=options.classes)
    if options.split == "test":  # then nothing that only shapes the training images can fail
        images = replace(images, val_fraction=0.0, shots=None)
    task = make_task(load_dataset(data, images), images)
    if "classes" in known:
        check_same_classes(known["classes"], task.classes, data)
    split = {"test": task.test, "val": task.val, "train": task.train}[options.split]
    if split is None:
        raise ValueError("split is 'val', but the checkpoint was trained without one")

    if options.threads:
        torch.set_num_threads(options.threads)
    set_up(options.device, deterministic=False)
    model = models.create(name, len(task.classes), stem=stem)
    checkpoint.load(model, options.checkpoint)
    model.to(options.device, memory_format=torch.channels_last)
    scores = metrics.evaluate(
        model,
        split,
        size=size,
        batch=options.batch,
        loss=loss,
        device=options.device,
        dtype=options.dtype,
        workers=options.workers,
    )
    counts = split.counts().tolist()
    return Evaluation(options.checkpoint, data, options.split, size, task.classes, counts, scores)


def main(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 failed, 2 wrong."""
    options = tyro.cli(Evaluate, args=args, prog=PROG, config=(tyro.conf.FlagCreatePairsOff,))

    def command() -> None:
        result = evaluate(options)
        if options.json:
            print(json.dumps(dataclasses.asdict(result)))
        else:
            print(result.text(options.per_class))

    return guarded(PROG, command)


def _told(name: str, given: Any, known: Any) -> Any:
    if given is None and known is None:
        raise ValueError(f"{name} is None, and the checkpoint does not tell it; give --{name}")
    return known if given is None else given


def _images(trained: dict[str, Any] | None) -> Images:
    """Rebuild how a run chose its images, from JSON."""
    values = dict(trained or {"val_fraction": 0.0})
    if "classes" in values:
        values["classes"] = tuple(values["classes"])
    return Images(**values)


if __name__ == "__main__":
    sys.exit(main())
