"""MLflow tracking that never stops or slows training, and loses nothing.

Everything is first appended to a journal in the run folder; a thread sends it on to the MLflow
server (`pipeline/mlflow_records.py` says how). What could not be sent (server down, process killed)
is sent by the next command on the same run_dir. What is sent twice counts once: MLflow keeps a
(key, step, time, value) once, and what the journal has already is not logged again.
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

from data_prep.files import digest_of, read_json, sha256_of, write_atomically, write_json
from pipeline.checkpoints.folder import CheckpointError, list_checkpoints
from pipeline.recipe import Recipe
from pipeline.tracking.mlflow_records import METRICS_RECORDS, client_of, send, short

if TYPE_CHECKING:  # mlflow takes seconds to import, and only the sending thread needs it
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

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
        self.history, self._logged = _read_journal(self._journal)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's run id; None until the server has been reached for the first time."""
        run_id: str | None = self._state["run_id"]
        return run_id

    @property
    def has_records(self) -> bool:
        return self._journal.exists()

    # ── What can be logged ──────────────────────────────────────────────────────────────────────

    def log_status(self, status: str) -> None:
        """:param status: MLflow's RunStatus."""
        self._log("status", status=status)

    def log_params(self, **sections: Any) -> None:
        """Mappings, flattened to `section.key`. What MLflow has of a key already stays as it is."""
        params = {key: str(value)[:500] for key, value in _flat(sections).items()}
        self._log_once("params", params=params)

    def log_input(self, name: str, digest: str, context: str, profile: Mapping[str, Any]) -> None:
        """A data set that the run reads.

        :param context: `training`, `validation` or `evaluation`.
        """
        self._log_once("input", name=name, digest=digest, context=context, profile=profile)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, *, once: Sequence[str] = ()
    ) -> None:
        """:param once: not if a run that was interrupted has logged the same values of these."""
        before = {key: self.history.get(key, {}).get(step, math.nan) for key in once}
        same = [math.isclose(value, metrics[key], rel_tol=1e-4) for key, value in before.items()]
        if not (same and all(same)):
            self._log("metrics", metrics=dict(metrics), step=step)
            _remember(self.history, metrics, step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self._log_once("tags", tags=dict(tags))

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """A small artifact; what it holds now is logged, whatever becomes of it."""
        self._log_once("json", name=name, content=content)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, of which a copy is kept: what is sent late is what was logged."""
        kept = Path("files", sha256_of(path)[:16], path.name)
        copy = self._journal.parent / kept
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                write_atomically(copy, path.read_bytes())
        except OSError as error:
            log.warning("%s: not logged: %s", path, error.strerror)
            return
        self._log_once("artifact", name=f"{folder or ''}/{path.name}", kept=str(kept))

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """A table that MLflow's UI shows."""
        self._log_once("table", name=name, columns=dict(columns))

    def close(self, status: str | None = "FINISHED") -> None:
        """Send what is left; after a while, leave the rest to the next command.

        :param status: MLflow's RunStatus: FINISHED, FAILED or KILLED; None leaves it as it is.
        """
        if status:
            self.log_status(status)
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if unsent := self._unsent_bytes():
            log.warning(
                "%d bytes of records could not be sent to %s; they are kept in %s and sent by the "
                "next command on this run_dir",
                unsent,
                self._recipe.tracking_uri,
                self._journal,
            )

    def _log_once(self, kind: str, **content: Any) -> None:
        """Unless the last such record, which it would replace, says the same."""
        subject, digest = _subject(kind, content), digest_of(content)
        if self._logged.get(subject) != digest:
            self._logged[subject] = digest
            self._log(kind, **content)

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
                if self._unsent_bytes():
                    self._send_journal()
                failures = 0
            except Exception as error:  # whatever the server or the network does, training goes on
                if failures == 0:
                    log.warning(
                        "MLflow at %s: %s; will retry", self._recipe.tracking_uri, short(error)
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
        client = client_of(self._recipe.tracking_uri)
        if not self._run_exists:
            self._find_or_create_run(client)
        for kind, group in groupby(self._unsent(), key=lambda record: record[0]["kind"]):
            while batch := list(islice(group, METRICS_RECORDS if kind == "metrics" else 1)):
                records = [record for record, _ in batch]
                send(client, self._state["run_id"], kind, records, self._journal.parent)
                self._state["sent"] = batch[-1][1]
                self._save_state()

    def _unsent_bytes(self) -> int:
        size = self._journal.stat().st_size if self._journal.exists() else 0
        return size - int(self._state["sent"])

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


def open_tracker(recipe: Recipe) -> Tracker:
    """Return the tracker of `run_dir`. Of a checkpoint that was copied here, it goes on with the
    MLflow run."""
    checkpoints, run_id = list_checkpoints(recipe.checkpoints), None
    if checkpoints:
        with suppress(CheckpointError):  # another command will say so
            run_id = checkpoints[-1].info.tracker_run_id
    return Tracker(recipe, run_id)


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
    return read_json(_files(recipe)[1])


def _read_state(recipe: Recipe) -> dict[str, Any] | None:
    return _read_states(recipe).get(recipe.tracking_uri)


def _end_torn_line(journal: Path) -> None:
    """A line that a crash has cut must not swallow the next one."""
    if journal.exists() and journal.stat().st_size:
        with journal.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _read_journal(journal: Path) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Its metrics (but the machine's) by step; and a digest of what else, by subject."""
    history: dict[str, dict[int, float]] = {}
    logged: dict[str, str] = {}
    if journal.exists():
        with journal.open("rb") as lines:
            for line in lines:
                with suppress(ValueError):  # a line that a crash has cut
                    record = json.loads(line)
                    kind = record.pop("kind")
                    del record["time_ms"]
                    if kind == "metrics":
                        _remember(history, record["metrics"], record["step"])
                    elif kind != "status":
                        logged[_subject(kind, record)] = digest_of(record)
    return history, logged


def _remember(
    history: dict[str, dict[int, float]], metrics: Mapping[str, float], step: int
) -> None:
    for key, value in metrics.items():
        if not key.startswith("system/"):
            history.setdefault(key, {})[step] = value


def _subject(kind: str, content: Mapping[str, Any]) -> str:
    """What a record is about: the next one about it says something new, or need not be said."""
    names = content.get("name") or sorted(content[kind])
    return f"{kind} {names} {content.get('context', '')}"


def run_id_of(recipe: Recipe) -> str | None:
    """The MLflow run that the commands on this run_dir log to; None if there is none yet."""
    state = _read_state(recipe)
    return state["run_id"] if state else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
