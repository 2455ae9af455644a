"""This module makes rings of a Transformer: a layer of its own is a ring of one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.config import EXPRESSIBLE
from models.ringformer.encoder_decoder import RingDecoder, RingEncoder
from models.seq2seq import TranslationModel

R = TypeVar("R", RingEncoder, RingDecoder)


def rings_of(model: TranslationModel) -> tuple[Sequence[RingEncoder], Sequence[RingDecoder]]:
    """Return the rings that are an encoder when they run one after the other, and a decoder's.

    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    """
    config, encoder, decoder = model.config, model.encoder, model.decoder
    if config.architecture not in EXPRESSIBLE:
        raise ValueError(f"{config.architecture} is not a standard Transformer")
    if isinstance(encoder, RingEncoder) and isinstance(decoder, RingDecoder):
        return [encoder], [decoder]
    keys = {"architecture": "ringformer", "level_signals": "none"}
    one_level = config.model_copy(update={**keys, "encoder_levels": 1, "decoder_levels": 1})
    return (
        [_filled(RingEncoder(one_level), layer) for layer in encoder.layers],
        [_filled(RingDecoder(one_level), layer) for layer in decoder.layers],
    )


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
