"""What a data set is, and the list of those known by name."""

import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bit.data.images import CorruptImage, resize
from bit.data.threads import in_order

# A split whose resized images take less is resized once and kept.
RESIDENT_BYTES = 2 << 30


class Split:
    """Labelled images, decoded when asked for.

    Args:
        images: anything with a length that gives image i for `images[i]`, as a uint8 array (H, W)
            of greys or (H, W, 3) of RGB: one array of them all, a list, or an object that decodes.
        labels: class numbers, integers (N,) from 0 to len(classes) - 1.
        classes: the names of the classes.

    Raises:
        ValueError: lengths differ, or a label lies outside the classes.
    """

    def __init__(self, images: Sequence[np.ndarray], labels: np.ndarray, classes: Sequence[str]):
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = list(classes)
        if self.labels.shape != (len(images),):
            raise ValueError(
                f"labels has shape {self.labels.shape}; with {len(images)} images it must be "
                f"({len(images)},)"
            )
        if len(images) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()}; with "
                f"{len(self.classes)} classes they must lie in 0..{len(self.classes) - 1}"
            )
        self._images = images
        self._squares: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> np.ndarray:
        """Images in each class: int64 (len(classes),)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def image(self, i: int) -> np.ndarray:
        """Image i as uint8 RGB (H, W, 3); not to be written to.

        A corrupt file that was too costly to find at loading is warned about, and the next image
        of the same class in this split stands in for it.
        """
        try:
            return self._read(i)
        except CorruptImage as error:
            alike = np.flatnonzero(self.labels == self.labels[i])
            for other in np.roll(alike, -1 - np.searchsorted(alike, i))[:-1]:
                try:
                    pixels = self._read(other)
                except CorruptImage:
                    continue
                warnings.warn(f"replaced by another image of its class: {error}", stacklevel=2)
                return pixels
            raise

    def _read(self, i: int) -> np.ndarray:
        pixels = self._images[i]
        if pixels.dtype != np.uint8 or not (
            pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] == 3
        ):
            raise ValueError(
                f"image {i} is {pixels.dtype} {pixels.shape}; it must be uint8 (H, W) or (H, W, 3)"
            )
        return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels

    def squares(self, side: int) -> Sequence[np.ndarray]:
        """Every image resized to uint8 (side, side, 3): bilinear, antialiased, aspect ignored.

        One array (N, side, side, 3) under `RESIDENT_BYTES`, made at the first call and kept until
        another side is asked for; otherwise an object that resizes image i for `squares(side)[i]`.
        """
        if len(self) * side * side * 3 >= RESIDENT_BYTES:
            return _LazySquares(self, side)
        if self._squares is None or self._squares.shape[1] != side:
            squares = np.empty((len(self), side, side, 3), np.uint8)

            def fill(start: int) -> None:
                for i in range(start, min(start + 64, len(self))):
                    squares[i] = resize(self.image(i), side)

            for _ in in_order(fill, range(0, len(self), 64), os.cpu_count() or 1):
                pass
            self._squares = squares
        return self._squares

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Split":
        """The images at `indices`, in that order, with the same classes; nothing is copied."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise ValueError(
                f"indices run from {indices.min()} to {indices.max()}; they must lie in "
                f"0..{len(self) - 1}"
            )
        return Split(_Chosen(self._images, indices), self.labels[indices], self.classes)

    def select_classes(self, indices: Sequence[int]) -> "Split":
        """The images of the classes numbered `indices`, which become 0, 1, ... in that order."""
        chosen = list(indices)
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"indices is {chosen}; it must name at least one class, none twice")
        if not all(0 <= c < len(self.classes) for c in chosen):
            raise ValueError(f"indices is {chosen}; it must lie in 0..{len(self.classes) - 1}")
        renumbered = np.full(len(self.classes), -1)
        renumbered[chosen] = np.arange(len(chosen))
        kept = np.flatnonzero(renumbered[self.labels] >= 0)
        classes = [self.classes[c] for c in chosen]
        return Split(_Chosen(self._images, kept), renumbered[self.labels[kept]], classes)


