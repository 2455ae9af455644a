"""Text in, text out: SentencePiece, beam search, SentencePiece; by any engine."""

# Functions import torch, and what reads recipes, runs and vocabularies, themselves: other engines
# need none of it, and so start seconds sooner, where it is not installed, too.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from sentencepiece import SentencePieceProcessor

from data_prep.text import seen_words
from models.export_format import ModelError, load_weights, read_ensemble
from models.search_config import SearchConfig
from pipeline.translation.serving import Hypothesis, PairIds, Part, TextTranslator

if TYPE_CHECKING:
    from models.seq2seq import TranslationModel
    from pipeline.checkpoints.folder import Checkpoint
    from pipeline.translation_recipe import TranslationRecipe

Vocabularies = tuple[SentencePieceProcessor, SentencePieceProcessor]  # source, target


class Translator(TextTranslator):
    """A PyTorch model that translates sentences by beam search, on a GPU if there is one."""

    search: SearchConfig

    def __init__(
        self,
        models: Sequence[TranslationModel],
        vocabularies: Vocabularies,
        search: SearchConfig,
        max_source_tokens: int | None = None,
    ) -> None:
        """Move models to the GPU if there is one, and make ready to translate.

        :param models: of the same vocabularies; several are an ensemble.
        :param max_source_tokens: longer lines are translated in parts; None: the most that the
            models can take.
        """
        import torch

        self.models = models
        self._lock = Lock()  # a model keeps folded weights, and one batch takes all cores
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for each in self.models:
            each.eval().to(device, getattr(torch, search.dtype))
        self.max_target_tokens = min(each.max_target_seq_len for each in self.models)
        longest = min(max_source_tokens or self.max_target_tokens, self.max_target_tokens)
        backend = f"PyTorch {search.dtype} on {device}"
        if len(models) > 1:
            backend += f", an ensemble of {len(models)}"
        super().__init__(vocabularies, search, longest, backend)

    @classmethod
    def of_run(cls, recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> Translator:
        """Return a translator with the average of checkpoints of `run_dir`.

        :raises CheckpointError: a checkpoint is damaged, or has no moving average.
        """
        from data_prep.vocabulary import load_vocabularies
        from pipeline.translation.run_model import model_of_run

        model, vocabularies = model_of_run(recipe, checkpoints), load_vocabularies(recipe.shards)
        made = cls([model], vocabularies, recipe.evaluation, recipe.data.max_tokens_per_side)
        made.seen_words = seen_words(recipe.shards)
        return made

    @classmethod
    def of_exports(cls, folders: Sequence[Path], **search: object) -> Translator:
        """Return a translator with the models in folders, an ensemble if they are several.

        :param folders: in format safetensors, with the same vocabularies.
        :param search: `evaluation` keys that differ from what the first model was exported with.
        :raises ModelError: a folder is not an exported model, or does not fit the first one.
        :raises TypeError: there is no such key.
        :raises ValueError: a key cannot have this value.
        """
        from safetensors import SafetensorError

        from data_prep.files import DataError
        from data_prep.vocabulary import load_vocabularies, vocabulary_digest
        from pipeline.translation.run_model import model_for

        models, longest, exports = [], [], read_ensemble(folders)
        evaluation = (exports[0].evaluation or SearchConfig()).replaced(search)
        for folder, settings in zip(folders, exports, strict=True):
            try:
                if vocabulary_digest(folder) != vocabulary_digest(folders[0]):
                    raise ModelError(f"{folder} has another vocabulary than {folders[0]}")
                vocabularies = load_vocabularies(folder)
                model = model_for(settings.model, vocabularies)
                load_weights(model, folder)
            except (
                OSError, KeyError, ValueError, RuntimeError, SafetensorError, DataError,
            ) as error:  # fmt: skip
                raise ModelError(f"{folder}: not an exported model: {error}") from error
            models.append(model)
            longest.append(settings.max_source_tokens or model.max_source_seq_len)
        made = cls(models, vocabularies, evaluation, min(longest))
        made.seen_words = seen_words(folders[0])
        return made

    def search_batches(self, batches: Iterable[list[Part]]) -> Iterator[list[list[Hypothesis]]]:
        """Translate one batch after the other; see `TextTranslator`."""
        from pipeline.translation.beam_search import beam_search

        for parts in batches:
            with self._lock:
                found = beam_search(self.models, parts, self.search)
            yield found

    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[list[list[float]]]:
        """Score one batch after the other; see `TextTranslator`."""
        from pipeline.translation.beam_search import force

        for pairs in batches:
            with self._lock:
                log_probs = force(self.models, pairs)
            yield log_probs


def load_exports(*folders: Path, threads: int | None = None, **search: object) -> TextTranslator:
    """Return a translator with the model in a folder that `./run.sh export` wrote, by the engine of
    its format.

    :param folders: in any format but huggingface; several, which must be in format safetensors, are
        an ensemble.
    :param threads: of other engines than PyTorch, which has its own; None: see `thread_count`.
    :param search: `evaluation` keys that differ from what the first model was exported with.
    :raises ModelError: a folder is not an exported model, two do not go together, or
        `evaluation.dtype` was given for a model that has its own.
    :raises TypeError: there is no such key.
    :raises ValueError: a key cannot have this value.
    """
    form = read_ensemble(folders)[0].format
    if form == "safetensors":
        return Translator.of_exports(folders, **search)
    if "dtype" in search:
        raise ModelError(
            f"evaluation.dtype is for PyTorch; an export in format {form} computes in what "
            "`export --quantization` gave it"
        )
    (folder,) = folders
    if form == "ctranslate2":
        from pipeline.translation.ctranslate2_translator import CTranslate2Translator

        return CTranslate2Translator(folder, threads, **search)
    from pipeline.translation.onnx_translator import OnnxTranslator

    return OnnxTranslator(folder, threads, **search)
