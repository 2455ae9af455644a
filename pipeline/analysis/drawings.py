"""The pictures of the analyses, in the style of `pipeline/pictures.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from data_prep.pictures import new_figure, write_png
from pipeline.pictures import BLUE, INK, MUTED, ORANGE, style_axes

Floats = NDArray[np.floating[Any]]

COLOURS = (BLUE, ORANGE)  # of a model, and of the one that it is compared with
SHADES = {"q": "#2b6cb0", "k": "#63b3ed", "v": "#2c7a7b", "ffn": "#dd6b20"}
MOST_NUMBERS = 10  # rows and columns of a matrix whose cells have their value in them
GREEN_TO_YELLOW, WHITE_TO_BLUE = "viridis", "Blues"


def draw_cka(names: tuple[str, str], stacks: Mapping[str, Floats], path: Path) -> None:
    """Draw a matrix for each stack, from the lower left corner on.

    :param names: of the models whose levels are the rows and the columns.
    :param stacks: CKA by the stack's name, `[N + 1, M + 1]`.
    """
    figure = new_figure(5.2 * len(stacks), 4.8)
    colours = ScalarMappable(Normalize(0, 1), GREEN_TO_YELLOW)
    panels = _panels(figure, len(stacks))
    for axes, (stack, cka) in zip(panels, stacks.items(), strict=True):
        axes.imshow(cka, origin="lower", norm=colours.norm, cmap=colours.cmap)
        if max(cka.shape) <= MOST_NUMBERS:
            for (row, column), value in np.ndenumerate(cka):
                colour = "white" if value < 0.6 else INK
                text = f"{value:.2f}" if np.isfinite(value) else "–"
                axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)
        axes.set_title(stack, loc="left", fontsize=11, color=INK)
        axes.set_ylabel(f"level of {names[0]}")
        axes.set_xlabel(f"level of {names[1]}")
        axes.set_yticks(*_level_ticks(cka.shape[0]))
        axes.set_xticks(*_level_ticks(cka.shape[1]))
        axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=panels, label="linear CKA", shrink=0.8)
    write_png(figure, path)


def draw_distances(
    models: Mapping[str, Mapping[str, tuple[Floats, float]]], unit: str, path: Path
) -> None:
    """Draw the mean attention distance of each head as a dot, and of each level as a line.

    :param models: by a model's name, and its stack's: distances `[N, H]`, and that of attention
        that is the same everywhere.
    """
    figure, panels = _figure_of_stacks(list(next(iter(models.values()))))
    for colour, (name, stacks) in zip(COLOURS, models.items(), strict=False):
        for stack, (distances, uniform) in stacks.items():
            levels, heads = distances.shape
            x, axes = range(1, levels + 1), panels[stack]
            axes.scatter(
                np.repeat(x, heads), distances, color=colour, alpha=0.4, s=18, linewidths=0
            )
            axes.plot(x, distances.mean(1), color=colour, label=name)
            axes.axhline(uniform, color=colour, linestyle=":", label=f"{name}, if it were uniform")
    for axes in panels.values():
        axes.margins(y=0.3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("level")
        axes.set_ylabel(f"mean attention distance ({unit})")
    _legend(figure, panels)
    write_png(figure, path)


def draw_cosines(models: Mapping[str, Mapping[str, Floats]], path: Path) -> None:
    """Draw how alike a token's states are: behind consecutive levels, and behind the last one.

    :param models: by a model's name, and its stack's, cosines of all with all `[N + 1, N + 1]`.
    """
    figure, panels = _figure_of_stacks(list(next(iter(models.values()))))
    for colour, (name, stacks) in zip(COLOURS, models.items(), strict=False):
        for stack, cosines in stacks.items():
            lines = {
                "level before": (range(1, len(cosines)), cosines.diagonal(1), "o-"),
                "last level": (range(len(cosines) - 1), cosines[:-1, -1], "s--"),
            }
            for other, (x, y, style) in lines.items():
                label = f"{name}: with the {other}"
                panels[stack].plot(x, y, style, color=colour, label=label, markersize=4)
    deepest = max(len(cosines) for stacks in models.values() for cosines in stacks.values())
    for axes in panels.values():
        axes.set_ylim(top=1.02)
        axes.set_xlabel("level")
        axes.set_ylabel("cosine of a token's states")
        axes.set_xticks(*_level_ticks(deepest))
    _legend(figure, panels)
    write_png(figure, path)


def draw_signals(stacks: Mapping[str, Mapping[str, tuple[Floats, Floats]]], path: Path) -> None:
    """Draw the sizes of level signals; where there are none, say so.

    :param stacks: by the stack's name, and the projection's: relative to its input, and the change
        of what it gives, each `[N]`.
    """
    figure = new_figure(max(7, 4.8 * len(stacks)), 6.4)
    panels = figure.subplots(2, len(stacks), squeeze=False, sharex=True)
    labels = ("signal, relative to its input", "its change of the projection")
    for column, (stack, projections) in enumerate(stacks.items()):
        for row, label in enumerate(labels):
            axes = panels[row][column]
            style_axes(axes)
            axes.set_ylabel(label)
            for name, sizes in projections.items():
                x, y = range(1, len(sizes[row]) + 1), sizes[row]
                axes.plot(x, y, "o-", color=SHADES[name], label=name, markersize=4)
            if not projections:
                middle = {"ha": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, "no level signals", color=MUTED, **middle)
                axes.set_xticks([])
            elif all((sizes[row] > 0).all() for sizes in projections.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_locator(NullLocator())
        panels[0][column].set_title(stack, loc="left", fontsize=11, color=INK)
        panels[1][column].set_xlabel("level")
    _legend(figure, dict(enumerate(panels[0])))
    write_png(figure, path)


def draw_attention(
    title: str, levels: Floats, rows: Sequence[str], columns: Sequence[str], path: Path
) -> None:
    """Draw a matrix for each level.

    :param levels: `[N, T, S]`.
    :param rows, columns: the tokens that attend, and those that are attended to.
    """
    across = min(3, len(levels))
    down = -(-len(levels) // across)
    size = (0.19 * len(columns) + 1.2) * across, (0.19 * len(rows) + 1.3) * down
    figure = new_figure(max(size[0], 6), max(size[1], 3))
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for number, axes in enumerate(panels):
        if number >= len(levels):
            axes.set_axis_off()
            continue
        axes.imshow(levels[number], cmap=WHITE_TO_BLUE, vmin=0, vmax=levels.max(), aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(f"level {number + 1}", loc="left", fontsize=9, color=INK)
        axes.spines[:].set_color(MUTED)
        axes.tick_params(length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    write_png(figure, path)


class LookedAt(NamedTuple):
    """An image, and how much of the class token's attention each patch gets at each level."""

    title: str
    pixels: NDArray[np.uint8]  # [height, width, 1 or 3]
    levels: Floats  # [N, rows, columns]


