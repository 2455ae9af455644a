"""MLflow tracking that never stops or slows training, and loses nothing.

Everything is first appended to a journal in the run folder; a thread sends it on to the MLflow
server. What could not be sent (server down, process killed) is sent by the next command that opens
the tracker. Metrics that are sent twice count once: MLflow keeps a (key, step, time, value) once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.stage import write_json
from pipeline.config import Recipe

if TYPE_CHECKING:  # mlflow takes seconds to import, and only the sending thread needs it
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

MAX_BATCH = 500  # metrics a request; MLflow allows 1,000
MAX_PARAMS = 100
RETRY_SECONDS = (1, 2, 5, 10, 30)
CLOSE_SECONDS = 60


class Tracker:
    """The MLflow run of one `run_dir`. Only global rank 0 opens one."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        folder = recipe.run_dir / "tracking"
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._state_file = folder / "journal.jsonl", folder / "run.json"
        self._state = self._read_state()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's run id; None until the server has been reached for the first time."""
        run_id: str | None = self._state["run_id"]
        return run_id

    # ── What can be logged ──────────────────────────────────────────────────────────────────────

    def start_training(self, deepspeed_config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Log the recipe, DeepSpeed's configuration and what the data is."""
        recipe = self._recipe.model_dump(mode="json")
        for name, content in (("recipe", recipe), ("deepspeed", deepspeed_config), ("data", data)):
            self._log("json", name=f"{name}.json", content=content)
        sections = {key: value for key, value in recipe.items() if key != "data"}
        params = {**_flat(sections), **_flat(deepspeed_config, "deepspeed.")}
        params |= _flat({key: data[key] for key in ("totals", "vocabulary")}, "data.")
        self._log("params", params={key: str(value)[:500] for key, value in params.items()})
        self._log("status", status="RUNNING")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._log("metrics", metrics=dict(metrics), step=step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._log("tags", tags=dict(tags))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """:param path: a file that stays where it is until it has been sent."""
        self._log("artifact", path=str(path.absolute()), folder=folder)

    def log_table(self, name: str, columns: Mapping[str, list[str]]) -> None:
        """A table that MLflow's UI shows."""
        self._log("table", name=name, columns=dict(columns))

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left; after a while, leave the rest to the next command."""
        self._log("status", status=status)
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if unsent := self._journal.stat().st_size - self._state["sent"]:
            log.warning(
                "%d bytes of records could not be sent to %s; they are kept in %s and sent by the "
                "next command on this run_dir",
                unsent,
                self._recipe.tracking_uri,
                self._journal,
            )

    def _log(self, kind: str, **content: Any) -> None:
        record = {"kind": kind, "time_ms": int(time.time() * 1000), **content}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        self._wake.set()

    # ── The sending thread ──────────────────────────────────────────────────────────────────────

    def _read_state(self) -> dict[str, Any]:
        """Run id, and how many bytes of the journal have been sent to this tracking server."""
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text(encoding="utf-8"))
            if state["uri"] == self._recipe.tracking_uri:
                return state
        except (FileNotFoundError, ValueError, KeyError):
            pass
        return {"uri": self._recipe.tracking_uri, "run_id": None, "sent": 0}

    def _send_all(self) -> None:
        failures = 0
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._send_journal()
                failures = 0
            except Exception as error:  # whatever the server or the network does, training goes on
                if failures == 0:
                    log.warning("MLflow at %s: %s; will retry", self._state["uri"], _short(error))
                pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]
                failures += 1
                if closing and failures >= 3:
                    return
                time.sleep(pause)
                self._wake.set()
                continue
            if closing:
                return

    def _send_journal(self) -> None:
        client = self._client()
        run_id = self.run_id or self._create_run(client)
        for kind, records in groupby(self._unsent(), key=lambda record: record[0]["kind"]):
            while batch := list(islice(records, 50 if kind == "metrics" else 1)):
                _send(client, run_id, kind, [record for record, _ in batch])
                self._state["sent"] = batch[-1][1]
                write_json(self._state_file, self._state)

    def _unsent(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Journal records not sent yet, each with the position after it."""
        if not self._journal.exists():
            return
        with self._journal.open("rb") as journal:
            journal.seek(self._state["sent"])
            for line in iter(journal.readline, b""):
                if not line.endswith(b"\n"):
                    return  # still being written
                yield json.loads(line), journal.tell()

    def _client(self) -> MlflowClient:
        # This thread retries by itself; MLflow's own patience would hold up the end of a run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=self._state["uri"])

    def _create_run(self, client: MlflowClient) -> str:
        name = self._recipe.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            neighbourhood = self._recipe.run_dir.absolute().parent
            local = self._state["uri"].startswith("sqlite:")
            location = (neighbourhood / "mlartifacts").as_uri() if local else None
            experiment_id = client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=self._recipe.run_dir.absolute().name)
        self._state["run_id"] = run.info.run_id
        write_json(self._state_file, self._state)
        return str(run.info.run_id)


def _send(client: MlflowClient, run_id: str, kind: str, records: list[dict[str, Any]]) -> None:
    """Send journal records of one kind."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    record = records[0]
    try:
        if kind == "metrics":
            metrics = [
                Metric(key, value, record["time_ms"], record["step"])
                for record in records
                for key, value in record["metrics"].items()
            ]
            for begin in range(0, len(metrics), MAX_BATCH):
                client.log_batch(run_id, metrics=metrics[begin : begin + MAX_BATCH])
        elif kind == "params":
            params = [Param(key, value) for key, value in record["params"].items()]
            for begin in range(0, len(params), MAX_PARAMS):
                client.log_batch(run_id, params=params[begin : begin + MAX_PARAMS])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in record["tags"].items()])
        elif kind == "json":
            client.log_dict(run_id, record["content"], record["name"])
        elif kind == "table":
            client.log_table(run_id, record["columns"], record["name"])
        elif kind == "artifact":
            client.log_artifact(run_id, record["path"], record["folder"])
        elif kind == "status" and record["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        elif kind == "status":
            client.set_terminated(run_id, record["status"])
    except MlflowException as error:
        # Refused for good (a parameter that changed on resume, say): retrying cannot help.
        if error.get_http_status_code() not in (400, 404):  # type: ignore[no-untyped-call]
            raise
        log.warning("MLflow did not take %s: %s", kind, _short(error))
    except FileNotFoundError as error:
        log.warning("artifact is gone, not logged: %s", _short(error))


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
