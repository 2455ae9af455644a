"""The page of a model's answers shows what they are, whatever they are."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pipeline.evaluation.answers import (
    MOST_ROWS,
    read_table,
    write_answers_page,
    write_table,
)

HOSTILE = "<script>alert('ROWS & HEAD')</script><b>\"&amp;\\1"


class Cells(HTMLParser):
    """The elements of a page, and the text of its cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1] in ("td", "button") and data.strip():
            self.texts.append(data)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, long = tmp_path / "table.tsv", 200_000 * "long "
    write_table(path, ["line", "text"], [(2, '"Ja",\tsagt er.'), (1, HOSTILE), (3, long)])
    assert [row["line"] for row in read_table(path)] == ["2", "1", "3"]
    assert [row["text"] for row in read_table(path)] == ['"Ja",\tsagt er.', HOSTILE, long]


def test_text_stays_text_and_nothing_is_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_answers_page(path, HOSTILE, ["line", HOSTILE], [(3, HOSTILE), (1, "Ja.")], "all.tsv")
    page = path.read_text(encoding="utf-8")
    cells = Cells(page)
    assert cells.texts == ["line", HOSTILE, "3", HOSTILE, "1", "Ja."]
    assert cells.elements.count("script") == 1  # ours
    assert page.count('class="number"') == 3
    assert "http" not in page
    assert "all.tsv" not in page


def test_of_many_answers_the_first_are_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_answers_page(path, "BLEU", ["line"], [(n,) for n in range(MOST_ROWS + 7)], "all.tsv")
    page = path.read_text(encoding="utf-8")
    assert Cells(page).texts == ["line", *map(str, range(MOST_ROWS))]
    assert "the worst 5,000 of 5,007; all are in all.tsv" in page
