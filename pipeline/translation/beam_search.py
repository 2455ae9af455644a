"""Beam search (`search.py`) and forced decoding with a PyTorch model.

Keys and values are not copied for each hypothesis (`models/ringformer/decoder_state.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag

from data_prep.vocabulary import EOS_IDX, PAD_IDX
from models.seq2seq import TranslationModel
from pipeline.translation.batches import collate_ids
from pipeline.translation.search import Decoding, Ints, NextTokens, search_batch
from pipeline.translation.serving import Hypothesis, PairIds
from pipeline.translation_recipe import SearchConfig


@torch.inference_mode()
def beam_search(
    model: TranslationModel, sources: Sequence[Sequence[int]], search: SearchConfig
) -> list[list[Hypothesis]]:
    """Translate `sources` in one batch.

    :param sources: token ids of each sentence, with EOS.
    :returns: at most `beam_size` hypotheses for each sentence, best first.
    :raises ModelError: the model's output is not a number.
    """
    decoding, lengths = TorchDecoding(model, sources), [len(ids) for ids in sources]
    return search_batch(decoding, lengths, search, model.max_target_seq_len)


@torch.inference_mode()
def force(model: TranslationModel, pairs: PairIds) -> list[list[float]]:
    """Return the log-probabilities of the tokens of given translations, computed at once."""
    batch = collate_ids(*pairs, next(model.parameters()).device)
    log_probs = model.log_probs(
        batch.source_seqs,
        batch.source_seqs_layout,
        batch.target_seqs,
        batch.target_seqs_layout,
        batch.targets,
    )
    return [row[: len(ids)] for row, ids in zip(log_probs.tolist(), pairs[1], strict=True)]


class TorchDecoding(Decoding):
    """A PyTorch model decodes a batch on its device; a step brings a few numbers to the host."""

    def __init__(self, model: TranslationModel, sources: Sequence[Sequence[int]]) -> None:
        self.model, lengths = model, [len(ids) for ids in sources]
        self.device = next(model.parameters()).device
        source = torch.full((len(sources), max(lengths)), PAD_IDX)
        for row, ids in enumerate(sources):
            source[row, : len(ids)] = torch.tensor(ids)
        self.source = source.to(self.device)
        self.layout = BatchLayout.of(self.source, lengths)
        self.state = IncrementalStateBag(model.max_target_seq_len + 1)
        self.beam_size = 1

    def next_tokens(self, last: Ints, count: int, forced: Ints | None = None) -> NextTokens:
        """Decode one position; see `Decoding`."""
        new = torch.from_numpy(last).to(self.device).reshape(-1, 1)
        layout = BatchLayout.of(new)
        logits = self.model(self.source, self.layout, new, layout, state_bag=self.state)
        self.state.increment_step_nr()
        logits = logits.float().view(*last.shape, -1)
        log_sum = logits.logsumexp(dim=2, keepdim=True)
        best, tokens = logits.topk(min(count, logits.size(2)))
        if forced is None:
            of_forced = logits[:, :, EOS_IDX, None]
        else:
            rows = torch.arange(len(forced), device=self.device)
            of_forced = logits[rows, :, torch.from_numpy(forced).to(self.device), None]
        log_probs = (torch.cat([best, of_forced], dim=2) - log_sum).cpu().numpy()
        return NextTokens(tokens.cpu().numpy(), log_probs[..., :-1], log_probs[..., -1])

    def reorder(self, sentences: Ints, parents: Ints) -> None:
        """Keep some sentences; see `Decoding`."""
        rows = sentences[:, None] * self.beam_size + parents
        self.beam_size = parents.shape[1]
        self.state.reorder(torch.from_numpy(rows.flatten()).to(self.device))
