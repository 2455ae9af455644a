"""MLflow tracking that never stops or slows training, and loses nothing.

Every record is first appended to a journal in the run folder; a thread then sends it to the MLflow
server (`pipeline/tracking/mlflow_records.py` says how). What could not be sent (the server was
down, the process was killed) is sent by the next command on the same run_dir. Nothing counts twice:
MLflow keeps a (key, step, time, value) once, and what the journal has already is not logged again.
"""

# Functions import mlflow themselves: that takes seconds, and only the sending thread needs it.

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import digest_of, read_json, sha256_of, write_atomically, write_json
from pipeline.checkpoints.folder import CheckpointError
from pipeline.checkpoints.trained_with import newest_checkpoint
from pipeline.recipe import Recipe
from pipeline.tracking.journal import (
    History,
    add_to_history,
    end_torn_line,
    read_journal,
    records_behind,
    subject_of,
)
from pipeline.tracking.mlflow_records import METRICS_RECORDS, client_of, describe_error, send
from pipeline.tracking.moved_store import FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("tracking")

ENDS = {"FINISHED", "KILLED", "FAILED"}  # statuses of a run

RETRY_SECONDS = (1, 2, 5, 10, 30)  # pauses after failures in a row
CLOSE_SECONDS = 60  # how long `close` waits


