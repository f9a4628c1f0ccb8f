"""Images to batches: a seeded stream for training, a plain one for evaluation.

A training batch is a pure function of (seed, step), so a resumed run needs to know nothing but the
step, and threads may prepare batches in any order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from bit.data.dataset import Split
from bit.data.images import resized_crop
from bit.data.threads import in_order

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
    """One training batch, as bytes; mixup is a recipe until `micro` carries it out."""

    images: np.ndarray  # uint8 (B, crop, crop, 3)
    labels: np.ndarray  # int64 (B,)
    partner: np.ndarray | None = None  # int64 (B,): image i is mixed with image partner[i]
    lam: float = 1.0  # weight of image i, 1 - lam is the partner's

    def micro(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Cut the batch into micro-batches of `size` (the last may be smaller).

        Partners come from the whole batch, so no image depends on `size`.

        Yields:
            x: float32 (b, 3, crop, crop), channels_last, (v - 127.5) / 127.5, mixed
            labels_a: int64 (b,), of the images
            labels_b: int64 (b,), of their partners; without mixup `labels_a` again
        """
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1")
        labels = torch.from_numpy(self.labels)
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            x, labels_a = normalize(self.images[part]), labels[part]
            if self.partner is None:
                yield x, labels_a, labels_a
            else:
                partner = self.partner[part]
                # Two products and a sum: a fused multiply-add could round one element differently
                # with its place in the micro-batch.
                x.mul_(self.lam).add_(normalize(self.images[partner]).mul_(1 - self.lam))
                yield x, labels_a, labels[partner]


def normalize(images: np.ndarray) -> torch.Tensor:
    """uint8 (b, H, W, 3) to float32 (b, 3, H, W) in [-1, 1], channels_last."""
    x = torch.from_numpy(images).to(torch.float32)
    return x.sub_(127.5).div_(127.5).permute(0, 3, 1, 2)


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
        cut = self._inception_crops if self.augment.inception else self._crops
        images = cut(indices, rng)
        if self.augment.flip:
            flipped = rng.random(len(images)) < 0.5
            # Twice as fast as [:, :, ::-1], which copies byte by byte.
            images[flipped] = images[flipped].take(np.arange(images.shape[2])[::-1], axis=2)
        batch = Batch(images, self.split.labels[indices])
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

    def _crops(self, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.augment.crop
        tops, lefts = rng.integers(0, self.augment.resize - side + 1, (2, len(indices)))
        crops = np.empty((len(indices), side, side, 3), np.uint8)
        for crop, i, top, left in zip(
            crops, indices.tolist(), tops.tolist(), lefts.tolist(), strict=True
        ):
            crop[:] = self._squares[i][top : top + side, left : left + side]
        return crops

    def _inception_crops(self, indices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = self.augment.crop
        shape = (len(indices), _INCEPTION_TRIES)
        areas = rng.uniform(0.05, 1.0, shape)
        aspects = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), shape))
        corners = rng.random((len(indices), 2))
        crops = np.empty((len(indices), side, side, 3), np.uint8)
        for crop, i, *draws in zip(crops, indices.tolist(), areas, aspects, corners, strict=True):
            image = self.split.image(i)
            crop[:] = resized_crop(image, _inception_box(image.shape[:2], *draws), side)
        return crops


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


def eval_batches(
    split: Split, size: int, batch_size: int, workers: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every image of a split once, in order, resized to `size` x `size` px without a crop.

    Yields:
        x: float32 (b, 3, size, size), channels_last, in [-1, 1]
        labels: int64 (b,); the last batch may be smaller
    """
    if size < 1 or batch_size < 1:
        raise ValueError(f"size is {size} and batch_size {batch_size}; both must be at least 1")
    squares = split.squares(size)

    def stack(start: int) -> np.ndarray:
        stop = min(start + batch_size, len(split))
        return np.stack([squares[i] for i in range(start, stop)])

    labels = torch.from_numpy(split.labels)
    starts = range(0, len(split), batch_size)
    for start, images in zip(starts, in_order(stack, starts, workers), strict=True):
        yield normalize(images), labels[start : start + batch_size]
