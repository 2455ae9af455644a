"""What tests share: real data beside the checkout, a tiny recipe, commands as users run them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import torch

from data_prep.prepare import prepare
from models.seq2seq import TranslationModel
from pipeline.checkpoints.folder import (
    CheckpointInfo,
    Layout,
    ValidationState,
    finish_checkpoint,
    tag_of,
)
from pipeline.command_line import load_recipe
from pipeline.dashboard import SERVER_SETTINGS
from pipeline.recipe import Recipe
from pipeline.translation.run_model import model_identity

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

TINY_RECIPE = """
run_dir: {run_dir}
data:
  root: {root}
  toy_corpus: {{train: 600, valid: 40, test: 20}}
  train:
    - {{name: toy, source: toy/train.de, target: toy/train.en}}
  valid: {{name: toy-valid, source: toy/valid.de, target: toy/valid.en}}
  test: {{name: toy-test, source: toy/test.de, target: toy/test.en}}
  vocabulary: {{size: 300}}
  max_tokens_per_side: 64
model:
  model_dim: 32
  num_heads: 4
  ffn_inner_dim: 64
  num_levels: 3
  max_seq_len: 96
training:
  max_steps: 6
  max_tokens: 2048
  micro_batch_tokens: 512
  learning_rate: 5e-3
  warmup_steps: 2
  log_every: 2
  validate_every: 3
  checkpoint_every: 3
evaluation: {{beam_size: 2, untrained_baseline: true}}
"""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora and golden vectors beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file; its run_dir is empty."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=folder / "run", root=folder / "data"))
    return path


@pytest.fixture(scope="session")
def prepared(tiny_recipe: Path) -> Recipe:
    """The tiny recipe with its shards in run_dir."""
    recipe = load_recipe(tiny_recipe)
    prepare(recipe.data, recipe.run_dir)
    return recipe


def save_checkpoint(model: TranslationModel, recipe: Recipe) -> None:
    """The run's only checkpoint, as ZeRO stage 0 writes it."""
    checkpoints = recipe.run_dir / "checkpoints"
    (checkpoints / tag_of(1)).mkdir(parents=True)
    weights = {"module": model.state_dict()}
    torch.save(weights, checkpoints / tag_of(1) / "mp_rank_00_model_states.pt")
    layout = Layout(zero_stage=0, world_size=1, precision="fp32", offload=False)
    info = CheckpointInfo(
        step=1,
        training=recipe.training.model_dump(mode="json"),
        steps_per_epoch=1,
        validation=ValidationState(criterion="valid_loss"),
        tracker_run_id=None,
        saved_at=0,
        **layout.model_dump(),
        **model_identity(recipe),
    )
    finish_checkpoint(checkpoints, info, keep=1)


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `python -m MODULE ARGUMENTS…` and collect what it said."""

    def run(
        module: str, *arguments: object, stdin: str | bytes = ""
    ) -> subprocess.CompletedProcess[str]:
        return run_process([sys.executable, "-m", module, *map(str, arguments)], stdin=stdin)

    return run


@pytest.fixture
def port() -> int:
    """A port on 127.0.0.1 that nobody uses."""
    return free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(arguments: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script with DeepSpeed's launcher."""
    return run_process([*launcher(ranks), *arguments])


def launcher(ranks: int) -> list[str]:
    """The `deepspeed` command for so many ranks on this machine."""
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    return [*command, "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def run_process(
    command: list[str], *, stdin: str | bytes = "", timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a process in the checkout with the environment's programs on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        command,
        input=data,
        capture_output=True,
        cwd=ROOT,
        timeout=timeout,
        env={**os.environ, "PATH": path, **environment},
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def wait_for_answer(
    address: str, server: subprocess.Popen[bytes], output: Path | None = None
) -> None:
    """Until a server that was started answers with success.

    :param output: what it says, for the message when it does not.
    """
    deadline = time.monotonic() + 120
    while True:
        try:
            requests.get(address, timeout=5).raise_for_status()
            return
        except requests.RequestException:
            said = output.read_text() if output else f"{address} does not answer"
            assert server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow tracking server, up inside the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--workers", "1",
         "--artifacts-destination", str(folder / "artifacts")],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **SERVER_SETTINGS},
    )  # fmt: skip
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", process)
        yield
    finally:
        process.terminate()
        process.wait(30)
