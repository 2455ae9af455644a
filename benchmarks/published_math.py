"""This RingFormer computes as the published implementation does, to measure against.

The same parameters and the same result as `models.ringformer`; but level signals are d×d matrices
multiplied with each token, attention is softmax(QKᵀ)V in separate steps, q, k and v are separate
products, and every level projects the encoder's output again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelConfig
from models.ringformer import RingDecoder, RingEncoder
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel
from models.stack import LayerNorm

Weights = Mapping[str, Tensor]  # of a ring, by name


def _signal(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.T @ b, x.unsqueeze(-1)).squeeze(-1)


def _attention(ring: Ring, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend in separate steps.

    :param q, k, v: `[B, S, d]`.
    :param mask: True where hidden, `[B, 1, T, S]`.
    :returns: `[B, T, d]`.
    """
    q, k, v = (ring.heads(x, 1)[0] for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    weights = torch.softmax(scores.masked_fill(mask, -1e9), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _self_attention(ring: Ring, weights: Weights, i: int, x: Tensor, mask: Tensor) -> Tensor:
    a, b = weights["qkv_signal_a"], weights["qkv_signal_b"]
    q, k, v = (
        F.linear(x, weights["self_attn_qkv"][j]) + _signal(x, a[i, j], b[i, j]) for j in range(3)
    )
    y = F.linear(_attention(ring, q, k, v, mask), weights["self_attn_output"])
    return ring.add_norm(x, y, LayerNorm(*weights["self_attn_layer_norm"][i]))


def _feed_forward(ring: Ring, weights: Weights, i: int, x: Tensor) -> Tensor:
    y = x + _signal(x, weights["ffn_signal_a"][i], weights["ffn_signal_b"][i])
    y = ring.dropout(F.gelu(F.linear(y, weights["ffn_up"])))
    return ring.add_norm(
        x, F.linear(y, weights["ffn_down"]), LayerNorm(*weights["ffn_layer_norm"][i])
    )


def _padding(layout: BatchLayout) -> Tensor:
    return (layout.position_indices < 0)[:, None, None]


class PublishedEncoder(RingEncoder):
    """The encoder computes so."""

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        x, mask, weights = seqs, _padding(seqs_layout), dict(self.named_parameters())
        for i in range(self.num_levels):
            x = _self_attention(self, weights, i, x, mask)
            x = _feed_forward(self, weights, i, x)
        return x


class PublishedDecoder(RingDecoder):
    """The decoder computes so, all positions at once."""

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
        num_levels: int | None = None,
    ) -> Tensor:
        x, cross_mask = seqs, _padding(encoder_output_layout)
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        mask, weights = _padding(seqs_layout) | future, dict(self.named_parameters())
        for i in range(num_levels or self.num_levels):
            x = _self_attention(self, weights, i, x, mask)
            q = F.linear(x, self.cross_attn_q)
            k, v = (F.linear(encoder_output, weight) for weight in self.cross_attn_kv)
            y = F.linear(_attention(self, q, k, v, cross_mask), self.cross_attn_output)
            x = self.add_norm(x, y, LayerNorm(*self.cross_attn_layer_norm[i]))
            x = _feed_forward(self, weights, i, x)
        return x


class PublishedModel(TranslationModel):
    """The model holds all logits at once, and computes their cross-entropy as PyTorch does."""

    def __init__(self, config: ModelConfig, vocab_sizes: tuple[int, int], pad_idx: int) -> None:
        encoder, decoder = PublishedEncoder(config), PublishedDecoder(config)
        super().__init__(config, vocab_sizes, pad_idx, encoder, decoder)

    def forward(  # type: ignore[override]
        self,
        source_seqs: Tensor,
        source_seqs_layout: BatchLayout,
        target_seqs: Tensor,
        target_seqs_layout: BatchLayout,
        targets: Tensor | None = None,
    ) -> Tensor:
        arguments = source_seqs, source_seqs_layout, target_seqs, target_seqs_layout
        logits = super().forward(*arguments)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.pad_idx, reduction="sum"
        )
