"""What cleaning did, in numbers (`report.json`) and on one page (`report.png`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.config import DataConfig, TrainingCorpus
from data_prep.pictures import new_figure, write_png
from data_prep.pieces import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE = "score"  # what translate_with.min_score drops for
EXAMPLES = 5  # pairs shown of what a filter dropped from a corpus
LENGTH_EDGES = np.arange(0, 501, 10)  # characters; the last bin also holds what is longer
RATIO_EDGES = np.arange(0, 4.05, 0.1)  # target characters over source characters, likewise


def report_of(
    config: DataConfig, filtered: Sequence[Result], kept: Sequence[Result]
) -> dict[str, Any]:
    """Put together the report on all training corpora.

    :param filtered, kept: of each piece, what the filters on a pair and those on all pairs did.
    :returns: `kept`, and of each of `corpora` its `read`, `kept` and `dropped` pairs, each of its
        `filters` with counts, share and examples, and histograms of what was kept.
    """
    corpora = []
    for index, corpus in enumerate(config.train):
        pieces = [(f, k) for f, k in zip(filtered, kept, strict=True) if f["corpus"] == index]
        left = read = sum(piece["read"] for piece, _ in pieces)
        filters = []
        for name in filter_names(config, corpus):
            tallies = [result for piece in pieces for result in piece if name in result["dropped"]]
            dropped = sum(tally["dropped"][name] for tally in tallies)
            examples = [pair for tally in tallies for pair in tally["examples"][name]][:EXAMPLES]
            filters.append(
                {
                    "filter": name,
                    "seen": left,
                    "dropped": dropped,
                    "share": round(dropped / left, 6) if left else 0.0,
                    "kept": left - dropped,
                    "examples": examples,
                }
            )
            left -= dropped
        histograms = {
            key: np.sum([k[key] for _, k in pieces], axis=0, dtype=int).tolist() if pieces else []
            for key in ("source_chars", "target_chars", "ratio")
        }
        dropped = {each["filter"]: each["dropped"] for each in filters}
        counts = {"corpus": corpus.name, "read": read, "kept": left, "dropped": dropped}
        corpora.append({**counts, "filters": filters, **histograms})
    return {"kept": sum(corpus["kept"] for corpus in corpora), "corpora": corpora}


def filter_names(config: DataConfig, corpus: TrainingCorpus) -> list[str]:
    """Return what the counts of a corpus are of, in the order in which pairs are dropped."""
    first = [SCORE] if corpus.translate_with and corpus.translate_with.min_score is not None else []
    return [*first, *(each.filter for each in config.filters_of(corpus))]


def summary(corpus: Mapping[str, Any]) -> str:
    """Return one line about a corpus of the report."""
    dropped = ", ".join(f"{count} {why}" for why, count in corpus["dropped"].items() if count)
    return f"{corpus['corpus']}: kept {corpus['kept']} of {corpus['read']} pairs" + (
        f" (dropped: {dropped})" if dropped else ""
    )


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw a report.

    :param path: of the PNG; the same report has the same bytes.
    """
    write_png(picture(report), path)


def picture(report: Mapping[str, Any]) -> Figure:
    """Return what each filter dropped from each corpus, and lengths and ratios of what was kept."""
    corpora = report["corpora"]
    names = [corpus["corpus"] for corpus in corpora]
    figure = new_figure(11, 5 + 0.5 * len(corpora))
    grid = figure.add_gridspec(2, 2, height_ratios=(1 + 0.3 * len(corpora), 3))
    shares = figure.add_subplot(grid[0, :])
    rows, left = range(len(corpora)), np.zeros(len(corpora))
    reads = np.array([max(corpus["read"], 1) for corpus in corpora])
    filters = dict.fromkeys(name for corpus in corpora for name in corpus["dropped"])
    for number, name in enumerate(filters):
        width = 100 * np.array([corpus["dropped"].get(name, 0) for corpus in corpora]) / reads
        if width.any():
            shares.barh(rows, width, left=left, color=f"C{number}", label=name)
            left += width
    for row, corpus in enumerate(corpora):
        dropped = f"{left[row]:.2f} %" if left[row] else "none"
        note = f" {dropped} of {corpus['read']:,} dropped, {corpus['kept']:,} kept"
        shares.text(left[row], row, note, va="center")
    shares.set(title="Dropped, % of the pairs read", xlim=(0, max(1.0, 1.8 * left.max())))
    shares.set_yticks(rows, names)
    shares.set_ylim(len(corpora) - 0.5, -0.5)  # the first on top; there may be no bars to fit
    if left.any():
        shares.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    else:
        shares.set_xticks([])
    lengths, ratios = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    for number, corpus in enumerate(corpora):
        for axis, key, edges, style in (
            (lengths, "source_chars", LENGTH_EDGES, "-"),
            (lengths, "target_chars", LENGTH_EDGES, "--"),
            (ratios, "ratio", RATIO_EDGES, "-"),
        ):
            if corpus["kept"]:
                percent = 100 * np.array(corpus[key]) / corpus["kept"]
                axis.plot(edges[:-1], percent, style, color=f"C{number}", label=corpus["corpus"])
    lengths.set(title="Characters a side (source —, target - -)", ylabel="% of the pairs kept")
    ratios.set(title="Target characters over source characters")
    for axis in (lengths, ratios):
        axis.grid(alpha=0.3)
        if not report["kept"]:
            axis.text(0.5, 0.5, "no pair was kept", transform=axis.transAxes, ha="center")
    if report["kept"]:
        ratios.legend(fontsize="small")
    return figure
