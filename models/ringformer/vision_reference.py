"""This module makes image classifiers of the published implementation's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from models.config import VisionConfig
from models.image_classifier import ImageClassifier, ImageShape
from models.ringformer.published_checkpoint import VISION_FFN_SIGNAL, copy_weights
from models.ringformer.vision_ring import VisionRing

EMBEDDINGS, ENCODER = "transformer.embeddings", "transformer.encoder"
QKV = {"query": "Q", "key": "K", "value": "V"}  # how the projections, and their signals, are called


def classifier_from_reference(
    state_dict: Mapping[str, Tensor], *, num_heads: int
) -> ImageClassifier:
    """Build a classifier from the published implementation's state dict.

    Sizes and dtype are read off the tensors, and the checkpoint's own table of positions is used.
    Dropout is 0, and images are not normalised: the checkpoint says neither.

    :raises KeyError: a tensor is missing.
    :raises ValueError: a tensor's shape does not fit the others, or `num_heads`.
    """
    weights = dict(state_dict)
    num_levels, ffn_rank, model_dim = weights[VISION_FFN_SIGNAL].shape
    patches = weights[f"{EMBEDDINGS}.patch_embeddings.weight"]
    positions = weights[f"{EMBEDDINGS}.position_embeddings.pos_embed"][0]
    patch_size, patches_of_a_side = patches.size(-1), isqrt(len(positions) - 1)
    if len(positions) != 1 + patches_of_a_side**2:
        raise ValueError(f"{len(positions)} positions are not of a class token and a square image")
    config = VisionConfig(
        model_dim=model_dim,
        num_heads=num_heads,
        ffn_inner_dim=weights[f"{ENCODER}.layers.0.ffn.fc1.weight"].size(0),
        num_levels=num_levels,
        dropout=0.0,
        patch_size=patch_size,
        attention_signal_rank=weights[f"{ENCODER}.ATTN_lev_embed_Q_01"].size(1),
        ffn_signal_rank=ffn_rank,
    )
    image = ImageShape(patches.size(1), patches_of_a_side * patch_size)
    encoder, classes = VisionRing(config, len(positions)), weights["head.weight"].size(0)
    model = ImageClassifier(config, image, classes, encoder).to(patches.dtype)
    copy_weights(weights, classifier_reference_names(model))
    assert model.pos_encoder is not None
    model.pos_encoder.table = positions.clone()
    return model


def classifier_reference_names(model: ImageClassifier) -> dict[str, Tensor]:
    """Map the published name of every parameter to it, or to a view into a stacked one.

    :raises TypeError: the model is no RingFormer.
    """
    if not isinstance(model.encoder, VisionRing) or model.config.architecture != "ringformer":
        raise TypeError("Only a RingFormer has names in the published implementation.")
    names: dict[str, Tensor] = {f"{EMBEDDINGS}.cls_token": model.class_token[None, None]}
    for place, module in (
        (f"{EMBEDDINGS}.patch_embeddings", model.patches),
        (f"{ENCODER}.encoder_norm", model.final_layer_norm),
        ("head", model.head),
    ):
        names |= {f"{place}.{kind}": tensor for kind, tensor in module.named_parameters()}
    return names | _ring_names(model.encoder)


def _ring_names(ring: VisionRing) -> dict[str, Tensor]:
    weights, layer = dict(ring.named_parameters()), f"{ENCODER}.layers.0"
    names: dict[str, Tensor] = {
        f"{ENCODER}.lev_embed_FF_01": weights["ffn_signal_a"],
        f"{ENCODER}.lev_embed_FF_02": weights["ffn_signal_b"],
    }
    for theirs, ours in (
        ("attn.out", "self_attn_output"),
        ("ffn.fc1", "ffn_up"),
        ("ffn.fc2", "ffn_down"),
    ):
        names[f"{layer}.{theirs}.weight"] = weights[ours]
        names[f"{layer}.{theirs}.bias"] = weights[f"{ours}_bias"]
    biases = weights["self_attn_qkv_bias"].chunk(3)
    for index, (projection, letter) in enumerate(QKV.items()):
        names[f"{layer}.attn.{projection}.weight"] = weights["self_attn_qkv"][index]
        names[f"{layer}.attn.{projection}.bias"] = biases[index]
        names[f"{ENCODER}.ATTN_lev_embed_{letter}_01"] = weights["qkv_signal_a"][:, index]
        names[f"{ENCODER}.ATTN_lev_embed_{letter}_02"] = weights["qkv_signal_b"][:, index]
    for theirs, ours in (("ATTN", "self_attn"), ("FF", "ffn")):
        for level, norm in enumerate(weights[f"{ours}_layer_norm"]):
            for kind, tensor in zip(("weight", "bias"), norm, strict=True):
                names[f"{ENCODER}.{theirs}_layer_norms.{level}.{kind}"] = tensor
    return names
