"""The journal of a run_dir: everything that was logged for it, a JSON record a line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import digest_of

log = logging.getLogger("tracking")

History = dict[str, dict[int, float]]  # metric → step → value


class JournalRecord(NamedTuple):
    """A record as the journal has it."""

    content: dict[str, Any]
    end: int  # position in the journal after the record, in bytes


class Logged(NamedTuple):
    """What the commands on a run_dir have logged so far."""

    history: History
    """Metrics, without those of the machine."""

    tags: dict[str, str]

    digests: dict[str, str]
    """Of the last record about each subject."""

    statuses: list[str]
    """Of the run, one after the other."""


def read_journal(journal: Path) -> Logged:
    """Read what was logged before."""
    logged = Logged({}, {}, {}, [])
    if journal.exists():
        with journal.open("rb") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError, AttributeError):  # cut by a crash
                    record = json.loads(line)
                    kind = record.pop("kind")
                    del record["time_ms"]
                    if kind == "metrics":
                        add_to_history(logged.history, record["metrics"], record["step"])
                    elif kind == "status":
                        logged.statuses.append(record["status"])
                    else:
                        logged.digests[subject_of(kind, record)] = digest_of(record)
                    if kind == "tags":
                        logged.tags.update(record["tags"])
    return logged


def records_behind(journal: Path, position: int) -> Iterator[JournalRecord]:
    """Read the records of the journal behind a position, in bytes."""
    if not journal.exists():
        return
    with journal.open("rb") as lines:
        lines.seek(position)
        for line in iter(lines.readline, b""):
            if not line.endswith(b"\n"):
                return  # still being written
            try:
                content = json.loads(line)
                if not isinstance(content, dict) or not {"kind", "time_ms"} <= content.keys():
                    raise ValueError
            except ValueError:
                log.warning("%s: skipped a line that a crash has cut", journal)
                continue
            yield JournalRecord(content, lines.tell())


def add_to_history(history: History, metrics: Mapping[str, float], step: int) -> None:
    """Put metrics of a step into `history`, except for those of the machine."""
    for key, value in metrics.items():
        if not key.startswith("system/"):
            history.setdefault(key, {})[step] = value


def subject_of(kind: str, content: Mapping[str, Any]) -> str:
    """Return what a record is about; a later record about the same replaces it."""
    names = content.get("name") or sorted(content[kind])
    return f"{kind} {names} {content.get('context', '')}"


def end_torn_line(journal: Path) -> None:
    """End a last line that a crash has cut, so that the next record has a line of its own."""
    if journal.exists() and journal.stat().st_size:
        with journal.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
