"""These tests hold the vision ring to the published implementation's golden vectors, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from models.config import ActivationCheckpointing, VisionConfig
from models.export_format import load_weights, read_classifier_settings
from models.factory import create_classifier
from models.image_classifier import ImageClassifier, ImageShape
from models.ringformer.vision_reference import classifier_from_reference, classifier_reference_names
from tests.conftest import Command
from tests.models.test_vision import randomised, tiny

TOLERANCE = 1e-9
FILE = Path("reference", "vision_ring_d32.safetensors")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / FILE)


@pytest.fixture(scope="module")
def weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}


@pytest.fixture
def model(weights: dict[str, Tensor], shared: Path) -> ImageClassifier:
    with safe_open(shared / FILE, "pt") as file:
        num_heads = int(file.metadata()["num_heads"])
    return classifier_from_reference(weights, num_heads=num_heads)


def test_encoder_logits_and_loss(model: ImageClassifier, golden: dict[str, Tensor]) -> None:
    encoded, logits = model.encode(golden["input.image"]), model(golden["input.image"])
    assert (encoded - golden["output.encoder"]).abs().max() < TOLERANCE
    assert (logits - golden["output.logits"]).abs().max() < TOLERANCE
    loss = F.cross_entropy(logits, golden["input.label"])
    assert abs(loss - golden["output.loss"]) < TOLERANCE


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_gradients_of_every_parameter(
    model: ImageClassifier, golden: dict[str, Tensor], levels: int
) -> None:
    model.checkpoint_activations(ActivationCheckpointing(levels=levels))
    F.cross_entropy(  # type: ignore[no-untyped-call]
        model(golden["input.image"]), golden["input.label"]
    ).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that names lead to gradients
    gradients = classifier_reference_names(model)
    expected = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < TOLERANCE, name


def test_all_sizes_are_the_checkpoints() -> None:
    """A model of other sizes, put under the published names, comes back the same."""
    torch.manual_seed(0)
    config = VisionConfig(
        model_dim=24, num_heads=3, ffn_inner_dim=40, num_levels=4, dropout=0.0, patch_size=5,
        attention_signal_rank=3, ffn_signal_rank=7,
    )  # fmt: skip
    ours = randomised(create_classifier(config, ImageShape(3, 20), 6).double())
    assert ours.pos_encoder is not None
    positions = torch.randn_like(ours.pos_encoder.table)  # not necessarily sinusoids
    ours.pos_encoder.table = positions
    checkpoint = {name: tensor.clone() for name, tensor in classifier_reference_names(ours).items()}
    checkpoint["transformer.embeddings.position_embeddings.pos_embed"] = positions[None]
    theirs = classifier_from_reference(checkpoint, num_heads=3)
    assert theirs.config == config
    assert theirs.image == ImageShape(3, 20)
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    assert torch.equal(theirs(images), ours(images))


@pytest.mark.slow
def test_a_checkpoint_file_becomes_an_exported_model(
    golden: dict[str, Tensor],
    weights: dict[str, Tensor],
    model: ImageClassifier,
    tmp_path: Path,
    command: Command,
) -> None:
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "their.pt")
    convert = ["models.ringformer.reference", tmp_path / "their.pt", tmp_path / "ours"]
    done = command(*convert, "--num_heads", 4)
    assert done.returncode == 0, done.stderr
    settings = read_classifier_settings(tmp_path / "ours")
    assert settings.classes == [str(digit) for digit in range(10)]
    config = VisionConfig.model_validate(settings.model)
    image = ImageShape(settings.channels, settings.image_size)
    assert image == (1, 28)
    ours = create_classifier(config, image, len(settings.classes)).double()
    load_weights(ours, tmp_path / "ours")
    assert torch.equal(ours(golden["input.image"]), model(golden["input.image"]))
    refused = command(*convert, "--vocabulary", tmp_path / "their.pt")
    assert refused.returncode == 1
    assert "--vocabulary is for translation" in refused.stderr


def test_what_is_missing_or_does_not_fit(weights: dict[str, Tensor]) -> None:
    damaged = dict(weights)
    del damaged["transformer.encoder.ATTN_lev_embed_K_02"]
    with pytest.raises(KeyError, match="ATTN_lev_embed_K_02"):
        classifier_from_reference(damaged, num_heads=4)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        classifier_from_reference(weights, num_heads=5)
    positions = "transformer.embeddings.position_embeddings.pos_embed"
    with pytest.raises(ValueError, match="16 positions are not of a class token and a square"):
        classifier_from_reference({**weights, positions: weights[positions][:, 1:]}, num_heads=4)
    head = {"head.weight": weights["head.weight"][:3]}
    with pytest.raises(ValueError, match=r"head\.bias is \[10\], expected \[3\]"):
        classifier_from_reference({**weights, **head}, num_heads=4)


def test_rivals_have_no_published_names() -> None:
    for architecture in ("transformer", "universal"):
        with pytest.raises(TypeError, match="Only a RingFormer"):
            classifier_reference_names(tiny(architecture))
