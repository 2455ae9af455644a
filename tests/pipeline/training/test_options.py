"""Training does what a recipe can ask for: BLEU, early stopping, averages, warm starts …"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.text import PAD_IDX
from models.factory import abstract_model, create_model
from pipeline.checkpoints.folder import list_checkpoints
from pipeline.checkpoints.weights import load_average, load_weights
from pipeline.evaluation.evaluator import evaluate
from pipeline.publishing.exports import export
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.ranks import new_run, options, tracked, train

pytestmark = pytest.mark.slow


def steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints that were kept."""
    return [checkpoint.step for checkpoint in list_checkpoints(run_dir / "checkpoints")]


def test_validation_bleu_on_two_ranks_is_that_of_evaluation(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    """Evaluation has the same sentences here: the validation set is the test set too. One of them
    is so long that both translate it in parts."""
    run_dir = new_run(prepared, "bleu", "clean")
    for language in ("de", "en"):
        text = run_dir / "clean" / f"valid.{language}"
        text.write_text(text.read_text() + " ".join(text.read_text().split()[:90]) + "\n")
        shutil.copy(text, run_dir / "clean" / f"test.{language}")
    (run_dir / "clean" / "manifest.json").unlink()  # as if these texts had been prepared
    settings = {"bleu_every": 40, "validate_every": 20, "max_steps": 80, "keep_checkpoints": 1}
    codes, said = train(
        tiny_recipe, run_dir, "--deepspeed_config", ROOT / "ds_configs" / "zero3.json",
        ranks=2, learning_rate=2e-2, checkpoint_every=1000, **settings,
    )  # fmt: skip
    assert codes == [0, 0], said
    counts = abstract_model(prepared.model, (300, 300)).parameter_counts
    assert f"train: ringformer, {counts.core:,} core parameters" in said  # of all ranks' parts
    found = tracked(run_dir, "valid_bleu")
    assert list(found) == [40, 80]
    assert sorted(tracked(run_dir, "valid_loss")) == [20, 40, 60, 80]
    best = max(found, key=lambda step: found[step])
    assert (run_dir / "checkpoints" / "best").read_text() == f"step-{best:08d}"
    assert steps(run_dir) == sorted({best, 80})
    keys = {"run_dir": str(run_dir), "evaluation.untrained_baseline": "false"}
    evaluation = evaluate(load_recipe(tiny_recipe, list(keys.items())))
    assert evaluation.validation is not None
    for result in (*evaluation.results, evaluation.validation):
        assert result.scores["step"] == 80
        assert result.scores["bleu"] == found[80]
    codes, said = train(
        tiny_recipe, run_dir, "--evaluation.beam_size", 1, learning_rate=2e-2,
        checkpoint_every=1000, **{**settings, "max_steps": 81},
    )  # fmt: skip
    assert codes == [0], said
    assert said.count("looked for anew: valid_bleu is found by other keys of `evaluation`") == 1


def test_early_stopping_keeps_the_best(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    """The learning rate is one that makes the model worse after the first steps."""
    run_dir = new_run(prepared, "early", "clean")
    settings = {
        "learning_rate": 0.5, "warmup_steps": 0, "schedule": "inverse_sqrt", "early_stopping": 2,
        "validate_every": 1, "checkpoint_every": 1000, "keep_checkpoints": 1, "max_steps": 1000,
    }  # fmt: skip
    codes, said = train(tiny_recipe, run_dir, **settings)
    assert codes == [0], said
    losses = tracked(run_dir, "valid_loss")
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 2 < 1000
    assert f"early stopping at step {last}: step {best} was the best" in said
    assert steps(run_dir) == [best, last]
    assert (run_dir / "checkpoints" / "best").read_text() == f"step-{best:08d}"
    codes, said = train(tiny_recipe, run_dir, **settings)  # nothing left to do
    assert codes == [0]
    assert "early stopping: no better model in 2 validations" in said
    codes, said = train(tiny_recipe, run_dir, **{**settings, "early_stopping": 3})
    assert codes == [0], said
    assert f"resumed from {run_dir}/checkpoints/step-{last:08d}" in said


def test_epochs_end_training(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    run_dir = new_run(prepared, "epochs", "clean")
    codes, said = train(tiny_recipe, run_dir, max_epochs=1.5, max_steps=1000, log_every=1)
    assert codes == [0], said
    epochs = tracked(run_dir, "epoch")
    assert epochs[max(epochs)] >= 1.5 > epochs[max(epochs) - 1]
    rates = tracked(run_dir, "learning_rate")
    assert rates[max(rates)] < 0.05 * max(rates.values())  # the schedule ends there, too
    codes, said = train(tiny_recipe, run_dir, max_epochs=1.5, max_steps=1000)
    assert codes == [0]
    assert "finished" in said


def test_frozen_parameters_stay(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    """They stay through checkpoints and changes of the ZeRO stage, too."""
    run_dir = new_run(prepared, "frozen", "clean")
    for number, stage in enumerate(["zero0", "zero1", "zero3", "zero0"], start=1):
        config = ROOT / "ds_configs" / f"{stage}.json"
        codes, said = train(
            tiny_recipe, run_dir, "--deepspeed_config", config, "--model.tied_embeddings", "false",
            freeze="[encoder_frontend, encoder.ffn]", max_steps=2 * number, checkpoint_every=1,
        )  # fmt: skip
        assert codes == [0], said
    first, last = (load_weights(list_checkpoints(run_dir / "checkpoints")[i]) for i in (0, -1))
    for name in (name for name in last if "pos_encoder" not in name):  # never trained
        tensor, frozen = last[name], name.startswith(("encoder_frontend", "encoder.ffn"))
        assert torch.equal(tensor, first[name]) == frozen, name


def test_a_parameter_to_freeze_that_is_not_there(
    prepared: TranslationRecipe, tiny_recipe: Path
) -> None:
    run_dir = new_run(prepared, "not-there", "clean")
    codes, said = train(tiny_recipe, run_dir, freeze="[encodr]")
    assert codes == [2]
    assert "no parameter's name begins with 'encodr'; they are encoder_frontend.embed" in said


def test_a_warm_start_and_a_moving_average(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    """The average is what the formula gives; an export of it begins another run."""
    run_dir = new_run(prepared, "ema", "clean")
    settings = {"ema_decay": 0.9, "checkpoint_every": 1, "max_steps": 3, "keep_checkpoints": 9}
    codes, said = train(tiny_recipe, run_dir, **settings)
    assert codes == [0], said
    _, two, three = list_checkpoints(run_dir / "checkpoints")
    averages = {name: load_average(three)[name] for name, _ in model_parameters(tiny_recipe)}
    for name, average in averages.items():
        before, weight = load_average(two)[name], load_weights(three)[name]
        expected = before + (1 - 4 / 13) * (weight - before)  # (1 + n) / (10 + n), n = 3
        torch.testing.assert_close(average, expected)
    shutil.rmtree(three.folder)
    codes, said = train(tiny_recipe, run_dir, **settings)
    assert codes == [0], said
    again = load_average(list_checkpoints(run_dir / "checkpoints")[-1])
    for name, average in averages.items():
        assert torch.equal(again[name], average), name

    keys = {"run_dir": str(run_dir), "training.ema_decay": "0.9", "evaluation.use_ema": "true"}
    exported = run_dir / "export"
    export(load_recipe(tiny_recipe, list(keys.items())), exported)
    warm = new_run(prepared, "warm", "clean")
    codes, said = train(
        tiny_recipe, warm, init_from=exported, learning_rate=1e-12, max_steps=1, checkpoint_every=1
    )
    assert codes == [0], said
    for name, tensor in load_weights(list_checkpoints(warm / "checkpoints")[0]).items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=1e-6)


def model_parameters(recipe: Path) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters of a fresh model, by name."""
    model = create_model(load_recipe(recipe).model, (300, 300), PAD_IDX)
    return list(model.named_parameters())


def test_a_warm_start_from_no_export(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path, command: Command
) -> None:
    """It is told before the launcher starts."""
    run_dir = new_run(prepared, "misfit", "clean")
    given = options(tiny_recipe, run_dir, init_from=tmp_path)
    done = command("pipeline.train", "--steps_left", *given)
    assert done.returncode == 1
    assert f"training.init_from: {tmp_path}: not an exported model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_warm_start_from_what_cannot_be_trained(
    prepared: TranslationRecipe, tiny_recipe: Path, ctranslate2_folder: Path
) -> None:
    run_dir = new_run(prepared, "folded", "clean")
    codes, said = train(tiny_recipe, run_dir, init_from=ctranslate2_folder)
    assert codes == [1]
    assert f"{ctranslate2_folder} is in format ctranslate2" in said
    assert "export --format safetensors" in said
    assert "Traceback" not in said


def test_adam_decays_through_the_gradient(prepared: TranslationRecipe, tiny_recipe: Path) -> None:
    """In its first step Adam moves every weight by the learning rate, whatever the decay, which
    turns some round; AdamW moves it further. A resumed run takes the optimizer that the recipe
    names now."""
    after = {}
    for optimizer in ("adam", "adamw"):
        run_dir = new_run(prepared, f"{optimizer}-0.1", "clean")
        settings = {
            "optimizer": optimizer, "weight_decay": 0.1, "learning_rate": 0.1,
            "max_steps": 1, "warmup_steps": 0, "schedule": "inverse_sqrt",
        }  # fmt: skip
        codes, said = train(tiny_recipe, run_dir, **settings)
        assert codes == [0], said
        weights = load_weights(list_checkpoints(run_dir / "checkpoints")[0])
        after[optimizer] = weights["decoder.self_attn_layer_norm"][:, 0]  # before, they were 1
    adam, adamw = after.values()
    step = torch.full_like(adam, 0.1)
    torch.testing.assert_close((adam - 1).abs(), step)
    torch.testing.assert_close((adamw - (1 - 0.1 * 0.1)).abs(), step)
    assert ((adam > 1) != (adamw > 1)).any()
    losses = []
    for optimizer in ("adam", "adamw"):  # both go on from AdamW
        run_dir = new_run(prepared, f"adamw-then-{optimizer}", "clean")
        shutil.copytree(
            run_dir.with_name("adamw-0.1") / "checkpoints",
            run_dir / "checkpoints",
        )
        codes, said = train(
            tiny_recipe, run_dir, **{**settings, "optimizer": optimizer, "max_steps": 3}
        )
        assert codes == [0], said
        losses.append(tracked(run_dir, "valid_loss")[3])
    assert losses[0] != losses[1]
