"""Scores are those that the `sacrebleu` command gives; suspicious translations are found."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from pipeline.translation.scores import (
    by_source_length,
    corpus_scores,
    paired_bootstrap,
    suspicious,
)
from tests.conftest import run_process


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Return two references, and two systems that leave out words of the first; as files, too."""
    words = ["the", "a", "small", "old", "house", "man", "dog", "sees", "likes", "buys", ",", "."]
    draw = random.Random(1)
    lines = {"ref0": [" ".join(draw.choices(words, k=draw.randint(4, 30))) for _ in range(120)]}
    lines["ref1"] = [line.replace("small", "little") for line in lines["ref0"]]
    for name, lost in (("baseline", 0.3), ("better", 0.25)):
        lines[name] = [
            " ".join(word for word in line.split() if draw.random() > lost) or "."
            for line in lines["ref0"]
        ]
    folder = tmp_path_factory.mktemp("systems")
    for name, text in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in text))
    return folder, lines


def sacrebleu(folder: Path, *arguments: str) -> str:
    """Run the command `sacrebleu` against both references, and return what it says."""
    program = str(Path(sys.executable).with_name("sacrebleu"))
    references = [str(folder / "ref0"), str(folder / "ref1")]
    done = run_process(
        [program, *references, *arguments, "-m", "bleu", "chrf", "ter", "-w", "2"], NO_COLOR="1"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scores_intervals_and_signatures_are_sacrebleus(
    systems: tuple[Path, dict[str, list[str]]],
) -> None:
    folder, lines = systems
    ours = corpus_scores(lines["better"], [lines["ref0"], lines["ref1"]], "en")
    theirs = json.loads(
        sacrebleu(folder, "-i", str(folder / "better"), "--confidence", "-l", "de-en")
    )
    for name, found in zip(("bleu", "chrf", "ter"), theirs, strict=True):
        assert ours[name] == pytest.approx(found["score"], abs=0.006)
        assert ours[f"{name}_ci"] == pytest.approx(found["confidence_var"], abs=0.006)
        assert "nrefs:2" in ours[f"{name}_signature"]
        assert set(found["signature"].split("|")) == set(ours[f"{name}_signature"].split("|"))
    assert ours["length_ratio"] == pytest.approx(0.75, abs=0.03)


def test_paired_bootstrap_is_sacrebleus(systems: tuple[Path, dict[str, list[str]]]) -> None:
    folder, lines = systems
    references = [lines["ref0"], lines["ref1"]]
    ours = paired_bootstrap(lines["baseline"], lines["better"], references, "en")
    said = sacrebleu(
        folder, "-i", str(folder / "baseline"), str(folder / "better"), "--paired-bs",
        "-f", "text", "-l", "de-en",
    )  # fmt: skip
    (before, after) = (re.findall(r"([\d.]+) \(", row) for row in re.findall(r".*± .*", said)[-2:])
    chances = re.findall(r"\(p = ([\d.]+)\)", said)
    for name, *theirs in zip(("bleu", "chrf", "ter"), before, after, chances, strict=True):
        was, became, p = map(float, theirs)
        assert ours[name]["baseline"] == pytest.approx(was, abs=0.006)
        assert ours[name]["difference"] == pytest.approx(became - was, abs=0.011)
        assert ours[name]["p"] == pytest.approx(p, abs=1e-4)
    assert ours["bleu"]["p"] < 0.05 < paired_bootstrap(
        lines["better"], [*lines["better"][:-1], "."], references, "en"
    )["bleu"]["p"]  # fmt: skip


def test_equal_systems_differ_by_chance(systems: tuple[Path, dict[str, list[str]]]) -> None:
    _, lines = systems
    found = paired_bootstrap(lines["better"], lines["better"], [lines["ref0"]], "en")
    assert {(score["difference"], score["p"]) for score in found.values()} == {(0.0, 1.0)}


def test_buckets_hold_every_sentence(systems: tuple[Path, dict[str, list[str]]]) -> None:
    _, lines = systems
    lengths = [len(line.split()) for line in lines["ref0"]]
    buckets = by_source_length([0, *lengths[1:-1], 200], lines["better"], [lines["ref0"]], "en")
    assert [bucket["source_tokens"] for bucket in buckets] == ["1–10", "11–20", "21–30", "> 60"]
    assert sum(bucket["sentences"] for bucket in buckets) == 120
    assert buckets[-1] == {"source_tokens": "> 60", "sentences": 1, "bleu": buckets[-1]["bleu"],
                           "bleu_ci": 0.0}  # fmt: skip


def test_suspicious_translations() -> None:
    sources = ["Berlin", "Ein Hund", "Ja", "", "Gut", "Eine Katze"]
    hypotheses = ["Berlin", "Ein Hund", "", "", "very " * 10, "A cat"]
    references = [["Berlin", "A dog", "Yes", "", "Good", "A cat"], ["B.", "Dog", "Y", "", "G", "C"]]
    assert suspicious(sources, hypotheses, references) == {
        "copied": [1], "empty": [2], "overlong": [4],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "tokeniser"),
    [(("zh", "zh-CN", "zh_Hant", "cmn", "zho_Hans"), "zh"), (("en", "en-GB", "deu_Latn"), "13a")],
)
def test_the_tokeniser_is_the_languages_whatever_its_code(
    codes: tuple[str, ...], tokeniser: str
) -> None:
    hypotheses, references = ["我今天去了北京的学校。", "猫"], [["我昨天去了北京的学校。", "猫"]]
    found = [corpus_scores(hypotheses, references, code) for code in codes]
    assert all(scores == found[0] for scores in found)
    assert f"tok:{tokeniser}|" in found[0]["bleu_signature"]


@pytest.mark.parametrize(
    ("code", "sentence", "other", "tokeniser"),
    [
        ("th", "พรุ่งนี้เราจะไปเยี่ยมเพื่อนเก่าที่กรุงเทพ", "แมว", "char"),
        ("khm_Khmr", "ថ្ងៃស្អែកយើងនឹងទៅលេងមិត្តចាស់នៅភ្នំពេញ", "ឆ្មា", "char"),
        ("zh", "我今天去了北京的学校。", "猫", "zh"),
    ],
)
def test_where_words_are_not_set_apart_characters_count(
    code: str, sentence: str, other: str, tokeniser: str
) -> None:
    references = [[sentence] * 20]
    near, far = ([text] * 20 for text in (sentence[:-3] + sentence[-2:], other))
    good, bad = (corpus_scores(each, references, code) for each in (near, far))
    assert f"tok:{tokeniser}|" in good["bleu_signature"]
    assert good["bleu"] > 70 > 10 > bad["bleu"]
    if code == "zh":  # for the others TER sees one word
        assert good["ter"] < 30 < bad["ter"]
