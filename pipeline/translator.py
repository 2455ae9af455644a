"""Text in, text out: SentencePiece, beam search, SentencePiece."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from fairseq2.data.tokenizers import VocabularyInfo
from fairseq2.generation.beam_search import BeamSearchSeq2SeqGenerator
from fairseq2.nn import BatchLayout
from safetensors import SafetensorError
from safetensors.torch import load_model
from sentencepiece import SentencePieceProcessor

from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX, UNK_IDX, load_vocabulary
from models.config import ModelConfig
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.checkpoint import CheckpointError, average_weights, checkpoints_to_average
from pipeline.config import EvaluationConfig, Recipe

log = logging.getLogger("translate")


class Translator:
    """A model that translates sentences by beam search.

    A batch holds sources of one length only: no padding, and what comes out for a sentence does
    not depend on its neighbours.
    """

    def __init__(
        self,
        model: TranslationModel,
        vocabulary: SentencePieceProcessor,
        search: EvaluationConfig,
    ) -> None:
        self.model, self.vocabulary, self.search = model, vocabulary, search
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)
        size = vocabulary.get_piece_size()
        self._generate = BeamSearchSeq2SeqGenerator(
            model,
            VocabularyInfo(size, UNK_IDX, BOS_IDX, EOS_IDX, PAD_IDX),
            beam_size=search.beam_size,
            max_gen_len=(search.max_length_ratio, search.max_length_offset),
            len_penalty=search.length_penalty,
        )

    @classmethod
    def of_run(cls, recipe: Recipe) -> Translator:
        """The average of the newest checkpoints of `run_dir`.

        :raises CheckpointError: there is none, or it belongs to another vocabulary or model.
        """
        vocabulary_path = recipe.run_dir / "shards" / "spm.model"
        model = untrained_model(recipe)
        model.load_state_dict(average_weights(checkpoints_to_average(recipe)))
        return cls(model, load_vocabulary(vocabulary_path), recipe.evaluation)

    @classmethod
    def of_export(cls, folder: Path, **search: object) -> Translator:
        """A folder written by `./run.sh export`.

        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises CheckpointError: it is not one.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vocabulary = load_vocabulary(folder / "spm.model")
            size = vocabulary.get_piece_size()
            model = create_model(ModelConfig.model_validate(config["model"]), size, PAD_IDX)
            load_model(model, folder / "model.safetensors")
            evaluation = EvaluationConfig.model_validate({**config["evaluation"], **search})
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: not an exported model: {error}") from error
        return cls(model, vocabulary, evaluation)

    def translate(
        self, sentences: Sequence[str], progress: Callable[[int], None] = lambda count: None
    ) -> list[str]:
        """Translate sentences; an empty one gives an empty one.

        :param progress: called with the number of sentences just finished.
        """
        encoded = self.vocabulary.encode(list(sentences), add_eos=True)
        limit = self.model.max_source_seq_len
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(encoded):
            if len(ids) > limit:
                log.warning("a sentence of %d tokens was cut to %d", len(ids), limit)
                encoded[index] = [*ids[: limit - 1], EOS_IDX]
            if sentences[index].strip():
                by_length[len(encoded[index])].append(index)
        translations = [""] * len(sentences)
        for indices in self._batches(by_length):
            decoded = self._decode([encoded[index] for index in indices])
            for index, text in zip(indices, decoded, strict=True):
                translations[index] = text
            progress(len(indices))
        progress(len(sentences) - sum(map(len, by_length.values())))
        return translations

    def _batches(self, by_length: dict[int, list[int]]) -> Iterator[list[int]]:
        for length, indices in sorted(by_length.items(), reverse=True):
            size = max(1, self.search.batch_tokens // (length * self.search.beam_size))
            for begin in range(0, len(indices), size):
                yield indices[begin : begin + size]

    def _decode(self, batch: list[list[int]]) -> list[str]:
        """Best hypotheses of sources of equal length."""
        source = torch.tensor(batch, device=self.device)
        prompt = torch.full((len(batch), 1), BOS_IDX, device=self.device)
        output = self._generate(source, BatchLayout.of(source), prompt, BatchLayout.of(prompt))
        best = [hypotheses[0].seq.tolist() for hypotheses in output.hypotheses]
        # Byte fallback can spell a line break; one line in is one line out.
        return [" ".join(text.split()) for text in self.vocabulary.decode(best)]


def untrained_model(recipe: Recipe) -> TranslationModel:
    """The model as training starts with it."""
    vocabulary = load_vocabulary(recipe.run_dir / "shards" / "spm.model")
    torch.manual_seed(recipe.training.seed)
    return create_model(recipe.model, vocabulary.get_piece_size(), PAD_IDX)
