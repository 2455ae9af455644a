"""The picture of a sweep: how its trials went, and what each parameter had to do with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.pictures import new_figure, write_png
from pipeline.checkpoints.folder import Criterion
from pipeline.pictures import BLUE, INK, MUTED, ORANGE, style_axes
from pipeline.sweeping.config import Choices, Range

COLUMNS = 3


class Drawn(NamedTuple):
    """A trial as the picture shows it."""

    number: int
    parameters: Mapping[str, Any]
    value: float | None
    """None: it has failed."""

    pruned: bool


def draw_sweep(
    trials: Sequence[Drawn],
    space: Mapping[str, Range | Choices],
    criterion: Criterion,
    path: Path,
) -> None:
    """Draw the values of trials one after the other, and over each parameter.

    :param trials: those that are finished, in the order of their numbers.
    :param criterion: says which values are better.
    :param path: of the PNG.
    """
    panels = 1 + len(space)
    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = new_figure(4 * columns, 0.4 + 3.2 * rows)
    history, *others = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    _draw_history(history, trials, criterion)
    for axes, (key, dimension) in zip(others, space.items(), strict=False):
        _draw_parameter(axes, trials, key, dimension)
    for axes in others[len(space) :]:
        axes.axis("off")
    for number, axes in enumerate(figure.axes[:panels]):
        style_axes(axes)
        if number % columns == 0:
            axes.set_ylabel(criterion.metric.replace("_", " "))
    figure.legend(frameon=False, loc="outside upper left", ncols=4)
    write_png(figure, path)


def _draw_history(axes: Any, trials: Sequence[Drawn], criterion: Criterion) -> None:
    complete = [trial for trial in trials if trial.value is not None and not trial.pruned]
    _scatter(axes, trials, [trial.number for trial in trials], labels=True)
    best, line = math.nan, []
    for trial in complete:
        assert trial.value is not None
        best = trial.value if math.isnan(best) else criterion.best(best, trial.value)
        line.append(best)
    if complete:
        axes.step(
            [trial.number for trial in (*complete, trials[-1])], [*line, best], where="post",
            color=ORANGE,
            label="best so far",
        )  # fmt: skip
    for trial in trials:
        if trial.value is None:
            axes.axvline(trial.number, color=MUTED, linewidth=1, linestyle=":")
    if any(trial.value is None for trial in trials):
        axes.plot([], [], color=MUTED, linewidth=1, linestyle=":", label="failed")
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_parameter(
    axes: Any, trials: Sequence[Drawn], key: str, dimension: Range | Choices
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    places = [trial.parameters[key] for trial in trials]
    if isinstance(dimension, Choices):
        names = [choice if isinstance(choice, str) else json.dumps(choice)
                 for choice in dimension.choices]  # fmt: skip
        choices = list(dimension.choices)
        places = [choices.index(place) for place in places]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif dimension.log:
        margin = (dimension.high / dimension.low) ** 0.03
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(dimension.low / margin, dimension.high * margin)
    else:
        margin = 0.03 * (dimension.high - dimension.low)
        axes.set_xlim(dimension.low - margin, dimension.high + margin)
    _scatter(axes, trials, places)
    axes.set_xlabel(key)


def _scatter(
    axes: Any, trials: Sequence[Drawn], places: Sequence[Any], *, labels: bool = False
) -> None:
    """Draw the values of trials at `places`."""
    for pruned, style, name in (
        (False, {"color": BLUE, "edgecolor": INK, "linewidth": 0.4}, "complete"),
        (True, {"color": MUTED, "marker": "x"}, "pruned"),
    ):
        shown = [
            (place, trial.value)
            for place, trial in zip(places, trials, strict=True)
            if trial.pruned == pruned and trial.value is not None and math.isfinite(trial.value)
        ]
        if shown:
            axes.scatter(*zip(*shown, strict=True), s=28, label=name if labels else None, **style)
