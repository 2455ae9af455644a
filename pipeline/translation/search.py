"""Beam search over a batch of sentences, or sampling, whatever engine runs the model.

Each step extends all hypotheses of all sentences at once. It takes the best 2 × beam_size
candidates of a sentence. Those of the first beam_size that end in EOS are finished; the first
beam_size that do not end are extended in the next step. A sentence with beam_size finished
hypotheses is done. fairseq and fairseq2 search in the same way, and fairseq2's generator gives the
same translations; but here no step loops over sentences, keys and values are not copied for each
hypothesis, and sentences that are done leave the batch.

The engine finds each hypothesis' likeliest next tokens among the whole vocabulary; which of them
are taken is decided here, on arrays of a few numbers. This file needs numpy, not PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.export_format import DIVERGED, ModelError
from models.search_config import SearchConfig
from pipeline.translation.serving import Hypothesis, length_limit

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

ALL_TOKENS = 1 << 30  # wanted: as many as there are
MAX_DRAWN = 1 << 22  # candidates at once
SHRINK_AT = 0.75  # finished sentences leave when at most this share of the batch is unfinished


class NextTokens(NamedTuple):
    """The likeliest tokens after each hypothesis, best first; or all, in the order of their ids."""

    tokens: Ints  # [B, K, C]
    log_probs: Floats  # [B, K, C]
    named: Floats  # log-probabilities of the tokens that were named, [B, K, F]


class Decoding(Protocol):
    """A batch of B sentences is being decoded, with K hypotheses each."""

    def next_tokens(self, last: Ints, count: int, named: Ints | None = None) -> NextTokens:
        """Decode one position of every hypothesis.

        :param last: the newest token of each, `[B, K]`.
        :param count: of the tokens wanted, C; fewer if the vocabulary has fewer.
        :param named: more tokens whose log-probabilities are wanted, `[B, F]`; None: EOS.
        """

    def reorder(self, sentences: Ints, parents: Ints) -> None:
        """Keep some sentences, and go on from other hypotheses of theirs.

        :param sentences: those to keep, ascending, `[B']`.
        :param parents: which of a sentence's hypotheses each new one extends, `[B', K']`.
        """


class Candidates(NamedTuple):
    """The best continuations of each sentence, `[B, C]`; of beam search best first."""

    scores: Floats  # summed log-probabilities
    parents: Ints  # which of the sentence's hypotheses each one extends
    tokens: Ints  # the token that is added


def search_batch(
    decoding: Decoding,
    lengths: Sequence[int],
    search: SearchConfig,
    longest: int,
    prefixes: Sequence[Sequence[int]],
) -> list[list[Hypothesis]]:
    """Translate the sentences of a batch by beam search.

    :param decoding: of the batch, before its first step.
    :param lengths: of the sources, in tokens with EOS.
    :param longest: the most tokens that the model can produce.
    :param prefixes: tokens that the translation of each sentence begins with.
    :returns: at most `beam_size` hypotheses for each sentence, best first.
    :raises ModelError: the model's output is not a number.
    """
    beam_size = search.beam_size
    limits = length_limits(lengths, search, longest, list(map(len, prefixes)))
    finished: list[list[Hypothesis]] = [[] for _ in lengths]

    active = list(range(len(lengths)))  # the source of each row of `hypotheses`
    hypotheses: Ints = np.full((len(lengths), 1, 1), BOS_IDX)  # [B, K, step]
    scores: Floats = np.zeros((len(lengths), 1), np.float32)
    for step in range(1, max(limits) + 1):
        forced = forced_tokens(step, active, limits, prefixes)
        candidates = _best_candidates(decoding, hypotheses, scores, forced, search)
        collect_finished(finished, active, hypotheses, candidates, search)

        kept = rows_to_keep([step < limits[i] and len(finished[i]) < beam_size for i in active])
        if not len(kept):
            break
        active = [active[row] for row in kept]
        totals, parents, tokens = candidates
        candidates = Candidates(totals[kept], parents[kept], tokens[kept])
        hypotheses, scores, parents = extend_unfinished(hypotheses[kept], candidates, beam_size)
        decoding.reorder(kept, parents)
    return [sorted(found, key=lambda hypothesis: -hypothesis.score) for found in finished]


def sample_batch(
    decoding: Decoding,
    lengths: Sequence[int],
    search: SearchConfig,
    longest: int,
    prefixes: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
) -> list[list[Hypothesis]]:
    """Draw `beam_size` translations of each sentence of a batch, each token by its probability.

    The other parameters are those of `search_batch`. What is drawn depends on no other sentence.

    :param places: what is drawn for a sentence is a function of the seed and this.
    :returns: the hypotheses in the order in which they were drawn.
    """
    limits = length_limits(lengths, search, longest, list(map(len, prefixes)))
    size = (len(lengths), search.beam_size)
    numbers = np.zeros((*size, max(limits)))
    for row, which in np.ndindex(size):
        place = places[row]
        generator = np.random.default_rng([search.sampling_seed, *place, which])
        numbers[row, which, : limits[row]] = generator.random(limits[row])

    found: list[dict[int, Hypothesis]] = [{} for _ in lengths]
    active = list(range(len(lengths)))
    hypotheses: Ints = np.full((len(lengths), 1, 1), BOS_IDX)
    scores: Floats = np.zeros(size, np.float32)
    for step in range(1, max(limits) + 1):
        forced = forced_tokens(step, active, limits, prefixes)
        wanted = search.sampling_topk or ALL_TOKENS
        candidates = _next_tokens(decoding, hypotheses, forced, search, wanted)
        tokens, log_probs = _draw(*candidates, search, numbers[active, :, step - 1])
        parents = np.broadcast_to(np.arange(hypotheses.shape[1]), tokens.shape)
        past = np.broadcast_to(hypotheses, (*tokens.shape, step))
        hypotheses = np.concatenate([past, tokens[:, :, None]], axis=2)
        scores = scores + log_probs
        for row, which in zip(*(tokens == EOS_IDX).nonzero(), strict=True):
            score = float(scores[row, which] / step**search.length_penalty)
            ids = hypotheses[row, which, 1:].tolist()
            found[active[row]].setdefault(int(which), Hypothesis(ids, score))

        kept = rows_to_keep([len(found[i]) < search.beam_size for i in active])
        if not len(kept):
            break
        active = [active[row] for row in kept]
        hypotheses, scores = hypotheses[kept], scores[kept]
        decoding.reorder(kept, parents[kept])
    return [[one for _, one in sorted(own.items())] for own in found]


def _draw(
    tokens: Ints, log_probs: Floats, search: SearchConfig, numbers: NDArray[np.float64]
) -> tuple[Ints, Floats]:
    """Draw the next token of each hypothesis.

    :param tokens, log_probs: candidates, `[B, K or 1, C]`.
    :param numbers: uniformly distributed in [0, 1), `[B, K]`.
    :returns: tokens and their log-probabilities, `[B, K]`.
    """
    take = np.take_along_axis
    if search.sampling_topk:
        best = (-log_probs).argsort(axis=2, kind="stable")[:, :, : search.sampling_topk]
        # By id: the order of two likely ones may depend on what else is in the batch.
        best = take(best, take(tokens, best, 2).argsort(axis=2), 2)
        tokens, log_probs = take(tokens, best, 2), take(log_probs, best, 2)
    drawn = np.empty(numbers.shape, np.int64)
    some = max(1, MAX_DRAWN // (numbers.shape[1] * tokens.shape[2]))
    for begin in range(0, len(tokens), some):
        part = slice(begin, begin + some)
        heights = log_probs[part].astype(np.float64) / search.sampling_temperature
        sums = np.exp(heights - heights.max(axis=2, keepdims=True)).cumsum(axis=2)
        drawn[part] = (sums <= numbers[part, :, None] * sums[:, :, -1:]).sum(axis=2)
    places = np.minimum(drawn, tokens.shape[2] - 1)[:, :, None]
    rows, slots = np.arange(len(tokens))[:, None, None], np.arange(numbers.shape[1])[:, None]
    at = rows, np.minimum(slots, tokens.shape[1] - 1), places
    return tokens[at][:, :, 0], log_probs[at][:, :, 0]


def pad(sequences: Sequence[Sequence[int] | NDArray[Any]]) -> tuple[Ints, Ints]:
    """Return token ids as rows of one length, and how many of each row are no padding."""
    lengths = np.array([len(ids) for ids in sequences])
    padded = np.full((len(sequences), lengths.max()), PAD_IDX)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(sequences)
    return padded, lengths


def length_limits(
    lengths: Sequence[int], search: SearchConfig, longest: int, needed: Sequence[int]
) -> list[int]:
    """Return how many tokens the translation of each sentence may have; parameters are those of
    `search_batch`.

    :param needed: tokens that it must have at least, besides EOS.
    """
    limits = (length_limit(length, search, longest) for length in lengths)
    return [max(limit, least + 1) for limit, least in zip(limits, needed, strict=True)]


def forced_tokens(
    step: int, active: list[int], limits: list[int], prefixes: Sequence[Sequence[int]]
) -> Ints:
    """Return the token that each sentence must have at a step, or -1 if it is free, `[B]`."""
    forced = np.array([EOS_IDX if step >= limits[index] else -1 for index in active])
    if step <= max(map(len, prefixes), default=0):
        for row, index in enumerate(active):
            if step <= len(prefixes[index]):
                forced[row] = prefixes[index][step - 1]
    return forced


def rows_to_keep(unfinished: Sequence[bool]) -> Ints:
    """Return the rows to go on with: the unfinished ones, or all if that is most of them."""
    rows = np.flatnonzero(unfinished)
    return rows if len(rows) <= SHRINK_AT * len(unfinished) else np.arange(len(unfinished))


def force_batch(decoding: Decoding, targets: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probabilities of the tokens of given translations.

    :param decoding: of the batch, before its first step.
    :param targets: a translation of each sentence, token ids with EOS.
    """
    longest = max(map(len, targets))
    padded = np.array([[BOS_IDX, *ids, *[EOS_IDX] * (longest - len(ids))] for ids in targets])
    steps = [
        decoding.next_tokens(padded[:, step, None], 1, padded[:, step + 1, None]).named[:, 0, 0]
        for step in range(longest)
    ]
    found = np.stack(steps, axis=1)
    return [row[: len(ids)].tolist() for row, ids in zip(found, targets, strict=True)]


