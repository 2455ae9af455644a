"""`./run.sh` as a shell script: signals, where it looks for things, what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from data_prep.files import only_command_in
from data_prep.text import PAD_IDX
from models.factory import create_model
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import ROOT
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command, free_port, run_process
from tests.pipeline.conftest import save_checkpoint

RUN = str(ROOT / "run.sh")
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
Stage = Callable[[TranslationRecipe, Path], list[str]]


def stopped(
    command: list[str],
    seen: str,
    signum: signal.Signals,
    folder: Path,
    hangs: bool = False,
    /,
    **environment: str,
) -> tuple[int, str]:
    """Send `signum` to `run.sh` alone when it has said `seen`.

    :param hangs: what is at work does not hear the signal; then send another one.
    :returns: its exit code and what it said. Nothing of it is left.
    """
    mark = f"RINGFORMER_TEST={uuid4().hex}"
    name, value = mark.split("=")
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, name: value, "OMP_NUM_THREADS": "1", **environment},
            # Tests started in the background have them ignored, and bash cannot trap them then.
            preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in SIGNALS],
        )
    deadline = time.monotonic() + 300
    while not re.search(seen, log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise AssertionError(log.read_text())
        time.sleep(0.05)
    if hangs:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.suspend()
        process.send_signal(signum)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
    process.send_signal(signum)
    code = process.wait(5 if hangs else 120)  # 10 s after the first, run.sh kills by itself
    left = []
    for other in psutil.process_iter():
        try:
            if other.environ().get(name) == value and other.status() != psutil.STATUS_ZOMBIE:
                left.append(other.cmdline())
        except psutil.Error:  # ended, or another user's
            continue
    assert left == []
    return code, log.read_text()


@pytest.fixture(scope="module")
def saved(prepared: TranslationRecipe) -> TranslationRecipe:
    """The tiny recipe with shards and a checkpoint of random weights, in a run_dir of its own."""
    run_dir = prepared.run_dir.parent / "shell"
    for part in ("shards", "clean"):
        shutil.copytree(prepared.run_dir / part, run_dir / part)
    recipe = prepared.model_copy(update={"run_dir": run_dir})
    save_checkpoint(create_model(recipe.model, (300, 300), PAD_IDX), recipe)
    return recipe


def checkout(folder: Path) -> Path:
    """A checkout in which nothing was set up."""
    folder.mkdir()
    for name in ("run.sh", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_an_environment_of_others_is_left_alone(tmp_path: Path) -> None:
    """Neither that of the checkout, nor that beside a link to `run.sh`."""
    ours, elsewhere = checkout(tmp_path / "checkout"), tmp_path / "elsewhere"
    for folder in (ours / ".venv", elsewhere / ".venv"):
        folder.mkdir(parents=True)
        (folder / "precious.txt").write_text("mine")
    (elsewhere / "run.sh").symlink_to(Path("..", "checkout", "run.sh"))
    for script in (ours / "run.sh", elsewhere / "run.sh"):
        done = run_process([str(script), "setup"])
        assert done.returncode == 1
        assert f"{ours}/.venv is there, and not made by this script; move it away" in done.stderr
        assert (ours / ".venv" / "precious.txt").read_text() == "mine"
        assert [path.name for path in (elsewhere / ".venv").iterdir()] == ["precious.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
def test_setup_is_stopped(tmp_path: Path, signum: signal.Signals) -> None:
    folder = checkout(tmp_path / "checkout")
    code, said = stopped([str(folder / "run.sh"), "setup"], "setting up", signum, tmp_path)
    assert code == 75, said
    assert "stopped by a signal; run the same command again to continue" in said
    again, said = stopped([str(folder / "run.sh"), "setup"], "setting up", signum, tmp_path)
    assert again == 75, said  # it goes on in the environment that it began


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "seen", "code", "signum"),
    [
        (["prepare", "--data.toy_corpus.train", "100000"], "clean: started", 75, signal.SIGTERM),
        (["evaluate"], "test set toy-test", 75, signal.SIGHUP),
        (["evaluate", "over ranks"], "test set toy-test", 75, signal.SIGTERM),
        (["export", "--format", "ctranslate2"], "export: started", 75, signal.SIGINT),
        (["translate", "--input", "fifo"], "model ready", 1, signal.SIGTERM),
        (["dashboard"], "dashboard: http", 0, signal.SIGINT),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_every_stage_is_stopped(
    saved: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    command: list[str],
    seen: str,
    code: int,
    signum: signal.Signals,
) -> None:
    run_dir = tmp_path / "run"
    if command[0] != "prepare":
        shutil.copytree(saved.run_dir, run_dir)
    environment = {}
    if "over ranks" in command:
        command, environment = command[:1], {"DEEPSPEED_ARGS": "--num_accelerators 2"}
    if "fifo" in command:
        os.mkfifo(tmp_path / "fifo")
        writer = subprocess.Popen(["sh", "-c", "exec >fifo; sleep 300"], cwd=tmp_path)
    if command[0] == "dashboard":
        command = [*command, "--port", str(free_port())]
    elsewhere = ["--config", str(tiny_recipe), "--run_dir", str(run_dir)]
    elsewhere += ["--data.root", str(tmp_path / "data")]
    # In a folder with a module whose name many import.
    for name in ("queue", "socket", "requests", "torch"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\n")
    found, said = stopped([RUN, *command, *elsewhere], seen, signum, tmp_path, **environment)
    if "fifo" in command:
        writer.kill()
        writer.wait()
    assert found == code, said
    assert "Traceback" not in said
    assert ("run the same command again to continue" in said) == (code == 75)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_what_does_not_stop_is_killed_by_a_second_signal(tiny_recipe: Path, tmp_path: Path) -> None:
    command = [RUN, "dashboard", "--config", str(tiny_recipe), "--run_dir", str(tmp_path / "run")]
    command += ["--port", str(free_port())]
    code, said = stopped(command, "dashboard: http", signal.SIGTERM, tmp_path, True)
    assert code == 0, said


@pytest.mark.slow
def test_a_dashboard_on_a_full_disk(tiny_recipe: Path, tmp_path: Path) -> None:
    """It says which file has no room, in one line and without MLflow's traceback."""
    full = tmp_path / "full"
    full.mkdir()
    command = [sys.executable, "-m", "pipeline.dashboard", "--config", str(tiny_recipe)]
    command += ["--run_dir", str(full / "run"), "--port", str(free_port())]
    mount = f"mount -t tmpfs -o size=64k none {full} || exit 77; exec {shlex.join(command)}"
    done = run_process(["unshare", "--mount", "sh", "-c", mount])
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    assert done.returncode == 1
    assert re.fullmatch(
        r"dashboard: error: .*sqlite:///.*/full/mlflow\.db .*disk is full.*\n", done.stderr
    )