class Tracker:
    """Logs to the MLflow run of one `run_dir`. Only rank 0 opens one."""

    def __init__(
        self, recipe: Recipe, run_id: str | None = None, origin: str | None = None
    ) -> None:
        """Read the journal, and start the thread that sends what is unsent.

        :param run_id: MLflow run to continue if `run_dir` names none; a copied checkpoint does.
        :param origin: the `run_dir` that the checkpoint was trained in.
        """
        self._recipe = recipe
        self._journal = _journal_of(recipe.run_dir)
        self._state_file = _state_file_of(recipe.run_dir)
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        self._state = _read_state(recipe) or {"run_id": run_id, "sent": 0, "run_dir": origin}
        if original := self._original():
            text = "%s is a copy of %s, which keeps the run in MLflow; this one gets another"
            log.warning(text, recipe.run_dir, original)
            self._state = {"run_id": None, "sent": 0}
            self._save_state()
        parent = recipe.tracking.parent
        if parent is not None and not _journal_of(parent).exists():
            text = "tracking.parent: %s has logged nothing; until it does, this run is below none"
            log.warning(text, parent)
        self._run_exists = False
        end_torn_line(self._journal)
        if self._unsent_bytes() < 0:  # the journal is gone, or has lost its end: all is sent again
            self._state["sent"] = 0
        self.history, self.tags, self._logged, _ = read_journal(self._journal)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._send_until_closed, name="tracking", daemon=True
        )
        self._thread.start()

    def _original(self) -> Path | None:
        """Return the `run_dir` that this one is a copy of, if that goes on with the same run."""
        recipe, place = self._recipe, self._state.get("run_dir")
        if not isinstance(place, str) or not Path(place).is_dir():
            return None
        if Path(place).samefile(recipe.run_dir):
            return None
        original = recipe.model_copy(update={"run_dir": Path(place)})
        return original.run_dir if run_id_of(original) == self.run_id else None

    @property
    def run_id(self) -> str | None:
        """Return MLflow's run id; None until the server has been reached for the first time."""
        run_id: str | None = self._state["run_id"]
        return run_id

    @property
    def has_records(self) -> bool:
        """Tell whether anything was logged for this `run_dir`, by an earlier command too."""
        return self._journal.exists()

    # ── What can be logged ──────────────────────────────────────────────────────────────────────

    def log_status(self, status: str) -> None:
        """Log the status of the run.

        :param status: a name of MLflow's RunStatus.
        """
        self._append_record("status", status=status)

    def log_params(self, **sections: Any) -> None:
        """Log parameters: mappings, flattened to `section.key`.

        MLflow keeps the first value that it gets for a key.
        """
        params = {key: str(value)[:500] for key, value in flatten(sections).items()}
        self._append_if_new("params", params=params)

    def log_input(self, name: str, digest: str, context: str, profile: Mapping[str, Any]) -> None:
        """Log a data set that the run reads.

        :param context: `training`, `validation` or `evaluation`.
        :param profile: facts about it; `folder` is where it is.
        """
        self._append_if_new("input", name=name, digest=digest, context=context, profile=profile)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, *, once: Sequence[str] = ()
    ) -> None:
        """Log metrics of a step.

        :param once: names of metrics. If all of them have (nearly) these values at this step
            already, as after a training that was interrupted, and the others any, nothing is
            logged.
        """
        before = {key: values[step] for key, values in self.history.items() if step in values}
        same = [math.isclose(before.get(key, math.nan), metrics[key], rel_tol=1e-4) for key in once]
        if not (same and all(same) and metrics.keys() <= before.keys()):
            self._append_record("metrics", metrics=dict(metrics), step=step)
            add_to_history(self.history, metrics, step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Log tags; a new value replaces the old one."""
        self.tags |= tags
        self._append_if_new("tags", tags=dict(tags))

    def log_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Log a small JSON artifact."""
        self._append_if_new("json", name=name, content=content)

    def log_note(self, text: str) -> None:
        """Log what the run's page begins with, instead of what was there.

        :param text: Markdown; `artifact:PATH` is the address of an artifact.
        """
        self._append_if_new("note", name="note", text=text)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file. A copy of it is kept, so that the file as it is now is sent, however late.

        :param folder: of artifacts in MLflow.
        """
        kept = Path("files", sha256_of(path)[:16], path.name)
        copy = self._journal.parent / kept
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                write_atomically(copy, path.read_bytes())
        except OSError as error:
            log.warning("%s: not logged: %s", path, error.strerror)
            return
        self._append_if_new("artifact", name=f"{folder or ''}/{path.name}", kept=str(kept))

    def log_table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Log a table that MLflow's UI shows."""
        self._append_if_new("table", name=name, columns=dict(columns))

    def close(self, status: str | None = "FINISHED") -> bool:
        """Send what is left; after CLOSE_SECONDS leave the rest to the next command.

        :param status: of the run: FINISHED, FAILED or KILLED; None leaves it as it is.
        :returns: whether all is sent.
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
        return not unsent

    def _append_if_new(self, kind: str, **content: Any) -> None:
        """Append a record, unless the last record about the same subject says the same."""
        subject, digest = subject_of(kind, content), digest_of(content)
        if self._logged.get(subject) != digest:
            self._logged[subject] = digest
            self._append_record(kind, **content)

    def _append_record(self, kind: str, **content: Any) -> None:
        """Append a record to the journal in one write, and wake the thread.

        A full disk becomes a warning.
        """
        record = {"kind": kind, "time_ms": int(time.time() * 1000), **content}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            descriptor = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, line) < len(line):
                    os.ftruncate(descriptor, before)  # the next record begins a line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:  # training goes on; saving a checkpoint will say more
            log.warning("%s: not logged: %s", self._journal, error.strerror)
        self._wake.set()

    # ── The sending thread ──────────────────────────────────────────────────────────────────────

    def _save_state(self) -> None:
        """Write the run id and how much was sent; states of other tracking stores stay."""
        own = {**self._state, "run_dir": str(self._recipe.run_dir.resolve())}
        states = {**_read_states(self._recipe), self._recipe.tracking_uri: own}
        write_json(self._state_file, states)

    def _send_until_closed(self) -> None:
        """Send what the journal gets, until `close` is called. This is what the thread runs."""
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
                    text = "MLflow at %s: %s; will retry"
                    log.warning(text, self._recipe.tracking_uri, describe_error(error))
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
        """Send all unsent records, and save after each batch how far that went.

        :raises Exception: an error of MLflow or the network.
        """
        client = client_of(self._recipe)
        if not self._run_exists:
            self._find_or_create_run(client)
        unsent = records_behind(self._journal, self._state["sent"])
        by_kind = groupby(unsent, key=lambda record: record.content["kind"])
        for kind, group in by_kind:
            while batch := list(islice(group, METRICS_RECORDS if kind == "metrics" else 1)):
                records = [record.content for record in batch]
                send(client, self._state["run_id"], kind, records, self._journal.parent)
                self._state["sent"] = batch[-1].end
                self._save_state()

    def _unsent_bytes(self) -> int:
        size = self._journal.stat().st_size if self._journal.exists() else 0
        return size - int(self._state["sent"])

    def _find_or_create_run(self, client: MlflowClient) -> None:
        """Make sure that the tracking store has a run; a new one gets the whole journal."""
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                run = client.get_run(self.run_id)
                self._run_exists = run.info.lifecycle_stage == "active"
                name = client.get_experiment(run.info.experiment_id).name
                if name != self._recipe.tracking.experiment:
                    text = "MLflow run %s stays in its experiment, %s; tracking.experiment says %s"
                    log.warning(text, self.run_id, name, self._recipe.tracking.experiment)
            except MlflowException as error:
                if error.get_http_status_code() != 404:  # type: ignore[no-untyped-call]
                    raise
            if not self._run_exists:
                log.warning("MLflow run %s was deleted; sending all to a new one", self.run_id)
        if not self._run_exists:
            run_id = self._create_mlflow_run(client)
            self._state |= {"run_id": run_id, "sent": 0, "parent": None}
            self._save_state()
            self._run_exists = True
        self._nest(client)

    def _nest(self, client: MlflowClient) -> None:
        """Tell MLflow once below which run this one is, if that has a run there already."""
        recipe = self._recipe
        if recipe.tracking.parent is None:
            return
        tracking = recipe.tracking.model_copy(update={"uri": recipe.tracking_uri})
        parent = run_id_of(
            recipe.model_copy(update={"run_dir": recipe.tracking.parent, "tracking": tracking})
        )
        if parent is not None and parent != self._state.get("parent"):
            client.set_tag(self._state["run_id"], "mlflow.parentRunId", parent)
            self._state["parent"] = parent
            self._save_state()

    def _create_mlflow_run(self, client: MlflowClient) -> str:
        """Create a run, and its experiment if there is none; return the run's id."""
        name = self._recipe.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = self._recipe.tracking_uri.startswith("sqlite")
            location = self._recipe.store.with_name(FILES).as_uri() if local else None
            experiment_id = client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=self._recipe.run_dir.absolute().name)
        return str(run.info.run_id)


