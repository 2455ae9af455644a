"""Where MLflow's store is when `run_dir` has a name that means something else in a URI."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.recipe_file import load_recipe
from pipeline.tracking.mlflow_records import metric_key
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.slow


def test_a_run_dir_with_any_name(tiny_recipe: Path, tmp_path: Path) -> None:
    place = tmp_path / "a b%20c#d?e=f&g%"
    place.mkdir()
    recipe = load_recipe(tiny_recipe, [("run_dir", str(place / "run"))])
    (place / "picture.png").write_bytes(b"picture")
    tracker = Tracker(recipe)
    tracker.log_metrics({"train_loss": 1.5}, 3)
    tracker.log_artifact(place / "picture.png", "folder")
    tracker.close()
    client = MlflowClient(recipe.tracking_uri)
    run_id = str(tracker.run_id)
    history = client.get_metric_history(run_id, metric_key("train_loss"))
    assert [metric.value for metric in history] == [1.5]
    copy = client.download_artifacts(run_id, "folder/picture.png", str(tmp_path))
    assert Path(copy).read_bytes() == b"picture"
    assert {path.name for path in tmp_path.iterdir()} == {place.name, Path(copy).name}
    assert {path.name for path in place.iterdir()} >= {"mlflow.db", "mlartifacts", "run"}