class _Chosen:
    def __init__(self, images: Sequence[np.ndarray], indices: np.ndarray):
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._images[self._indices[i]]


class _LazySquares:
    def __init__(self, split: Split, side: int):
        self._split, self._side = split, side

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, i: int) -> np.ndarray:
        return resize(self._split.image(i), self._side)


@dataclass(frozen=True)
class Dataset:
    """A training split and a test split over the same classes.

    Raises:
        ValueError: fewer than two classes, different ones in the splits, or one without an image.
    """

    name: str
    train: Split
    test: Split
    corrupt: tuple[str, ...] = ()  # what was left out at loading: "file: reason"

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            raise ValueError(
                f"data set {self.name!r}: the classes of train, {self.train.classes}, and of "
                f"test, {self.test.classes}, must be the same"
            )
        if len(self.classes) < 2:
            raise ValueError(
                f"data set {self.name!r} has {len(self.classes)} class ({self.classes}); a "
                "classifier needs at least 2"
            )
        for part, split in ("train", self.train), ("test", self.test):
            for number in np.flatnonzero(split.counts() == 0):
                raise ValueError(
                    f"data set {self.name!r}: class {self.classes[number]!r} has no readable "
                    f"image in the {part} split"
                )

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into them."""
        return self.train.classes

    @cached_property
    def native_size(self) -> int:
        """Typical short side of the raw images in pixels: the median over up to 64 of train."""
        sample = np.linspace(0, len(self.train) - 1, num=min(64, len(self.train)), dtype=int)
        return int(statistics.median(min(self.train.image(i).shape[:2]) for i in sample))

    def select_classes(self, indices: Sequence[int]) -> "Dataset":
        """The same set with only these classes, renumbered in this order, names kept."""
        return Dataset(
            self.name,
            self.train.select_classes(indices),
            self.test.select_classes(indices),
            self.corrupt,
        )


@dataclass(frozen=True)
class Options:
    """What a data set may be told; each uses what it has a use for."""

    root: Path | None  # folder or file the images are in
    strict: bool  # a corrupt image is an error
    test_fraction: float  # of each class, where there is no test split of its own
    seed: int  # of that choice


Loader = Callable[[Options], Dataset]
_LOADERS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Decorator: make a function from `Options` to `Dataset` known to `load` as `name`."""

    def add(loader: Loader) -> Loader:
        if name in _LOADERS:
            raise ValueError(f"name is {name!r}, which another data set has")
        _LOADERS[name] = loader
        return loader

    return add


def names() -> list[str]:
    """The names `load` knows."""
    return sorted(_LOADERS)


def load(
    name_or_path: str | Path,
    *,
    root: str | Path | None = None,
    strict: bool = False,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Load a data set by its name, or from a folder or archive of images by its path.

    Args:
        name_or_path: one of `names()`; anything else is a path to a folder or a .tar, .tar.gz,
            .tar.xz, .tar.bz2 or .zip file, laid out as `bit.data.folder` says.
        root: where a named data set's files are, if not where it looks by itself.
        strict: stop at corrupt images instead of leaving them out with a warning.
        test_fraction: share of each class that becomes the test split where there is none.
        seed: chooses those images.

    Raises:
        ValueError: no such data set, files missing or broken; the message says which and why.
    """
    name = str(name_or_path)
    if name not in _LOADERS:
        if root is not None:
            raise ValueError(
                f"name_or_path is {name!r}; with root it must be one of {', '.join(names())}"
            )
        if not Path(name).expanduser().exists():
            raise ValueError(
                f"name_or_path is {name!r}; it must be one of {', '.join(names())}, or a folder "
                "or archive of images that exists"
            )
        name, root = "folder", name
    where = None if root is None else Path(root).expanduser()
    return _LOADERS[name](Options(where, strict, test_fraction, seed))
