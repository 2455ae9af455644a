"""Scores of classifiers, by hand and against what others compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from pipeline.classification.scores import by_class, confusion, mcnemar, scores


def drawn(images: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return random probabilities and labels."""
    draw = np.random.default_rng(1)
    weights = draw.random((images, classes), dtype=np.float32)
    labels = draw.integers(0, classes, images)
    weights[np.arange(images), labels] += 0.5
    return weights / weights.sum(axis=1, keepdims=True), labels


def test_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]], np.float32)
    found = scores(probabilities, np.array([0, 1, 2]))
    assert found["accuracy"] == 66.67
    assert found["loss"] == pytest.approx(
        -(math.log(0.5) + math.log(0.8) + math.log(0.2)) / 3, abs=1e-5
    )
    assert "top5_accuracy" not in found
    # Wilson (1927): (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n)
    n, p, z = 3, 2 / 3, 1.959964
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    bounds = [100 * (middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx(bounds, abs=0.01)


def test_as_others_compute_them() -> None:
    probabilities, labels = drawn(500, 8)
    predictions = probabilities.argmax(axis=1)
    found = scores(probabilities, labels)
    assert found["accuracy"] == pytest.approx(100 * (predictions == labels).mean(), abs=0.01)
    top5 = top_k_accuracy_score(labels, probabilities, k=5)
    assert found["top5_accuracy"] == pytest.approx(100 * top5, abs=0.01)
    assert (
        confusion(predictions, labels, 8).tolist() == confusion_matrix(labels, predictions).tolist()
    )
    precision, recall, _, images = precision_recall_fscore_support(labels, predictions)
    names = [f"class {number}" for number in range(8)]
    for row, of_class in enumerate(by_class(predictions, labels, names).values()):
        assert of_class["images"] == images[row]
        assert of_class["recall"] == pytest.approx(100 * recall[row], abs=0.01)
        assert of_class["precision"] == pytest.approx(100 * precision[row], abs=0.01)


def test_a_class_that_never_occurs() -> None:
    found = by_class(np.array([0, 0]), np.array([0, 0]), ["seen", "unseen"])
    assert found["unseen"] == {"images": 0, "recall": None, "precision": None}
    assert confusion(np.array([0, 2]), np.array([0, 1]), 2).tolist() == [[1, 0], [0, 0]]


def test_mcnemar_looks_at_what_one_of_two_gets_right() -> None:
    both, ours, theirs = [True] * 50, [True] * 9, [False] * 9
    better = mcnemar(np.array([*both, *theirs, True]), np.array([*both, *ours, False]))["accuracy"]
    # Of 10 images that one of them gets right 9 or more: 2 · (10 + 1) / 2¹⁰.
    assert better["p"] == pytest.approx(22 / 1024)
    assert better["difference"] == pytest.approx(100 * 8 / 60, abs=0.01)
    same = mcnemar(np.array(both), np.array(both))["accuracy"]
    assert (same["difference"], same["p"]) == (0.0, 1.0)
