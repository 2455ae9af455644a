"""Locks, on file systems that have them and on those that have none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from pathlib import Path

import pytest

from data_prep import files
from data_prep.files import DataError, locked, only_command_in


@pytest.fixture(params=[None, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose file system answers so to `flock`; None: it locks."""
    (tmp_path / "machine").mkdir()
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))
    files._warn_of_no_locks.cache_clear()
    flock = fcntl.flock

    def answer(file: int, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if request.param and "/shared/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(request.param, os.strerror(request.param))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", answer)
    return tmp_path / "shared"


def test_one_command_at_a_time_on_a_machine(
    folder: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with only_command_in(folder):
                again = only_command_in(folder)
                with pytest.raises(DataError, match="another command is at work here"):
                    again.__enter__()
                with locked(folder / "another"):
                    pass
    warnings = [record.getMessage() for record in caplog.records]
    without_locks = request.node.callspec.params["folder"] is not None
    assert len(warnings) == without_locks
    if without_locks:
        assert warnings[0].startswith(f"{folder}: the file system there has no locks (")


def test_a_run_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            DataError, match=r"file: there can be no such folder \(File exists\); choose"
        ),
        only_command_in(tmp_path / "file"),
    ):
        pass


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass
