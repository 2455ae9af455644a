"""This module describes a trained model to CTranslate2 as a standard post-norm Transformer.

Level signals are linear: folded into the weights they leave a Transformer of N layers, of which
most matrices are the same in every layer. CTranslate2 stores equal tensors once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation
from fairseq2.models.transformer import (
    TransformerDecoder,
    TransformerEmbeddingFrontend,
    TransformerEncoder,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import LAYER_NORM_EPS, Architecture
from models.positions import InterleavedSinusoids
from models.ringformer import RingDecoder
from models.ringformer.ring import Ring
from models.ringformer.weights import FeedForward, SelfAttention
from models.seq2seq import TranslationModel

EXPRESSIBLE: tuple[Architecture, ...] = ("ringformer", "transformer")
"""Not `universal` (encodings are added before each layer), not `one_wide_ffn` (decoder layers have
no feed-forward network)."""


class CrossAttention(NamedTuple):
    """A layer's encoder-decoder attention has these weights."""

    q: Tensor  # [d, d]
    kv: Tensor  # [2d, d]
    output: Tensor  # [d, d]
    layer_norm: Tensor  # weight and bias, [2, d]


class Layer(NamedTuple):
    """A layer of an encoder or decoder has these weights, `[output, input]`."""

    self_attn: SelfAttention
    cross_attn: CrossAttention | None  # None in the encoder
    ffn: FeedForward | None


def ctranslate2_spec(model: TranslationModel) -> TransformerSpec:
    """Describe a model to CTranslate2, but for its vocabularies; those are to be registered.

    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    """
    config = model.config
    if config.architecture not in EXPRESSIBLE:
        raise ValueError(f"{config.architecture} is not a standard Transformer")
    spec = TransformerSpec.from_config(
        (config.encoder_levels, config.decoder_levels),
        config.num_heads,
        pre_norm=False,
        activation=Activation.GELU,
    )
    # LN(α x + y) with ε is LN(x + y/α) with ε/α².
    scale = config.residual_scale
    spec.config.layer_norm_epsilon = LAYER_NORM_EPS / scale**2
    spec.config.add_source_eos = True
    with torch.inference_mode():
        (embeddings,) = spec.encoder.embeddings
        _fill_stack(spec.encoder, model.encoder, model.encoder_frontend, embeddings, scale)
        _fill_stack(
            spec.decoder, model.decoder, model.decoder_frontend, spec.decoder.embeddings, scale
        )
        for side in (spec.encoder, spec.decoder):
            side.scale_embeddings = config.scale_embeddings
        _set(spec.decoder.projection, model.final_proj.weight, model.final_proj.bias)
    return spec


def _fill_stack(
    spec: Any,
    stack: TransformerEncoder | TransformerDecoder,
    frontend: TransformerEmbeddingFrontend,
    embeddings: Any,
    residual_scale: float,
) -> None:
    embeddings.weight = _array(frontend.get_parameter("embed.weight"))
    assert isinstance(frontend.pos_encoder, InterleavedSinusoids)
    spec.position_encodings.encodings = _array(frontend.pos_encoder.table)
    if isinstance(stack, Ring):
        layers = _ring_layers(stack)
    else:
        layers = [_transformer_layer(layer) for layer in stack.layers]
    for target, (self_attn, cross_attn, ffn) in zip(spec.layer, layers, strict=True):
        attention = target.self_attention
        _set(attention.linear[0], self_attn.qkv, self_attn.qkv_bias)
        _set(attention.linear[1], self_attn.output / residual_scale)
        _set_norm(attention.layer_norm, self_attn.layer_norm)
        if cross_attn is not None:
            q, kv, output, norm = cross_attn
            weights = (q, kv, output / residual_scale)
            for linear, weight in zip(target.attention.linear, weights, strict=True):
                _set(linear, weight)
            _set_norm(target.attention.layer_norm, norm)
        assert ffn is not None  # or the architecture is not expressible
        _set(target.ffn.linear_0, ffn.up, ffn.up_bias)
        _set(target.ffn.linear_1, ffn.down / residual_scale)
        _set_norm(target.ffn.layer_norm, ffn.layer_norm)


def _ring_layers(ring: Ring) -> list[Layer]:
    """Take W_i = W + M_i and W_up,i = W_up + W_up M_i from `levels`; static signals are biases."""
    cross: list[CrossAttention | None] = [None] * ring.num_levels
    if isinstance(ring, RingDecoder):
        q, kv, output = ring.cross_attn_q, ring.cross_attn_kv.flatten(0, 1), ring.cross_attn_output
        cross = [CrossAttention(q, kv, output, norm) for norm in ring.cross_attn_layer_norm]
    levels = zip(ring.make_levels(fold=True), cross, strict=True)
    return [Layer(level.self_attn, own, level.ffn) for level, own in levels]


def _transformer_layer(layer: nn.Module) -> Layer:
    def weights_of(attention: str) -> list[Tensor]:
        names = ("q_proj", "k_proj", "v_proj", "output_proj")
        return [layer.get_parameter(f"{attention}.{name}.weight") for name in names]

    def norm_of(sublayer: str) -> Tensor:
        norm = f"{sublayer}_layer_norm"
        names = ("weight", "bias")
        return torch.stack([layer.get_parameter(f"{norm}.{name}") for name in names])

    q, k, v, output = weights_of("self_attn")
    self_attn = SelfAttention(torch.cat([q, k, v]), None, output, norm_of("self_attn"))
    cross = None
    if hasattr(layer, "encoder_decoder_attn"):
        q, k, v, output = weights_of("encoder_decoder_attn")
        cross = CrossAttention(q, torch.cat([k, v]), output, norm_of("encoder_decoder_attn"))
    up, down = (layer.get_parameter(f"ffn.{name}_proj.weight") for name in ("inner", "output"))
    return Layer(self_attn, cross, FeedForward(up, None, down, norm_of("ffn")))


def _set(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    linear.weight = _array(weight)
    if bias is not None:
        linear.bias = _array(bias)


def _set_norm(spec: Any, norm: Tensor) -> None:
    spec.gamma, spec.beta = map(_array, norm.unbind())


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return array  # a copy because quantization works in place
