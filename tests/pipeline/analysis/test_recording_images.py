"""A recording of an image classifier has what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.config import Architecture, VisionConfig
from models.factory import create_classifier
from models.image_classifier import ImageClassifier, ImageShape
from models.recording import StackRecording, record
from models.ringformer import VisionRing
from models.ringformer.vision_reference import classifier_from_reference
from pipeline.analysis.signals import SignalSizes, Sizes
from tests.pipeline.analysis.test_recording import KernelCalls

MODELS: list[Any] = [
    *({"architecture": each} for each in get_args(Architecture)),
    {"level_signals": "static"},
]


def tiny(**changes: object) -> ImageClassifier:
    """Build a small float64 classifier of images with 2 × 2 patches."""
    torch.manual_seed(0)
    sizes = {"model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 3, "dropout": 0.1}
    config = VisionConfig.model_validate({**sizes, "patch_size": 4, **changes})
    model = create_classifier(config, ImageShape(3, 8), classes=5).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3)
    return model


def recorded(model: ImageClassifier, images: Tensor) -> StackRecording:
    return record({"encoder": model.encoder}, partial(model.encode, images))["encoder"]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: str(*changes.values()))
def test_states_and_attention(changes: dict[str, object], images: Tensor) -> None:
    model = tiny(**changes)
    with KernelCalls() as calls:
        found = recorded(model, images)
    assert found.cross_attention is None
    for matrix, (v, result) in zip(found.self_attention, calls.made, strict=True):
        torch.testing.assert_close(matrix @ v, result)
    with torch.no_grad():
        torch.testing.assert_close(found.states[0], model.embed(images))
        torch.testing.assert_close(
            model.final_layer_norm(found.states[-1]), model.encode(images), rtol=0, atol=0
        )
        x = found.states[0]
        for i, state in enumerate(found.states[1:]):
            if isinstance(model.encoder, VisionRing):
                x = model.encoder.add_encodings(x, i, range(5))
                x = model.encoder.layer(x, model.encoder.levels()[i])
                torch.testing.assert_close(state, x)


def test_attention_is_that_of_the_published_implementation(shared: Path) -> None:
    path = shared / "reference" / "vision_ring_d32.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        heads = int(file.metadata()["num_heads"])
    weights = {
        name.removeprefix("weight."): tensor
        for name, tensor in tensors.items()
        if name.startswith("weight.")
    }
    model = classifier_from_reference(weights, num_heads=heads).eval()
    found = recorded(model, tensors["input.image"])
    for level, attention in enumerate(found.self_attention):
        torch.testing.assert_close(
            attention, tensors[f"output.attention.{level}"], rtol=0, atol=1e-12
        )


def sizes(model: ImageClassifier, images: Tensor) -> Mapping[str, Sizes]:
    """Return the sizes of the signals in a batch."""
    measure = SignalSizes()
    assert isinstance(model.encoder, VisionRing)
    measure.add(model.encoder, recorded(model, images), torch.ones(6, 5, dtype=torch.bool))
    return measure.value()


def test_signals_of_known_size(images: Tensor) -> None:
    """M is s I. Of the feed-forward network LayerNorm takes all of that away again."""
    model = tiny(attention_signal_rank=16, ffn_signal_rank=16)
    ring, levels = model.encoder, torch.arange(1, 4, dtype=torch.float64)
    assert isinstance(ring, VisionRing)
    identity = torch.eye(16, dtype=torch.float64)
    with torch.no_grad():
        for a, b in (
            (ring.qkv_signal_a, ring.qkv_signal_b),
            (ring.ffn_signal_a, ring.ffn_signal_b),
        ):
            assert a is not None
            assert b is not None
            a.copy_((levels.view(3, *[1] * (a.dim() - 1)) * identity).expand_as(a))
            b.copy_(identity.expand_as(b))
    found = sizes(model, images)
    assert list(found) == ["q", "k", "v", "ffn"]
    for share in found.values():
        torch.testing.assert_close(share.of_input, levels)
    assert found["ffn"].of_projection.max() < 1e-3  # but for its epsilon
    x = model.embed(images)
    read = torch.nn.functional.layer_norm(x, (16,))
    ratio = x.norm(dim=-1) / (read @ ring.self_attn_qkv[0].T).norm(dim=-1)
    torch.testing.assert_close(found["q"].of_projection[0], ratio.mean().detach())


def test_which_signals_there_are(images: Tensor) -> None:
    assert list(sizes(tiny(level_signals="static"), images)) == ["q", "k", "v", "ffn"]
    assert list(sizes(tiny(level_signals="ffn"), images)) == ["ffn"]
    assert not sizes(tiny(architecture="universal"), images)
