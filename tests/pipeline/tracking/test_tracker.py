"""The tracker loses nothing while a real MLflow server comes and goes."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.recipe_file import load_recipe
from pipeline.tracking.mlflow_records import client_of, send
from pipeline.tracking.tracker import Tracker, history_of, run_id_of, send_left_over
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import free_port, mlflow_server

pytestmark = pytest.mark.slow


def recipe_of(tiny_recipe: Path, folder: Path, port: int) -> TranslationRecipe:
    """Return the tiny recipe with a run_dir in `folder`, tracked by a server at `port`."""
    uri = f"http://127.0.0.1:{port}"
    return load_recipe(tiny_recipe, [("run_dir", str(folder / "run")), ("tracking.uri", uri)])


@pytest.fixture(scope="module")
def port() -> int:
    """Return the port of this file's server, before it is there."""
    return free_port()


@pytest.fixture(scope="module")
def server(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a tracking server from now on."""
    with mlflow_server(tmp_path_factory.mktemp("server"), port):
        yield


def test_what_an_interrupted_training_has_logged_is_not_logged_again(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny_recipe, [("run_dir", str(tmp_path / "run"))])
    tracker = Tracker(recipe)
    for metrics in (
        {"valid_loss": 2.0},
        {"valid_loss": 2.00001},
        {"valid_loss": 2.0, "valid_bleu": 3.0},  # going on, it translates too
    ):
        tracker.log_metrics(metrics, 4, once=["valid_loss"])
    tracker.close(None)
    assert history_of(recipe) == {"valid_loss": {4: 2.0}, "valid_bleu": {4: 3.0}}
    lines = (recipe.run_dir / "tracking" / "journal.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "metrics" for line in lines) == 2


def test_nothing_is_lost_while_the_server_is_away(
    tiny_recipe: Path,
    tmp_path: Path,
    port: int,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path, port)
    data = {"totals": {"train": {"pairs": 3}}, "vocabulary": {"sizes": [300, 300]}}
    (tmp_path / "hypotheses.txt").write_text("Hello.\n")

    tracker = Tracker(recipe)  # nobody listens yet
    tracker.log_params(deepspeed={"zero_optimization": {"stage": 1}}, data=data)
    for step in range(1, 101):
        tracker.log_metrics({"train_loss": 1 / step}, step)
    tracker.log_artifact(tmp_path / "hypotheses.txt", "evaluation")
    tracker.close()
    (tmp_path / "hypotheses.txt").write_text("Bye.\n")  # what was logged is still sent
    assert tracker.run_id is None
    assert "sent by the next command" in caplog.text

    request.getfixturevalue("server")
    tracker = Tracker(recipe)  # the next command
    tracker.log_metrics({"train_loss": 0.0}, 101)
    tracker.log_table("translations.json", {"source": ["Hallo."], "translation": ["Hello."]})
    tracker.log_note("![a](artifact:loss.png) [b](artifact:data/a b.html) [c](https://d)")
    tracker.close()
    run_id = tracker.run_id
    assert run_id is not None
    client = MlflowClient(recipe.tracking_uri)
    history = client.get_metric_history(run_id, "loss/train_loss")
    assert [metric.step for metric in history] == list(range(1, 102))
    assert history[49].value == 1 / 50
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts"
    assert run.data.tags["mlflow.note.content"] == (
        f"![a](get-artifact?run_uuid={run_id}&path=loss.png) "
        f"[b]({page}/data/a%20b.html?workflowType=machine_learning) [c](https://d)"
    )
    assert run.data.params["data.totals.train.pairs"] == "3"
    assert run.data.params["deepspeed.zero_optimization.stage"] == "1"
    artifacts = [item.path for item in client.list_artifacts(run_id, "evaluation")]
    assert artifacts == ["evaluation/hypotheses.txt"]
    copy = client.download_artifacts(run_id, "evaluation/hypotheses.txt", str(tmp_path))
    assert Path(copy).read_text() == "Hello.\n"

    # Sent again (a process killed before it noted what it had sent): still once in MLflow.
    # The kill has also cut the last record short.
    with (tmp_path / "run" / "tracking" / "journal.jsonl").open("a") as journal:
        journal.write('{"kind": "metrics", "time_ms": 17')
    state = tmp_path / "run" / "tracking" / "run.json"
    state.write_text(json.dumps({recipe.tracking_uri: {"run_id": run_id, "sent": 0}}))
    tracker = Tracker(recipe)
    tracker.log_metrics({"valid_loss": 2.0}, 101)
    tracker.close()
    assert tracker.run_id == run_id
    assert len(client.get_metric_history(run_id, "loss/train_loss")) == 101
    assert client.get_metric_history(run_id, "loss/valid_loss")[0].value == 2.0
    assert "skipped a line that a crash has cut" in caplog.text
    table = client.download_artifacts(run_id, "translations.json", str(tmp_path))
    assert json.loads(Path(table).read_text())["data"] == [["Hallo.", "Hello."]]
    tracker = Tracker(recipe)  # another evaluation's takes its place
    tracker.log_table("translations.json", {"source": ["Ja.", "Nein."], "chrf": [1.5, 2]})
    tracker.close()
    table = client.download_artifacts(run_id, "translations.json", str(tmp_path))
    assert json.loads(Path(table).read_text()) == {
        "columns": ["source", "chrf"], "data": [["Ja.", 1.5], ["Nein.", 2]],
    }  # fmt: skip


def test_a_new_store_or_a_deleted_run_gets_everything(
    tiny_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_recipe(tiny_recipe, [("run_dir", str(tmp_path / "run"))])
    tracker = Tracker(first)
    tracker.log_metrics({"train_loss": 1.0}, 1)
    tracker.close()
    deleted = tracker.run_id
    assert deleted is not None
    MlflowClient(first.tracking_uri).delete_run(deleted)
    uri = f"sqlite:///{tmp_path}/other.db"
    second = load_recipe(tiny_recipe, [("run_dir", str(tmp_path / "run")), ("tracking.uri", uri)])
    tracker = Tracker(first)
    tracker.log_metrics({"train_loss": 0.5}, 2)
    tracker.close()
    assert f"MLflow run {deleted} was deleted" in caplog.text
    send_left_over(second)
    for recipe in (first, second):
        client = MlflowClient(recipe.tracking_uri)
        (experiment,) = (client.get_experiment_by_name("ringformer"),)
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "loss/train_loss")
        assert [metric.value for metric in history] == [1.0, 0.5]
        assert run_id_of(recipe) == run.info.run_id
    send_left_over(first)  # has everything already: nothing is sent twice
    runs = MlflowClient(first.tracking_uri).search_runs([run.info.experiment_id])
    assert len(runs) == 1


def test_a_refused_record_does_not_hold_up_the_others(
    tiny_recipe: Path,
    tmp_path: Path,
    port: int,
    server: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    recipe = recipe_of(tiny_recipe, tmp_path, port)
    for size in (1, 2):  # MLflow's parameters cannot change
        tracker = Tracker(recipe)
        tracker.log_params(deepspeed={"train_batch_size": size, "fp16": size > 1})
        tracker.log_metrics({"train_loss": 1.0}, size)
        tracker.close()
    assert "MLflow did not take params: it keeps those that a run began with, of " in caplog.text
    assert tracker.run_id is not None
    client = MlflowClient(recipe.tracking_uri)
    history = client.get_metric_history(tracker.run_id, "loss/train_loss")
    assert [metric.step for metric in history] == [1, 2]


def test_files_that_cannot_be_sent_do_not_hold_up_the_others(
    tiny_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has them where only a client with other packages can write."""
    if find_spec("boto3"):
        pytest.skip("boto3 is installed")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = load_recipe(tiny_recipe, [("run_dir", str(tmp_path / "run")), ("tracking.uri", uri)])
    client = MlflowClient(uri)
    client.create_experiment(recipe.tracking.experiment, artifact_location="s3://bucket/mlflow")
    tracker = Tracker(recipe)
    tracker.log_json("recipe.json", {"a": 1})
    tracker.log_metrics({"train_loss": 1.0}, 1)
    assert tracker.close()
    assert "MLflow did not take json: ModuleNotFoundError" in caplog.text
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).data.metrics == {"loss/train_loss": 1.0}


