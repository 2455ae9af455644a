"""An exported model: a folder that needs nothing else of the run."""

# Functions import torch and what needs it themselves: that takes seconds, and a wrong argument is
# told before, as is that an export is up to date.

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import alone, sha256_of, write_atomically
from data_prep.identity import check_corpora
from data_prep.shards import ShardReader
from data_prep.stage import run_stage
from data_prep.text import BOS_IDX, EOS_IDX, SOURCE_WORDS, UNK_IDX, vocabulary_files
from data_prep.vocabulary import load_vocabularies
from models.config import EXPRESSIBLE, ModelConfig
from models.export_format import (
    SHORTLISTS,
    ClassifierSettings,
    ExportSettings,
    Format,
    Quantization,
    write_settings,
    write_weights,
)
from pipeline.checkpoints.folder import Checkpoint
from pipeline.evaluation.result import digest_of_weights
from pipeline.publishing.shortlist import (
    LARGE_VOCABULARY,
    coverage,
    has_large_vocabulary,
    make_shortlist,
    wants_shortlist,
)
from pipeline.recipe import Recipe, UsageError
from pipeline.translation.run_model import checkpoints_of_run, model_of_run
from pipeline.translation.serving import tokens_of
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from models.seq2seq import TranslationModel

log = logging.getLogger("export")

VERSION = 3  # raise it when the same weights would give other files
ONNX_FROM_WIDTH = 384


def export(
    recipe: TranslationRecipe,
    folder: Path,
    format: Format = "safetensors",
    quantization: Quantization | None = None,
    checkpoints: Sequence[Checkpoint] | None = None,
) -> None:
    """Bring an exported model up to date.

    The folder holds the averaged weights, in float32 (equal tensors once) or quantized; the
    vocabulary; export.json with architecture, search settings and languages; the model card; and
    a lexical shortlist, where that pays and `evaluation.shortlist` wants one.

    :param folder: to write.
    :param checkpoints: to average; by default those that `evaluation` names.
    :raises CheckpointError: the run has no checkpoint.
    :raises UsageError: the format cannot hold such a model.
    """
    from pipeline.publishing.model_card import model_card

    _refuse_impossible(recipe, format, quantization)
    check_corpora(recipe.data, recipe.run_dir)  # the card says what the model has learnt from
    checkpoints = checkpoints or checkpoints_of_run(recipe)
    card = model_card(recipe, checkpoints)
    settings = ExportSettings(
        format=format,
        quantization=quantization,
        model=recipe.evaluated_model,
        evaluation=recipe.evaluation.search,
        max_source_tokens=min(recipe.data.max_tokens_per_side, recipe.model.max_seq_len),
        source_lang=recipe.data.source_lang,
        target_lang=recipe.data.target_lang,
        shortlist=wants_shortlist(recipe, format) and has_large_vocabulary(recipe.shards),
    )

    words = recipe.shards / SOURCE_WORDS

    def write(partial: Path) -> dict[str, Any]:
        model = model_of_run(recipe, checkpoints)
        if format != "huggingface":  # which has names of its own
            for path in vocabulary_files(recipe.shards):
                shutil.copyfile(path, partial / path.name)
            if words.is_file():
                shutil.copyfile(words, partial / words.name)
        if format == "ctranslate2":
            _write_ctranslate2(model, partial, quantization)
        elif format == "huggingface":
            from pipeline.publishing.huggingface import write_huggingface

            write_huggingface(model, recipe.shards, settings, recipe.evaluation, partial)
        elif format == "onnx":
            from models.onnx_graph import write_onnx

            write_onnx(model, partial, quantization, shortlist=settings.shortlist)
        else:
            write_weights(model, partial)
        made: dict[str, Any] = {"parameters": model.parameter_counts.total}
        if settings.shortlist:
            made["shortlist"] = _write_shortlist(recipe, format, partial)
        elif wants_shortlist(recipe, format):
            log.info("no shortlist: below %d target tokens it gains little", LARGE_VOCABULARY)
        return made

    more = {"words": sha256_of(words)} if words.is_file() else {}
    write_export(recipe, checkpoints, folder, settings, card, write, more)


