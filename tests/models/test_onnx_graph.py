"""These tests run the graphs that a ring is written as."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from models.config import LevelSignals, ModelConfig
from models.export_format import ModelError, Quantization
from models.factory import create_model
from models.onnx_graph import write_onnx
from models.search_config import SearchConfig
from models.seq2seq import TranslationModel
from pipeline.translation.onnx_translator import OnnxDecoding, load_session
from pipeline.translation.search import search_batch

VOCAB = 40
SOURCES = [[5, 9, 7, 3], [11, 3], [8, 8, 21, 14, 6, 29, 10, 3]]
SIZES = {"model_dim": 32, "num_heads": 2, "ffn_inner_dim": 64, "num_levels": 3}


def model_of(**changes: object) -> TranslationModel:
    """Return a small model with random weights everywhere, level signals included."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SIZES, "max_seq_len": 40, **changes})
    return randomised(create_model(config, (VOCAB, VOCAB), 0))


def randomised(model: TranslationModel) -> TranslationModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3)
            elif "layer_norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def log_probs_of(folder: Path, targets: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
    """Return the log-probabilities of the whole vocabulary at every position of the targets."""
    sessions = [load_session(folder / f"{side}.onnx") for side in ("encoder", "decoder")]
    decoding = OnnxDecoding(sessions[0], sessions[1], SOURCES)
    found = []
    for tokens in zip(*targets, strict=True):
        step = decoding.next_tokens(np.array(tokens)[:, None], VOCAB)
        ordered = np.empty_like(step.log_probs)
        np.put_along_axis(ordered, step.tokens, step.log_probs, 2)
        assert np.array_equal(ordered[:, :, 3:4], step.named)
        found.append(ordered[:, 0])
    return found


def expected_of(
    model: TranslationModel, targets: Sequence[Sequence[int]]
) -> list[np.ndarray[Any, Any]]:
    """Return the same of PyTorch, which reads the targets in one pass, without a cache."""
    source = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, SOURCES)), batch_first=True)
    with torch.no_grad():
        logits = model.logits(source, torch.tensor(targets))
    return list(logits.log_softmax(2).transpose(0, 1).numpy())


TARGETS = torch.randint(4, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("signals", get_args(LevelSignals))
def test_probabilities_are_pytorchs(signals: LevelSignals, tied: bool, tmp_path: Path) -> None:
    model = model_of(level_signals=signals, tied_embeddings=tied, scale_embeddings=tied)
    write_onnx(model, tmp_path, None)
    found, expected = log_probs_of(tmp_path, TARGETS), expected_of(model, TARGETS)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-4), step


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [64, 90, 208, 320])  # blocks of 64, 128 and 256, full or not
def test_int8_is_close(width: int, tied: bool, tmp_path: Path) -> None:
    sizes = {"model_dim": width, "ffn_inner_dim": width + 10, "signal_rank": 1}
    model = model_of(tied_embeddings=tied, scale_embeddings=tied, **sizes)
    write_onnx(model, tmp_path, "int8")
    for ours, theirs in zip(
        log_probs_of(tmp_path, TARGETS), expected_of(model, TARGETS), strict=True
    ):
        assert np.abs(ours - theirs).mean() < 0.03 * theirs.std()


def test_stacks_of_different_depth_and_a_scaled_residual(tmp_path: Path) -> None:
    model = model_of(encoder_levels=5, decoder_levels=2, residual_scale=1.5)
    write_onnx(model, tmp_path, None)
    for ours, theirs in zip(
        log_probs_of(tmp_path, TARGETS), expected_of(model, TARGETS), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_levels_add_only_what_they_own(quantization: Quantization | None, tmp_path: Path) -> None:
    """Twice as many levels: the layer's matrices are there once still."""
    sizes = []
    for levels in (3, 6):
        folder = tmp_path / str(levels)
        folder.mkdir()
        write_onnx(model_of(num_levels=levels, model_dim=64, signal_rank=16), folder, quantization)
        sizes.append((folder / "weights.bin").stat().st_size)
    model = model_of(num_levels=3, model_dim=64, signal_rank=16)
    own = sum(p.numel() for name, p in model.named_parameters() if "signal" in name)
    alignment = 40_000
    assert sizes[1] - sizes[0] <= own * (2 if quantization else 4) + alignment


def test_a_diverged_model_is_named(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.decoder.get_parameter("cross_attn_q")[3, 4] = torch.nan
    with pytest.raises(ModelError, match="not all weights are numbers"):
        write_onnx(model, tmp_path, "int8")
    write_onnx(model, tmp_path, None)
    sessions = [load_session(tmp_path / f"{side}.onnx") for side in ("encoder", "decoder")]
    decoding = OnnxDecoding(sessions[0], sessions[1], SOURCES)
    with pytest.raises(ModelError, match="not a number"):
        search_batch(decoding, list(map(len, SOURCES)), SearchConfig(), 40, [()] * len(SOURCES))
