"""This module makes rings of a Transformer: a layer of its own is a ring of one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from fairseq2.models.transformer import TransformerDecoder, TransformerEncoder
from torch import Tensor, nn

from models.config import ModelConfig
from models.ringformer.encoder_decoder import RingDecoder, RingEncoder

R = TypeVar("R", RingEncoder, RingDecoder)


def encoder_rings(stack: TransformerEncoder, config: ModelConfig) -> Sequence[RingEncoder]:
    """Return the rings that are an encoder when they run one after the other: a ring is one."""
    if isinstance(stack, RingEncoder):
        return [stack]
    return [_filled(RingEncoder(_of_one_level(config)), layer) for layer in stack.layers]


def decoder_rings(stack: TransformerDecoder, config: ModelConfig) -> Sequence[RingDecoder]:
    """Return the same for a decoder."""
    if isinstance(stack, RingDecoder):
        return [stack]
    return [_filled(RingDecoder(_of_one_level(config)), layer) for layer in stack.layers]


def _of_one_level(config: ModelConfig) -> ModelConfig:
    keys = {"architecture": "ringformer", "level_signals": "none"}
    return config.model_copy(update={**keys, "encoder_levels": 1, "decoder_levels": 1})


def _filled(ring: R, layer: nn.Module) -> R:
    """Give a ring of one level the weights of a layer, and return it."""

    def stacked(place: str, *names: str) -> Tensor:
        return torch.stack([layer.get_parameter(f"{place}{name}") for name in names])

    def matrices(place: str, names: str) -> Tensor:
        return stacked(place, *(f".{name}_proj.weight" for name in names.split()))

    weights = {
        "self_attn_qkv": matrices("self_attn", "q k v"),
        "self_attn_output": matrices("self_attn", "output")[0],
        "self_attn_layer_norm": stacked("self_attn_layer_norm", ".weight", ".bias")[None],
        "ffn_up": matrices("ffn", "inner")[0],
        "ffn_down": matrices("ffn", "output")[0],
        "ffn_layer_norm": stacked("ffn_layer_norm", ".weight", ".bias")[None],
    }
    if isinstance(ring, RingDecoder):
        cross = "encoder_decoder_attn"
        weights["cross_attn_q"] = matrices(cross, "q")[0]
        weights["cross_attn_kv"] = matrices(cross, "k v")
        weights["cross_attn_output"] = matrices(cross, "output")[0]
        weights["cross_attn_layer_norm"] = stacked(f"{cross}_layer_norm", ".weight", ".bias")[None]
    ring.load_state_dict(weights)
    return ring
