"""These tests run the graphs that image classifiers are written as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from models.config import Architecture, LevelSignals
from models.image_classifier import ImageClassifier
from models.onnx_classifier import write_onnx_classifier
from pipeline.translation.onnx_translator import load_session
from tests.models.test_models import WIDE
from tests.models.test_vision import MODELS, images, tiny


def classifier(
    architecture: Architecture, signals: LevelSignals, **changes: object
) -> ImageClassifier:
    model = tiny(architecture, level_signals=signals, dropout=0.1, **changes).float().eval()
    model.set_normalisation([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    return model


@pytest.mark.parametrize(("architecture", "signals"), MODELS)
def test_logits_are_pytorchs(
    architecture: Architecture, signals: LevelSignals, tmp_path: Path
) -> None:
    check_logits(classifier(architecture, signals), tmp_path)


def test_logits_of_a_wide_ring_are_pytorchs(tmp_path: Path) -> None:
    check_logits(classifier("ringformer", "all", model_dim=WIDE, num_levels=1), tmp_path)


def check_logits(model: ImageClassifier, tmp_path: Path) -> None:
    write_onnx_classifier(model, tmp_path)
    session = load_session(tmp_path / "model.onnx")
    for count in (1, 5):
        (found,) = session.run(["logits"], {"images": images(count).numpy()})
        with torch.no_grad():
            assert np.abs(found - model(images(count)).numpy()).max() < 1e-5


def test_the_file_is_standard_and_always_the_same(tmp_path: Path) -> None:
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_onnx_classifier(classifier("ringformer", "all"), folder)
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
        written.append((folder / "model.onnx").read_bytes())
    assert written[0] == written[1]
    graph = onnx.load_model_from_string(written[0]).graph
    assert {node.domain for node in graph.node} == {""}


def test_levels_add_only_what_they_own(tmp_path: Path) -> None:
    """Twice as many levels: the layer's matrices are there once still."""
    sizes, parameters = [], []
    for levels in (3, 6):
        model = tiny(num_levels=levels, model_dim=64, ffn_inner_dim=256).float()
        write_onnx_classifier(model, tmp_path)
        sizes.append((tmp_path / "model.onnx").stat().st_size)
        parameters.append(sum(p.numel() for p in model.parameters()))
    nodes = 20_000
    assert sizes[1] - sizes[0] <= 4 * (parameters[1] - parameters[0]) + nodes
