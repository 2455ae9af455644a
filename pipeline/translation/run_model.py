"""The model of a run: untrained, as training starts with it, or with the weights of checkpoints."""

# Functions import torch and what needs it themselves: that takes seconds, and choosing checkpoints
# needs none of it.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from data_prep.files import digest_of
from data_prep.shards import read_shards_manifest
from data_prep.text import PAD_IDX
from data_prep.vocabulary import load_vocabularies, vocabulary_digest
from models.config import ModelConfig
from models.export_format import ExportSettings, ModelError, read_settings
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.weights import average_weights, fitting_checkpoints
from pipeline.recipe import UsageError
from pipeline.training.initial_weights import check_initial_weights, load_initial_weights
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from models.seq2seq import TranslationModel


def model_identity(recipe: TranslationRecipe) -> dict[str, Any]:
    """Return what a model's weights are bound to, as JSON values: its shape, the vocabulary, and
    the pairs that it has learnt from.

    :raises DataError: there are no prepared data.
    """
    data = read_shards_manifest(recipe.shards)
    return {
        "model": recipe.model.model_dump(mode="json"),
        "vocabulary": vocabulary_digest(recipe.shards),
        "data": digest_of([shard.sha256 for shard in data.of_split("train")]),
    }


def checkpoints_of_run(recipe: TranslationRecipe) -> list[Checkpoint]:
    """Return the checkpoints of `run_dir` that evaluation averages, oldest first.

    :raises CheckpointError: there is none, or one belongs to another vocabulary, model or data.
    :raises DataError: the data were not prepared as the recipe says.
    """
    checkpoints = fitting_checkpoints(recipe, model_identity)
    for checkpoint in checkpoints:
        check_decoder_levels(recipe, trained_with=checkpoint.info.training)
    return checkpoints


def check_decoder_levels(recipe: TranslationRecipe, trained_with: Mapping[str, Any]) -> None:
    """Check that a model can run as few levels of its decoder as `evaluation` says.

    :param trained_with: a recipe's `training` section.
    :raises UsageError: it was not trained to.
    """
    wanted, all_of_them = recipe.evaluated_model.decoder_levels, recipe.model.decoder_levels
    if wanted < all_of_them and not trained_with.get("random_depth"):
        raise UsageError(
            f"evaluation.decoder_levels ({wanted}) is less than model.decoder_levels "
            f"({all_of_them}): only a model trained with training.random_depth can do that"
        )


def untrained_model(recipe: TranslationRecipe) -> TranslationModel:
    """Return the model with the weights that training starts with.

    :raises CheckpointError: `training.init_from` does not fit.
    """
    import torch

    torch.manual_seed(recipe.training.seed)
    model = model_for(recipe.model, load_vocabularies(recipe.shards))
    if recipe.training.init_from:
        check_base(recipe, recipe.training.init_from)
        load_initial_weights(model, recipe.training.init_from)
    return model


def check_base(recipe: TranslationRecipe, folder: Path) -> None:
    """Compare an export with the run that starts from its weights.

    :raises CheckpointError: it has another vocabulary than the shards, or is of another model.
    """

    def read() -> ExportSettings:
        settings = read_settings(folder)
        if vocabulary_digest(folder) != vocabulary_digest(recipe.shards):
            raise ModelError(
                f"{folder} has another vocabulary than {recipe.shards}; prepare them with its own: "
                f"data.vocabulary.from: {folder}"
            )
        return settings

    check_initial_weights(folder, read, recipe.model)


def model_for(
    config: ModelConfig, vocabularies: tuple[SentencePieceProcessor, SentencePieceProcessor]
) -> TranslationModel:
    """Return a freshly initialised model for source and target vocabulary."""
    from models.factory import create_model

    source, target = vocabularies
    return create_model(config, (source.get_piece_size(), target.get_piece_size()), PAD_IDX)


def model_of_run(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> TranslationModel:
    """Return the model with the average of the checkpoints' weights, or of their moving averages;
    of its decoder as many levels as `evaluation` says.

    :raises CheckpointError: a checkpoint is damaged, or has no moving average.
    """
    weights = average_weights(checkpoints, use_ema=recipe.evaluation.use_ema)
    model = model_for(recipe.evaluated_model, load_vocabularies(recipe.shards))
    load_first_levels(model, weights)
    return model


def load_first_levels(model: TranslationModel, weights: dict[str, Tensor]) -> None:
    """Load the weights of a model whose decoder may have more levels."""
    for name, own in model.state_dict().items():
        weights[name] = weights[name][: len(own)]  # a level's own are in the first dimension
    model.load_state_dict(weights)
