"""This module describes a trained model to Hugging Face's `transformers` as a `MarianMTModel`: a
standard post-norm Transformer (`standard_transformer.py`).

Marian's sinusoids have sines in one half and cosines in the other, where ours alternate. So what is
of the model's dimension changes places: columns of what reads it, rows of what writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX
from models.ringformer.of_transformer import rings_of
from models.seq2seq import TranslationModel
from models.stack import LayerNorm
from models.standard_transformer import Layer, standard_layers

Named = Iterator[tuple[str, Tensor]]


def marian_config(model: TranslationModel) -> dict[str, Any]:
    """Return the content of config.json."""
    config, size = model.config, _vocab_size(model)
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "d_model": config.model_dim,
        "encoder_layers": config.encoder_levels,
        "decoder_layers": config.decoder_levels,
        "encoder_attention_heads": config.num_heads,
        "decoder_attention_heads": config.num_heads,
        "encoder_ffn_dim": config.ffn_inner_dim,
        "decoder_ffn_dim": config.ffn_inner_dim,
        "activation_function": "gelu",
        "dropout": config.dropout,
        "activation_dropout": config.dropout,
        "attention_dropout": 0.0,
        "max_position_embeddings": config.max_seq_len,
        "scale_embedding": config.scale_embeddings,
        "vocab_size": size,
        "decoder_vocab_size": size,
        "share_encoder_decoder_embeddings": config.tied_embeddings,
        "tie_word_embeddings": config.tied_embeddings,
        "pad_token_id": PAD_IDX,
        "bos_token_id": BOS_IDX,
        "eos_token_id": EOS_IDX,
        "decoder_start_token_id": BOS_IDX,
        "forced_eos_token_id": EOS_IDX,
    }


@torch.no_grad()
def marian_weights(model: TranslationModel) -> dict[str, Tensor]:
    """Return the weights in float32 by Marian's names, tied ones once.

    Sinusoids are not among them: Marian makes its own. Its LayerNorms have ε = 1e-5, where those of
    a residual_scale α should have 1e-5/α² (`standard_layers`).

    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    """
    rings, dim = rings_of(model), model.config.model_dim
    places = torch.tensor([*range(0, dim, 2), *range(1, dim, 2)])
    weights = dict(_embeddings(model, places))
    for side, stack in zip(("encoder", "decoder"), rings, strict=True):
        for index, layer in enumerate(standard_layers(stack)):
            for name, tensor in _layer(layer, places):
                weights[f"model.{side}.layers.{index}.{name}"] = tensor
    return {name: tensor.float().cpu().contiguous() for name, tensor in weights.items()}


def _vocab_size(model: TranslationModel) -> int:
    """Return the size of both vocabularies: beam search there knows but one."""
    return max(model.source_embed.num_embeddings, model.target_embed.num_embeddings)


def _embeddings(model: TranslationModel, places: Tensor) -> Named:
    """Give embeddings and output projection, with rows for as many tokens on both sides. Those that
    are no tokens of ours are never predicted."""
    size = _vocab_size(model)

    def padded(rows: Tensor, value: float = 0.0) -> Tensor:
        return F.pad(rows.T, (0, size - len(rows)), value=value).T

    if model.config.tied_embeddings:
        yield "model.shared.weight", model.source_embed.weight[:, places]
        return
    yield "model.encoder.embed_tokens.weight", padded(model.source_embed.weight[:, places])
    yield "model.decoder.embed_tokens.weight", padded(model.target_embed.weight[:, places])
    yield "lm_head.weight", padded(model.final_proj.weight[:, places])
    assert model.final_proj.bias is not None
    yield "final_logits_bias", padded(model.final_proj.bias[:, None], -torch.inf).T


def _layer(layer: Layer, places: Tensor) -> Named:
    self_attn, cross, ffn = layer
    yield from _attention("self_attn", self_attn.qkv[:, places], self_attn.qkv_bias)
    yield from _linear("self_attn.out_proj", self_attn.output[places])
    yield from _norm("self_attn_layer_norm", self_attn.layer_norm, places)
    if cross is not None:
        yield from _attention("encoder_attn", torch.cat([cross.q, cross.kv])[:, places], None)
        yield from _linear("encoder_attn.out_proj", cross.output[places])
        yield from _norm("encoder_attn_layer_norm", cross.layer_norm, places)
    yield from _linear("fc1", ffn.up[:, places], ffn.up_bias)
    yield from _linear("fc2", ffn.down[places])
    yield from _norm("final_layer_norm", ffn.layer_norm, places)


def _attention(name: str, qkv: Tensor, bias: Tensor | None) -> Named:
    biases = [None] * 3 if bias is None else bias.chunk(3)
    for which, weight, own in zip("qkv", qkv.chunk(3), biases, strict=True):
        yield from _linear(f"{name}.{which}_proj", weight, own)


def _linear(name: str, weight: Tensor, bias: Tensor | None = None) -> Named:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight.new_zeros(len(weight)) if bias is None else bias


def _norm(name: str, norm: LayerNorm, places: Tensor) -> Named:
    yield f"{name}.weight", norm.weight[places]
    yield f"{name}.bias", norm.bias[places]
