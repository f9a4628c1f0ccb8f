"""Seeded choices of images: the same split, numbers and seed give the same subset."""

import numpy as np

from bit.data.dataset import Split


def few_shot(split: Split, shots: int, seed: int) -> Split:
    """Exactly `shots` images of each class, as the paper's few-shot tasks have (section 3.2).

    Class c draws from `default_rng((seed, c))`. Subsets of one seed are nested: the images of 5
    shots are among those of 10.

    Raises:
        ValueError: shots below 1, or a class with fewer images.
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}; it must be at least 1")
    chosen = []
    for number, (name, count) in enumerate(zip(split.classes, split.counts(), strict=True)):
        if count < shots:
            raise ValueError(
                f"shots is {shots}, but class {name!r} has {count} images; it may be at most "
                f"{split.counts().min()}"
            )
        members = np.flatnonzero(split.labels == number)
        chosen.append(np.random.default_rng((seed, number)).permutation(members)[:shots])
    return split.subset(np.sort(np.concatenate(chosen)))


def split_off(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a split in two, the same way in every class.

    The part gets `fraction` of each class, rounded, at least one image and never all.

    Returns:
        (rest, part)

    Raises:
        ValueError: fraction outside (0, 1), or a class with a single image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
    in_part = np.zeros(len(split), dtype=bool)
    for number, (name, count) in enumerate(zip(split.classes, split.counts(), strict=True)):
        if count == 0:
            continue
        if count == 1:
            raise ValueError(f"class {name!r} has 1 image; to be split it must have at least 2")
        size = min(max(round(fraction * count), 1), count - 1)
        members = np.flatnonzero(split.labels == number)
        # The 1 keeps this draw apart from few_shot's.
        order = np.random.default_rng((seed, number, 1)).permutation(members)
        in_part[order[:size]] = True
    return split.subset(np.flatnonzero(~in_part)), split.subset(np.flatnonzero(in_part))
