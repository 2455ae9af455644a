"""The plain post-LN Transformer of fairseq2's own layers is RingFormer's baseline.

Activation, norms and the absence of biases are RingFormer's, so that only the sharing differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fairseq2.models.transformer import (
    SDPA,
    AttentionBiasCache,
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerDecoder,
    StandardTransformerDecoderLayer,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
)
from fairseq2.nn import BatchLayout, Linear, ResidualConnect, StandardLayerNorm
from torch import Tensor, nn
from torch.compiler import is_compiling

from models.attention import attention
from models.config import LAYER_NORM_EPS, LayersConfig, ModelConfig
from models.padding import padding_mask


class RightPaddedSDPA(SDPA):
    """The attention is PyTorch's fused one, with one mask per batch.

    fairseq2's own builds one per sequence in Python. Causal attention over sequences that are
    padded on the right needs none.
    """

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self,
        q: Tensor,
        q_layout: BatchLayout,
        k: Tensor,
        k_layout: BatchLayout,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        :param q, k, v: `[B, S, H, d/H]`.
        :returns: `[B, S, H, d/H]`, and no attention weights.
        """
        causal = self.causal
        if q.size(1) == 1:  # it is the last; `and` would leave a compiled graph with a symbol
            causal = False
        heads = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None if self.causal else padding_mask(k_layout, always=is_compiling()),
            causal=causal,
        )
        return heads.transpose(1, 2), None


class ScaledResidual(ResidualConnect):
    """The residual connection adds α times its input. (fairseq2's own cannot be constructed.)"""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, seqs: Tensor, residual: Tensor) -> Tensor:
        """Return y + α x."""
        return torch.add(seqs, residual, alpha=self.scale)


def multihead_attention(
    config: LayersConfig, *, causal: bool = False, bias: bool = False
) -> StandardMultiheadAttention:
    """Build an attention, freshly initialised."""
    return StandardMultiheadAttention(
        config.model_dim, config.num_heads, RightPaddedSDPA(causal), bias=bias
    )


def norm(config: LayersConfig) -> StandardLayerNorm:
    """Build a LayerNorm, freshly initialised."""
    return StandardLayerNorm(config.model_dim, bias=True, eps=LAYER_NORM_EPS)


def ffn(
    config: LayersConfig, *, bias: bool = False, init: Callable[[Linear], None] | None = None
) -> StandardFeedForwardNetwork:
    """Build a feed-forward network.

    :param init: initialises a projection; None: as fairseq2 does.
    """
    return StandardFeedForwardNetwork(
        config.model_dim,
        config.ffn_inner_dim,
        bias,
        inner_activation=nn.GELU(),
        inner_dropout_p=config.dropout,
        proj_init_fn=init,
    )


def transformer_encoder(config: ModelConfig) -> StandardTransformerEncoder:
    """Build the encoder, freshly initialised."""
    residual = ScaledResidual(config.residual_scale)
    encoder = StandardTransformerEncoder(
        [
            StandardTransformerEncoderLayer(
                multihead_attention(config),
                norm(config),
                ffn(config),
                norm(config),
                self_attn_residual=residual,
                ffn_residual=residual,
                dropout_p=config.dropout,
            )
            for _ in range(config.encoder_levels)
        ]
    )
    start_small(encoder, config.encoder_levels / config.residual_scale)
    return encoder


def transformer_decoder(config: ModelConfig) -> StandardTransformerDecoder:
    """Build the decoder, freshly initialised."""
    residual = ScaledResidual(config.residual_scale)
    decoder = StandardTransformerDecoder(
        [
            StandardTransformerDecoderLayer(
                multihead_attention(config, causal=True),
                norm(config),
                multihead_attention(config),
                norm(config),
                ffn(config),
                norm(config),
                self_attn_residual=residual,
                encoder_decoder_attn_residual=residual,
                ffn_residual=residual,
                dropout_p=config.dropout,
            )
            for _ in range(config.decoder_levels)
        ]
    )
    start_small(decoder, config.decoder_levels / config.residual_scale)
    return decoder


def start_small(stack: nn.Module, divisor: float) -> None:
    """Scale what a layer adds to the residual stream to α/N, as in a ring (`Stack.matrices`)."""
    with torch.no_grad():
        for name, weight in stack.named_parameters():
            if name.endswith("output_proj.weight"):  # of attention, and of the FFN
                weight.div_(divisor)
