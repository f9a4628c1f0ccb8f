"""Handwritten digits that come with scikit-learn: 1,797 grey images of 8 x 8 px, 10 classes."""

import numpy as np

from bit.data.dataset import Dataset, Options, Split, register
from bit.data.subsets import split_off


@register("digits")
def load_digits(options: Options) -> Dataset:
    """The embedded data set: no download, no options.

    The test split is a fifth of each class, always the same, so that scores can be compared.
    """
    from sklearn.datasets import load_digits as read  # takes a second to import

    digits = read()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    everything = Split(pixels, digits.target, [str(digit) for digit in range(10)])
    train, test = split_off(everything, 0.2, seed=0)
    return Dataset("digits", train, test)
