"""The picture of what cleaning did, also where there is nothing to draw."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from data_prep.clean_report import LENGTH_EDGES, RATIO_EDGES, picture

FILTERS = ("length", "duplicates")


def corpus(name: str, read: int, *dropped: int) -> dict[str, Any]:
    """What a report says of a corpus."""
    kept = read - sum(dropped)
    chars, ratio = [0] * (len(LENGTH_EDGES) - 1), [0] * (len(RATIO_EDGES) - 1)
    chars[3] = ratio[10] = kept
    return {
        "corpus": name,
        "read": read,
        "kept": kept,
        "dropped": dict(zip(FILTERS, dropped, strict=True)),
        "source_chars": chars,
        "target_chars": chars,
        "ratio": ratio,
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("corpora", "notes"),
    [
        ([corpus("toy", 9000, 0, 0)], ["none of 9,000 dropped, 9,000 kept"]),
        (
            [corpus("a", 500, 0, 0), corpus("b", 40, 0, 0)],
            ["none of 500 dropped, 500 kept", "none of 40 dropped, 40 kept"],
        ),
        (
            [corpus("a", 500, 0, 0), corpus("b", 40, 10, 2)],
            ["none of 500 dropped, 500 kept", "30.00 % of 40 dropped, 28 kept"],
        ),
        ([corpus("a", 500, 500, 0)], ["100.00 % of 500 dropped, 0 kept"]),
        ([corpus("a", 0, 0, 0)], ["none of 0 dropped, 0 kept"]),
        ([corpus("a$_$", 500, 0, 0)], ["none of 500 dropped, 500 kept"]),
    ],
)
def test_every_corpus_has_a_row_that_can_be_read(
    corpora: list[dict[str, Any]], notes: list[str]
) -> None:
    figure = picture({"kept": sum(each["kept"] for each in corpora), "corpora": corpora})
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    shares = figure.axes[0]
    names = [label.get_text() for label in shares.get_yticklabels()]
    assert names == [each["corpus"] for each in corpora]
    assert [text.get_text().strip() for text in shares.texts] == notes
    frame = shares.get_window_extent()
    for text in shares.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, text
        assert frame.y0 < box.y0 < box.y1 < frame.y1, text
