"""Tests share this: real data beside the checkout, a tiny recipe, commands as users run them."""

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

from data_prep.prepare import prepare
from pipeline.dashboard import SERVER_SETTINGS
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.forked import run_module

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Whoever starts pytest, programs are the environment's, as in `./run.sh`. Another ninja would build
# DeepSpeed's operators anew, and the next process with this one once more.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# In this order and before the others: one that began last would be waited for alone.
LONG_FILES = (
    "test_run.py",
    "pipeline/test_sweep.py",
    "pipeline/training/test_faults.py",
    "pipeline/training/test_options.py",
    "pipeline/training/test_zero_matrix.py",
    "pipeline/training/test_nodes.py",
    "pipeline/test_serve.py",
    "test_shell.py",
    "pipeline/classification/test_run.py",
    "test_run_on_real_data.py",
    "models/test_models.py",
    "test_benchmarks.py",
    "data_prep/test_pieces.py",
    "pipeline/publishing/test_shortlist.py",
    "pipeline/checkpoints/test_relayout.py",
    "pipeline/publishing/test_exports.py",
    "pipeline/translation/test_teacher.py",
)

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of long files first. `--dist loadfile` hands out files in this order."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real corpora and golden vectors beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a tiny recipe. Its run_dir is empty until `prepared` is asked for."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=folder / "run", root=folder / "data"))
    return path


@pytest.fixture(scope="session")
def prepared(tiny_recipe: Path) -> TranslationRecipe:
    """Return the tiny recipe, with its data prepared in run_dir."""
    recipe = load_recipe(tiny_recipe)
    prepare(recipe.data, recipe.run_dir)
    return recipe


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Return what runs `python -m MODULE ARGUMENTS…` and collects what it says.

    The process has done its imports before: see `tests/forked.py`.
    """

    def run(
        module: str, *arguments: object, stdin: str | bytes = ""
    ) -> subprocess.CompletedProcess[str]:
        streams, texts = tmp_path_factory.mktemp("streams"), [str(each) for each in arguments]
        (streams / "stdin").write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        code = run_module(module, texts, streams, seconds=300)
        said, warned = ((streams / name).read_bytes().decode() for name in ("stdout", "stderr"))
        assert code is not None
        return subprocess.CompletedProcess([module, *texts], code, said, warned)

    return run


@pytest.fixture
def port() -> int:
    """Return a port on 127.0.0.1 that nobody uses."""
    return free_port()


def free_port() -> int:
    """Return a port on 127.0.0.1 that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_process(
    command: list[str], *, stdin: str | bytes = "", timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a process in the checkout.

    :param timeout: in seconds.
    :param environment: variables besides those there are.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        command,
        input=data,
        capture_output=True,
        cwd=ROOT,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def wait_for_answer(
    address: str, server: subprocess.Popen[bytes], output: Path | None = None
) -> None:
    """Wait until a server answers with success.

    :param output: the file that has what `server` says, for the message when it never does.
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
    """Run a real MLflow tracking server while the block is at work."""
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
