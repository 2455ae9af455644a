"""A model's answers as a table, and as a page to search and sort: HTML that needs nothing else."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_ROWS = 5000  # of a page: 3 MB of news, which a browser searches at once and sorts in a second


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table of answers, with tabs between cells, as csv's readers take them.

    :param columns: their names.
    :param rows: the worst answers first.
    """
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    write_atomically(path, text.getvalue())


def read_table(path: Path) -> list[dict[str, str]]:
    """Read what `write_table` wrote: the cells of each row, by the names of their columns."""
    csv.field_size_limit(sys.maxsize)  # a line of text may be longer than csv's limit
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write_answers_page(
    path: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], all_in: str
) -> None:
    """Write the first rows of a table as a page; the other parameters are those of `write_table`.

    :param rows: there is one. Numbers are sorted as such.
    :param all_in: the file that has all rows.
    """
    about = ""
    if len(rows) > MOST_ROWS:
        about = f"the worst {MOST_ROWS:,} of {len(rows):,}; all are in {all_in}"
    head = "".join(
        f"<th{_kind(value)}><button>{escape(name)}</button></th>"
        for name, value in zip(columns, rows[0], strict=True)
    )
    parts = {
        "TITLE": escape(title),
        "ABOUT": escape(about),
        "HEAD": head,
        "ROWS": "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST_ROWS]),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    page = re.sub("TITLE|ABOUT|HEAD|ROWS", lambda found: parts[found[0]], template)
    write_atomically(path, page)


def _cell(value: Any) -> str:
    return f"<td{_kind(value)}>{escape(str(value))}</td>"


def _kind(value: Any) -> str:
    """Return the attribute that cells with such values have."""
    return ' dir="auto"' if isinstance(value, str) else ' class="number"'
