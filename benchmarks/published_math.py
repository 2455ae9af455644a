"""RingFormer computed as the published implementation does, to compare ours with.

It has the parameters and the result of `models.ringformer`; but level signals are d×d matrices
multiplied with each token, attention is softmax(QKᵀ)V in separate steps, q, k and v are separate
products, and every level projects the encoder's output again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelConfig
from models.ringformer import RingDecoder, RingEncoder
from models.seq2seq import TranslationModel


def _signal(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.T @ b, x.unsqueeze(-1)).squeeze(-1)


def _attention(ring: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return the heads' outputs side by side, `[B, T, d]`.

    :param mask: True where a key is hidden, `[B, 1, T, S]`.
    """
    q, k, v = (ring.heads(x, 1)[0] for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    weights = torch.softmax(scores.masked_fill(mask, -1e9), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _self_attention(ring: Any, i: int, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (
        F.linear(x, ring.self_attn_qkv[j])
        + _signal(x, ring.qkv_signal_a[i, j], ring.qkv_signal_b[i, j])
        for j in range(3)
    )
    y = F.linear(_attention(ring, q, k, v, mask), ring.self_attn_output)
    output: Tensor = ring.add_norm(x, y, ring.self_attn_layer_norm[i])
    return output


def _feed_forward(ring: Any, i: int, x: Tensor) -> Tensor:
    y = x + _signal(x, ring.ffn_signal_a[i], ring.ffn_signal_b[i])
    y = F.linear(ring.dropout(F.gelu(F.linear(y, ring.ffn_up))), ring.ffn_down)
    output: Tensor = ring.add_norm(x, y, ring.ffn_layer_norm[i])
    return output


def _padding(layout: BatchLayout) -> Tensor:
    return (layout.position_indices < 0)[:, None, None]


class PublishedEncoder(RingEncoder):
    """The encoder, computed in that way."""

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        x, mask = seqs, _padding(seqs_layout)
        for i in range(self.num_levels):
            x = _feed_forward(self, i, _self_attention(self, i, x, mask))
        return x


class PublishedDecoder(RingDecoder):
    """The decoder, computed in that way."""

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        x, cross_mask = seqs, _padding(encoder_output_layout)
        future = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        mask = _padding(seqs_layout) | future
        for i in range(self.num_levels):
            x = _self_attention(self, i, x, mask)
            q = F.linear(x, self.cross_attn_q)
            k, v = (F.linear(encoder_output, weight) for weight in self.cross_attn_kv)
            y = F.linear(_attention(self, q, k, v, cross_mask), self.cross_attn_output)
            x = self.add_norm(x, y, self.cross_attn_layer_norm[i])
            x = _feed_forward(self, i, x)
        return x


class PublishedModel(TranslationModel):
    """A RingFormer computed in that way, with all logits at once and PyTorch's cross-entropy."""

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
