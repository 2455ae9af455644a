"""Text in, text out: SentencePiece, beam search, SentencePiece."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from sentencepiece import SentencePieceProcessor

from data_prep.vocabulary import EOS_IDX, PAD_IDX, load_vocabularies
from models.config import ModelConfig
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.checkpoint import Checkpoint, CheckpointError, average_weights
from pipeline.config import EvaluationConfig, Recipe
from pipeline.search import batches, beam_search

log = logging.getLogger("translate")

Vocabularies = tuple[SentencePieceProcessor, SentencePieceProcessor]  # source, target


class Translator:
    """A model that translates sentences by beam search."""

    def __init__(
        self,
        model: TranslationModel,
        vocabularies: Vocabularies,
        search: EvaluationConfig,
    ) -> None:
        self.model, self.search = model.eval(), search
        self.source_vocabulary, self.target_vocabulary = vocabularies
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device, getattr(torch, search.dtype))

    @classmethod
    def of_run(cls, recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> Translator:
        """The average of checkpoints of `run_dir`."""
        model = untrained_model(recipe)
        use_ema = recipe.evaluation.use_ema
        model.load_state_dict(average_weights(checkpoints, use_ema=use_ema))
        return cls(model, load_vocabularies(recipe.run_dir / "shards"), recipe.evaluation)

    @classmethod
    def of_export(cls, folder: Path, **search: object) -> Translator:
        """A folder written by `./run.sh export`.

        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises CheckpointError: it is not one.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vocabularies = load_vocabularies(folder)
            model = _fresh_model(ModelConfig.model_validate(config["model"]), vocabularies)
            load_model(model, folder / "model.safetensors")
            evaluation = EvaluationConfig.model_validate({**config.get("evaluation", {}), **search})
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: not an exported model: {error}") from error
        return cls(model, vocabularies, evaluation)

    def translate(
        self, sentences: Sequence[str], progress: Callable[[int], None] = lambda count: None
    ) -> list[str]:
        """Translate sentences; an empty one gives an empty one.

        :param progress: called with the number of sentences just finished.
        """
        return [best[0][1] for best in self.n_best(sentences, progress)]

    def n_best(
        self, sentences: Sequence[str], progress: Callable[[int], None] = lambda count: None
    ) -> list[list[tuple[float, str]]]:
        """Up to beam_size (score, translation) of each sentence, best first."""
        found: list[list[tuple[float, str]]] = [[(0.0, "")] for _ in sentences]
        encoded = self._encode(sentences)
        progress(len(sentences) - len(encoded))
        for indices in batches({index: len(ids) for index, ids in encoded.items()}, self.search):
            batch = beam_search(self.model, [encoded[index] for index in indices], self.search)
            for index, hypotheses in zip(indices, batch, strict=True):
                texts = self.target_vocabulary.decode([h.tokens for h in hypotheses])
                # Byte fallback can spell a line break; one line in is one line out.
                found[index] = [
                    (h.score, " ".join(text.split()))
                    for h, text in zip(hypotheses, texts, strict=True)
                ]
            progress(len(indices))
        return found

    def _encode(self, sentences: Sequence[str]) -> dict[int, list[int]]:
        """Token ids of those that are not empty."""
        limit = self.model.max_source_seq_len
        encoded = {}
        for index, ids in enumerate(self.source_vocabulary.encode(list(sentences), add_eos=True)):
            if len(ids) > limit:
                log.warning("a sentence of %d tokens was cut to %d", len(ids), limit)
                ids = [*ids[: limit - 1], EOS_IDX]
            if len(ids) > 1:  # else only EOS
                encoded[index] = ids
        return encoded


def untrained_model(recipe: Recipe) -> TranslationModel:
    """The model as training starts with it."""
    torch.manual_seed(recipe.training.seed)
    return _fresh_model(recipe.model, load_vocabularies(recipe.run_dir / "shards"))


def _fresh_model(config: ModelConfig, vocabularies: Vocabularies) -> TranslationModel:
    source, target = vocabularies
    return create_model(config, (source.get_piece_size(), target.get_piece_size()), PAD_IDX)
