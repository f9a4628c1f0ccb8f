"""The scores of a network on the images of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bit.data import Split, eval_jobs
from bit.prefetch import on_device
from bit_kernels.data import mixup_cross_entropy


@dataclass(frozen=True)
class Metrics:
    """Scores as shares of 1; the loss is a mean over images."""

    images: int
    loss: float
    top1: float
    top5: float  # among the best min(5, classes) logits
    mean_per_class: float  # mean of `per_class` over the classes that have images
    per_class: tuple[float | None, ...]  # top-1 of each class; None for a class without images

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Metrics:
        """Rebuild from `dataclasses.asdict`, by way of JSON or not."""
        return cls(**tree | {"per_class": tuple(tree["per_class"])})


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return the context of a forward pass: plain for "float32", autocast for "bfloat16"."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    size: int,
    batch: int,
    loss: str = "softmax",
    device: str = "cpu",
    dtype: str = "float32",
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Metrics | None:
    """Score `model` on every image of `split`, each resized to size x size px, without a crop.

    Returns None if `stop()` became true on the way. The model is left in training or evaluation
    mode as it was.
    """
    was_training = model.training
    model.eval()
    losses, true, matches = [], [], []  # of every batch, left on the device until all are there
    try:
        jobs = eval_jobs(split, size, batch, workers=workers)
        for images, labels in on_device(jobs, device):
            if stop():
                return None
            with autocast(device, dtype):
                logits = model(images)
            targets = labels, labels, 1.0
            losses.append(mixup_cross_entropy(logits, targets, loss=loss, reduction="sum"))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            matches.append(best == labels[:, None])
            true.append(labels)
    finally:
        model.train(was_training)
    total_loss = sum(torch.stack(losses).tolist())
    true, matches = torch.cat(true).cpu(), torch.cat(matches).cpu()
    hit, classes = matches[:, 0], logits.shape[1]
    seen = torch.bincount(true, minlength=classes)
    right = torch.bincount(true[hit], minlength=classes)
    per_class = tuple(r / s if s else None for r, s in zip(right.tolist(), seen.tolist()))
    present = [accuracy for accuracy in per_class if accuracy is not None]
    return Metrics(
        images=len(true),
        loss=total_loss / len(true),
        top1=hit.sum().item() / len(true),
        top5=matches.sum().item() / len(true),
        mean_per_class=sum(present) / len(present),
        per_class=per_class,
    )