def open_tracker(recipe: Recipe) -> Tracker:
    """Return the tracker of `run_dir`.

    If the checkpoints were copied here from another machine, it continues their MLflow run.
    """
    if (newest := newest_checkpoint(recipe)) is not None:
        with suppress(CheckpointError):  # a command that reads the checkpoint will say so
            return Tracker(recipe, newest.info.tracker_run_id, newest.info.run_dir)
    return Tracker(recipe)


def set_aside_finished(recipe: Recipe) -> None:
    """Rename the folder of the records if they are of a training that came to an end, or failed. A
    new one in the same `run_dir` gets a run of its own: its curves are not those of the one before.
    """
    journal = _journal_of(recipe.run_dir)
    logged, folder = read_journal(journal), journal.parent
    if "train_loss" in logged.history and not ENDS.isdisjoint(logged.statuses):
        send_left_over(recipe)  # no later command looks there
        number = next(n for n in count(1) if not folder.with_name(f"tracking-{n}").exists())
        kept = folder.rename(folder.with_name(f"tracking-{number}"))
        log.info("training anew, as another run in MLflow; records of the one before: %s", kept)


def history_of(recipe: Recipe) -> History:
    """Return the metrics that commands on this run_dir have logged so far."""
    return read_journal(_journal_of(recipe.run_dir)).history


def send_left_over(recipe: Recipe) -> None:
    """Send what earlier commands on this run_dir could not; everything, if the store is another."""
    journal = _journal_of(recipe.run_dir)
    state = _read_state(recipe) or {"sent": 0}
    if journal.exists() and journal.stat().st_size != state["sent"]:
        open_tracker(recipe).close(status=None)


def _journal_of(run_dir: Path) -> Path:
    return run_dir / "tracking" / "journal.jsonl"


def _state_file_of(run_dir: Path) -> Path:
    return run_dir / "tracking" / "run.json"


def _read_states(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Read, for each tracking store, its run id and how many bytes of the journal were sent."""
    return read_json(_state_file_of(recipe.run_dir))


def _read_state(recipe: Recipe) -> dict[str, Any] | None:
    state = _read_states(recipe).get(recipe.tracking_uri)
    if not isinstance(state, dict):
        return None
    sent, run_id = state.get("sent"), state.get("run_id")
    whole = type(sent) is int and sent >= 0 and "run_id" in state
    return state if whole and isinstance(run_id, str | None) else None


def run_id_of(recipe: Recipe) -> str | None:
    """Return the MLflow run that commands on this run_dir log to; None if there is none yet."""
    state = _read_state(recipe)
    return state["run_id"] if state else None


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
