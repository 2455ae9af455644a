"""Forced decoding: how likely a model finds a translation that it is given."""

from __future__ import annotations

import math
from typing import NamedTuple


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