def _best_candidates(
    decoding: Decoding, hypotheses: Ints, scores: Floats, forced: Ints, search: SearchConfig
) -> Candidates:
    """Return the best continuations of the hypotheses of each sentence.

    :param hypotheses: `[B, K, step]`.
    :param scores: of the hypotheses, `[B, K]`.
    :param forced: see `forced_tokens`.
    :raises ModelError: a score is not a number.
    """
    wanted = 2 * search.beam_size
    tokens, log_probs = _next_tokens(decoding, hypotheses, forced, search, wanted)
    totals = (scores[:, :, None] + log_probs).reshape(len(scores), -1)
    index = (-totals).argsort(axis=1, kind="stable")[:, :wanted]
    row = np.arange(len(totals))[:, None]
    parents = index // tokens.shape[2]
    return Candidates(totals[row, index], parents, tokens.reshape(totals.shape)[row, index])


def _next_tokens(
    decoding: Decoding, hypotheses: Ints, forced: Ints, search: SearchConfig, wanted: int
) -> tuple[Ints, Floats]:
    """Return the likeliest next tokens of each hypothesis.

    :param wanted: how many at least; what may not follow has probability 0.
    :returns: tokens, and their log-probabilities, `[B, K, C]`.
    :raises ModelError: one is not a number.
    """
    given = np.flatnonzero(forced >= 0)
    ends = bool((forced[given] == EOS_IDX).all())
    named = None if ends else np.where(forced < 0, EOS_IDX, forced)[:, None]
    tokens, log_probs, of_forced = likely_tokens(decoding, hypotheses, search, wanted, named)
    if len(given):
        tokens = tokens.copy()  # it may be one row for all
        tokens[given, :, 0], log_probs[given] = forced[given, None], -np.inf
        log_probs[given, :, 0] = of_forced[given, :, 0]
    return tokens, log_probs


