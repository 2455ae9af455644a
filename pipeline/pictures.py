"""Pictures of a run: losses over time, and BLEU by sentence length."""

# Functions import matplotlib themselves: that takes a second, and few commands draw.

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2b6cb0", "#dd6b20"


def draw_losses(history: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draw training and validation loss, and validation BLEU if there is any, over the steps.

    :param history: metric → step → value. Without losses nothing is drawn.
    :param path: of the PNG.
    """
    from matplotlib.figure import Figure

    curves = {
        "train_loss": ("training", BLUE, "-"),
        "valid_loss": ("validation", ORANGE, "o-"),
    }
    if not any(history.get(key) for key in curves):
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, (label, colour, style) in curves.items():
        if points := sorted(history.get(key, {}).items()):
            label = f"{label}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    style_axes(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per target token (nats)")
    figure.legend(frameon=False, loc="outside upper left", ncols=2)
    if points := sorted(history.get("valid_bleu", {}).items()):
        bleu = axes.twinx()
        bleu.plot(*zip(*points, strict=True), "s--", color=MUTED, markersize=4)
        bleu.set_ylabel("validation BLEU", color=MUTED)
        bleu.spines[["top", "left"]].set_visible(False)
    write_png(figure, path)


def draw_bleu_by_length(title: str, buckets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a bar for the BLEU of each bucket of source lengths.

    :param buckets: what `scores.by_source_length` returned.
    :param path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    heights = [bucket["bleu"] for bucket in buckets]
    intervals = [bucket["bleu_ci"] for bucket in buckets]
    axes.bar(
        range(len(buckets)), heights, yerr=intervals, color=BLUE, ecolor=INK, capsize=3, width=0.7
    )
    for place, bucket in enumerate(buckets):
        axes.text(place, 0, f"{bucket['sentences']:,}", color="white", ha="center", va="bottom")
    style_axes(axes)
    axes.set_xticks(range(len(buckets)), [bucket["source_tokens"] for bucket in buckets])
    axes.set_xlabel("source tokens (in the bar: sentences)")
    axes.set_ylabel("BLEU, 95% confidence interval")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    write_png(figure, path)


def style_axes(axes: Any) -> None:
    """Leave out the frame, and draw light horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)


def write_png(figure: Figure, path: Path) -> None:
    """Write a PNG; the same picture has the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
