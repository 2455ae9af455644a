"""Beam search for translations that must have certain terms, whatever engine runs the model.

A term is met where its tokens stand in a row and a word ends behind them. Hypotheses are grouped in
banks by the number of tokens of terms that they still lack, and banks take turns in giving their
best hypotheses to the next step: dynamic beam allocation (Post & Vilar 2018, arXiv 1804.06609). So
those that are further with their terms do not have to compete with likelier ones that have not
begun. Unlike there, the beam is wider by one for each token of a term, so that no bank is left out,
whatever beam_size is.

A hypothesis ends when it has all of its terms, and never gets so long that they would not fit. So
every translation has every term, however unlikely the model finds that. This file needs numpy, not
PyTorch; `search.py` is the search without terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.text import BOS_IDX, EOS_IDX
from models.search_config import SearchConfig
from pipeline.translation.search import (
    Candidates,
    Decoding,
    Floats,
    Ints,
    collect_finished,
    extend_unfinished,
    forced_tokens,
    length_limits,
    likely_tokens,
    repetitions,
    rows_to_keep,
)
from pipeline.translation.serving import Hypothesis

Tokens = tuple[int, ...]

INSIDE, BREAK = -1, -2  # tokens of no term: those within a word, and those behind its end
ENDED, NEVER = -1, 1 << 30  # in place of the number of tokens that are left


class State(NamedTuple):
    """How far a hypothesis is with its terms."""

    unmet: tuple[Tokens, ...]
    """The terms that it lacks; one that is required twice is there twice."""

    begun: Tokens = ()
    """Its newest tokens, if they are the beginning of an unmet term, or all of it."""

    @property
    def left(self) -> int:
        """Return how many more tokens are needed."""
        return sum(map(len, self.unmet)) - len(self.begun)


class Terms:
    """The terms are what the translation of one sentence must have."""

    def __init__(self, terms: Sequence[Tokens], breaks: NDArray[np.bool_]) -> None:
        """Keep the terms.

        :param breaks: whether the word before a token has ended, `[vocabulary]`.
        """
        self.breaks, self.begin = breaks, State(tuple(sorted(terms)))
        self.ids = sorted({token for term in terms for token in term})
        self.count = self.begin.left
        self._behind = frozenset([BREAK, *(token for token in self.ids if breaks[token])])

    def after(self, state: State, token: int) -> State:
        """Return the state of a hypothesis that gets one more token."""
        if token not in self.ids:
            token = BREAK if self.breaks[token] else INSIDE
        return _after(state, token, self._behind)

    def left_after(self, state: State, first: int) -> list[int]:
        """Return how many tokens are left after INSIDE, BREAK, `first`, and each of `ids`."""
        if first == EOS_IDX:
            of_first = NEVER if state.left else ENDED
        else:
            of_first = self.after(state, first).left
        inside, behind, *own = (
            _after(state, token, self._behind).left for token in (INSIDE, BREAK, *self.ids)
        )
        return [inside, behind, of_first, *own]


@lru_cache(maxsize=1 << 16)
def _after(state: State, token: int, behind: frozenset[int]) -> State:
    """Find terms from left to right, of several that begin with the same token the longest.

    :param behind: tokens that can stand behind a term.
    """
    unmet, begun = list(state.unmet), (*state.begun, token)
    while begun and not any(term[: len(begun)] == begun for term in unmet):
        begins = (term for term in unmet if begun[: len(term)] == term)
        met = [term for term in begins if begun[len(term)] in behind]
        if met:
            unmet.remove(max(met, key=len))
        begun = begun[len(max(met, key=len)) if met else 1 :]
    return State(tuple(unmet), begun)


class Moves(NamedTuple):
    """What each hypothesis may be continued with, `[B, K, N]`."""

    tokens: Ints
    log_probs: Floats
    left: Ints
    """How many tokens of terms are left then; or ENDED, or NEVER."""


def constrained_batch(
    decoding: Decoding,
    lengths: Sequence[int],
    search: SearchConfig,
    longest: int,
    terms: Sequence[Terms],
    prefixes: Sequence[Sequence[int]],
) -> list[list[Hypothesis]]:
    """Translate the sentences of a batch, each with its terms.

    The parameters are those of `search.search_batch`.

    :param terms: of each sentence; with its prefix they leave room for EOS in `longest`.
    :returns: at most `beam_size` hypotheses for each sentence, best first.
    :raises ModelError: the model's output is not a number.
    """
    needed = [own.count + len(p) for own, p in zip(terms, prefixes, strict=True)]
    limits = length_limits(lengths, search, longest, needed)
    finished: list[list[Hypothesis]] = [[] for _ in terms]

    active = list(range(len(terms)))  # the source of each row of `hypotheses`
    hypotheses: Ints = np.full((len(terms), 1, 1), BOS_IDX)  # [B, K, step]
    scores: Floats = np.zeros((len(terms), 1), np.float32)
    states = [[own.begin] for own in terms]
    for step in range(1, max(limits) + 1):
        own = [terms[index] for index in active]
        forced = forced_tokens(step, active, limits, prefixes)
        room = np.array([limits[index] - step for index in active])
        size, widths = search.no_repeat_ngram_size, _widths(own, search)[:, None]
        named, left = _left_after(hypotheses, states, own, forced, room, size)
        moves = _moves(decoding, hypotheses, named, left, own, search)
        widest = int(widths.max())
        candidates = _allocate(scores, moves, widest)
        collect_finished(finished, active, hypotheses, candidates, search, widths)

        kept = rows_to_keep(
            [step < limits[i] and len(finished[i]) < search.beam_size for i in active]
        )
        if not len(kept):
            break
        candidates.scores[candidates.tokens == EOS_IDX] = -np.inf
        hypotheses, scores, parents = extend_unfinished(hypotheses, candidates, widest)
        scores[np.arange(scores.shape[1]) >= widths] = -np.inf
        hypotheses, scores, parents = hypotheses[kept], scores[kept], parents[kept]
        states = [
            [
                own[i].after(states[i][k], token)
                for k, token in zip(parents[row], hypotheses[row, :, -1].tolist(), strict=True)
            ]
            for row, i in enumerate(kept)
        ]
        active = [active[row] for row in kept]
        decoding.reorder(kept, parents)
    return [sorted(found, key=lambda hypothesis: -hypothesis.score) for found in finished]


def _left_after(
    hypotheses: Ints,
    states: list[list[State]],
    terms: Sequence[Terms],
    forced: Ints,
    room: Ints,
    no_repeat_ngram_size: int,
) -> tuple[Ints, Ints]:
    """Return tokens of which something is known: EOS or the one that is forced, and those of terms;
    and how many tokens of terms are left after each token, or NEVER if it may not follow.

    :param hypotheses: `[B, K, step]`; `states` are theirs.
    :param forced: see `forced_tokens`.
    :param room: tokens that may come behind the next one, `[B]`.
    :returns: tokens, `[B, F]`; what is left after INSIDE, BREAK, and each of them, `[B, K, 2 + F]`.
    """
    named: Ints = np.full((len(terms), 1 + max(len(own.ids) for own in terms)), EOS_IDX)
    named[:, 0] = np.where(forced < 0, EOS_IDX, forced)
    left: Ints = np.full((*hypotheses.shape[:2], 2 + named.shape[1]), NEVER)
    for row, (own, of_row) in enumerate(zip(terms, states, strict=True)):
        named[row, 1 : 1 + len(own.ids)] = own.ids
        first = int(named[row, 0])
        left[row, :, : 3 + len(own.ids)] = [own.left_after(state, first) for state in of_row]
    for row, beam, token in zip(*repetitions(hypotheses, no_repeat_ngram_size), strict=True):
        own, state = terms[row], states[row][beam]
        # What brings a term on may repeat.
        if token in own.ids and own.after(state, int(token)).left >= state.left:
            left[row, beam, 3 + own.ids.index(token)] = NEVER
    given = np.flatnonzero(forced >= 0)
    left[given, :, :2], left[given, :, 3:] = NEVER, NEVER
    left[left >= room[:, None, None]] = NEVER
    return named, left


def _moves(
    decoding: Decoding,
    hypotheses: Ints,
    named: Ints,
    left: Ints,
    terms: Sequence[Terms],
    search: SearchConfig,
) -> Moves:
    """Return what each hypothesis may be continued with: tokens that are named, and the likeliest
    others, as many as there are hypotheses of the sentence.

    :param named, left: see `_left_after`.
    """
    widths = _widths(terms, search)[:, None, None]
    wanted = int(widths.max()) + named.shape[1]
    tokens, log_probs, of_named = likely_tokens(decoding, hypotheses, search, wanted, named)
    log_probs[(tokens[..., None] == named[:, None, None]).any(axis=3)] = -np.inf
    best = (-log_probs).argsort(axis=2, kind="stable")[:, :, : widths.max()]
    tokens = np.take_along_axis(tokens, best, 2)
    log_probs = np.take_along_axis(log_probs, best, 2)
    log_probs[np.broadcast_to(np.arange(best.shape[2]) >= widths, best.shape)] = -np.inf

    left_then = np.where(terms[0].breaks[tokens], left[:, :, 1:2], left[:, :, :1])
    left = np.concatenate([left_then, left[:, :, 2:]], axis=2)
    named = np.broadcast_to(named[:, None], of_named.shape)
    log_probs = np.concatenate([log_probs, of_named], axis=2)
    log_probs[left == NEVER] = -np.inf
    return Moves(np.concatenate([tokens, named], axis=2), log_probs, left)


def _widths(terms: Sequence[Terms], search: SearchConfig) -> Ints:
    """Return how many hypotheses each sentence has: one more for each token of its terms."""
    return np.array([search.beam_size + own.count for own in terms])


def _allocate(scores: Floats, moves: Moves, width: int) -> Candidates:
    """Return the continuations of each sentence in the order in which they are taken: the best one
    of each bank, then the second of each, and so on.

    :param scores: of the hypotheses, `[B, K]`.
    :param width: how many are wanted that do not end.
    """
    take = np.take_along_axis
    totals = (scores[:, :, None] + moves.log_probs).reshape(len(scores), -1)
    banks: Ints = np.maximum(moves.left, 0).reshape(totals.shape)  # those that end are complete
    by_bank = np.lexsort((-totals, banks))
    banks, places = take(banks, by_bank, 1), np.arange(totals.shape[1])
    begins = np.diff(banks, axis=1, prepend=-1) != 0
    ranks = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    ordered = take(totals, by_bank, 1)
    order = np.lexsort((-ordered, ranks, ordered == -np.inf))
    index = take(by_bank, order, 1)[:, : width + scores.shape[1]]
    return Candidates(
        take(totals, index, 1),
        index // moves.tokens.shape[2],
        take(moves.tokens.reshape(totals.shape), index, 1),
    )