def likely_tokens(
    decoding: Decoding,
    hypotheses: Ints,
    search: SearchConfig,
    wanted: int,
    named: Ints | None = None,
) -> NextTokens:
    """Return what may follow each hypothesis: `wanted` tokens at least, and those that are named,
    which may follow always.

    The parameters are those of `_next_tokens` and `Decoding.next_tokens`.
    """
    row, beam, token = repetitions(hypotheses, search.no_repeat_ngram_size)
    tokens, log_probs, of_named = decoding.next_tokens(
        hypotheses[:, :, -1],
        # Enough are left when the forbidden ones are not counted.
        wanted + 2 + (len(row) and int(np.bincount(row * hypotheses.shape[1] + beam).max())),
        named,
    )
    if np.isnan(log_probs).any():
        raise ModelError(DIVERGED)
    log_probs = np.where((tokens == PAD_IDX) | (tokens == BOS_IDX), -np.inf, log_probs)
    if len(row):
        which, place = (tokens[row, beam] == token[:, None]).nonzero()
        log_probs[row[which], beam[which], place] = -np.inf
    return NextTokens(tokens, log_probs, of_named)


def repetitions(hypotheses: Ints, size: int) -> tuple[Ints, Ints, Ints]:
    """Find the tokens that would repeat an n-gram of that size (BOS is not part of any).

    :param size: 0 finds none.
    :returns: sentence, hypothesis and token of each, `[F]`.
    """
    if not size or hypotheses.shape[2] <= size:
        none = np.empty(0, np.int64)
        return none, none, none
    ngrams = np.lib.stride_tricks.sliding_window_view(hypotheses[:, :, 1:], size, axis=2)
    tail = hypotheses[:, :, None, hypotheses.shape[2] - size + 1 :]
    row, beam, which = (ngrams[..., :-1] == tail).all(axis=3).nonzero()
    return row, beam, ngrams[row, beam, which, -1]


