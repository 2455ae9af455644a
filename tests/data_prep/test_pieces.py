"""Any workers and any interruption give the same bytes, or else there is a clear error."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.files import sha256_of
from tests.conftest import ROOT, free_port, run_process

PAIRS = 3000


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two corpora of many pieces, with repeats within and across them, and a recipe."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "data").mkdir()
    words = [f"{a}{b}" for a in ("Haus", "Baum", "Weg", "See") for b in ("", "e", "lein", "s")]
    draw = random.Random(1)
    for name in ("one", "two"):
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(PAIRS)]
        for lang, mark in (("de", ""), ("en", "the ")):
            text = "".join(f"{mark}{line}.\n" for line in lines)
            (folder / "data" / f"{name}.{lang}").write_text(text)
    for split in ("valid", "test"):
        for lang in ("de", "en"):
            (folder / "data" / f"{split}.{lang}").write_text(f"Ein {split} auf {lang}.\n")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
run_dir: {folder}/run
data:
  root: {folder}/data
  train:
    - {{name: one, source: one.de, target: one.en}}
    - {{name: two, source: two.de, target: two.en}}
  valid: {{name: valid, source: valid.de, target: valid.en}}
  test: {{name: test, source: test.de, target: test.en}}
  cleaning:
    filters: [{{filter: letters}}, {{filter: duplicates}}, {{filter: repeated_side, max: 2}}]
  vocabulary: {{size: 60, sample_lines: 2000}}
  pairs_per_piece: 500
  pairs_per_shard: 700
"""
    )
    return path


def command(recipe: Path, run_dir: Path, *options: str) -> list[str]:
    module = [sys.executable, "-m", "tests.data_prep.prepare_alone", "--config", str(recipe)]
    return [*module, "--run_dir", str(run_dir), *options]


def files_of(run_dir: Path) -> dict[str, str]:
    """Return the checksum of every file that a run left, hidden ones too."""
    files = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
    return {name: sha256_of(path) for name, path in files.items() if name != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> dict[str, str]:
    run_dir = recipe.parent / "undisturbed"
    done = run_process(command(recipe, run_dir, "--data.workers", "2"))
    assert done.returncode == 0, done.stderr
    files = files_of(run_dir)
    assert sum(name.startswith("shards/train-") for name in files) == 7
    assert not [name for name in files if "scratch" in name or "partial" in name]
    return files


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "5"])
def test_the_number_of_workers_changes_nothing(
    recipe: Path, undisturbed: dict[str, str], tmp_path: Path, workers: str
) -> None:
    done = run_process(command(recipe, tmp_path, "--data.workers", workers))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_killed_again_and_again(recipe: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """The command alone gets SIGKILL: its workers must notice by themselves."""
    seed = random.randrange(1000)
    print("seed", seed)
    draw = random.Random(seed)
    longest = 2.0
    for _ in range(6):
        started = time.monotonic()
        process = subprocess.Popen(
            command(recipe, tmp_path, "--data.workers", "2"), cwd=ROOT, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=draw.uniform(0.5, longest))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        longest = max(longest, 2 * (time.monotonic() - started))
    done = run_process(command(recipe, tmp_path, "--data.workers", "2"))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_killed_worker_is_a_clear_error_and_costs_nothing(
    recipe: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    import psutil

    process = subprocess.Popen(
        command(recipe, tmp_path, "--data.workers", "2"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = False
    while process.poll() is None and not killed:
        for child in psutil.Process(process.pid).children():
            if "spawn_main" in " ".join(child.cmdline()) and child.cpu_times().user > 0.3:
                child.kill()
                killed = True
                break
        time.sleep(0.02)
    assert killed
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker died" in said
    assert "Traceback" not in said
    assert run_process(command(recipe, tmp_path)).returncode == 0
    assert files_of(tmp_path) == undisturbed


@pytest.fixture
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Dask scheduler and two workers, in another folder than the command's."""
    address = f"tcp://127.0.0.1:{free_port()}"
    cli = [sys.executable, "-m"]
    host, port = address.removeprefix("tcp://").split(":")
    commands = [
        [*cli, "distributed.cli.dask_scheduler", "--host", host, "--port", port, "--no-dashboard"],
        [*cli, "distributed.cli.dask_worker", address, "--nworkers", "2", "--nthreads", "1",
         "--no-dashboard", "--death-timeout", "60"],
    ]  # fmt: skip
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            each, cwd=elsewhere, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for each in commands
    ]
    yield address
    for process in reversed(processes):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.slow
def test_dask_changes_nothing(
    recipe: Path, undisturbed: dict[str, str], tmp_path: Path, scheduler: str
) -> None:
    root = os.path.relpath(recipe.parent / "data")
    options = ["--data.executor", "dask", "--data.scheduler", scheduler, "--data.root", root]
    done = run_process(command(recipe, tmp_path, *options))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_scheduler_that_is_not_there(recipe: Path, tmp_path: Path) -> None:
    scheduler = f"tcp://127.0.0.1:{free_port()}"
    options = ["--data.executor", "dask", "--data.scheduler", scheduler]
    _, _, module, *arguments = command(recipe, tmp_path, *options)
    impatient = (
        "import runpy, data_prep.pieces; data_prep.pieces.SECONDS_TO_CONNECT = 1;"
        f"runpy.run_module('{module}', run_name='__main__')"
    )
    done = run_process([sys.executable, "-c", impatient, *arguments])
    assert done.returncode == 1
    assert f"data.scheduler {scheduler}: no Dask scheduler answers there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", ["400k", "1m"])
def test_a_full_disk(recipe: Path, undisturbed: dict[str, str], tmp_path: Path, size: str) -> None:
    """The run is in a file system of that size, which exists in a mount namespace of its own."""
    small = tmp_path / "small"
    small.mkdir()
    script = f"""
        mount -t tmpfs -o size={size} none {small} || exit 77
        {" ".join(command(recipe, small / "run", "--data.workers", "2"))}
        echo "exit $?" >&2
        mount -o remount,size=64m {small}
        {" ".join(command(recipe, small / "run", "--data.workers", "2"))}
        code=$?
        cp -a {small}/run {tmp_path}/copy
        exit $code
    """
    done = run_process(["unshare", "--mount", "sh", "-c", script])
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    assert "exit 1" in done.stderr
    assert "no space left on the disk; free some and run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "copy").keys() == undisturbed.keys()


@pytest.mark.slow
def test_killed_while_the_toy_corpus_is_written(tiny_recipe: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(command(tiny_recipe, tmp_path / "run"), cwd=ROOT)
    while process.poll() is None:
        if (tmp_path / "run" / ".fetch.partial" / "toy").exists():
            process.kill()
    assert process.wait() == -signal.SIGKILL
    done = run_process(command(tiny_recipe, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "fetch: continued" in done.stderr
