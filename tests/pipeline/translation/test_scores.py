"""Scores against the `sacrebleu` command, test sets from wherever they come."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.files import DataError
from pipeline.command_line import load_recipe
from pipeline.evaluation.test_sets import load_test_sets
from pipeline.pictures import draw_bleu_by_length, draw_losses
from pipeline.ranks import share_of
from pipeline.recipe import Recipe, UsageError
from pipeline.translation.scores import (
    by_source_length,
    corpus_scores,
    paired_bootstrap,
    suspicious,
)
from tests.conftest import Command, run_process


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Two references, and two systems that leave out words of the first; as files, too."""
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


def test_buckets_hold_every_sentence_and_are_drawn(
    systems: tuple[Path, dict[str, list[str]]], tmp_path: Path
) -> None:
    _, lines = systems
    lengths = [len(line.split()) for line in lines["ref0"]]
    buckets = by_source_length([0, *lengths[1:-1], 200], lines["better"], [lines["ref0"]], "en")
    assert [bucket["source_tokens"] for bucket in buckets] == ["1–10", "11–20", "21–30", "> 60"]
    assert sum(bucket["sentences"] for bucket in buckets) == 120
    assert buckets[-1] == {"source_tokens": "> 60", "sentences": 1, "bleu": buckets[-1]["bleu"],
                           "bleu_ci": 0.0}  # fmt: skip
    draw_bleu_by_length("title", buckets, tmp_path / "a.png")
    draw_bleu_by_length("title", buckets, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    draw_losses({"train_loss": {10: 2.0, 20: 1.5}, "valid_bleu": {20: 3.0}}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    draw_losses({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_every_rank_has_its_lines_and_all_are_shared_out() -> None:
    for lines in ([], ["a"], ["long " * 20, "b", "c", "d"], [str(n) * n for n in range(40)]):
        for world_size in (1, 2, 3, 8):
            shares = [lines[share_of(lines, rank, world_size)] for rank in range(world_size)]
            assert [line for share in shares for line in share] == lines
    sizes = [len("".join(part)) for part in (lines[share_of(lines, rank, 2)] for rank in (0, 1))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


def test_suspicious_translations() -> None:
    sources = ["Berlin", "Ein Hund", "Ja", "", "Gut", "Eine Katze"]
    hypotheses = ["Berlin", "Ein Hund", "", "", "very " * 10, "A cat"]
    references = [["Berlin", "A dog", "Yes", "", "Good", "A cat"], ["B.", "Dog", "Y", "", "G", "C"]]
    assert suspicious(sources, hypotheses, references) == {
        "copied": [1], "empty": [2], "overlong": [4],
    }  # fmt: skip


def with_test_sets(recipe: Recipe, root: Path, text: str) -> Recipe:
    path = recipe.run_dir.parent / "tiny.yaml"
    return load_recipe(path, [("data.root", str(root)), ("evaluation.test_sets", text)])


def test_test_sets_from_files(prepared: Recipe, tmp_path: Path) -> None:
    for name, lines in (("a.de", "Ja.\nNein.\n"), ("a.en", "Yes.\nNo.\n"), ("b.en", "Y.\n")):
        (tmp_path / name).write_text(lines)
    one = "[{name: my set/1, source: a.de, references: [a.en, a.en]}]"
    own, mine = load_test_sets(with_test_sets(prepared, tmp_path, one))
    assert (own.name, len(own.sources), len(own.references)) == ("toy-test", 20, 1)
    assert mine.slug == "my-set-1"
    assert mine.references == [["Yes.", "No."]] * 2
    wrong = {
        "[{name: x, source: a.de, references: [a.en, b.en]}]": "x: 2 source lines but 1 in a ref",
        "[{name: x, source: nowhere, references: [a.en]}]": "x: .*nowhere does not exist",
        "[{name: toy-test, source: a.de, references: [a.en]}]": "two test sets are called toy-test",
        "[wmt14/ful]": "sacreBLEU has no test set wmt14/ful; it has wmt14, wmt14/full",
        "[wmt08/nc]": "wmt08/nc has no de-en, but ",
    }
    for text, message in wrong.items():
        with pytest.raises(DataError, match=message):
            list(load_test_sets(with_test_sets(prepared, tmp_path, text)))
    with pytest.raises(UsageError, match=r"command line: .*test_sets\.0\.source` is required"):
        with_test_sets(prepared, tmp_path, "[{name: x, references: [a.en]}]")


@pytest.mark.slow
def test_a_test_set_of_sacrebleus_cache(
    prepared: Recipe, shared: Path, tmp_path: Path, command: Command
) -> None:
    cache = tmp_path / "wmt14" / "full"
    cache.mkdir(parents=True)
    for field in ("src", "ref", "docid", "genre", "origlang"):
        side = "de" if field == "src" else "en"
        shutil.copy(
            shared / "data/newstest" / f"newstest2014.{side}", cache / f"wmt14_full.de-en.{field}"
        )
    code = (
        "import sys; from pathlib import Path; from pipeline.command_line import load_recipe;"
        "from pipeline.evaluation.test_sets import load_test_sets;"
        "recipe = load_recipe(Path(sys.argv[1]), [('evaluation.test_sets', sys.argv[2])]);"
        "print([(t.slug, len(t.sources), len(t.references)) for t in load_test_sets(recipe)][1:])"
    )
    recipe = str(prepared.run_dir.parent / "tiny.yaml")
    done = run_process(
        [sys.executable, "-c", code, recipe, "[wmt14/full]"], SACREBLEU=str(tmp_path)
    )
    assert done.stdout == "[('wmt14-full', 3003, 1)]\n", done.stderr
    empty, nobody = str(tmp_path / "empty"), "http://127.0.0.1:9"
    done = run_process(
        [sys.executable, "-c", code, recipe, "[wmt17]"], SACREBLEU=empty, https_proxy=nobody
    )
    assert "wmt17: sacreBLEU cannot fetch it" in done.stderr
    assert f"bring it from another machine's {empty}" in done.stderr
