"""Pairs of the validation set as examples, and who attends to whom in one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.shards import ShardReader
from data_prep.text import BOS_IDX, PAD_IDX
from data_prep.vocabulary import load_vocabularies
from models.recording import record
from models.stack import Layered
from pipeline.analysis.distance import token_distances
from pipeline.analysis.drawings import draw_attention
from pipeline.analysis.examples import (
    Analysis,
    Batch,
    Examples,
    Numbers,
    Settings,
    choose,
)
from pipeline.analysis.measures import rounded
from pipeline.recipe import UsageError
from pipeline.translation.batches import PairBatch, collate

SHOWN_TOKENS = (6, 24)  # at least and at most, on each side of a pair that is good to look at


class Pairs(Examples):
    """Pairs of the validation set; the decoder reads the reference, as in training."""

    what = "sentence pairs"
    unit = "tokens"
    class_token = False

    def __init__(
        self, shards: Path, settings: Settings, longest: int, device: torch.device
    ) -> None:
        """Choose pairs.

        :param longest: the most tokens a side that the models can take.
        :raises UsageError: there are too few, or the one to show is not there.
        """
        self.settings, self._device = settings, device
        self._reader, self._vocabularies = ShardReader(shards, "valid"), load_vocabularies(shards)
        lengths = np.stack(self._reader.lengths())
        (fitting,) = np.nonzero(lengths.max(0) <= longest)
        chosen = fitting[choose(len(fitting), settings.examples)]
        super().__init__(chosen)
        self._shown = self._to_show(lengths, chosen, fitting)

    def _to_show(self, lengths: Numbers, chosen: Numbers, fitting: Numbers) -> int:
        """Return the pair whose attention is drawn.

        :param lengths: of both sides of all pairs, `[2, pairs]`.
        :raises UsageError: it is not there, or too long.
        """
        wanted = self.settings.show
        if wanted is not None:
            if wanted - 1 not in fitting:
                raise UsageError(
                    f"--show {wanted}: the validation set has {len(self._reader)} pairs, and this "
                    "is none of them that the models can take"
                )
            return wanted - 1
        low, high = SHOWN_TOKENS
        good = (lengths.min(0)[chosen] >= low) & (lengths.max(0)[chosen] <= high)
        return int(chosen[good.argmax()] if good.any() else chosen[lengths.max(0)[chosen].argmin()])

    def batches(self) -> Iterator[Batch]:
        for pairs in self.dealt:
            yield self._batch(pairs)

    def _batch(self, pairs: Numbers) -> Batch:
        batch = collate(self._reader, pairs, self._device)
        real = {"encoder": batch.source_seqs != PAD_IDX, "decoder": batch.targets != PAD_IDX}
        return Batch(partial(_run, batch), real)

    def distances(self, positions: int) -> Tensor:
        return token_distances(positions)

    def attention_maps(self, model: Layered) -> Sequence[Analysis]:
        batch = self._batch(np.array([self._shown]))
        recorded = record(model.stacks, partial(batch.run, model))
        encoder, decoder = recorded["encoder"], recorded["decoder"]
        assert decoder.cross_attention is not None
        source, target = (side.tolist() for side in self._reader[self._shown])
        read, predicted = self._tokens(0, source), self._tokens(1, target)
        begun = self._tokens(1, [BOS_IDX, *target[:-1]])
        maps = {
            "attention_encoder": ("Encoder self-attention", encoder.self_attention, read, read),
            "attention_decoder": ("Decoder self-attention", decoder.self_attention, begun, begun),
            "attention_cross": (
                "Attention to the source, by the token that is predicted",
                decoder.cross_attention,
                predicted,
                read,
            ),
        }
        return [self._map(name, *parts) for name, parts in maps.items()]

    def _tokens(self, side: int, ids: Sequence[int]) -> list[str]:
        return [self._vocabularies[side].id_to_piece(token) for token in ids]

    def _map(
        self, name: str, title: str, attention: Tensor, rows: list[str], columns: list[str]
    ) -> Analysis:
        """Return one kind of attention in the pair.

        :param attention: `[N, 1, H, T, S]`.
        """
        head = self.settings.head
        heads = attention[:, 0]
        levels = (heads.mean(1) if head is None else heads[:, head - 1]).cpu().numpy()
        which = "mean over heads" if head is None else f"head {head}"
        content: Mapping[str, object] = {
            "pair": self._shown + 1,
            "heads": which,
            "rows": rows,
            "columns": columns,
            "levels": rounded(levels),
        }
        return Analysis(
            name, content, partial(draw_attention, f"{title}, {which}", levels, rows, columns)
        )


def _run(batch: PairBatch, model: nn.Module) -> object:
    return model(*batch)
