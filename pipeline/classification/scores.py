"""Scores of a classifier: accuracy with its interval, by class, and a test for two classifiers."""

# Functions import scipy themselves: a command that scores nothing need not wait for it.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""Numbers of classes, `[images]`."""

Probabilities = NDArray[np.float32]
"""Of each class, `[images, classes]`."""


def scores(probabilities: Probabilities, labels: Labels) -> dict[str, Any]:
    """Return what a classifier is worth.

    :returns: `accuracy` in percent with `accuracy_low` and `accuracy_high` (95%, Wilson's
        interval), of more than five classes `top5_accuracy`, and `loss`, the cross-entropy (nats).
    """
    from scipy.stats import binomtest

    order = np.argsort(-probabilities, axis=1, kind="stable")
    right = order[:, 0] == labels
    top5 = {}
    if probabilities.shape[1] > 5:
        top5["top5_accuracy"] = round(
            100 * float((order[:, :5] == labels[:, None]).any(1).mean()), 2
        )
    interval = binomtest(int(right.sum()), len(labels)).proportion_ci(method="wilson")
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "accuracy": round(100 * float(right.mean()), 2),
        "accuracy_low": round(100 * float(interval.low), 2),
        "accuracy_high": round(100 * float(interval.high), 2),
        **top5,
        "loss": round(float(-np.log(np.maximum(of_label, 1e-45)).mean()), 5),
    }


def confusion(predictions: Labels, labels: Labels, classes: int) -> NDArray[np.int64]:
    """Count images by their class and the one that was predicted, `[classes, classes]`.

    :param classes: how many; images that have others are not counted.
    """
    known = (labels < classes) & (predictions < classes)
    pairs = np.bincount(classes * labels[known] + predictions[known], minlength=classes**2)
    return pairs.reshape(classes, classes)


def by_class(
    predictions: Labels, labels: Labels, classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return images, recall and precision of each class, in percent; None where there is nothing to
    divide by."""
    right = labels[predictions == labels]
    counts = (np.bincount(each, minlength=len(classes)) for each in (right, labels, predictions))

    def share(part: int, whole: int) -> float | None:
        return round(100 * part / whole, 2) if whole else None

    return {
        name: {"images": own, "recall": share(hits, own), "precision": share(hits, called)}
        for name, hits, own, called in zip(
            classes, *(each.tolist() for each in counts), strict=True
        )
    }


def mcnemar(baseline: NDArray[np.bool_], right: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Compare two classifiers of the same images by McNemar's exact test.

    :param baseline, right: whether each of them is right, `[images]`.
    :returns: of `accuracy` (percent) the `baseline`'s, the `difference` to it, and `p`.
    """
    from scipy.stats import binomtest

    only, other = int((right & ~baseline).sum()), int((baseline & ~right).sum())
    p = float(binomtest(only, only + other).pvalue) if only + other else 1.0
    return {
        "accuracy": {
            "baseline": round(100 * float(baseline.mean()), 2),
            "difference": round(100 * float(right.mean() - baseline.mean()), 2),
            "p": p,
        }
    }
