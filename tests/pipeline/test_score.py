"""The door to forced decoding: what comes out for what goes in, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_prep.files import DataError
from pipeline.score import rerank
from pipeline.translation.lines import Lines
from pipeline.translation.serving import Pair
from pipeline.translation.translator import load_exports
from tests.conftest import Command


def test_scores_and_tokens(ctranslate2_folder: Path, command: Command) -> None:
    """One line for each, up to the one that is wrong."""
    long = "Ein Haus. " * 40
    texts = ["Ja.\tYes, the house.", "", f"{long}\tA house.", "\t", "Nein.\t", "Ja.", "Ja.\tYes."]
    done = command(
        "pipeline.score", "--model", ctranslate2_folder, "--tokens", stdin="\r\n".join(texts)
    )
    assert done.returncode == 1
    assert "score: error: stdin:6: expected a sentence, one tab, and a translation" in done.stderr
    assert "score: line 3: 281 tokens, more than the 96 that the model takes" in done.stderr
    found = done.stdout.split("\n")
    assert found[1:4] == ["", "nan", ""]
    assert len(found) == 6
    pairs = [Pair("Ja.", "Yes, the house."), Pair("Nein.", "")]
    expected = load_exports(ctranslate2_folder).score(pairs)
    for line, forced in zip((found[0], found[4]), expected, strict=True):
        assert forced is not None
        total, *each = line.split("\t")
        assert float(total) == pytest.approx(forced.log_prob, abs=1e-4)
        tokens = [text.rsplit(" ", 1) for text in each]
        assert [token for token, _ in tokens] == forced.tokens
        values = [float(value) for _, value in tokens]
        assert values == pytest.approx(forced.log_probs, abs=1e-4)
        assert math.fsum(values) == pytest.approx(float(total), abs=1e-4)
    assert [line.count("\t") for line in found[4:]] == [1, 0]  # nothing but EOS


def test_what_translate_prints_is_reranked(
    ctranslate2_folder: Path, command: Command, sentences: list[str], tmp_path: Path
) -> None:
    """By log-probability a token, the worst coming first."""
    # Behind a tab is what a translation was made to begin with: it is no part of the sentence.
    (tmp_path / "input").write_text("\n".join(f"{sentence}\tThe" for sentence in sentences))
    translator = load_exports(ctranslate2_folder)
    best = translator.n_best(sentences)
    rows = [f"{i}\t{one.score:.4f}\t{one.text}" for i, all in enumerate(best) for one in all[::-1]]
    arguments = ["--model", ctranslate2_folder, "--rerank", tmp_path / "input", "--prefix"]
    done = command("pipeline.score", *arguments, stdin="\n".join(rows))
    assert done.returncode == 0, done.stderr
    chosen = done.stdout.splitlines()
    assert len(chosen) == len(sentences)
    rows[len(rows) // 2] = f"{'1' * 5000}\t-1\tYes."
    broken = command("pipeline.score", *arguments, stdin="\n".join(rows))
    assert f"stdin:{len(rows) // 2 + 1}: expected the number of a sentence" in broken.stderr
    assert broken.stdout.splitlines() == chosen[: broken.stdout.count("\n")] != []
    # The vocabulary may cut a text in other tokens than the search has found it in.
    pairs = [
        Pair(source, one.text) for source, all in zip(sentences, best, strict=True) for one in all
    ]
    means = {
        pair: forced.log_prob / len(forced.tokens)
        for pair, forced in zip(pairs, translator.score(pairs), strict=True)
        if forced
    }
    for line, source, all in zip(chosen, sentences, best, strict=True):
        assert line in [one.text for one in all]
        top = max(means[Pair(source, one.text)] for one in all)
        assert means[Pair(source, line)] == pytest.approx(top, rel=1e-5)
    assert chosen != [all[-1].text for all in best]
    assert "translations in" in done.stderr


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["0\t-1\tYes.", "1\t-1"], "stdin:2: expected the number of a sentence, a score"),
        (["0\t-1\tYes.", "one\t-1\tNo."], "stdin:2: expected the number of a sentence, a score"),
        (["1\t-1\tNo."], "stdin:1: a translation of sentence 1, but 0 comes next"),
        (["0\t-1\tYes.", "1\t-1\tNo.", "0\t-1\tYes."], "sentence 0, but there is none left"),
        (["0\t-1\tYes."], "input:2: stdin has no translation of this sentence"),
    ],
)
def test_rows_that_do_not_fit(
    rows: list[str], expected: str, ctranslate2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "input").write_text("Ja.\nNein.\n")
    translator = load_exports(ctranslate2_folder)
    batches = (Lines(line, [text]) for line, text in enumerate(rows, start=1))
    with pytest.raises(DataError, match=expected):
        list(rerank(translator, tmp_path / "input", False, "stdin", batches, lambda count: None))


def test_a_tab_is_a_space_in_a_sentence_to_rerank(ctranslate2_folder: Path, tmp_path: Path) -> None:
    """As `translate` without `--prefix` reads it."""
    (tmp_path / "input").write_text("Das Haus\tist alt.\n")
    translator = load_exports(ctranslate2_folder)
    best = translator.n_best(["Das Haus\tist alt."])[0]
    texts = ["The house.", "Yes.", *(one.text for one in best)]
    scores = translator.score([("Das Haus ist alt.", text) for text in texts])
    means = [each.score(translator.search.length_penalty) for each in scores if each]
    rows = iter([Lines(1, [f"0\t-1\t{text}" for text in texts])])
    found = rerank(translator, tmp_path / "input", False, "stdin", rows, lambda count: None)
    assert [line for lines in found for line in lines] == [texts[means.index(max(means))]]
