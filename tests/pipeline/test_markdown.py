"""A table stays one, whatever is in its cells."""

from __future__ import annotations

from pipeline.markdown import markdown_table


def test_a_cell_ends_neither_its_row_nor_itself() -> None:
    rows = [("T-shirt|top", 6000), ("two\nlines", "")]
    assert markdown_table(("class", "images"), rows) == (
        "| class | images |\n|---|---|\n| T-shirt\\|top | 6000 |\n| two lines | |"
    )
