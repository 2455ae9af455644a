"""An interruption changes nothing in what is kept, averaged and evaluated."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pipeline.checkpoints.folder import (
    CheckpointInfo,
    Criterion,
    ValidationState,
    finish_checkpoint,
    list_checkpoints,
    record_validation,
    tag_of,
)
from pipeline.checkpoints.weights import checkpoints_to_average
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import finish, new_run, options, start, train

STATE = ValidationState(criterion="valid_loss")


def save(folder: Path, step: int, *, scheduled: bool = True, keep: int = 3) -> None:
    (folder / tag_of(step)).mkdir(parents=True)
    info = CheckpointInfo(
        zero_stage=1, world_size=1, precision="fp32", offload=False, step=step, training={},
        steps_per_epoch=10, validation=STATE, scheduled=scheduled, tracker_run_id=None, saved_at=0,
    )  # fmt: skip
    finish_checkpoint(folder, info, keep)


def steps_on_disk(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def averaged(recipe: TranslationRecipe, count: int) -> list[int]:
    evaluation = recipe.evaluation.model_copy(update={"average_checkpoints": count})
    chosen = checkpoints_to_average(recipe.model_copy(update={"evaluation": evaluation}))
    return [checkpoint.step for checkpoint in chosen]


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> TranslationRecipe:
    return load_recipe(tiny_recipe, [("run_dir", str(tmp_path))])


def test_only_the_schedules_checkpoints_are_kept_and_averaged(recipe: TranslationRecipe) -> None:
    folder = recipe.checkpoints
    save(folder, 29, scheduled=False)
    assert averaged(recipe, 3) == [29]  # there is no other yet
    save(folder, 100)
    assert steps_on_disk(folder) == [100]
    save(folder, 170, scheduled=False)
    assert steps_on_disk(folder) == [100, 170]  # to resume from
    assert averaged(recipe, 3) == [100]
    for step in (200, 300):
        save(folder, step)
    save(folder, 333, scheduled=False)
    assert steps_on_disk(folder) == [100, 200, 300, 333]
    assert averaged(recipe, 3) == [100, 200, 300]
    save(folder, 400)
    assert steps_on_disk(folder) == [200, 300, 400]


@pytest.mark.parametrize(("asked", "expected"), [(True, [100, 150]), (False, [100])])
def test_a_validation_that_was_put_off_can_ask_for_the_checkpoint(
    recipe: TranslationRecipe, asked: bool, expected: list[int]
) -> None:
    folder = recipe.checkpoints
    save(folder, 100)
    save(folder, 150, scheduled=False)
    record_validation(
        folder, 150, STATE.judged(1.0, 150, Criterion("valid_loss", False)), asked=asked
    )
    assert averaged(recipe, 3) == expected


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_checkpoints_of_an_undisturbed_one(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    settings = {
        "max_steps": 12, "checkpoint_every": 4, "validate_every": 100, "keep_checkpoints": 3,
        "log_every": 1,
    }  # fmt: skip
    run_dir = new_run(prepared, "schedule/stopped")
    log = run_dir / "log"
    (rank,) = start(options(tiny_recipe, run_dir, **{**settings, "max_steps": 10**6}), log, ranks=1)
    while "step 5/" not in log.read_text():
        assert rank.is_alive(), log.read_text()
    os.kill(rank.pid or 0, signal.SIGTERM)
    assert finish([rank]) == [75]
    stopped = steps_on_disk(run_dir / "checkpoints")[-1]
    assert stopped % 4, "the signal came at a step of the schedule"
    end = (stopped // 4 + 3) * 4
    codes, said = train(tiny_recipe, run_dir, **{**settings, "max_steps": end})
    assert codes == [0], said
    assert steps_on_disk(run_dir / "checkpoints") == [end - 8, end - 4, end]