@pytest.mark.slow
def test_a_slow_training_says_how_fast_it_is_and_saves_when_it_is_stopped(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    """On its first lines, before the first report. MLflow has the report alone. And no module of
    the current folder is run."""
    run_dir = tmp_path / "run"
    shutil.copytree(prepared.run_dir / "shards", run_dir / "shards")
    (tmp_path / "queue.py").write_text("open('executed', 'w')\n")
    options = ["--config", str(tiny_recipe), "--run_dir", str(run_dir)]
    for key in ("max_steps", "log_every", "validate_every", "checkpoint_every"):
        options += [f"--training.{key}", "100000"]
    first_sign = r"train: step \d+/100000 \| [\d,]+ tokens/s \| ETA .+\n"
    code, said = stopped([RUN, *options[:2], "train", *options[2:]], first_sign, signal.SIGHUP,
                         tmp_path)  # fmt: skip
    assert code == 75, said
    (saved,) = list_checkpoints(run_dir / "checkpoints")
    assert f"stopped by a signal at step {saved.step}; run the same command again" in said
    assert "Traceback" not in said
    assert said.count(" tokens/s | ") == 2
    assert re.match(r"run\.sh: training begins; .*\ntrain: preflight: ", said)
    journal = (run_dir / "tracking" / "journal.jsonl").read_text()
    assert journal.count('"train_loss"') == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_another_command_at_work_keeps_those_away_that_write(
    saved: TranslationRecipe, tiny_recipe: Path, command: Command
) -> None:
    options = ["--config", tiny_recipe, "--run_dir", saved.run_dir]
    with only_command_in(saved.run_dir):
        for module in ("prepare", "evaluate", "export", "analyse"):
            done = command(f"pipeline.{module}", *options)
            assert done.returncode == 1
            assert f"{saved.run_dir}: another command is at work here" in done.stderr
        done = command("pipeline.translate", *options, stdin="Gut.\n")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--run_dir '' prepare", "command line: `run_dir`: must not be empty"),
        ("prepare --data.root ' '", "command line: `data.root`: must not be empty"),
        ("export --output ''", "argument --output: must not be empty"),
        ("dashboard --port 0", "--port 0: ports have numbers from 1 to 65535"),
        ("dashboard --port 70000", "--port 70000: ports have numbers from 1 to 65535"),
        ("dashboard --port $TAKEN", "Address already in use; choose another one"),
        ("translate <&-", "stdin is closed; give sentences there, or --input FILE"),
        ("translate </", "stdin is a folder, not text to translate"),
        ("translate --input /", "--input /: cannot be read: Is a directory"),
        ("translate --input /nowhere", "--input /nowhere: cannot be read: No such file"),
        ("translate >&-", "stdout is closed; translations are written there"),
    ],
)
def test_bad_usage_is_told_at_once(arguments: str, expected: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_process(["bash", "-c", f"{RUN} {arguments}"], TAKEN=str(taken.getsockname()[1]))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ranks_without_a_launcher_are_one_process(
    saved: TranslationRecipe, tiny_recipe: Path, command: Command
) -> None:
    options = ["--config", str(tiny_recipe), "--run_dir", str(saved.run_dir)]
    done = run_process(
        [sys.executable, "-m", "pipeline.evaluate", *options, "--evaluation.checkpoint", "77"],
        WORLD_SIZE="2",
    )
    assert done.returncode == 1
    assert "evaluation.checkpoint 77 is not there" in done.stderr


def test_the_modules_of_the_doors_hide_no_others() -> None:
    """A launcher runs `pipeline/train.py` by its path, with `pipeline` on sys.path."""
    names = {path.stem for path in (ROOT / "pipeline").iterdir()}
    assert not names & sys.stdlib_module_names
    show = "import sys, pipeline; print(any(p.endswith('/pipeline') for p in sys.path))"
    done = run_process([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r} + "
                        f"'/pipeline'); {show}"])  # fmt: skip
    assert done.stdout == "False\n"