def test_what_stands_before_a_server_that_is_away_refuses_nothing(
    tiny_recipe: Path, tmp_path: Path, port: int, server: None
) -> None:
    """A proxy says 404 then, and so does MLflow of a run that it does not have."""

    class NotFound(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(404)

        do_PATCH = do_GET = do_POST

    with HTTPServer(("127.0.0.1", 0), NotFound) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        client = client_of(recipe_of(tiny_recipe, tmp_path, proxy.server_port))
        with pytest.raises(MlflowException, match="404"):
            send(client, "0" * 32, "status", [{"status": "FINISHED"}], tmp_path)
        proxy.shutdown()
    client = client_of(recipe_of(tiny_recipe, tmp_path, port))
    send(client, "0" * 32, "status", [{"status": "FINISHED"}], tmp_path)  # is left out


def test_a_record_that_does_not_fit_on_the_disk_leaves_nothing_behind(
    tiny_recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(tiny_recipe, tmp_path, free_port())
    journal = recipe.run_dir / "tracking" / "journal.jsonl"
    tracker = Tracker(recipe)
    tracker.log_metrics({"train_loss": 3.0}, 1)
    whole, limits = journal.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, limits[1]))
    try:
        tracker.log_metrics({"train_loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "not logged: No space left on device" in caplog.text
    assert journal.read_bytes() == whole
    tracker.log_metrics({"train_loss": 1.0}, 3)
    tracker.close()
    assert history_of(recipe)["train_loss"] == {1: 3.0, 3: 1.0}
