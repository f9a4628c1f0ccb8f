"""Images with labels: data sets by name or path, few-shot subsets, batches."""

from bit.data import digits, fashion_mnist, folder  # noqa: F401  (each registers itself)
from bit.data.batches import Augment, Batch, TrainBatches, eval_batches, eval_jobs
from bit.data.dataset import Dataset, Options, Split, load, names, register
from bit.data.images import CorruptImage
from bit.data.subsets import few_shot, split_off

__all__ = [
    "Augment",
    "Batch",
    "CorruptImage",
    "Dataset",
    "Options",
    "Split",
    "TrainBatches",
    "eval_batches",
    "eval_jobs",
    "few_shot",
    "load",
    "names",
    "register",
    "split_off",
]
