"""Images to batches: a seeded stream for training, a plain one for evaluation.

A training batch is a pure function of (seed, step), so a resumed run needs to know nothing but the
step, and threads may prepare batches in any order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from bit.data.dataset import Split
from bit.data.images import resized_crop
from bit.data.threads import in_order
from bit_kernels.functional import mixup

# Memory for a tensor of a shape and dtype; channels_last if it has four dimensions.
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
# Makes a batch: its images in memory from an `Empty`, if it is given one, and tensors of labels.
Job = Callable[..., tuple[Tensor, ...]]

# Last word of the seeds (seed, step, _), one a purpose. Never 0: numpy pads seeds with zeros, and
# (seed, step, 0) would draw what the order of epoch `step` draws.
_AUGMENT, _MIXUP = 1, 2
_INCEPTION_TRIES = 10


@dataclass(frozen=True)
class Augment:
    """How a training image becomes a square of `crop` x `crop` pixels.

    Either resized to `resize` x `resize` pixels (bilinear, antialiased, aspect ignored) and cropped
    at random, as the BiT-HyperRule does; or, with `inception`, a random rectangle of the raw image
    of 5 to 100 % of its area and 3:4 to 4:3 in aspect (its logarithm uniform), resized, as in
    pre-training (paper, section 3.1). Then, with `flip`, mirrored half of the time.
    """

    resize: int  # px; not used by inception
    crop: int  # px
    flip: bool = True  # not for classes that differ by left and right
    inception: bool = False

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise ValueError(f"crop is {self.crop} px; it must be at least 1")
        if self.resize < self.crop and not self.inception:
            raise ValueError(f"resize is {self.resize} px; it must be at least crop, {self.crop}")


@dataclass
class Batch:
    """One training batch as a recipe, which `micro` carries out."""

    images: list[np.ndarray]  # B of uint8 (H, W, 3), whole
    labels: np.ndarray  # int64 (B,)
    crop: int  # px, the side of what is cut out of each image
    corners: np.ndarray  # int64 (B, 2): top and left of it, px
    flips: np.ndarray  # bool (B,): mirrored or not
    partner: np.ndarray | None = None  # int64 (B,): image i is mixed with image partner[i]
    lam: float = 1.0  # weight of image i, 1 - lam is the partner's

    def micro(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Cut the batch into micro-batches of `size` (the last may be smaller).

        Partners come from the whole batch, so no image depends on `size`. Yields what `collate`
        returns.
        """
        return (self.collate(part) for part in self.parts(size))

    def parts(self, size: int) -> list[slice]:
        """Which images each micro-batch holds."""
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1")
        return [slice(start, start + size) for start in range(0, len(self.labels), size)]

    def collate(self, part: slice, empty: Empty | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Make one micro-batch. empty: gives the memory for its images; None = new memory.

        Returns:
            x: float32 (b, 3, crop, crop), channels_last, (v - 127.5) / 127.5, mixed
            labels_a: int64 (b,), of the images
            labels_b: int64 (b,), of their partners; without mixup `labels_a` again
        """
        labels = torch.from_numpy(self.labels)
        own = np.arange(len(self.labels))[part]
        others = own if self.partner is None else self.partner[own]
        taken = own if self.partner is None else np.concatenate([own, others])
        x = mixup(
            [self.images[i] for i in taken],
            self.lam,
            None if self.partner is None else len(own) + np.arange(len(own)),
            crop=(self.crop, self.crop),
            corners=self.corners[taken],
            flips=self.flips[taken],
            out=empty and empty((len(own), 3, self.crop, self.crop), torch.float32),
        )
        return x, labels[own], labels[others]


class TrainBatches:
    """The endless stream of training batches of one run.

    Epoch e visits all images in the order `default_rng((seed, e)).permutation`, and batches run
    across its end; a batch larger than the set holds images several times, differently augmented.

    Args:
        split: what to train on.
        augment: how an image becomes a square.
        batch_size: images a step.
        seed: of order, augmentation and mixup; not negative.
        mixup_alpha: one lambda a step is drawn from Beta(alpha, alpha), and partners are a random
            permutation of the batch (Zhang et al., arXiv 1710.09412); 0 is without mixup.
        workers: threads that prepare batches in `iterate`.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment,
        *,
        batch_size: int,
        seed: int,
        mixup_alpha: float = 0.0,
        workers: int = 1,
    ):
        if len(split) == 0:
            raise ValueError("split has no images; it must have at least 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha is {mixup_alpha}; it must be at least 0")
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        self.split, self.augment, self.batch_size = split, augment, batch_size
        self.seed, self.mixup_alpha, self.workers = seed, mixup_alpha, workers
        self._squares = None if augment.inception else split.squares(augment.resize)
        self._order = lru_cache(maxsize=4)(self._permutation)

    def indices(self, step: int) -> np.ndarray:
        """Which images of the split step `step` takes: int64 (batch_size,)."""
        count = len(self.split)
        first = step * self.batch_size
        epochs = range(first // count, (first + self.batch_size - 1) // count + 1)
        stream = np.concatenate([self._order(epoch) for epoch in epochs])
        start = first - epochs[0] * count
        return stream[start : start + self.batch_size]

    def batch(self, step: int) -> Batch:
        """Batch number `step`, counted from 0."""
        indices = self.indices(step)
        rng = np.random.default_rng((self.seed, step, _AUGMENT))
        cut = self._inception_crops if self.augment.inception else self._squares_and_corners
        images, corners = cut(indices, rng)
        flips = np.zeros(len(images), np.bool_)
        if self.augment.flip:
            flips = rng.random(len(images)) < 0.5
        batch = Batch(images, self.split.labels[indices], self.augment.crop, corners, flips)
        if self.mixup_alpha > 0:
            rng = np.random.default_rng((self.seed, step, _MIXUP))
            batch.lam = float(rng.beta(self.mixup_alpha, self.mixup_alpha))
            batch.partner = rng.permutation(self.batch_size)
        return batch

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop - 1, up to workers + 1 of them prepared ahead."""
        return in_order(self.batch, range(start, stop), self.workers)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.split))

    def _squares_and_corners(
        self, indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        room = self.augment.resize - self.augment.crop
        corners = rng.integers(0, room + 1, (2, len(indices))).T
        return [self._squares[i] for i in indices.tolist()], corners

    def _inception_crops(
        self, indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        shape = (len(indices), _INCEPTION_TRIES)
        areas = rng.uniform(0.05, 1.0, shape)
        aspects = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), shape))
        draws = areas, aspects, rng.random((len(indices), 2))
        crops = []
        for i, *drawn in zip(indices.tolist(), *draws, strict=True):
            image = self.split.image(i)
            box = _inception_box(image.shape[:2], *drawn)
            crops.append(resized_crop(image, box, self.augment.crop))
        return crops, np.zeros((len(indices), 2), np.int64)


def _inception_box(
    shape: tuple[int, int], areas: np.ndarray, aspects: np.ndarray, corner: np.ndarray
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the first try that fits into the image; else all of it."""
    height, width = shape
    for area, aspect in zip(areas.tolist(), aspects.tolist(), strict=True):
        w = max(1, round(math.sqrt(area * aspect * height * width)))
        h = max(1, round(math.sqrt(area / aspect * height * width)))
        if w <= width and h <= height:
            left, top = int(corner[0] * (width - w + 1)), int(corner[1] * (height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def eval_jobs(split: Split, size: int, batch_size: int, workers: int = 1) -> Iterator[Job]:
    """The batches of `eval_batches` as functions that make them; `workers` threads decode ahead."""
    if size < 1 or batch_size < 1:
        raise ValueError(f"size is {size} and batch_size {batch_size}; both must be at least 1")
    squares = split.squares(size)
    labels = torch.from_numpy(split.labels)

    def prepare(start: int) -> list[np.ndarray]:
        return [squares[i] for i in range(start, min(start + batch_size, len(split)))]

    def make(start: int, images: list[np.ndarray], empty: Empty | None = None):
        out = empty and empty((len(images), 3, size, size), torch.float32)
        return mixup(images, out=out), labels[start : start + batch_size]

    starts = range(0, len(split), batch_size)
    for start, images in zip(starts, in_order(prepare, starts, workers), strict=True):
        yield partial(make, start, images)


def eval_batches(
    split: Split, size: int, batch_size: int, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image of a split once, in order, resized to `size` x `size` px without a crop.

    Yields:
        x: float32 (b, 3, size, size), channels_last, in [-1, 1]
        labels: int64 (b,); the last batch may be smaller
    """
    return (job() for job in eval_jobs(split, size, batch_size, workers))
