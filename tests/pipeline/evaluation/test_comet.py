"""COMET scores test sets, where its program and a model are at hand.

The program cannot be installed beside our packages, so a script stands in for it: it takes the
options of unbabel-comet 2.2.7 and writes the JSON that this writes.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from data_prep.files import DataError, read_json
from pipeline.evaluation.comet import PROGRAM
from pipeline.evaluation.evaluator import evaluate
from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import untrained_model
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import save_checkpoint

STAND_IN = f"""#!{sys.executable}
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("-s", "-t", "-r", "--model", "--to_json"):
    parser.add_argument(name, required=True)
parser.add_argument("--quiet", action="store_true")
given = parser.parse_args()
assert os.environ["HF_HUB_OFFLINE"] == os.environ["PYTHONUTF8"] == "1"
if "damaged" in pathlib.Path(given.model).read_text():
    sys.exit("not a checkpoint")
columns = [pathlib.Path(path).read_text().splitlines() for path in (given.s, given.t, given.r)]
rows = [
    {{"src": s, "mt": t, "ref": r, "COMET": 0.5 + 0.1 * (t == r) + 0.02 * (s == r)}}
    for s, t, r in zip(*columns, strict=True)
]
pathlib.Path(given.to_json).write_text(json.dumps({{given.t: rows}}))
"""


@pytest.fixture
def recipe(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TranslationRecipe:
    """A run with a model, a COMET model, and the program on PATH."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / PROGRAM
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "model.ckpt").write_text("weights")
    others = shutil.ignore_patterns("checkpoints", "evaluation", "tracking")  # of other tests
    shutil.copytree(prepared.run_dir, tmp_path / "run", ignore=others)
    keys = {"run_dir": str(tmp_path / "run"), "evaluation.comet": str(tmp_path / "model.ckpt")}
    recipe = load_recipe(tiny_recipe, list(keys.items()))
    save_checkpoint(untrained_model(recipe), recipe)
    return recipe


def test_test_sets_are_scored_by_comet(recipe: TranslationRecipe, tmp_path: Path) -> None:
    (found,) = evaluate(recipe).results
    assert found.scores["comet"] == 0.5  # nothing is translated rightly
    assert ", COMET 0.5" in found.line
    validation = read_json(recipe.run_dir / "evaluation" / "validation" / "scores.json")
    assert "bleu" in validation
    assert "comet" not in validation

    assert evaluate(recipe).missing == []
    # What was scored by the first is scored anew.
    (tmp_path / "model.ckpt").write_text("other weights")
    (tmp_path / "bin" / PROGRAM).write_text(STAND_IN.replace("0.5 +", "0.25 +"))
    (found,) = evaluate(recipe).results
    assert found.scores["comet"] == 0.25


def test_what_is_not_at_hand_is_said_before_anything_is_translated(
    recipe: TranslationRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.ckpt").write_text("damaged")
    with pytest.raises(DataError, match=r"model\.ckpt failed: not a checkpoint"):
        evaluate(recipe)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"comet-score is not on PATH; install the package"):
        evaluate(recipe)
    (tmp_path / "model.ckpt").unlink()
    with pytest.raises(UsageError, match=r"model\.ckpt is no file that ends in \.ckpt"):
        evaluate(recipe)
    assert not (recipe.run_dir / "evaluation" / "toy-test").exists()
