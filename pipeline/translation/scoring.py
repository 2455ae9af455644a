"""Forced decoding: how likely a model finds translations that it is given, by any engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from data_prep.text import normalise
from models.export_format import ModelError
from pipeline.translation.serving import DIVERGED, TextTranslator, batches_by_length

log = logging.getLogger("score")


class Pair(NamedTuple):
    """A sentence and a translation of it."""

    source: str
    target: str


class Forced(NamedTuple):
    """A model has been led through a translation."""

    tokens: list[str]
    """As text, with EOS."""

    log_probs: list[float]
    """Of each token, given the source and the tokens before it (natural logarithm)."""

    @property
    def log_prob(self) -> float:
        """Return the log-probability of the translation: the sum."""
        return math.fsum(self.log_probs)

    def score(self, length_penalty: float) -> float:
        """Return what a search compares: log-probability ÷ number of tokens to that power."""
        return self.log_prob / math.pow(len(self.tokens), length_penalty)


def force(
    translator: TextTranslator,
    pairs: Sequence[Pair],
    progress: Callable[[int], None] = lambda count: None,
    lines: Sequence[int] | None = None,
) -> list[Forced | None]:
    """Lead a model through the translations of `pairs`, whose text is normalised first.

    :param progress: is called with the number of pairs just finished.
    :param lines: the number of each pair's line, for warnings; None: from 1.
    :returns: None for a pair of which the model cannot take a side, for it is too long.
    :raises ModelError: the model's output is not a number.
    """
    vocabularies = translator.source_vocabulary, translator.target_vocabulary
    sources, targets = (
        vocabulary.encode([normalise(pair[side]) for pair in pairs], add_eos=True)
        for side, vocabulary in enumerate(vocabularies)
    )
    limit, lengths = translator.max_target_tokens, dict[int, int]()
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        length = max(len(source), len(target))
        if length <= limit:
            lengths[number] = length
        else:
            line = lines[number] if lines else number + 1
            log.warning(
                "line %d: %d tokens, more than the %d that the model takes; it has no score",
                line, length, limit,
            )  # fmt: skip
    progress(len(pairs) - len(lengths))
    found: list[Forced | None] = [None] * len(pairs)
    order = list(batches_by_length(lengths, translator.search, beam_size=1))
    results = translator.score_batches(
        ([sources[i] for i in batch], [targets[i] for i in batch]) for batch in order
    )
    for batch, result in zip(order, results, strict=True):
        for number, log_probs in zip(batch, result, strict=True):
            if any(value != value for value in log_probs):
                raise ModelError(DIVERGED)
            tokens = translator.target_vocabulary.id_to_piece(targets[number])
            found[number] = Forced(tokens, list(log_probs))
        progress(len(batch))
    return found
