"""This command converts the published implementation's checkpoints (code of https://arxiv.org/abs/2502.13181).

python -m models.ringformer.reference CHECKPOINT.pt OUT [--num_heads 8] [--vocabulary MODEL...]
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data_prep.files import DataError, sha256_of
from data_prep.stage import run_stage
from data_prep.text import JOINT, PAD_IDX, SEPARATE
from models.config import ModelConfig
from models.export_format import ClassifierSettings, ExportSettings, write_settings, write_weights
from models.image_classifier import ImageClassifier
from models.ringformer import RingDecoder, RingEncoder
from models.ringformer.published_checkpoint import FFN_SIGNAL, copy_weights, load_checkpoint
from models.ringformer.ring import Ring
from models.ringformer.vision_reference import classifier_from_reference
from models.seq2seq import TranslationModel

log = logging.getLogger("convert")


def from_reference(
    state_dict: Mapping[str, Tensor], *, num_heads: int, pad_idx: int
) -> TranslationModel:
    """Build a model from the published implementation's state dict.

    Sizes and dtype are read off the tensors, and the checkpoint's own sinusoid table is used.
    Dropout is 0: the checkpoint does not say what it was.

    :raises KeyError: a tensor is missing.
    :raises ValueError: a tensor's shape does not fit the others, or `num_heads`.
    """
    weights = dict(state_dict)
    num_levels, rank, model_dim = weights[FFN_SIGNAL].shape
    source_embed, output = weights["encoder.emb_layer.emb_layer.weight"], weights["fc.weight"]
    positions = weights["encoder.pos_layer.pe"][0]
    config = ModelConfig(
        model_dim=model_dim,
        num_heads=num_heads,
        ffn_inner_dim=weights["encoder.encoders.0.positionWiseFeedForward.FFN1.0.weight"].size(0),
        num_levels=num_levels,
        decoder_levels=weights["decoder.lev_param_FF_01"].size(0),
        signal_rank=rank,
        dropout=0.0,
        tied_embeddings=False,
        scale_embeddings=False,
        max_seq_len=positions.size(0),
    )
    encoder, decoder = RingEncoder(config), RingDecoder(config)
    vocab_sizes = source_embed.size(0), output.size(0)
    model = TranslationModel(config, vocab_sizes, pad_idx, encoder, decoder).to(positions.dtype)
    copy_weights(weights, reference_names(model))
    for frontend in (model.encoder_frontend, model.decoder_frontend):
        assert frontend.pos_encoder is not None
        frontend.pos_encoder.table = positions.clone()  # another rounding of it costs 1e-7
    return model


def reference_names(model: TranslationModel) -> dict[str, Tensor]:
    """Map the published name of every parameter to it, or to a view into a stacked one.

    :raises TypeError: the model is no RingFormer.
    """
    names: dict[str, Tensor] = {
        "encoder.emb_layer.emb_layer.weight": model.source_embed.weight,
        "decoder.emb_layer.emb_layer.weight": model.target_embed.weight,
        "fc.weight": model.final_proj.weight,
    }
    if model.final_proj.bias is not None:
        names["fc.bias"] = model.final_proj.bias
    encoder, decoder = model.encoder, model.decoder
    if not isinstance(encoder, RingEncoder) or not isinstance(decoder, RingDecoder):
        raise TypeError("Only a RingFormer has names in the published implementation.")
    names |= _ring_names(encoder, "encoder", "encoders.0", "self_attention")
    names |= _ring_names(decoder, "decoder", "decoders.0", "masked_self_attention")
    cross = dict(zip("kv", decoder.cross_attn_kv, strict=True))
    cross |= {"q": decoder.cross_attn_q, "attn": decoder.cross_attn_output}
    for letter, weight in cross.items():
        names[f"decoder.decoders.0.enc_dec_attention.{letter}_proj.weight"] = weight
    return names


def _ring_names(ring: Ring, stack: str, layer: str, attention: str) -> dict[str, Tensor]:
    weights = dict(ring.named_parameters())
    names: dict[str, Tensor] = {
        f"{stack}.{layer}.{attention}.attn_proj.weight": weights["self_attn_output"],
        f"{stack}.{layer}.positionWiseFeedForward.FFN1.0.weight": weights["ffn_up"],
        f"{stack}.{layer}.positionWiseFeedForward.FFN2.0.weight": weights["ffn_down"],
        f"{stack}.lev_param_FF_01": weights["ffn_signal_a"],
        f"{stack}.lev_param_FF_02": weights["ffn_signal_b"],
    }
    for index, letter in enumerate("qkv"):
        names[f"{stack}.{layer}.{attention}.{letter}_proj.weight"] = weights["self_attn_qkv"][index]
        names[f"{stack}.lev_param_SA_{letter.upper()}_01"] = weights["qkv_signal_a"][:, index]
        names[f"{stack}.lev_param_SA_{letter.upper()}_02"] = weights["qkv_signal_b"][:, index]
    sublayers = ("self_attn", "cross_attn", "ffn")
    own_norms = [weights[f"{s}_layer_norm"] for s in sublayers if f"{s}_layer_norm" in weights]
    for number, norms in enumerate(own_norms, start=1):
        for level, norm in enumerate(norms):
            for kind, tensor in zip(("weight", "bias"), norm, strict=True):
                names[f"{stack}.layer_norms_{number:02d}.{level}.{kind}"] = tensor
    return names


def main() -> None:
    """Run the command."""
    arguments = _arguments()
    vocabulary: list[Path] = arguments.vocabulary
    try:
        model, settings = _convert(arguments)
        for path in vocabulary:
            path.open("rb").close()
        names = SEPARATE if len(vocabulary) > 1 else JOINT

        def build(partial: Path) -> dict[str, object]:
            write_weights(model, partial)
            write_settings(partial, settings)
            for path, name in zip(vocabulary, names, strict=False):
                shutil.copyfile(path, partial / name)
            return {}

        files = [sha256_of(path) for path in (arguments.checkpoint, *vocabulary)]
        inputs = {**settings.model_dump(mode="json"), "files": files}
        run_stage(arguments.output, inputs, build, log, stage="export")
    except KeyError as error:
        sys.exit(f"error: {arguments.checkpoint}: tensor {error} is missing")
    except (OSError, ValueError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.ringformer.reference",
        description="Convert a checkpoint of the published implementation, of translation or of "
        "image classification, to an exported model.",
    )
    parser.add_argument("checkpoint", type=Path, help="its state dict, saved by torch")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--num_heads", type=int, default=8, help="[default 8]")
    parser.add_argument("--pad_idx", type=int, default=0, help="id of padding [default 0]")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        nargs="+",
        default=[],
        metavar="MODEL",
        help="SentencePiece model to go with it, for `./run.sh translate --model OUTPUT`; two, of "
        "source and target, where each side has its own",
    )
    arguments = parser.parse_args()
    if len(arguments.vocabulary) > 2:
        parser.error("--vocabulary takes one model, or two")
    return arguments


def _convert(
    arguments: argparse.Namespace,
) -> tuple[TranslationModel | ImageClassifier, ExportSettings | ClassifierSettings]:
    """Return the model in the checkpoint, and what it is.

    :raises KeyError: a tensor is missing.
    :raises ValueError: the checkpoint, or an option, does not fit.
    """
    weights, num_heads = load_checkpoint(arguments.checkpoint), arguments.num_heads
    if FFN_SIGNAL in weights:
        if arguments.vocabulary and arguments.pad_idx != PAD_IDX:
            raise ValueError(f"--vocabulary goes with --pad_idx {PAD_IDX} only")
        model = from_reference(weights, num_heads=num_heads, pad_idx=arguments.pad_idx)
        return model, ExportSettings(format="safetensors", model=model.config)
    if arguments.vocabulary:
        raise ValueError("--vocabulary is for translation, and the checkpoint classifies images")
    classifier = classifier_from_reference(weights, num_heads=num_heads)
    return classifier, ClassifierSettings(
        format="safetensors",
        model=classifier.config,
        channels=classifier.image.channels,
        image_size=classifier.image.size,
        stored_size=classifier.image.size,
        classes=[str(number) for number in range(classifier.head.out_features)],
    )


if __name__ == "__main__":
    main()
