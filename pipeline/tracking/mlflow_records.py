"""MLflow's client, and journal records as calls of it."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

MAX_PARAMS = 100  # MLflow's limit for one request; that of metrics is 1,000
METRICS_RECORDS = 50  # journal records of metrics sent together

IMPORTING = threading.Lock()  # two threads that import mlflow at once deadlock

Record = Mapping[str, Any]


def client_of(uri: str) -> MlflowClient:
    """MLflow's client, which does not retry: who calls it does, or tells the user."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    with IMPORTING:
        from mlflow import MlflowClient

    for noisy in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri)


def send(
    client: MlflowClient, run_id: str, kind: str, records: Sequence[Record], folder: Path
) -> None:
    """Send journal records of one kind; but for metrics, one.

    :param folder: of the journal; kept files lie below it.
    :raises Exception: MLflow's or the network's, where trying again can help.
    """
    from mlflow.exceptions import MlflowException

    try:
        if kind == "metrics":
            _metrics(client, run_id, records)
        elif kind == "artifact":
            where = records[0]["name"].rpartition("/")[0]
            client.log_artifact(run_id, str(folder / records[0]["kept"]), where or None)
        else:
            SENDERS[kind](client, run_id, records[0])
    except MlflowException as error:
        # Refused for good: retrying cannot help.
        if error.get_http_status_code() not in (400, 404):  # type: ignore[no-untyped-call]
            raise
        log.warning("MLflow did not take %s: %s", kind, short(error))
    except FileNotFoundError as error:
        log.warning("artifact is gone, not logged: %s", short(error))


def short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _metrics(client: MlflowClient, run_id: str, records: Sequence[Record]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(key, value, record["time_ms"], record["step"])
        for record in records
        for key, value in record["metrics"].items()
    ]
    client.log_batch(run_id, metrics=metrics)


def _params(client: MlflowClient, run_id: str, record: Record) -> None:
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
    for begin in range(0, len(new), MAX_PARAMS):
        client.log_batch(run_id, params=new[begin : begin + MAX_PARAMS])


def _tags(client: MlflowClient, run_id: str, record: Record) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(*tag) for tag in record["tags"].items()])


def _input(client: MlflowClient, run_id: str, record: Record) -> None:
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


def _json(client: MlflowClient, run_id: str, record: Record) -> None:
    client.log_dict(run_id, record["content"], record["name"])


def _table(client: MlflowClient, run_id: str, record: Record) -> None:
    name, folder = record["name"], record["name"].rpartition("/")[0]
    if name not in [item.path for item in client.list_artifacts(run_id, folder or None)]:
        client.log_table(run_id, record["columns"], name)  # it would append


def _status(client: MlflowClient, run_id: str, record: Record) -> None:
    if record["status"] in ("SCHEDULED", "RUNNING"):
        client.update_run(run_id, status=record["status"])
    else:
        client.set_terminated(run_id, record["status"])


SENDERS = {
    "params": _params,
    "tags": _tags,
    "input": _input,
    "json": _json,
    "table": _table,
    "status": _status,
}
