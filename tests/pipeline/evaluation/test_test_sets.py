"""Test sets come from the cleaned text, from files of one's own, and from sacreBLEU's cache."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from data_prep.files import DataError
from pipeline.evaluation.test_sets import load_test_sets
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import run_process


def with_test_sets(recipe: TranslationRecipe, root: Path, text: str) -> TranslationRecipe:
    """Return the recipe with these `evaluation.test_sets`, files below `root`."""
    path = recipe.run_dir.parent / "tiny.yaml"
    return load_recipe(path, [("data.root", str(root)), ("evaluation.test_sets", text)])


def test_test_sets_from_files(prepared: TranslationRecipe, tmp_path: Path) -> None:
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
        "[wmt14/ful]": "sacreBLEU has no test set wmt14/ful; it has wmt14, wmt14/full",
        "[wmt08/nc]": "wmt08/nc has no de-en, but ",
    }
    for text, message in wrong.items():
        with pytest.raises(DataError, match=message):
            list(load_test_sets(with_test_sets(prepared, tmp_path, text)))
    with pytest.raises(UsageError, match=r"command line: .*test_sets\.0\.source` is required"):
        with_test_sets(prepared, tmp_path, "[{name: x, references: [a.en]}]")
    for name, why in {
        "toy-test": "another test set is",
        "test": "data.test is, in MLflow",
        "validation": "the validation set is",
    }.items():
        text = f"[{{name: {name}, source: a.de, references: [a.en]}}]"
        with pytest.raises(UsageError, match=f"the test set {name} must not be .*: {why}"):
            with_test_sets(prepared, tmp_path, text)


@pytest.mark.slow
def test_a_test_set_of_sacrebleus_cache(
    prepared: TranslationRecipe, shared: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "wmt14" / "full"
    cache.mkdir(parents=True)
    for field in ("src", "ref", "docid", "genre", "origlang"):
        side = "de" if field == "src" else "en"
        shutil.copy(
            shared / "data/newstest" / f"newstest2014.{side}", cache / f"wmt14_full.de-en.{field}"
        )
    code = (
        "import sys; from pathlib import Path; from pipeline.recipe_file import load_recipe;"
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
