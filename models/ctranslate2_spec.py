"""A trained model as a standard post-norm Transformer, in CTranslate2's terms.

Level signals are linear: folded into the weights they leave a Transformer of N layers, of which
most matrices are the same in every layer. CTranslate2 stores equal tensors once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config import LAYER_NORM_EPS, Architecture
from models.ringformer.ring import Ring, RingDecoder
from models.seq2seq import TranslationModel

EXPRESSIBLE: tuple[Architecture, ...] = ("ringformer", "transformer")
"""Not `universal` (encodings are added before each layer), not `one_wide_ffn` (decoder layers have
no feed-forward network)."""


class Layer(NamedTuple):
    """Of an encoder or a decoder; weights are `[output, input]`."""

    qkv: Tensor  # [3d, d]
    qkv_bias: Tensor | None  # [3d]
    self_output: Tensor  # [d, d]
    self_norm: Tensor  # weight and bias [2, d]
    cross: tuple[Tensor, Tensor, Tensor, Tensor] | None  # q, k and v, output, norm
    up: Tensor  # [m, d]
    up_bias: Tensor | None  # [m]
    down: Tensor  # [d, m]
    ffn_norm: Tensor  # [2, d]


def ctranslate2_spec(model: TranslationModel) -> TransformerSpec:
    """The model without its vocabularies; those are to be registered.

    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    """
    config = model.config
    if config.architecture not in EXPRESSIBLE:
        raise ValueError(f"{config.architecture} is not a standard Transformer")
    spec = TransformerSpec.from_config(
        config.num_levels, config.num_heads, pre_norm=False, activation=Activation.GELU
    )
    spec.config.layer_norm_epsilon = LAYER_NORM_EPS
    spec.config.add_source_eos = True
    with torch.inference_mode():
        (embeddings,) = spec.encoder.embeddings
        _fill_stack(spec.encoder, model.encoder, model.encoder_frontend, embeddings)
        _fill_stack(spec.decoder, model.decoder, model.decoder_frontend, spec.decoder.embeddings)
        for side in (spec.encoder, spec.decoder):
            side.scale_embeddings = config.scale_embeddings
        _set(spec.decoder.projection, model.final_proj.weight, model.final_proj.bias)
    return spec


def _fill_stack(spec: Any, stack: nn.Module, frontend: Any, embeddings: Any) -> None:
    embeddings.weight = _array(frontend.embed.weight)
    spec.position_encodings.encodings = _array(frontend.pos_encoder.table)
    layers = _ring_layers(stack) if isinstance(stack, Ring) else _transformer_layers(stack)
    for target, layer in zip(spec.layer, layers, strict=True):
        attention = target.self_attention
        _set(attention.linear[0], layer.qkv, layer.qkv_bias)
        _set(attention.linear[1], layer.self_output)
        _set_norm(attention.layer_norm, layer.self_norm)
        if layer.cross is not None:
            *weights, norm = layer.cross
            for linear, weight in zip(target.attention.linear, weights, strict=True):
                _set(linear, weight)
            _set_norm(target.attention.layer_norm, norm)
        _set(target.ffn.linear_0, layer.up, layer.up_bias)
        _set(target.ffn.linear_1, layer.down)
        _set_norm(target.ffn.layer_norm, layer.ffn_norm)


def _ring_layers(ring: Ring) -> list[Layer]:
    """W_i = W + M_i and W_up,i = W_up + W_up M_i are `Ring.levels`; static signals are biases."""
    norms = ring.cross_attn_layer_norm.unbind() if isinstance(ring, RingDecoder) else ()
    layers = []
    for index, level in enumerate(ring.levels()):
        own = None
        if isinstance(ring, RingDecoder):
            kv = ring.cross_attn_kv.flatten(0, 1)
            own = ring.cross_attn_q, kv, ring.cross_attn_output, norms[index]
        layers.append(
            Layer(
                level.qkv, level.qkv_bias, level.self_attn_output, level.self_attn_layer_norm,
                own, level.ffn_up, level.ffn_up_bias, level.ffn_down, level.ffn_layer_norm,
            )
        )  # fmt: skip
    return layers


def _transformer_layers(stack: Any) -> list[Layer]:
    layers = []
    for layer in stack.layers:
        q, k, v, output = _projections(layer.self_attn)
        cross = None
        if hasattr(layer, "encoder_decoder_attn"):
            cross_q, cross_k, cross_v, cross_output = _projections(layer.encoder_decoder_attn)
            norm = _norm(layer.encoder_decoder_attn_layer_norm)
            cross = cross_q, torch.cat([cross_k, cross_v]), cross_output, norm
        layers.append(
            Layer(
                torch.cat([q, k, v]), None, output, _norm(layer.self_attn_layer_norm), cross,
                layer.ffn.inner_proj.weight, None, layer.ffn.output_proj.weight,
                _norm(layer.ffn_layer_norm),
            )
        )  # fmt: skip
    return layers


def _projections(attention: Any) -> list[Tensor]:
    names = ("q_proj", "k_proj", "v_proj", "output_proj")
    return [getattr(attention, name).weight for name in names]


def _norm(module: Any) -> Tensor:
    return torch.stack([module.weight, module.bias])


def _set(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    linear.weight = _array(weight)
    if bias is not None:
        linear.bias = _array(bias)


def _set_norm(spec: Any, norm: Tensor) -> None:
    spec.gamma, spec.beta = map(_array, norm.unbind())


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return array  # a copy because quantization works in place
