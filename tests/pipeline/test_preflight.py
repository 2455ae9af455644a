"""A killed build must not stop the next command, nor a live one be torn."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from pipeline.preflight import remove_dead_build_locks


@pytest.mark.parametrize("alive", [True, False])
def test_only_locks_of_killed_builds_are_removed(
    alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    held = FileBaton(str(lock))  # type: ignore[no-untyped-call]
    builder = os.fork()
    if builder == 0:
        held.try_acquire()  # type: ignore[no-untyped-call]
        os.kill(os.getpid(), signal.SIGSTOP if alive else signal.SIGKILL)
    _, status = os.waitpid(builder, os.WUNTRACED)
    assert os.WIFSTOPPED(status) == alive
    assert lock.exists()
    try:
        assert remove_dead_build_locks() == ([] if alive else [lock])
        assert lock.exists() == alive
    finally:
        if alive:
            os.kill(builder, signal.SIGKILL)
            os.waitpid(builder, 0)
