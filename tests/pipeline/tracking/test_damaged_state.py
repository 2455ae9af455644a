"""Files under `tracking` and `evaluation` that are damaged count as missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.files import digest_of
from pipeline.evaluation.result import DIGEST, read_scores
from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import Tracker, run_id_of
from pipeline.translation_recipe import TranslationRecipe

SCORES = {"bleu": 1.0, "test_set": "t", "fingerprint": "f", "files": {}}


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> TranslationRecipe:
    keys = {"run_dir": tmp_path / "run", "tracking.uri": "http://127.0.0.1:9"}
    (tmp_path / "run" / "tracking").mkdir(parents=True)
    return load_recipe(tiny_recipe, [(key, str(value)) for key, value in keys.items()])


@pytest.mark.parametrize(
    "state",
    [None, 3, "x", [], {}, {"run_id": "a"}, {"run_id": 3, "sent": 0}, {"run_id": "a", "sent": None},
     {"run_id": "a", "sent": -1}, {"sent": 0}],
    ids=str,
)  # fmt: skip
def test_run_json(recipe: TranslationRecipe, state: Any) -> None:
    path = recipe.run_dir / "tracking" / "run.json"
    path.write_text(json.dumps({recipe.tracking_uri: state}))
    assert run_id_of(recipe) is None
    path.write_text(json.dumps({recipe.tracking_uri: {"run_id": "a", "sent": 0}}))
    assert run_id_of(recipe) == "a"


def test_journal(recipe: TranslationRecipe) -> None:
    lines = ["3", "null", "[]", "{}", '{"kind": "metrics", "time_ms": 1}', '{"kind": null}', "\x00"]
    good = {"kind": "metrics", "metrics": {"loss": 2.0}, "step": 1, "time_ms": 1}
    text = "\n".join([*lines, json.dumps(good), ""])
    (recipe.run_dir / "tracking" / "journal.jsonl").write_text(text)
    tracker = Tracker(recipe)
    assert tracker.history == {"loss": {1: 2.0}}
    tracker.close(status=None)


def test_scores_json(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    whole = {**SCORES, DIGEST: digest_of(SCORES)}
    path.write_text(json.dumps(whole))
    assert read_scores(tmp_path) == SCORES
    path.write_text(json.dumps({**whole, "bleu": 98.0}))  # edited
    assert read_scores(tmp_path) == {}
