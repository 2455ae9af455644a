"""This module describes a trained model as a standard post-norm Transformer, which engines know.

Level signals are linear: folded into the weights they leave a Transformer of N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.ringformer import RingDecoder
from models.ringformer.ring import Ring
from models.ringformer.weights import FeedForward, SelfAttention
from models.stack import LayerNorm


class CrossAttention(NamedTuple):
    """A layer's encoder-decoder attention has these weights."""

    q: Tensor  # [d, d]
    kv: Tensor  # [2d, d]
    output: Tensor  # [d, d]
    layer_norm: LayerNorm


class Layer(NamedTuple):
    """A layer of an encoder or decoder has these weights, `[output, input]`."""

    self_attn: SelfAttention
    cross_attn: CrossAttention | None  # None in the encoder
    ffn: FeedForward


def standard_layers(rings: Sequence[Ring]) -> list[Layer]:
    """Return the layers of an encoder or decoder, each computing LN(x + y) sublayer by sublayer.

    LN(α x + y) with ε is LN(x + y/α) with ε/α²; the engine has to be told the latter.

    :param rings: that run one after the other, see `of_transformer.py`.
    """
    return [layer for ring in rings for layer in _layers(ring)]


def _layers(ring: Ring) -> list[Layer]:
    """Take W_i = W + M_i and W_up,i = W_up + W_up M_i from `levels`; static signals are biases."""
    scale = ring.residual_scale
    cross: list[CrossAttention | None] = [None] * ring.num_levels
    if isinstance(ring, RingDecoder):
        q, kv = ring.cross_attn_q, ring.cross_attn_kv.flatten(0, 1)
        output = ring.cross_attn_output / scale
        cross = [CrossAttention(q, kv, output, LayerNorm(*n)) for n in ring.cross_attn_layer_norm]
    layers = []
    for (own, ffn), cross_attn in zip(ring.make_levels(fold=True), cross, strict=True):
        assert ffn is not None  # or the architecture is not expressible
        self_attn = own._replace(output=own.output / scale)
        layers.append(Layer(self_attn, cross_attn, ffn._replace(down=ffn.down / scale)))
    return layers
