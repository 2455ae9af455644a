"""Whatever happens to a training, it says so, loses nothing, and goes on where it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from data_prep.shards import ShardReader
from models.export_format import write_weights
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.publishing.exports import export
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.tracking.mlflow_records import metric_key
from pipeline.translation.run_model import untrained_model
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import save_checkpoint
from tests.pipeline.ranks import finish, new_run, options, start, wait_for, weights

pytestmark = pytest.mark.slow

STEPS = 60


def run_dir_of(prepared: TranslationRecipe, name: str) -> Path:
    """Make a run_dir with the shards, in a folder of its own that will hold its tracking store."""
    return new_run(prepared, f"faults/{name}/run")


def arguments(recipe: Path, run_dir: Path, **training: object) -> list[str]:
    """Return the command line of a training that logs and saves often."""
    settings: dict[str, object] = {
        "max_steps": STEPS, "log_every": 1, "checkpoint_every": 2, "validate_every": 7,
        "keep_checkpoints": 5, "collective_timeout": 60,
    }  # fmt: skip
    return options(recipe, run_dir, **{**settings, **training})


def history(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """Return what MLflow has of a metric: (step, value), in order of the steps."""
    wanted = "SELECT step, value FROM metrics WHERE key = ? ORDER BY step"
    with sqlite3.connect(run_dir.parent / "mlflow.db") as store:
        rows = store.execute(wanted, [metric_key(key)])
        return list(rows)


@pytest.fixture(scope="module")
def undisturbed(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    """Return the run_dir of a training of two ranks to which nothing happens."""
    run_dir = run_dir_of(prepared, "undisturbed")
    log = run_dir / "log"
    assert finish(start(arguments(tiny_recipe, run_dir), log)) == [0, 0], log.read_text()
    return run_dir


def test_killed_at_eight_random_moments(
    prepared: TranslationRecipe, tiny_recipe: Path, undisturbed: Path
) -> None:
    """Both ranks are killed, as a launcher does when one dies, or one: the other says so. The
    result is the same bits, and MLflow has every step once."""
    run_dir = run_dir_of(prepared, "killed")
    draw, log, kills = random.Random(5), run_dir / "log", Counter[str]()
    while sum(kills.values()) < 8:
        log.write_text("")
        ranks = start(arguments(tiny_recipe, run_dir), log)
        # Half of them at any moment of the start, half while it steps and saves.
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 3))
            victims = ranks
        else:
            wait_for(log, "step ")
            time.sleep(draw.uniform(0, 0.5))
            victims = draw.choice([ranks, ranks[:1], ranks[1:]])
        for rank in victims:
            rank.kill()
        codes = finish(ranks)
        if 0 in codes:  # at its end
            break
        if victims is not ranks:
            assert sorted(codes, key=str) == [-signal.SIGKILL, 1], log.read_text()
            assert "lost contact with another rank" in log.read_text()
            assert "Traceback" not in log.read_text()
        kills["both" if victims is ranks else "one"] += 1
    log.write_text("")
    assert list_checkpoints(run_dir / "checkpoints")
    assert finish(start(arguments(tiny_recipe, run_dir), log)) == [0, 0], log.read_text()
    assert "resumed from" in log.read_text()
    expected = weights(undisturbed)
    for name, tensor in weights(run_dir).items():
        assert torch.equal(tensor, expected[name]), name
    for key in ("train_loss", "valid_loss", "grad_norm"):
        assert history(run_dir, key) == history(undisturbed, key)
    assert [step for step, _ in history(run_dir, "train_loss")] == list(range(1, STEPS + 1))
    assert min(kills["one"], kills["both"]) >= 2, kills


def test_sigterm_saves_on_all_ranks_and_exits_75(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    """The signal comes to one rank only, and the others agree. The next run does the validation
    that was due."""
    run_dir = run_dir_of(prepared, "preempted")
    log = run_dir / "log"
    settings = {"checkpoint_every": 1000, "validate_every": 1, "max_steps": 16}
    ranks = start(arguments(tiny_recipe, run_dir, **settings), log)
    wait_for(log, "step 6/")
    os.kill(ranks[1].pid or 0, signal.SIGTERM)
    assert finish(ranks) == [75, 75], log.read_text()
    (saved,) = list_checkpoints(run_dir / "checkpoints")[-1:]
    assert (
        f"stopped by a signal at step {saved.step}; run the same command again" in log.read_text()
    )
    assert saved.info.validation.due
    assert "Traceback" not in log.read_text()
    ranks = start(arguments(tiny_recipe, run_dir, **settings), log)
    assert finish(ranks) == [0, 0], log.read_text()
    assert f"resumed from {saved.folder}" in log.read_text()
    for key in ("train_loss", "valid_loss"):
        assert [step for step, _ in history(run_dir, key)] == list(range(1, 17))


def test_damaged_checkpoints_are_set_aside(
    prepared: TranslationRecipe, tiny_recipe: Path, undisturbed: Path
) -> None:
    """A file is cut, another one's is zeros, has another byte, or is half a JSON: training goes
    back to the newest checkpoint before them."""
    run_dir = undisturbed.parent.parent / "damaged" / "run"
    shutil.copytree(undisturbed.parent, run_dir.parent)
    log = run_dir / "log"
    log.write_text("")
    whole, *damaged = list_checkpoints(run_dir / "checkpoints")[-5:]
    for checkpoint, damage in zip(
        damaged, ("cut", "flipped", "zeros", "checkpoint.json"), strict=True
    ):
        states = checkpoint.folder / "mp_rank_00_model_states.pt"
        content = bytearray(states.read_bytes())
        if damage == "cut":
            states.write_bytes(content[:1000])
        elif damage == "flipped":
            content[len(content) // 2] ^= 0xFF
            states.write_bytes(content)
        elif damage == "zeros":
            states.write_bytes(bytes(len(content)))
        else:
            info = checkpoint.folder / damage
            info.write_text(info.read_text()[:100])
    assert finish(start(arguments(tiny_recipe, run_dir), log)) == [0, 0], log.read_text()
    said = log.read_text()
    for checkpoint in damaged:
        name = "checkpoint.json" if checkpoint is damaged[-1] else "mp_rank_00_model_states.pt"
        assert f"{checkpoint.folder}: {name} " in said
        assert (run_dir / "checkpoints" / f"damaged-{checkpoint.tag}").is_dir()
    assert said.count("going back to the one before") == 4
    assert f"resumed from {whole.folder}" in said
    expected = weights(undisturbed)
    for name, tensor in weights(run_dir).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_hung_rank_is_not_waited_for_in_silence(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    run_dir = run_dir_of(prepared, "hung")
    log = run_dir / "log"
    ranks = start(arguments(tiny_recipe, run_dir, max_steps=10**6, collective_timeout=8), log)
    wait_for(log, "step 3/")
    os.kill(ranks[1].pid or 0, signal.SIGSTOP)
    ranks[0].join(90)
    ranks[1].kill()
    assert finish(ranks) == [1, -signal.SIGKILL]
    said = log.read_text()
    assert "train: error: rank 0 on" in said
    assert "no progress for 8 s after step" in said
    assert "Traceback" not in said
    assert "train_step" in (run_dir / "hangs" / "rank-0.txt").read_text()


def test_a_process_that_was_suspended_has_waited_for_nobody(tmp_path: Path) -> None:
    program = """