def draw_class_attention(images: Sequence[LookedAt], path: Path) -> None:
    """Draw a row for each image: itself, then at each level what the class token looks at.

    The more orange, the more attention, relative to the most that a patch gets at any level.
    """
    levels = len(images[0].levels)
    size = 1.5 * (levels + 1), 1.7 * len(images)
    figure = new_figure(max(size[0], 5), size[1])
    rows = figure.subplots(len(images), levels + 1, squeeze=False)
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        grey = image.pixels.mean(2)
        height, width = grey.shape
        row[0].imshow(image.pixels if image.pixels.shape[2] == 3 else grey, cmap="gray")
        row[0].set_title(image.title, loc="left", fontsize=9, color=INK)
        for level, (axes, attention) in enumerate(zip(row[1:], image.levels, strict=True), 1):
            axes.imshow(grey, cmap="gray", vmin=-128, vmax=255)  # no black: orange stands out
            tint = np.broadcast_to(to_rgb(ORANGE), (*attention.shape, 3))
            opacity = 0.9 * attention[..., None] / image.levels.max()
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axes.imshow(np.concatenate([tint, opacity], 2), extent=extent)
            if number == 0:
                axes.set_title(f"level {level}", loc="left", fontsize=9, color=INK)
        for axes in row:
            axes.set_axis_off()
    write_png(figure, path)


def _panels(figure: Figure, count: int) -> Sequence[Any]:
    panels: Sequence[Any] = figure.subplots(1, count, squeeze=False)[0]
    return panels


def _figure_of_stacks(stacks: Sequence[str]) -> tuple[Figure, dict[str, Any]]:
    """Return a figure, and its panels by the name of a stack."""
    figure = new_figure(max(7, 4.8 * len(stacks)), 4.2)
    panels = dict(zip(stacks, _panels(figure, len(stacks)), strict=True))
    for stack, axes in panels.items():
        style_axes(axes)
        axes.set_title(stack, loc="left", fontsize=11, color=INK)
    return figure, panels


def _legend(figure: Figure, panels: Mapping[Any, Any]) -> None:
    """Explain above all panels what is drawn in any of them."""
    drawn: dict[str, Any] = {}
    for axes in panels.values():
        drawn |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if drawn:
        handles, labels, columns = list(drawn.values()), list(drawn), len(panels)
        figure.legend(handles, labels, frameon=False, loc="outside upper left", ncols=columns)


def _level_ticks(count: int) -> tuple[range, list[str]]:
    """Return places and labels of levels 0 (what enters the stack) to N."""
    return range(count), ["in", *map(str, range(1, count))]
