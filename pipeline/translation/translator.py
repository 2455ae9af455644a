"""Text in, text out: SentencePiece, beam search, SentencePiece; by any engine."""

# Functions import torch, and what reads runs and vocabularies, themselves: other engines
# need neither, and so start seconds sooner.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor

from data_prep.files import DataError
from models.config import ModelConfig
from models.export_format import ModelError, load_weights, read_settings
from pipeline.recipe import UsageError
from pipeline.translation.serving import (
    CTranslate2Translator,
    Hypothesis,
    PairIds,
    TextTranslator,
)
from pipeline.translation_recipe import SearchConfig, TranslationRecipe

if TYPE_CHECKING:
    from models.seq2seq import TranslationModel
    from pipeline.checkpoints.folder import Checkpoint

Vocabularies = tuple[SentencePieceProcessor, SentencePieceProcessor]  # source, target


class Translator(TextTranslator):
    """A PyTorch model that translates sentences by beam search, on a GPU if there is one."""

    search: SearchConfig

    def __init__(
        self,
        model: TranslationModel,
        vocabularies: Vocabularies,
        search: SearchConfig,
        max_source_tokens: int | None = None,
    ) -> None:
        """Move `model` to the GPU if there is one, and make ready to translate.

        :param max_source_tokens: longer lines are translated in parts; None: the most that the
            model can take.
        """
        import torch

        self.model = model.eval()
        self.max_target_tokens = model.max_target_seq_len
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device, getattr(torch, search.dtype))
        longest = min(max_source_tokens or model.max_source_seq_len, model.max_source_seq_len)
        super().__init__(vocabularies, search, longest, f"PyTorch {search.dtype} on {device}")

    @classmethod
    def of_run(cls, recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> Translator:
        """Return a translator with the average of checkpoints of `run_dir`.

        :raises CheckpointError: a checkpoint is damaged, or has no moving average.
        """
        from data_prep.vocabulary import load_vocabularies
        from pipeline.translation.run_model import model_of_run

        model, vocabularies = model_of_run(recipe, checkpoints), load_vocabularies(recipe.shards)
        return cls(model, vocabularies, recipe.evaluation, recipe.data.max_tokens_per_side)

    @classmethod
    def of_export(cls, folder: Path, **search: object) -> TextTranslator:
        """Return a translator with the model in a folder that `./run.sh export` wrote.

        :param folder: in any format.
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: the folder is not an exported model.
        :raises UsageError: `evaluation.dtype` was given for a model that has its own.
        """
        settings = read_settings(folder)
        if settings.format != "safetensors":
            if "dtype" in search:
                raise UsageError(
                    f"evaluation.dtype is for PyTorch; an export in format {settings.format} "
                    "computes in what `export --quantization` gave it"
                )
            if settings.format == "ctranslate2":
                return CTranslate2Translator(folder, **search)
            from pipeline.translation.onnx_translator import OnnxTranslator

            return OnnxTranslator(folder, **search)
        from safetensors import SafetensorError

        from data_prep.vocabulary import load_vocabularies
        from pipeline.translation.run_model import model_for

        try:
            vocabularies = load_vocabularies(folder)
            model = model_for(ModelConfig.model_validate(settings.model), vocabularies)
            load_weights(model, folder)
            evaluation = SearchConfig.model_validate({**(settings.evaluation or {}), **search})
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, DataError) as error:
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        return cls(model, vocabularies, evaluation, settings.max_source_tokens)

    def search_batches(
        self, batches: Iterable[list[list[int]]]
    ) -> Iterator[list[list[Hypothesis]]]:
        """Translate one batch after the other; see `TextTranslator`."""
        from pipeline.translation.beam_search import beam_search

        for sources in batches:
            yield beam_search(self.model, sources, self.search)

    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[list[list[float]]]:
        """Score one batch after the other; see `TextTranslator`."""
        from pipeline.translation.beam_search import force

        for pairs in batches:
            yield force(self.model, pairs)
