"""Collation: pairs of token ids become the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor

from data_prep.batch_plan import Indices
from data_prep.shards import ShardReader, TokenIds
from data_prep.text import BOS_IDX, PAD_IDX
from models.padding import PaddedLayout, to_device
from pipeline.translation.search import pad

Ids = TokenIds | Sequence[int]


class PairBatch(NamedTuple):
    """A collated micro-batch of pairs, padded on the right: what a `TranslationModel` takes."""

    source_seqs: Tensor
    """Source token ids with EOS, int64 `[B, S]`."""

    source_seqs_layout: BatchLayout

    target_seqs: Tensor
    """The decoder's input: BOS and the target without its EOS, int64 `[B, T]`."""

    target_seqs_layout: BatchLayout

    targets: Tensor
    """The tokens to predict: target token ids with EOS, int64 `[B, T]`."""

    @property
    def positions(self) -> int:
        """Return how many source and target positions there are, padding included."""
        return self.source_seqs.numel() + self.targets.numel()

    def __str__(self) -> str:
        pairs, source_length = self.source_seqs.shape
        return f"{pairs} × {source_length} + {self.targets.size(1)} tokens"


def collate(reader: ShardReader, pairs: Indices, device: torch.device) -> PairBatch:
    """Read `pairs`, pad them, and put them on `device`.

    Where the micro-batches do not divide among the ranks, a rank's last one is empty. It then gets
    a pair whose targets are all padding, so that the rank still takes part in the step.
    """
    token_ids = reader.read(pairs if len(pairs) else np.zeros(1, dtype=np.int32))
    sources, targets = ([pair[side] for pair in token_ids] for side in (0, 1))
    batch = collate_ids(sources, targets, device)
    if not len(pairs):
        batch.targets.fill_(PAD_IDX)
    return batch


def collate_ids(sources: Sequence[Ids], targets: Sequence[Ids], device: torch.device) -> PairBatch:
    """Pad pairs, and put them on `device`.

    :param sources, targets: token ids with EOS.
    """
    source, source_lengths = pad(sources)
    target, target_lengths = pad(targets)
    begin = np.full((len(target), 1), BOS_IDX, dtype=np.int64)
    shifted = np.concatenate([begin, target[:, :-1]], axis=1)
    source_seqs, target_seqs, predicted = (
        to_device(torch.from_numpy(ids), device) for ids in (source, shifted, target)
    )
    return PairBatch(
        source_seqs,
        PaddedLayout(source_lengths, source.shape[1], device),
        target_seqs,
        PaddedLayout(target_lengths, target.shape[1], device),
        predicted,
    )
