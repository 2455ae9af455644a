"""Any workers and any interruption give the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images.config import ImagesConfig
from tests.conftest import ROOT, run_process
from tests.data_prep.images.small_sets import FOLDER_SETS, config_of, write_folders
from tests.data_prep.test_pieces import files_of

Configuration = Callable[[int], ImagesConfig]


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Configuration:
    """Return the configuration of some hundred photos in many pieces, for a number of workers."""
    root = tmp_path_factory.mktemp("photos")
    write_folders(root)
    draw = np.random.default_rng(1)
    for number in range(300):
        pixels = draw.integers(256, size=(90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / "cat" / f"photo{number}.jpg")
    (root / "train" / "dog" / "none.png").write_text("none")

    def of_workers(workers: int) -> ImagesConfig:
        return config_of(
            root, FOLDER_SETS, image_size=64, workers=workers, images_per_piece=20,
            images_per_shard=50,
        )  # fmt: skip

    return of_workers


def command(config: ImagesConfig, run_dir: Path) -> list[str]:
    module = [sys.executable, "-m", "tests.data_prep.images.prepare_alone"]
    return [*module, str(run_dir), config.model_dump_json()]


@pytest.fixture(scope="module")
def undisturbed(configuration: Configuration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    done = run_process(command(configuration(2), run_dir))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    files = files_of(run_dir)
    assert sum(name.startswith("shards/train-") for name in files) == 7
    assert not [name for name in files if "scratch" in name or "partial" in name]
    return run_dir


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(
    configuration: Configuration, undisturbed: Path, tmp_path: Path
) -> None:
    done = run_process(command(configuration(1), tmp_path))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(undisturbed)


@pytest.mark.slow
def test_killed_again_and_again(
    configuration: Configuration, undisturbed: Path, tmp_path: Path
) -> None:
    """The command alone gets SIGKILL: its workers must notice by themselves."""
    seed = random.randrange(1000)
    print("seed", seed)
    draw = random.Random(seed)
    longest, killed = 2.0, 0
    while killed < 3:
        started = time.monotonic()
        process = subprocess.Popen(
            command(configuration(2), tmp_path), cwd=ROOT, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=draw.uniform(0.5, longest))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        longest = max(longest, 1.5 * (time.monotonic() - started))
    assert killed
    done = run_process(command(configuration(2), tmp_path))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(undisturbed)


@pytest.mark.slow
def test_killed_while_shards_are_gathered(
    configuration: Configuration, undisturbed: Path, tmp_path: Path
) -> None:
    """Converted pieces are not made again, but for one that was damaged meanwhile."""
    process = subprocess.Popen(command(configuration(2), tmp_path), cwd=ROOT)
    scratch = tmp_path / ".shards.partial" / "scratch-shards"
    while process.poll() is None:
        if (scratch / "00000").exists():
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    shutil.rmtree(scratch)
    damaged = scratch.with_name("scratch-images") / "00003" / "images.npy"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\1\2\3\4")
    (damaged.parents[1] / ".DS_Store").write_text("x")  # another program's
    done = run_process(command(configuration(2), tmp_path))
    assert done.returncode == 0, done.stderr
    assert "images: 17 of 18 pieces were done before" in done.stderr
    assert files_of(tmp_path) == files_of(undisturbed)
