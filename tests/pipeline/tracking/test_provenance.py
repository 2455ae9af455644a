"""What MLflow is told of a training does not have the password of its server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.recipe_file import load_recipe
from pipeline.tracking.provenance import DataFacts, log_data, log_training
from pipeline.tracking.tracker import Tracker
from tests.conftest import free_port

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("password", ["secret", "secret@home"])
def test_the_password_of_the_server_stays_here(
    password: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = f"127.0.0.1:{free_port()}"  # nobody listens
    uri, run_dir = f"http://me:{password}@{server}", str(tmp_path / "run")
    mail = '{name: a, url: "https://a.example/b", by: "me@a.example"}'
    given = ["--tracking.uri", uri, "--data.downloads", mail]
    monkeypatch.setattr(sys, "argv", ["train", "--local_rank=0", *given])
    monkeypatch.delenv("DEEPSPEED_ARGS", raising=False)
    recipe = load_recipe(tiny_recipe, [("run_dir", run_dir), ("tracking.uri", uri)])
    tracker = Tracker(recipe)
    log_data(tracker, recipe, DataFacts({}, None, {}, (), ()))
    log_training(tracker, recipe, {}, ranks=1, device="cpu", core_parameters=7)
    tracker.close()
    command = f"./run.sh --tracking.uri http://{server} --data.downloads '{mail}'"
    assert tracker.tags["command"] == command
    records = (tmp_path / "run" / "tracking" / "journal.jsonl").read_text().splitlines()
    (told,) = [r["content"] for r in map(json.loads, records) if r.get("name") == "recipe.json"]
    assert told["tracking"]["uri"] == f"http://{server}"
    assert "secret" not in "".join(records)
