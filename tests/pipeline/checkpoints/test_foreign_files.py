"""What in a run folder is ours, and what code in it cannot do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from pipeline.checkpoints.folder import (
    Checkpoint,
    CheckpointError,
    DamagedCheckpointError,
    best_tag,
    list_checkpoints,
    remove_unfinished,
    set_aside_damaged,
    tag_of,
)
from pipeline.checkpoints.weights import load_weights, tensors_only
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import untrained_model
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.conftest import save_checkpoint
from tests.pipeline.ranks import new_run

MODEL: dict[str, Any] = {"module": {}, "buffer_names": [], "param_shapes": [], "shared_params": {}}


class Code:
    """A pickle of it creates a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Attribute:
    """A pickle of it is `getattr(ZeroStageEnum, name)`, as Python 3.11.2 makes one of a member."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return getattr, (ZeroStageEnum, self.name)


def test_members_of_deepspeeds_enumeration_are_read_as_any_python_pickles_them(
    tmp_path: Path,
) -> None:
    torch.save([Attribute("gradients"), ZeroStageEnum.weights], tmp_path / "good.pt")
    torch.save(Attribute("mro"), tmp_path / "bad.pt")
    with tensors_only():
        found = torch.load(tmp_path / "good.pt")
    assert found == [ZeroStageEnum.gradients, ZeroStageEnum.weights]
    with pytest.raises(CheckpointError, match="more than tensors"), tensors_only():
        torch.load(tmp_path / "bad.pt")


@pytest.fixture
def run(prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path) -> TranslationRecipe:
    """A run with a checkpoint of step 1."""
    recipe = load_recipe(tiny_recipe, [("run_dir", str(tmp_path / "run"))])
    for name in ("shards", "clean"):
        shutil.copytree(prepared.run_dir / name, recipe.run_dir / name)
    save_checkpoint(untrained_model(recipe), recipe)
    return recipe


def change(checkpoint: Path, **keys: Any) -> None:
    """Change checkpoint.json."""
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def put_code(checkpoint: Path, stage: int, where: str) -> Path:
    """Put code into a checkpoint, and return what it would create."""
    marker = checkpoint.parent.parent / "marker"
    (checkpoint / "mp_rank_00_model_states.pt").unlink()
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    model = {**MODEL, **({"code": Code(marker)} if where == "model" else {})}
    torch.save(model, checkpoint / f"{prefix}mp_rank_00_model_states.pt")
    torch.save({"code": Code(marker)}, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.pt")}
    change(checkpoint, zero_stage=stage, bytes=sizes, parts={})
    return marker


@pytest.mark.parametrize(
    ("stage", "where"),
    [(0, "model"), *((s, w) for s in (1, 2, 3) for w in ("model", "optimizer"))],
)
def test_code_in_a_checkpoint_is_not_run(run: TranslationRecipe, stage: int, where: str) -> None:
    folder = run.checkpoints / tag_of(1)
    marker = put_code(folder, stage, where)
    with pytest.raises(CheckpointError, match="more than tensors") as caught:
        load_weights(Checkpoint(folder, 1))
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["translate", "evaluate", "export"])
def test_no_command_runs_code_of_a_checkpoint(
    run: TranslationRecipe, tiny_recipe: Path, command: Command, module: str
) -> None:
    marker = put_code(run.checkpoints / tag_of(1), 1, "model")
    done = command(f"pipeline.{module}", "--config", tiny_recipe, "--run_dir", run.run_dir)
    assert done.returncode == 1, done.stderr
    assert "more than tensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()


FOREIGN = ["step-mine", "step-00000001.bak", "step-00000001-universal", "step-1", "step-000000012",
           "damaged-step-00000001", "notes"]  # fmt: skip


def test_only_step_and_eight_digits_are_ours(run: TranslationRecipe) -> None:
    folder = run.checkpoints
    for name in FOREIGN:
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("mine")
    shutil.copytree(folder / tag_of(1), folder / "step-1.copy")
    (folder / tag_of(7)).write_text("mine")
    (folder / tag_of(8)).symlink_to("notes")
    (folder / tag_of(2)).mkdir()  # a save that was interrupted
    (folder / ".step-00000002.universal").mkdir()
    remove_unfinished(folder)
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [1]
    assert {path.name for path in folder.iterdir()} == {
        *FOREIGN, "step-1.copy", tag_of(1), tag_of(7), tag_of(8), "latest"
    }  # fmt: skip
    assert all((folder / name / "thesis.txt").exists() for name in FOREIGN)


def test_what_is_set_aside_replaces_nothing(run: TranslationRecipe) -> None:
    folder = run.checkpoints
    for _ in range(2):
        shutil.copytree(folder / tag_of(1), folder / tag_of(3))
        set_aside_damaged(folder, Checkpoint(folder / tag_of(1), 1))
    names = {path.name for path in folder.glob("damaged-*")}
    assert names == {"damaged-step-00000003", "damaged-step-00000003-2"}


@pytest.mark.parametrize("text", [None, b"", b"\xff\xfe\x00", b"step-00000001", b"../../x"])
def test_the_newest_checkpoint_knows_the_best(run: TranslationRecipe, text: bytes | None) -> None:
    """The file for people may be damaged, or a kill came before it was written."""
    folder = run.checkpoints
    assert best_tag(folder) is None
    if text is not None:
        (folder / "best").write_bytes(text)
    shutil.copytree(folder / tag_of(1), folder / tag_of(2))
    for step in (1, 2):
        found = {"criterion": "valid_loss", "best": 1, "best_step": step}
        change(folder / tag_of(step), step=step, validation=found)
    assert best_tag(folder) == tag_of(2)
    (folder / tag_of(2) / "checkpoint.json").write_text("{")
    assert best_tag(folder) == tag_of(1)


@pytest.mark.parametrize(
    "text",
    ["", "null", "3", "[]", '"text"', '{"format": 2}', '{"format": null}', "[" * 100_000, "\x00"],
)
def test_a_damaged_checkpoint_json(run: TranslationRecipe, text: str) -> None:
    (run.checkpoints / tag_of(1) / "checkpoint.json").write_text(text)
    with pytest.raises(DamagedCheckpointError if "null}" not in text else CheckpointError):
        list_checkpoints(run.checkpoints)[0].check()


@pytest.mark.parametrize(
    "keys",
    [{"bytes": None}, {"step": "x"}, {"validation": None}, {"zero_stage": None}, {"step": 2},
     {"training": 3}],
)  # fmt: skip
def test_a_checkpoint_json_with_wrong_values(run: TranslationRecipe, keys: dict[str, Any]) -> None:
    change(run.checkpoints / tag_of(1), **keys)
    with pytest.raises(DamagedCheckpointError):
        list_checkpoints(run.checkpoints)[0].check()


def test_a_copy_under_another_step_is_no_checkpoint_of_it(run: TranslationRecipe) -> None:
    shutil.copytree(run.checkpoints / tag_of(1), run.checkpoints / tag_of(9))
    with pytest.raises(DamagedCheckpointError):
        list_checkpoints(run.checkpoints)[-1].check()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.model_dim", "16", "another model"),
        ("model.level_signals", "none", "another model"),
        ("training.max_tokens", "1024", "another batch plan"),
        ("training.micro_batch_tokens", "256", "another batch plan"),
        ("training.seed", "7", "another batch plan"),
        ("training.freeze", "[encoder]", "another set of frozen parameters"),
    ],
)
def test_a_training_of_other_weights_or_batches_does_not_go_on(
    prepared: TranslationRecipe, tiny_recipe: Path, key: str, value: str, expected: str
) -> None:
    run_dir = new_run(prepared, f"other-{key}")
    recipe = load_recipe(tiny_recipe, [("run_dir", str(run_dir))])
    save_checkpoint(untrained_model(recipe), recipe, TranslationTask(recipe).identity())
    (saved,) = list_checkpoints(recipe.checkpoints)
    saved.refuse_other(TranslationTask(recipe).identity())
    other = load_recipe(tiny_recipe, [("run_dir", str(run_dir)), (key, value)])
    with pytest.raises(CheckpointError, match=f"belongs to {expected}"):
        saved.refuse_other(TranslationTask(other).identity())
