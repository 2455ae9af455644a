"""An export is trained further on other text, with the vocabulary that it has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.prepare import prepare
from data_prep.shards import read_shards_manifest
from data_prep.vocabulary import vocabulary_digest
from models.export_format import digest_of_export
from pipeline.checkpoints.folder import CheckpointError, list_checkpoints
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import check_base, untrained_model
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import exported
from tests.pipeline.ranks import tracked, train


@pytest.mark.slow
def test_an_export_is_trained_on_other_text(
    prepared: TranslationRecipe, tiny_recipe: Path, six_steps: Path, tmp_path: Path
) -> None:
    """On the validation set of before, the loss begins where it was."""
    before = load_recipe(tiny_recipe, [("run_dir", str(six_steps))])
    export = exported(before, "safetensors")
    (tmp_path / "toy").mkdir()
    for language in ("de", "en"):
        text = (prepared.run_dir / "fetch" / "toy" / f"valid.{language}").read_bytes()
        (tmp_path / "toy" / f"valid.{language}").write_bytes(text)
    keys = [
        ("run_dir", f"{tmp_path}/run"),
        ("data.root", str(tmp_path)),
        ("data.seed", "2"),  # other training text
        ("training.init_from", str(export)),
    ]
    recipe = load_recipe(tiny_recipe, [*keys, ("data.vocabulary.size", "290")])
    prepare(recipe.data, recipe.run_dir)
    with pytest.raises(
        CheckpointError, match=f"another vocabulary.*data.vocabulary.from: {export}"
    ):
        TranslationTask(recipe).create_model()

    fine = tmp_path / "fine.yaml"
    fine.write_text(tiny_recipe.read_text().replace("{size: 300}", f"{{from: {export}}}"))
    recipe = load_recipe(fine, keys)
    made = prepare(recipe.data, recipe.run_dir)
    assert made.vocabulary.sha256 == vocabulary_digest(export) == vocabulary_digest(before.shards)
    assert made.of_split("train") != read_shards_manifest(before.shards).of_split("train")
    assert made.of_split("valid") == read_shards_manifest(before.shards).of_split("valid")
    # What the export's recipe left to the paper may be said.
    check_base(load_recipe(fine, [*keys, ("model.signal_rank", "2")]), export)
    assert torch.equal(
        untrained_model(recipe).source_embed.weight,
        TranslationTask(recipe).create_model().source_embed.weight,
    )
    arguments = [f"--{key}={value}" for key, value in keys[1:]]
    codes, said = train(
        fine, recipe.run_dir, *arguments, max_steps=1, learning_rate=1e-12, validate_every=1,
        checkpoint_every=1,
    )  # fmt: skip
    assert codes == [0], said
    (began,) = tracked(recipe.run_dir, "valid_loss").values()
    assert began == pytest.approx(tracked(six_steps, "valid_loss")[6], abs=1e-4)

    # To go on takes no base.
    digest = digest_of_export(export)
    export.rename(tmp_path / "moved")
    codes, said = train(fine, recipe.run_dir, *arguments, max_steps=2, learning_rate=1e-12)
    assert codes == [0], said
    checkpoints = list_checkpoints(recipe.checkpoints)
    assert [each.info.base for each in checkpoints] == [digest, digest]
    assert checkpoints[-1].info.training["init_from"] == str(export)