import time
from pathlib import Path
from pipeline.training.watchdog import Watchdog
watchdog = Watchdog(4, 0, str, Path("stacks"))
print("watched", flush=True)
for step in (1, 2, 3):
    while time.process_time() < step:  # of the processor's: suspended, there is work left
        pass
    watchdog.seen()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "watched\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("stage", "policy"),
    [*((stage, "skip") for stage in ("zero0", "zero1_bf16", "zero2", "zero3")), ("zero3", "stop")],
)
def test_gradients_that_are_not_finite(
    prepared: TranslationRecipe, tiny_recipe: Path, poisoned: Path, stage: str, policy: str
) -> None:
    """The embedding of one token is infinite: sentences with it have no gradient."""
    run_dir = run_dir_of(prepared, f"nonfinite-{policy}-{stage}")
    log = run_dir / "log"
    options = arguments(
        tiny_recipe, run_dir, max_steps=6, on_nonfinite=policy, init_from=poisoned,
        deepspeed_config=ROOT / "ds_configs" / f"{stage}.json",
    )  # fmt: skip
    ranks = start([*options, "--model.tied_embeddings", "false"], log)
    codes = finish(ranks)
    said = log.read_text()
    dumps = sorted((run_dir / "nonfinite").iterdir())
    assert f"see {str(dumps[0]).replace('rank-0.json', 'rank-*.json')}" in said
    content = json.loads(dumps[0].read_text())
    assert f"the gradient of step {content['step']} is not finite" in said
    assert content["weights"]["encoder_frontend.embed.weight"]["not finite"] == 32
    of_both_ranks = [json.loads(dump.read_text()) for dump in dumps[:2]]
    assert {each["step"] for each in of_both_ranks} == {content["step"]}
    losses = [each["loss"] for rank in of_both_ranks for each in rank["micro_batches"]]
    assert "nan" in losses
    if policy == "stop":
        assert codes == [1, 1]
        assert "training.on_nonfinite skip" in said
        assert "Traceback" not in said
    else:
        assert codes == [0, 0], said
        skipped = history(run_dir, "skipped_steps")[-1][1]
        assert 0 < skipped < 6
        assert len(dumps) == 2 * skipped
        assert all(
            tensor.isfinite().all()
            for name, tensor in weights(run_dir).items()
            if "embed" not in name
        )


