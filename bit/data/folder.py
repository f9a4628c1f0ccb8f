"""Any folder of images, or an archive of one.

    train/CLASS/FILE and test/CLASS/FILE    (or val, or validation, for test)
    CLASS/FILE, or train/CLASS/FILE alone   (the test split is chosen by a seed)

Classes are numbered by sorted folder name; what lies deeper in a class folder belongs to it.
Leading folders that hold one other folder and nothing else are skipped: archives often have one.
"""

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from bit.data.dataset import Dataset, Options, Split, register
from bit.data.images import SUFFIXES, CorruptImage, decode, size
from bit.data.subsets import split_off
from bit.data.threads import in_order
from bit.data.tree import Source, Tree, read_tree

# Below this all images are decoded at loading and kept; above, each when it is asked for.
DECODED_BYTES = 1 << 30

_TEST_NAMES = ("test", "val", "validation")


@register("folder")
def load_folder(options: Options) -> Dataset:
    """Read the folder or archive `root`.

    Corrupt images are left out with one warning, or are an error if `strict`. In a set of more
    than `DECODED_BYTES` looking at each would take too long: there they stay, and `Split.image`
    puts another in their place when it meets them (raises if `strict`).

    Raises:
        ValueError: no images or not in class folders, fewer than two classes, a class without
            images, classes that differ between train and test, a broken archive.
    """
    root = options.root
    if root is None:
        raise ValueError("root is None; it must be a folder or archive of images")
    parts = _parts(read_tree(root), root)
    classes = _classes(parts, root)

    files, labels, part_of = [], [], []
    for number, part in enumerate(parts):
        for label, name in enumerate(classes):
            found = part.folders[name].all_images()
            files += found
            labels += [label] * len(found)
            part_of += [number] * len(found)
    images, corrupt = _decoded(files, options.strict)
    if corrupt:
        message = f"{len(corrupt)} of {len(files)} images in {root} are corrupt: "
        message += _first_few(corrupt.values())
        if options.strict:
            raise ValueError(message)
        warnings.warn(f"left out: {message}", stacklevel=3)

    everything = Split(images, np.array(labels), classes)
    good = np.array([i not in corrupt for i in range(len(files))])
    splits = [
        everything.subset(np.flatnonzero(good & (np.array(part_of) == number)))
        for number in range(len(parts))
    ]
    if len(splits) == 1:
        splits = split_off(splits[0], options.test_fraction, options.seed)
    return Dataset(_name(root), *splits, tuple(corrupt.values()))


def _name(root: Path) -> str:
    name = root.resolve().name
    for suffix in (".zip", ".tgz", ".txz", ".gz", ".xz", ".bz2", ".tar"):
        name = name.removesuffix(suffix)
    return name


def _parts(tree: Tree, root: Path) -> list[Tree]:
    """[train] or [train, test]: the folders that hold the class folders."""
    while not tree.images and len(tree.folders) == 1:
        ((name, only),) = tree.folders.items()
        if only.images or name.lower() in ("train", *_TEST_NAMES):
            break
        tree = only
    # Not only lower case: "Train" and "Test" must not pass for two classes.
    named = {name.lower(): folder for name, folder in tree.folders.items()}
    tests = [named[name] for name in _TEST_NAMES if name in named]
    if "train" not in named:
        if tests:
            raise ValueError(f"{root} has {tests[0].path}, but no train beside it")
        return [tree]
    for test in tests:
        if test.folders:
            return [named["train"], test]
        warnings.warn(f"{root}: {test.path} has no class folders and is not used", stacklevel=4)
    return [named["train"]]


def _classes(parts: list[Tree], root: Path) -> list[str]:
    """The class names in order, once it is known that each has images in every part."""
    train = parts[0]
    classes = sorted(train.folders)
    if len(classes) < 2:
        raise ValueError(
            f"{root / train.path} has {len(classes)} class folders {classes} and "
            f"{len(train.images)} images outside of them; it must hold 2 or more classes, laid "
            "out as train/CLASS/FILE and test/CLASS/FILE or as CLASS/FILE"
        )
    for part in parts[1:]:
        if part.folders.keys() != train.folders.keys():
            raise ValueError(
                f"{train.path} and {part.path} in {root} must have the same classes; only in "
                f"{train.path}: {sorted(train.folders.keys() - part.folders)}, only in "
                f"{part.path}: {sorted(part.folders.keys() - train.folders)}"
            )
    folders = [part.folders[name] for part in parts for name in classes]
    empty = [folder.path for folder in folders if not folder.all_images()]
    if empty:
        raise ValueError(
            f"{root} has no images in {', '.join(empty)}; every class needs some, with a name "
            f"that ends in one of {', '.join(sorted(SUFFIXES))}"
        )
    others = [path for folder in folders for path in folder.all_others()]
    others += [f"{part.path}/{name}".lstrip("/") for part in parts for name in part.images]
    if others:
        warnings.warn(
            f"ignored in {root}: {len(others)} files that are no images by their suffix or lie "
            f"outside the class folders: {_first_few(others)}",
            stacklevel=4,
        )
    return classes


def _decoded(
    files: list[tuple[str, Source]], strict: bool
) -> tuple[Sequence[np.ndarray | None], dict[int, str]]:
    """The images, and "file: reason" for those found corrupt."""
    sample = files[:: max(1, len(files) // 64)]
    pixels = sum(height * width for height, width in (size(source) for _, source in sample))
    if 3 * pixels * len(files) / len(sample) >= DECODED_BYTES:
        return _Files(files, strict), {}

    reader = _Files(files, strict=False)
    images: list[np.ndarray | None] = [None] * len(files)
    corrupt: dict[int, str] = {}

    def decode_from(start: int) -> None:
        for i in range(start, min(start + 64, len(files))):
            try:
                images[i] = reader[i]
            except CorruptImage as error:
                corrupt[i] = str(error)

    for _ in in_order(decode_from, range(0, len(files), 64), os.cpu_count() or 1):
        pass
    return images, dict(sorted(corrupt.items()))


def _first_few(lines: Collection[str]) -> str:
    shown = "; ".join(list(lines)[:5])
    return shown if len(lines) <= 5 else f"{shown}; and {len(lines) - 5} more"


class _Files(Sequence):
    """Images decoded each time they are asked for."""

    def __init__(self, files: list[tuple[str, Source]], strict: bool):
        self._files, self._strict = files, strict

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> np.ndarray:
        name, source = self._files[i]
        try:
            return decode(source)
        except CorruptImage as error:
            kind = ValueError if self._strict else CorruptImage
            raise kind(f"{name}: {error}") from error
