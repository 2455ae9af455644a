"""MLflow tracking that never stops or slows training, and loses nothing.

Everything is first appended to a journal in the run folder; a thread sends it on to the MLflow
server. What could not be sent (server down, process killed) is sent by the next command on the
same run_dir. What is sent twice counts once: MLflow keeps a (key, step, time, value) once.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.stage import write_json
from pipeline.config import Recipe

if TYPE_CHECKING:  # mlflow takes seconds to import, and only the sending thread needs it
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

MAX_PARAMS = 100  # MLflow's limit for one request; that of metrics is 1,000
METRICS_RECORDS = 50  # journal records of metrics sent together
RETRY_SECONDS = (1, 2, 5, 10, 30)
CLOSE_SECONDS = 60


class Tracker:
    """The MLflow run of one `run_dir`. Only global rank 0 opens one."""

    def __init__(self, recipe: Recipe, run_id: str | None = None) -> None:
        """:param run_id: MLflow run to continue if `run_dir` does not say (a copied checkpoint)."""
        self._recipe = recipe
        self._journal, self._state_file = _files(recipe)
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        self._state = _read_state(recipe) or {"run_id": run_id, "sent": 0}
        self._run_exists = False
        _end_torn_line(self._journal)
        if not self._journal.exists():
            self._state["sent"] = 0
        self._history = _history(self._journal)
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
            self.log_json(f"{name}.json", content)
        sections = {key: value for key, value in recipe.items() if key != "data"}
        params = {**_flat(sections), **_flat(deepspeed_config, "deepspeed.")}
        params |= _flat({key: data[key] for key in ("totals", "vocabulary")}, "data.")
        self._log("params", params={key: str(value)[:500] for key, value in params.items()})
        self._log("status", status="RUNNING")

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, *, once: Sequence[str] = ()
    ) -> None:
        """:param once: not if a run that was interrupted has logged the same values of these."""
        before = {key: self._history.get((key, step), math.nan) for key in once}
        same = [math.isclose(value, metrics[key], rel_tol=1e-4) for key, value in before.items()]
        if not (same and all(same)):
            self._log("metrics", metrics=dict(metrics), step=step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._log("tags", tags=dict(tags))

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A small artifact; what it holds now is logged, whatever becomes of it."""
        self._log("json", name=name, content=content)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """:param path: a file that stays where it is until it has been sent."""
        self._log("artifact", path=str(path.absolute()), folder=folder)

    def log_table(self, name: str, columns: Mapping[str, list[str]]) -> None:
        """A table that MLflow's UI shows."""
        self._log("table", name=name, columns=dict(columns))

    def close(self, status: str | None = "FINISHED") -> None:
        """Send what is left; after a while, leave the rest to the next command.

        :param status: MLflow's RunStatus: FINISHED, FAILED or KILLED; None leaves it as it is.
        """
        if status:
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
        try:
            descriptor = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:  # training goes on; saving a checkpoint will say more
            log.warning("%s: not logged: %s", self._journal, error.strerror)
        self._wake.set()

    # ── The sending thread ──────────────────────────────────────────────────────────────────────

    def _save_state(self) -> None:
        states = {**_read_states(self._recipe), self._recipe.tracking_uri: self._state}
        write_json(self._state_file, states)

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
                    log.warning(
                        "MLflow at %s: %s; will retry", self._recipe.tracking_uri, _short(error)
                    )
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
        if not self._run_exists:
            self._find_or_create_run(client)
        for kind, records in groupby(self._unsent(), key=lambda record: record[0]["kind"]):
            while batch := list(islice(records, METRICS_RECORDS if kind == "metrics" else 1)):
                _send(client, self._state["run_id"], kind, [record for record, _ in batch])
                self._state["sent"] = batch[-1][1]
                self._save_state()

    def _unsent(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Journal records not sent yet, each with the position after it."""
        if not self._journal.exists():
            return
        with self._journal.open("rb") as journal:
            journal.seek(self._state["sent"])
            for line in iter(journal.readline, b""):
                if not line.endswith(b"\n"):
                    return  # still being written
                try:
                    record = json.loads(line)
                except ValueError:
                    log.warning("%s: skipped a line that a crash has cut", self._journal)
                    continue
                yield record, journal.tell()

    def _client(self) -> MlflowClient:
        # This thread retries by itself; MLflow's own patience would hold up the end of a run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        return MlflowClient(tracking_uri=self._recipe.tracking_uri)

    def _find_or_create_run(self, client: MlflowClient) -> None:
        """Have a run in this tracking store; a new one gets the whole journal."""
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                self._run_exists = client.get_run(self.run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.get_http_status_code() != 404:  # type: ignore[no-untyped-call]
                    raise
            if not self._run_exists:
                log.warning("MLflow run %s was deleted; sending all to a new one", self.run_id)
        if not self._run_exists:
            self._state |= {"run_id": self._create_run(client), "sent": 0}
            self._save_state()
            self._run_exists = True

    def _create_run(self, client: MlflowClient) -> str:
        name = self._recipe.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            neighbourhood = self._recipe.run_dir.absolute().parent
            local = self._recipe.tracking_uri.startswith("sqlite:")
            location = (neighbourhood / "mlartifacts").as_uri() if local else None
            experiment_id = client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=self._recipe.run_dir.absolute().name)
        return str(run.info.run_id)


def send_left_over(recipe: Recipe) -> None:
    """Send what earlier commands on this run_dir could not, or all of it to a changed store."""
    journal, _ = _files(recipe)
    state = _read_state(recipe) or {"sent": 0}
    if journal.exists() and journal.stat().st_size > state["sent"]:
        Tracker(recipe).close(status=None)


def _files(recipe: Recipe) -> tuple[Path, Path]:
    folder = recipe.run_dir / "tracking"
    return folder / "journal.jsonl", folder / "run.json"


def _read_states(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """For each tracking store: the run id there, and how many bytes of the journal it has."""
    try:
        states = json.loads(_files(recipe)[1].read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return states if isinstance(states, dict) else {}


def _read_state(recipe: Recipe) -> dict[str, Any] | None:
    return _read_states(recipe).get(recipe.tracking_uri)


def _end_torn_line(journal: Path) -> None:
    """A line that a crash has cut must not swallow the next one."""
    if journal.exists() and journal.stat().st_size:
        with journal.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _history(journal: Path) -> dict[tuple[str, int], float]:
    """What the journal has of losses and learning rate, by step."""
    history: dict[tuple[str, int], float] = {}
    if journal.exists():
        with journal.open("rb") as lines:
            for line in lines:
                with suppress(ValueError):  # a line that a crash has cut
                    record = json.loads(line)
                    for key, value in record.get("metrics", {}).items():
                        if key.endswith(("_loss", "learning_rate")):
                            history[key, record["step"]] = value
    return history


def run_id_of(recipe: Recipe) -> str | None:
    """The MLflow run that the commands on this run_dir log to; None if there is none yet."""
    state = _read_state(recipe)
    return state["run_id"] if state else None


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
            client.log_batch(run_id, metrics=metrics)
        elif kind == "params":
            params = [Param(key, value) for key, value in record["params"].items()]
            for begin in range(0, len(params), MAX_PARAMS):
                client.log_batch(run_id, params=params[begin : begin + MAX_PARAMS])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(*tag) for tag in record["tags"].items()])
        elif kind == "json":
            client.log_dict(run_id, record["content"], record["name"])
        elif kind == "table":
            folder = record["name"].rpartition("/")[0]
            if record["name"] not in [
                item.path for item in client.list_artifacts(run_id, folder or None)
            ]:
                client.log_table(run_id, record["columns"], record["name"])  # it would append
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
