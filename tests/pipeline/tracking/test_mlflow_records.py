"""What metrics are called in MLflow, and how many of their digits it gets."""

from __future__ import annotations

import math

import pytest

from pipeline.tracking.mlflow_records import metric_key, rounded

LOGGED = (
    "epoch", "grad_norm", "learning_rate", "skipped_steps", "speed/memory_gib",
    "speed/padding_share", "test--served_bleu", "test_bleu", "test_length_ratio",
    "test_sentences_per_second", "train_loss", "train_ppl", "valid_bleu", "valid_loss",
)  # fmt: skip


def test_mlflow_shows_loss_and_quality_first() -> None:
    """MLflow sorts sections, draws those without one last, and sorts the charts of a section."""
    shown = sorted((metric_key(name).rpartition("/") for name in LOGGED), key=lambda key: (
        not key[0], key[0], key[2],
    ))  # fmt: skip
    assert [f"{section}/{name}" for section, _, name in shown] == [
        "loss/train_loss", "loss/train_ppl", "loss/valid_loss",
        "quality/test--served_bleu", "quality/test_bleu", "quality/test_length_ratio",
        "quality/valid_bleu",
        "speed/memory_gib", "speed/padding_share", "speed/test_sentences_per_second",
        "training/epoch", "training/grad_norm", "training/learning_rate", "training/skipped_steps",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["speed/memory_gib", "system/cpu_utilization_percentage"])
def test_a_metric_with_a_section_keeps_it(name: str) -> None:
    assert metric_key(name) == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.6520123456, 2.65201),
        (0.0006999840001, 0.000699984),
        (12344.5678, 12344.6),
        (1234567.8, 1234568.0),  # never less than whole
        (-3.0, -3.0),
        (0.0, 0.0),
        (math.inf, math.inf),
    ],
)
def test_metrics_are_rounded(value: float, expected: float) -> None:
    assert rounded(value) == expected
    assert math.isnan(rounded(math.nan))