def collect_finished(
    finished: list[list[Hypothesis]],
    active: list[int],
    hypotheses: Ints,
    candidates: Candidates,
    search: SearchConfig,
    widths: Ints | int | None = None,
) -> None:
    """Append the candidates that end in EOS to the finished hypotheses of their sentences.

    :param widths: so many of the first candidates count, `[B, 1]`; None: as many as `beam_size`.
    """
    beam_size, length = search.beam_size, hypotheses.shape[2]
    ends = (candidates.tokens == EOS_IDX) & (candidates.scores != -np.inf)
    ends &= np.arange(ends.shape[1]) < (beam_size if widths is None else widths)
    row, place = ends.nonzero()
    if not len(row):
        return
    scores = (candidates.scores[row, place] / length**search.length_penalty).tolist()
    tokens = hypotheses[row, candidates.parents[row, place], 1:].tolist()
    for index, ids, score in zip(row.tolist(), tokens, scores, strict=True):
        if len(finished[active[index]]) < beam_size:
            finished[active[index]].append(Hypothesis([*ids, EOS_IDX], score))


def extend_unfinished(
    hypotheses: Ints, candidates: Candidates, beam_size: int
) -> tuple[Ints, Floats, Ints]:
    """Extend the hypotheses by the best candidates that do not end.

    :returns: hypotheses `[B, K, step + 1]`, their scores and parents `[B, K]`.
    """
    order = (candidates.tokens == EOS_IDX).argsort(axis=1, kind="stable")[:, :beam_size]
    row = np.arange(len(hypotheses))[:, None]
    scores, parents, tokens = (values[row, order] for values in candidates)
    past = hypotheses[row, parents]
    return np.concatenate([past, tokens[:, :, None]], axis=2), scores, parents
