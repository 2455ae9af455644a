"""Pictures of a run: losses over time, BLEU by sentence length, what a classifier confuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.pictures import new_figure, write_png

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE = "#2b6cb0", "#dd6b20"


def draw_losses(
    history: Mapping[str, Mapping[int, float]], path: Path, *, smoothed: bool = False
) -> None:
    """Draw training and validation loss, and validation BLEU or accuracy, over the steps.

    :param history: metric → step → value. Without losses nothing is drawn.
    :param smoothed: say that the training loss has label smoothing; the validation loss never has.
    :param path: of the PNG.
    """
    curves = {
        "train_loss": ("training, labels smoothed" if smoothed else "training", BLUE, "-"),
        "valid_loss": ("validation", ORANGE, "o-"),
    }
    if not any(history.get(key) for key in curves):
        return
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for key, (label, colour, style) in curves.items():
        if points := sorted(history.get(key, {}).items()):
            label = f"{label}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    style_axes(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per target (nats)")
    figure.legend(frameon=False, loc="outside upper left", ncols=2)
    for key, label in (("valid_bleu", "BLEU"), ("valid_accuracy", "accuracy")):
        if points := sorted(history.get(key, {}).items()):
            quality = axes.twinx()
            quality.plot(*zip(*points, strict=True), "s--", color=MUTED, markersize=4)
            quality.set_ylabel(f"validation {label}", color=MUTED)
            quality.spines[["top", "left"]].set_visible(False)
    write_png(figure, path)


def draw_bleu_by_length(title: str, buckets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a bar for the BLEU of each bucket of source lengths.

    :param buckets: what `scores.by_source_length` returned.
    :param path: of the PNG.
    """
    figure = new_figure(7, 4)
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


def draw_confusion(
    title: str, counts: NDArray[np.int64], classes: Sequence[str], path: Path
) -> None:
    """Draw a confusion matrix: a row for each class, with the shares of what was predicted.

    :param counts: `[classes, classes]`.
    :param path: of the PNG.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    number = len(classes)
    side = min(20.0, 2.5 + 0.55 * number)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.spines[:].set_visible(False)
    if number <= 50:
        axes.set_xticks(range(number), classes, rotation=45, ha="right")
        axes.set_yticks(range(number), classes)
    if number <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            share = shares[row, column]
            axes.text(
                column, row, f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}",
                ha="center", va="center", fontsize=8, color="white" if share > 0.5 else INK,
            )  # fmt: skip
    axes.set_xlabel("predicted (% of the class)")
    axes.set_ylabel("class")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    write_png(figure, path)


def draw_images(title: str, images: NDArray[np.uint8], captions: Sequence[str], path: Path) -> None:
    """Draw a contact sheet.

    :param images: `[images, C, S, S]`, grey or RGB.
    :param path: of the PNG.
    """
    columns = 8
    rows = max(1, -(-len(images) // columns))
    figure = new_figure(12, 0.6 + 1.75 * rows)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8, color=INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    write_png(figure, path)


def style_axes(axes: Any) -> None:
    """Leave out the frame, and draw light horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