@pytest.fixture(scope="module")
def poisoned(prepared: TranslationRecipe, tiny_recipe: Path) -> Path:
    """Return an export in which one rare token's source embedding is infinite. Such a model cannot
    be exported, only made."""
    run_dir = run_dir_of(prepared, "poisoned")
    keys = {"run_dir": str(run_dir), "model.tied_embeddings": "false"}
    recipe = load_recipe(tiny_recipe, list(keys.items()))
    model = untrained_model(recipe)
    save_checkpoint(model, recipe)
    export(recipe, run_dir / "export")
    model.state_dict()["encoder_frontend.embed.weight"][rare_token(prepared)] = torch.inf
    write_weights(model, run_dir / "export")
    return run_dir / "export"


def rare_token(prepared: TranslationRecipe) -> int:
    """Return a source token that about one in a hundred sentences has."""
    reader = ShardReader(prepared.run_dir / "shards", "train")
    counts = Counter(
        token
        for pair in map(reader.__getitem__, range(len(reader)))
        for token in set(pair[0].tolist())
    )
    rare: int = min(counts, key=lambda token: abs(counts[token] - len(reader) / 100))
    return rare


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of 16 MB, which a mount namespace has, and loses with its end."""
    folder = tmp_path / "small"
    folder.mkdir()
    script = f"mount -t tmpfs -o size=16m none {folder} && echo mounted && exec sleep 600"
    command = ["unshare", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        if not holder.stdout.readline():
            pytest.skip("needs the right to mount a file system")
        try:
            yield Path(f"/proc/{holder.pid}/root{folder}")  # as that process sees it
        finally:
            holder.kill()


def test_a_full_disk_while_saving(
    prepared: TranslationRecipe, tiny_recipe: Path, small_disk: Path, tmp_path: Path
) -> None:
    run_dir, log = small_disk / "run", tmp_path / "log"
    shutil.copytree(prepared.run_dir / "shards", run_dir / "shards")
    settings = {"checkpoint_every": 50, "keep_checkpoints": 2}
    ranks = start(arguments(tiny_recipe, run_dir, max_steps=10**5, **settings), log)
    while not (run_dir / "checkpoints" / "latest").exists():
        assert ranks[0].is_alive(), log.read_text()
        time.sleep(0.02)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert finish(ranks) == [1, 1], log.read_text()
    said = log.read_text()
    assert "cannot be written" in said
    assert "The checkpoints before are whole" in said
    assert "Traceback" not in said
    filler.unlink()
    (newest,) = list_checkpoints(run_dir / "checkpoints")[-1:]
    log.write_text("")
    settings["max_steps"] = newest.step + 5
    assert finish(start(arguments(tiny_recipe, run_dir, **settings), log)) == [0, 0], (
        log.read_text()
    )
    assert f"resumed from {newest.folder}" in log.read_text()


def test_no_room_for_checkpoints_is_seen_before(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    run_dir = run_dir_of(prepared, "no-room")
    log = run_dir / "log"
    options = arguments(tiny_recipe, run_dir, keep_checkpoints=10**7)
    assert finish(start(options, log)) == [1, 1]
    assert "make room, or lower training.keep_checkpoints" in log.read_text()
    assert "Traceback" not in log.read_text()
