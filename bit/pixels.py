"""What is reached without a network: scikit-learn's classifiers on raw pixels.

These are the floor that a few-shot result has to clear before it means anything.
"""

from __future__ import annotations

import warnings

import numpy as np

from bit.data import Split
from bit.task import Task

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C, the inverse of a penalty


def nearest_neighbour(task: Task, side: int) -> tuple[float, float, str]:
    """Classify test images by the nearest training image (Euclidean, side x side px).

    Returns (top-1, mean per-class accuracy, "") as shares of 1.
    """
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(n_neighbors=1)
    model.fit(_vectors(task.train, side), task.train.labels)
    return *_scores(model, task.test, side), ""


def logistic_regression(task: Task, side: int) -> tuple[float, float, str]:
    """Logistic regression on side x side px, its C the best of `PENALTIES` on validation.

    Returns (top-1, mean per-class accuracy, the C chosen) as `nearest_neighbour` does.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if task.val is None:
        raise ValueError("val_fraction is 0; logistic regression needs a validation split for C")
    images, best, chosen = _vectors(task.train, side), -1.0, None
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=300)
        with warnings.catch_warnings():  # a fit cut short is a candidate like any other
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(images, task.train.labels)
        score = _scores(model, task.val, side)[1]
        if score > best:
            best, chosen = score, model
    return *_scores(chosen, task.test, side), f"C={chosen.C:g}"


def _vectors(split: Split, side: int) -> np.ndarray:
    squares = np.stack([split.squares(side)[i] for i in range(len(split))])
    return squares.reshape(len(split), -1).astype(np.float32) / 127.5 - 1


def _scores(model, split: Split, side: int) -> tuple[float, float]:
    right = model.predict(_vectors(split, side)) == split.labels
    per_class = [right[split.labels == c].mean() for c in np.unique(split.labels)]
    return float(right.mean()), float(np.mean(per_class))
