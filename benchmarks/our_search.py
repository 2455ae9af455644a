"""Models with random weights, random sentences, and our beam search, to measure decoding with.

`decode.py` sets other systems beside it.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.train_step import config_of
from data_prep.text import EOS_IDX, PAD_IDX
from models.config import Architecture
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.translation.beam_search import beam_search
from pipeline.translation.serving import Part, batches_by_length
from pipeline.translation_recipe import TranslationEvaluation

VOCAB = 32000


def model_of(
    architecture: Architecture, dim: int, vocab_size: int = VOCAB, num_levels: int = 6
) -> TranslationModel:
    """Return a model with random weights, which never ends a translation itself."""
    config = config_of(dim, architecture=architecture, num_levels=num_levels, tied_embeddings=False)
    model = create_model(config, (vocab_size, vocab_size), PAD_IDX).eval()
    assert model.final_proj.bias is not None
    with torch.no_grad():
        model.final_proj.bias[EOS_IDX] = -1e4
    return model


def search_to_source_length(beam_size: int, **more: int) -> TranslationEvaluation:
    """Return a search whose translations have as many tokens as their sources, with EOS.

    :param more: other keys of `evaluation`.
    """
    return TranslationEvaluation(
        beam_size=beam_size, max_length_ratio=1.0, max_length_offset=0, **more
    )


def run_our_search(
    model: TranslationModel, sentences: list[list[int]], search: TranslationEvaluation
) -> None:
    """Run our beam search, and check that it ends where it must.

    :param search: of `search_to_source_length`.
    """
    lengths = {index: len(ids) for index, ids in enumerate(sentences)}
    for batch in batches_by_length(lengths, search):
        found = beam_search([model], [Part(sentences[index]) for index in batch], search)
        assert all(len(best[0].tokens) == lengths[i] for i, best in zip(batch, found, strict=True))


def random_sentences(count: int, vocab_size: int = VOCAB) -> list[list[int]]:
    """Return random token ids; lengths are log-normal, as in newswire."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(3.1, 0.5, count)).clip(5, 80).astype(int)
    if count == 1:
        lengths[0] = 25
    return [generator.integers(4, vocab_size, length).tolist() for length in lengths]
