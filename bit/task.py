"""The images of one run: which data set, which of its classes, which of its images."""

from __future__ import annotations

from dataclasses import dataclass

from bit import data
from bit.config import Images


@dataclass(frozen=True)
class Task:
    """Labelled images in three disjoint splits; labels count into `classes`."""

    classes: list[str]
    train: data.Split
    val: data.Split | None
    test: data.Split
    native_size: int  # typical short side of the raw images, px


def load_dataset(name: str, images: Images) -> data.Dataset:
    """Load a data set by registered name or path, with the options in `images`."""
    return data.load(
        name,
        root=images.root,
        strict=images.strict,
        test_fraction=images.test_fraction,
        seed=images.split_seed,
    )


def make_task(dataset: data.Dataset, images: Images) -> Task:
    """Select classes, set the validation split aside, then draw the few-shot subset.

    The validation split depends on `split_seed` only, so runs with other shots are scored on the
    same images. Raises ValueError for unknown classes and for more shots than images.
    """
    classes, train, test = dataset.classes, dataset.train, dataset.test
    if images.classes:
        unknown = sorted(set(images.classes) - set(classes))
        if unknown:
            raise ValueError(
                f"classes has {', '.join(unknown)}; {dataset.name} has {', '.join(classes)}"
            )
        chosen = [i for i, name in enumerate(classes) if name in images.classes]
        classes = [classes[i] for i in chosen]
        train, test = train.select_classes(chosen), test.select_classes(chosen)
    val = None
    if images.val_fraction > 0:
        train, val = data.split_off(train, images.val_fraction, images.split_seed)
    if images.shots is not None:
        train = data.few_shot(train, images.shots, images.shots_seed)
    return Task(classes, train, val, test, dataset.native_size)


def check_same_classes(trained: list[str], found: list[str], name: str) -> None:
    """Raise ValueError, listing the differences, unless a checkpoint's classes are `name`'s."""
    if trained == found:
        return
    missing = [c for c in trained if c not in found]
    extra = [c for c in found if c not in trained]
    parts = []
    if missing:
        parts.append(f"{name} lacks {', '.join(missing)}")
    if extra:
        parts.append(f"the checkpoint lacks {', '.join(extra)}")
    if not parts:
        parts.append("the same names in another order")
    raise ValueError(
        f"{name} has {len(found)} classes, the checkpoint was trained on {len(trained)}: "
        + "; ".join(parts)
    )
