"""Beam search over a batch of sentences.

Each step extends all hypotheses of all sentences at once. It takes the best 2 × beam_size
candidates of a sentence. Those of the first beam_size that end in EOS are finished; the first
beam_size that do not end are extended in the next step. A sentence with beam_size finished
hypotheses is done. fairseq and fairseq2 search in the same way, and fairseq2's generator gives the
same translations; but here no step loops over sentences, keys and values are not copied
(`models/ringformer/decoder_state.py`), and sentences that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor

from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX
from models.export_format import ModelError
from models.seq2seq import TranslationModel
from pipeline.recipe import SearchConfig
from pipeline.translation.serving import DIVERGED, Hypothesis, length_limit

SHRINK_AT = 0.75  # finished sentences leave when at most this share of the batch is unfinished


class Candidates(NamedTuple):
    """The best 2 × beam_size continuations of each sentence, best first, `[B, C]`."""

    scores: Tensor  # summed log-probabilities
    parents: Tensor  # which of the sentence's hypotheses each one extends
    tokens: Tensor  # the token that is added


@torch.inference_mode()
def beam_search(
    model: TranslationModel, sources: Sequence[Sequence[int]], search: SearchConfig
) -> list[list[Hypothesis]]:
    """Translate `sources` in one batch.

    :param sources: token ids of each sentence, with EOS.
    :returns: at most `beam_size` hypotheses for each sentence, best first.
    :raises ModelError: the model's output is not a number.
    """
    device = next(model.parameters()).device
    beam_size, lengths = search.beam_size, [len(ids) for ids in sources]
    source = torch.full((len(sources), max(lengths)), PAD_IDX)
    for row, ids in enumerate(sources):
        source[row, : len(ids)] = torch.tensor(ids)
    source = source.to(device)
    source_layout = BatchLayout.of(source, lengths)
    limits = [length_limit(length, search, model.max_target_seq_len) for length in lengths]
    state = IncrementalStateBag(max(limits) + 1)
    finished: list[list[Hypothesis]] = [[] for _ in sources]

    active = list(range(len(sources)))  # the source of each row of `hypotheses`
    hypotheses = torch.full((len(sources), 1, 1), BOS_IDX, device=device)  # [B, K, step]
    scores = torch.zeros(len(sources), 1, device=device)
    for step in range(1, max(limits) + 1):
        last = hypotheses[:, :, -1].reshape(-1, 1)
        logits = model(source, source_layout, last, BatchLayout.of(last), state_bag=state)
        state.increment_step_nr()
        logits = logits.float().view(*hypotheses.shape[:2], -1)
        at_limit = [row for row, index in enumerate(active) if step >= limits[index]]
        candidates = _best_candidates(logits, hypotheses, scores, at_limit, search)
        _collect_finished(finished, active, hypotheses, candidates, search)

        unfinished = [
            row
            for row, index in enumerate(active)
            if step < limits[index] and len(finished[index]) < beam_size
        ]
        if not unfinished:
            break
        rows = (
            unfinished if len(unfinished) <= SHRINK_AT * len(active) else list(range(len(active)))
        )
        active = [active[row] for row in rows]
        kept = torch.tensor(rows, device=device)
        old_beam_size = hypotheses.size(1)
        hypotheses, scores, parents = _extend_unfinished(
            hypotheses[kept], candidates, kept, beam_size
        )
        state.reorder((kept[:, None] * old_beam_size + parents).flatten())
    return [sorted(found, key=lambda hypothesis: -hypothesis.score) for found in finished]


def _best_candidates(
    logits: Tensor,
    hypotheses: Tensor,
    scores: Tensor,
    at_limit: list[int],
    search: SearchConfig,
) -> Candidates:
    """Return the best continuations of the hypotheses of each sentence.

    :param logits: `[B, K, V]`; they are overwritten.
    :param hypotheses: `[B, K, step]`.
    :param scores: of the hypotheses, `[B, K]`.
    :param at_limit: rows of sentences that must end now.
    :raises ModelError: a score is not a number.
    """
    log_sum = logits.logsumexp(dim=2, keepdim=True)
    logits[:, :, [PAD_IDX, BOS_IDX]] = -torch.inf
    if search.no_repeat_ngram_size:
        _forbid_repetition(logits, hypotheses, search.no_repeat_ngram_size)
    if at_limit:
        end = logits[at_limit, :, EOS_IDX]
        logits[at_limit] = -torch.inf
        logits[at_limit, :, EOS_IDX] = end
    count = min(2 * search.beam_size, logits.size(2))
    best, tokens = logits.topk(count)
    totals = (scores[:, :, None] + best - log_sum).flatten(1)
    totals, index = totals.topk(count)
    if totals[:, 0].isnan().any():
        raise ModelError(DIVERGED)
    return Candidates(totals, index // count, tokens.flatten(1).gather(1, index))


def _forbid_repetition(logits: Tensor, hypotheses: Tensor, size: int) -> None:
    """Rule out tokens that would repeat an n-gram of that size (BOS is not part of any)."""
    if hypotheses.size(2) <= size:
        return
    ngrams = hypotheses[:, :, 1:].unfold(2, size, 1)  # [B, K, n-grams, size]
    tail = hypotheses[:, :, None, hypotheses.size(2) - size + 1 :]
    sentence, beam, which = (ngrams[..., :-1] == tail).all(dim=3).nonzero(as_tuple=True)
    logits[sentence, beam, ngrams[sentence, beam, which, -1]] = -torch.inf


def _collect_finished(
    finished: list[list[Hypothesis]],
    active: list[int],
    hypotheses: Tensor,
    candidates: Candidates,
    search: SearchConfig,
) -> None:
    """Append the candidates that end in EOS to the finished hypotheses of their sentences."""
    beam_size, length = search.beam_size, hypotheses.size(2)
    ends = (candidates.tokens == EOS_IDX) & (candidates.scores != -torch.inf)
    row, place = ends[:, :beam_size].nonzero(as_tuple=True)
    if not len(row):
        return
    scores = (candidates.scores[row, place] / length**search.length_penalty).tolist()
    tokens = hypotheses[row, candidates.parents[row, place], 1:].tolist()
    for index, ids, score in zip(row.tolist(), tokens, scores, strict=True):
        if len(finished[active[index]]) < beam_size:
            finished[active[index]].append(Hypothesis([*ids, EOS_IDX], score))


def _extend_unfinished(
    hypotheses: Tensor, candidates: Candidates, kept: Tensor, beam_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend the hypotheses of the rows `kept` by the best candidates that do not end.

    :returns: hypotheses `[B, K, step + 1]`, their scores and parents `[B, K]`.
    """
    scores, parents, tokens = (part[kept] for part in candidates)
    order = (tokens == EOS_IDX).to(torch.int8).argsort(dim=1, stable=True)[:, :beam_size]
    scores, parents, tokens = (part.gather(1, order) for part in (scores, parents, tokens))
    past = hypotheses.gather(1, parents[:, :, None].expand(-1, -1, hypotheses.size(2)))
    return torch.cat([past, tokens[:, :, None]], dim=2), scores, parents
