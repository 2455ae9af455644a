"""What became of the images, in numbers (`report.json`) and on one page (`report.png`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.images.shards import ImagesManifest, open_images
from data_prep.pictures import new_figure, write_png

EXAMPLES = 12  # images shown of a class
MOST_CLASSES = 40  # shown
SIDE = 64  # of an image that is shown, at most; others are shown by every second pixel, third, …


def report_of(made: ImagesManifest, refused: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Put together the report on all images.

    :param refused: name, reason and detail of each file that was refused.
    :returns: counts by set, by split and class, and of repeats; and all files that were `refused`.
    """
    return {
        "sets": [each.model_dump() for each in made.sets],
        "classes": {
            name: {split: total.classes[label] for split, total in made.totals.items()}
            for label, name in enumerate(made.classes)
        },
        "repeats": made.repeats.model_dump(),
        "refused": [
            {"file": name, "reason": reason, "detail": detail} for name, reason, detail in refused
        ],
    }


def draw(made: ImagesManifest, shards: Path, path: Path) -> None:
    """Draw a row for each class: its name, its numbers of images, the first of training.

    :param shards: folder of the shards.
    :param path: of the PNG; the same shards have the same bytes.
    """
    names = made.classes[:MOST_CLASSES]
    sheet = _contact_sheet(made, shards, len(names))
    rows = len(names)
    figure = new_figure(9.5, 1.2 + 0.55 * rows)
    axes = figure.add_subplot()
    axes.imshow(sheet, extent=(0, EXAMPLES, rows, 0), interpolation="nearest", cmap="gray")
    counts = [[total.classes[label] for total in made.totals.values()] for label in range(rows)]
    axes.set_yticks(
        np.arange(rows) + 0.5,
        [
            f"{shortened(name)}   {' / '.join(f'{count:,}' for count in of_class)}"
            for name, of_class in zip(names, counts, strict=True)
        ],
    )
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    more = f"; {len(made.classes) - rows} more classes" if len(made.classes) > rows else ""
    totals = ", ".join(f"{total.images:,} {split}" for split, total in made.totals.items())
    axes.set_title(
        f"Training images of each class; numbers of {' / '.join(made.totals)}\n{totals}{more}"
    )
    write_png(figure, path)


def _contact_sheet(made: ImagesManifest, shards: Path, rows: int) -> NDArray[np.uint8]:
    """Return the first training images of the first classes, one row each `[height, width, 3]`."""
    step = -(-made.stored_size // SIDE)
    side = len(range(0, made.stored_size, step))
    sheet = np.full((rows, side, EXAMPLES, side, 3), 255, np.uint8)
    shown = np.zeros(len(made.classes), int)
    wanted = np.minimum([EXAMPLES] * len(shown), made.totals["train"].classes)
    wanted[rows:] = 0
    for shard in made.of_split("train"):
        if np.all(shown >= wanted):
            break
        images, labels = open_images(shards, shard, made)
        for row, label in enumerate(labels.tolist()):
            if shown[label] < wanted[label]:
                small = images[row, :, ::step, ::step].transpose(1, 2, 0)
                sheet[label, :, shown[label]] = small  # a grey one becomes three equal channels
                shown[label] += 1
    return sheet.reshape(rows * side, EXAMPLES * side, 3)


def shortened(name: str) -> str:
    """Return a class's name as pictures have room for it."""
    return name if len(name) <= 24 else f"{name[:23]}…"
