"""This module describes a trained model to CTranslate2 as a standard post-norm Transformer
(`standard_transformer.py`), of which most matrices are the same in every layer. CTranslate2 stores
equal tensors once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation
from fairseq2.models.transformer import TransformerEmbeddingFrontend
from numpy.typing import NDArray
from torch import Tensor

from models.config import LAYER_NORM_EPS
from models.positions import InterleavedSinusoids
from models.ringformer.of_transformer import rings_of
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel
from models.stack import LayerNorm
from models.standard_transformer import standard_layers


def ctranslate2_spec(model: TranslationModel) -> TransformerSpec:
    """Describe a model to CTranslate2, but for its vocabularies; those are to be registered.

    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    """
    config = model.config
    spec = TransformerSpec.from_config(
        (config.encoder_levels, config.decoder_levels),
        config.num_heads,
        pre_norm=False,
        activation=Activation.GELU,
    )
    # See `standard_layers`.
    spec.config.layer_norm_epsilon = LAYER_NORM_EPS / config.residual_scale**2
    spec.config.add_source_eos = True
    with torch.inference_mode():
        (embeddings,) = spec.encoder.embeddings
        encoder, decoder = rings_of(model)
        _fill_stack(spec.encoder, encoder, model.encoder_frontend, embeddings)
        _fill_stack(spec.decoder, decoder, model.decoder_frontend, spec.decoder.embeddings)
        for side in (spec.encoder, spec.decoder):
            side.scale_embeddings = config.scale_embeddings
        _set(spec.decoder.projection, model.final_proj.weight, model.final_proj.bias)
    return spec


def _fill_stack(
    spec: Any,
    rings: Sequence[Ring],
    frontend: TransformerEmbeddingFrontend,
    embeddings: Any,
) -> None:
    embeddings.weight = _array(frontend.get_parameter("embed.weight"))
    assert isinstance(frontend.pos_encoder, InterleavedSinusoids)
    spec.position_encodings.encodings = _array(frontend.pos_encoder.table)
    layers = standard_layers(rings)
    for target, (self_attn, cross_attn, ffn) in zip(spec.layer, layers, strict=True):
        attention = target.self_attention
        _set(attention.linear[0], self_attn.qkv, self_attn.qkv_bias)
        _set(attention.linear[1], self_attn.output)
        _set_norm(attention.layer_norm, self_attn.layer_norm)
        if cross_attn is not None:
            *weights, norm = cross_attn
            for linear, weight in zip(target.attention.linear, weights, strict=True):
                _set(linear, weight)
            _set_norm(target.attention.layer_norm, norm)
        _set(target.ffn.linear_0, ffn.up, ffn.up_bias)
        _set(target.ffn.linear_1, ffn.down)
        _set_norm(target.ffn.layer_norm, ffn.layer_norm)


def _set(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    linear.weight = _array(weight)
    if bias is not None:
        linear.bias = _array(bias)


def _set_norm(spec: Any, norm: LayerNorm) -> None:
    spec.gamma, spec.beta = map(_array, norm)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return array  # a copy because quantization works in place
