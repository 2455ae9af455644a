"""The plain pre-LN Transformer of fairseq2's own layers, a ViT's, is the vision ring's baseline.

Activation, norms, biases and dropout are the ring's, so that only the sharing differs.
"""

from __future__ import annotations

import numpy as np
import torch
from fairseq2.models.transformer import (
    AttentionBiasCache,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import Linear
from torch import Tensor, nn

from models.config import VisionConfig
from models.padding import PaddedLayout
from models.ringformer.vision_weights import (
    INIT_FFN,
    INIT_FFN_BIAS,
    FeedForward,
    Level,
    SelfAttention,
)
from models.stack import LayerNorm
from models.transformer import ffn, multihead_attention, norm, start_small


class VisionTransformer(nn.Module):
    """The encoder is a sequence of layers; images are all of one size, so nothing is padded."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(config) for _ in range(config.num_levels))
        self.dropout = nn.Dropout(config.dropout)
        start_small(self, config.num_levels)

    def forward(self, x: Tensor, read: int | None = None) -> Tensor:
        """Encode a batch.

        :param x: embedded class token and patches, `[B, S, d]`.
        :param read: how many positions, from the first on, the last layer computes; None: all.
        :returns: the encoder output, before the final LayerNorm, `[B, read, d]`.
        """
        layout, no_biases = _layout(x), AttentionBiasCache()
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, layout, no_biases)
        assert isinstance(last, StandardTransformerEncoderLayer)
        if read is None:
            return last(x, layout, no_biases)
        kv, x = last.self_attn_layer_norm(x), x[:, :read]
        x = x + last.self_attn(
            kv[:, :read], _layout(x), keys=kv, keys_layout=layout, values=kv, bias_cache=no_biases
        )
        encoded: Tensor = x + self.dropout(last.ffn(last.ffn_layer_norm(x)))
        return encoded

    def levels(self) -> list[Level]:
        """Return the layers' weights, as a ring has its own at each level."""
        return [_weights(layer) for layer in self.layers]


def _layout(x: Tensor) -> PaddedLayout:
    batch, length, _ = x.shape
    return PaddedLayout(np.full(batch, length), length, x.device)


def _layer(config: VisionConfig) -> StandardTransformerEncoderLayer:
    layer = StandardTransformerEncoderLayer(
        multihead_attention(config, bias=True),
        norm(config),
        ffn(config, bias=True, init=_init_ffn),
        norm(config),
        norm_order=TransformerNormOrder.PRE,
        dropout_p=config.dropout,
    )
    layer.self_attn_dropout = None  # as in the authors' code
    return layer


def _weights(layer: nn.Module) -> Level:
    def projection(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = (layer.get_parameter(f"{name}_proj.{kind}") for kind in ("weight", "bias"))
        return weight, bias

    def layer_norm(name: str) -> LayerNorm:
        return LayerNorm(*(layer.get_parameter(f"{name}.{kind}") for kind in ("weight", "bias")))

    qkv = [projection(f"self_attn.{which}") for which in "qkv"]
    return Level(
        SelfAttention(
            layer_norm("self_attn_layer_norm"),
            torch.cat([weight for weight, _ in qkv]),
            torch.cat([bias for _, bias in qkv]),
            *projection("self_attn.output"),
            signal=None,
        ),
        FeedForward(
            layer_norm("ffn_layer_norm"),
            *projection("ffn.inner"),
            *projection("ffn.output"),
            static=None,
            signal=None,
        ),
    )


def _init_ffn(projection: Linear) -> None:
    assert projection.bias is not None
    INIT_FFN(projection.weight)
    INIT_FFN_BIAS(projection.bias)
