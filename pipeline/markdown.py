"""Tables in Markdown, for model cards, MLflow and the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, whatever its cells hold: a `|` or the end of a line would end one.

    :param names: of the columns.
    :param rows: cells of each.
    """
    return "\n".join([_line(names), "|" + "---|" * len(names), *map(_line, rows)])


def _line(cells: Iterable[object]) -> str:
    contents = (" ".join(str(cell).split()).replace("|", r"\|") for cell in cells)
    return "|" + "".join(f" {content} |" if content else " |" for content in contents)