def write_export(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    folder: Path,
    settings: ExportSettings | ClassifierSettings,
    card: str,
    write: Callable[[Path], Mapping[str, Any]],
    more: Mapping[str, str] | None = None,
) -> None:
    """Bring the folder of an exported model of any task up to date; see `run_stage`.

    :param write: writes the model, and returns what to record about it.
    :param more: what it depends on besides weights, settings and card.
    :raises DataError: another export is at work there.
    """

    def build(partial: Path) -> Mapping[str, Any]:
        made = write(partial)
        write_settings(partial, settings)
        write_atomically(partial / "README.md", card)
        return made

    inputs = {
        "version": VERSION,
        **settings.model_dump(mode="json"),
        "weights": digest_of_weights(recipe, checkpoints),
        "card": card,
        **(more or {}),
    }
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with alone(lock, f"{folder}: another export is at work here", "--output"):
        run_stage(folder, inputs, build, log, stage="export", sealed=("*",))


def serving_format(model: ModelConfig) -> Format:
    """Return the format that serves a model best where sentences come one at a time: ONNX Runtime
    is quicker with each product, CTranslate2 with what is between them (docs/design.md)."""
    if model.architecture not in EXPRESSIBLE:
        return "safetensors"
    return "onnx" if model.model_dim >= ONNX_FROM_WIDTH else "ctranslate2"


def _refuse_impossible(
    recipe: TranslationRecipe, format: Format, quantization: Quantization | None
) -> None:
    """Check that the format can hold the recipe's model, and can be quantized so.

    :raises UsageError: it cannot.
    """
    architecture = recipe.model.architecture
    if quantization and format in ("safetensors", "huggingface"):
        raise UsageError(
            f"--quantization {quantization} needs --format ctranslate2 or --format onnx"
        )
    if format != "safetensors" and architecture not in EXPRESSIBLE:
        raise UsageError(
            f"--format {format}: model.architecture {architecture} is not a "
            "standard Transformer; --format safetensors takes it"
        )


def _write_shortlist(recipe: TranslationRecipe, format: Format, folder: Path) -> dict[str, float]:
    """Write a shortlist made from the training pairs.

    :returns: what the manifest says of it.
    """
    shortlist = make_shortlist(recipe.shards)
    source, target = map(tokens_of, load_vocabularies(recipe.shards))
    text = format == "ctranslate2"
    content = shortlist.to_text(source, target) if text else shortlist.to_bytes()
    write_atomically(folder / SHORTLISTS[format], content)
    found = coverage(shortlist, ShardReader(recipe.shards, "valid"))
    log.info(
        "shortlist: a sentence of %s has %.0f of %d target tokens, %.2f%% of those of its "
        "translation among them",
        recipe.data.valid.name,
        found.size,
        len(target),
        100 * found.covered,
    )
    return found._asdict()


def _write_ctranslate2(
    model: TranslationModel, folder: Path, quantization: Quantization | None
) -> None:
    """Write model.bin, CTranslate2's own config.json, and its vocabularies.

    :param folder: to write to; it holds the SentencePiece models.
    """
    from models.ctranslate2_spec import ctranslate2_spec

    # In float32 the bytes would depend on the order of additions, which is not ours to choose.
    spec = ctranslate2_spec(model.double())
    source, target = map(tokens_of, load_vocabularies(folder))
    # By these it looks for their ids, on both sides; a vocabulary may spell them in its own way.
    source[UNK_IDX], source[EOS_IDX] = target[UNK_IDX], target[EOS_IDX]
    spec.config.unk_token, spec.config.eos_token = target[UNK_IDX], target[EOS_IDX]
    spec.config.bos_token = spec.config.decoder_start_token = target[BOS_IDX]
    spec.register_source_vocabulary(source)
    spec.register_target_vocabulary(target)
    spec.validate()
    spec.optimize(quantization)
    spec.save(str(folder))
