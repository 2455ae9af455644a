"""MLflow's client, and what it is told for each kind of journal record."""

# Functions import mlflow themselves: that takes seconds, and a command whose thread has nothing to
# send needs none of it.

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from data_prep.files import first_line
from pipeline.recipe import Recipe
from pipeline.tracking.moved_store import follow_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

METRICS_RECORDS = 50  # journal records of metrics sent together
METRIC_DIGITS = 6  # significant ones; the journal has all
FILE_KINDS = ("artifact", "json", "table")  # records that become files
TRAINING_METRICS = ("epoch", "grad_norm", "learning_rate", "skipped_steps")

ARTIFACT = re.compile(r"(?P<label>!?\[[^]]*\])\(artifact:(?P<path>[^)]*)\)")  # in a note

IMPORT_LOCK = threading.Lock()  # two threads that import mlflow at once deadlock

Record = Mapping[str, Any]


def client_of(recipe: Recipe) -> MlflowClient:
    """Return a client of a recipe's tracking store.

    It does not retry; its callers do, or tell the user.
    """
    follow_store(recipe)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    with IMPORT_LOCK:
        from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=recipe.tracking_uri)


def send(
    client: MlflowClient, run_id: str, kind: str, records: Sequence[Record], folder: Path
) -> None:
    """Send journal records of one kind to MLflow: several of metrics, one of any other kind.

    What MLflow refuses for good is left out with a warning.

    :param folder: of the journal; the copies of artifacts are below it.
    :raises Exception: an error of MLflow or the network, after which it is worth trying again.
    """
    try:
        if kind == "metrics":
            _send_metrics(client, run_id, records)
        elif kind == "artifact":
            where = records[0]["name"].rpartition("/")[0]
            client.log_artifact(run_id, str(folder / records[0]["kept"]), where or None)
        else:
            SENDERS[kind](client, run_id, records[0])
    except FileNotFoundError as error:
        log.warning("artifact is gone, not logged: %s", describe_error(error))
    except Exception as error:
        if not _is_final(error, of_file=kind in FILE_KINDS):
            raise
        log.warning("MLflow did not take %s: %s", kind, describe_error(error))


def _is_final(error: Exception, of_file: bool) -> bool:
    """Return whether it is no use to send a record again: any other error can go away.

    :param of_file: the record is a file, for a place that may be another than the server.
    """
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # What stands before a server that is away says 404, too, but not in MLflow's words.
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
        return status in (400, 404) and "Response body:" not in str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return of_file and 400 <= status < 500 and status not in (401, 404, 408, 429)
    return of_file and isinstance(error, ImportError | PermissionError)


def describe_error(error: Exception) -> str:
    """Return the type of an error and the first line of its text, at most 200 characters of it."""
    text = first_line(error)[:200] if str(error).strip() else ""
    return f"{type(error).__name__}: {text}"


def metric_key(name: str) -> str:
    """Return what MLflow calls a metric: its name behind a section, as in `loss/train_loss`.

    MLflow draws the sections in alphabetical order, and metrics without one below them all. So
    `loss` and `quality` come before `speed` and `training`. (`system/…` has a page of its own.)
    """
    if "/" in name:
        return name
    if name in TRAINING_METRICS:
        return f"training/{name}"
    if name.endswith(("_loss", "_ppl")):
        return f"loss/{name}"
    return f"speed/{name}" if name.endswith("_per_second") else f"quality/{name}"


def rounded(value: float) -> float:
    """Return a metric as people read it: with six significant digits, or all those of its integer
    part where they are more."""
    if math.isfinite(value) and abs(value) >= 10**METRIC_DIGITS:
        return float(round(value))
    return float(f"{value:.{METRIC_DIGITS}g}")


def _send_metrics(client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(metric_key(key), rounded(value), record["time_ms"], record["step"])
        for record in records
        for key, value in record["metrics"].items()
    ]
    client.log_batch(run_id, metrics=metrics)


def _send_params(client: MlflowClient, run_id: str, record: Record) -> None:
    from mlflow.entities import Param

    known, params = client.get_run(run_id).data.params, record["params"]
    changed = sorted(key for key, value in params.items() if known.get(key, value) != value)
    if changed:
        log.warning(
            "MLflow did not take params: it keeps those that a run began with, of %s; recipe.json "
            "has the new ones",
            ", ".join(changed),
        )
    new = [Param(key, value) for key, value in params.items() if key not in known]
    client.log_batch(run_id, params=new)


def _send_tags(client: MlflowClient, run_id: str, record: Record) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(*tag) for tag in record["tags"].items()])


def _send_note(client: MlflowClient, run_id: str, record: Record) -> None:
    experiment = client.get_run(run_id).info.experiment_id
    page = f"#/experiments/{experiment}/runs/{run_id}/artifacts"

    def address(found: re.Match[str]) -> str:
        label, path = found["label"], quote(found["path"])
        if label.startswith("!"):  # a picture
            return f"{label}(get-artifact?run_uuid={run_id}&path={path})"
        return f"{label}({page}/{path}?workflowType=machine_learning)"

    client.set_tag(run_id, "mlflow.note.content", ARTIFACT.sub(address, record["text"]))


def _send_input(client: MlflowClient, run_id: str, record: Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        record["name"],
        record["digest"],
        source_type="local",
        source=json.dumps({"uri": record["profile"]["folder"]}),
        profile=json.dumps(record["profile"]),
    )
    tag = InputTag("mlflow.data.context", record["context"])
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [tag])])


def _send_json(client: MlflowClient, run_id: str, record: Record) -> None:
    text = json.dumps(record["content"], indent=2, ensure_ascii=False)
    client.log_text(run_id, text, record["name"])


def _send_table(client: MlflowClient, run_id: str, record: Record) -> None:
    name, folder = record["name"], record["name"].rpartition("/")[0]
    columns = record["columns"]
    if name not in [item.path for item in client.list_artifacts(run_id, folder or None)]:
        client.log_table(run_id, columns, name)
    else:  # `log_table` would append to it
        rows = list(zip(*columns.values(), strict=True))
        client.log_dict(run_id, {"columns": list(columns), "data": rows}, name)


def _send_status(client: MlflowClient, run_id: str, record: Record) -> None:
    if record["status"] in ("SCHEDULED", "RUNNING"):
        client.update_run(run_id, status=record["status"])
    else:
        client.set_terminated(run_id, record["status"])


SENDERS = {
    "params": _send_params,
    "tags": _send_tags,
    "note": _send_note,
    "input": _send_input,
    "json": _send_json,
    "table": _send_table,
    "status": _send_status,
}
