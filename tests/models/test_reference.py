"""These tests hold RingFormer to the published implementation's golden vectors, in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.config import ActivationCheckpointing, ModelConfig
from models.factory import create_model
from models.ringformer import reference
from models.ringformer.reference import from_reference, reference_names
from models.seq2seq import TranslationModel
from tests.conftest import Command

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "reference" / "ring_d32.safetensors")


@pytest.fixture
def model(golden: dict[str, Tensor], shared: Path) -> TranslationModel:
    with safe_open(shared / "reference" / "ring_d32.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    return from_reference(
        weights, num_heads=int(metadata["num_heads"]), pad_idx=int(metadata["pad_idx"])
    )


def test_logits_and_loss(model: TranslationModel, golden: dict[str, Tensor]) -> None:
    target = golden["input.target"]
    logits = model.logits(golden["input.source"], target)
    real = target != model.pad_idx
    assert (logits - golden["output.logits"])[real].abs().max() < TOLERANCE
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)
    assert abs(loss - golden["output.loss"]) < TOLERANCE


@pytest.mark.parametrize("segment_length", [0, 1, 2])
def test_gradients_of_every_parameter(
    model: TranslationModel, golden: dict[str, Tensor], segment_length: int
) -> None:
    model.checkpoint_activations(ActivationCheckpointing(levels=segment_length))
    target = golden["input.target"]
    logits = model.logits(golden["input.source"], target)
    cross_entropy(
        logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=model.pad_idx
    ).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad  # so that names lead to gradients
    gradients = reference_names(model)
    expected = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < TOLERANCE, name


@pytest.mark.slow
def test_a_checkpoint_file_becomes_an_exported_model(
    golden: dict[str, Tensor], model: TranslationModel, tmp_path: Path, command: Command
) -> None:
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    torch.save({"epoch": 3, "model": weights}, tmp_path / "their.pt")
    vocabularies = [tmp_path / "de", tmp_path / "en"]
    for path in vocabularies:
        path.write_text(path.name)
    convert = ["models.ringformer.reference", tmp_path / "their.pt"]
    options = ["--num_heads", 4, "--vocabulary", *vocabularies]
    done = command(*convert, tmp_path / "ours", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "spm.source.model").read_text() == "de"
    assert (tmp_path / "ours" / "spm.target.model").read_text() == "en"
    config = json.loads((tmp_path / "ours" / "export.json").read_text())["model"]
    sizes = weights["fc.weight"].size(0), weights["fc.weight"].size(0)
    ours = create_model(ModelConfig.model_validate(config), sizes, 0).double()
    load_model(ours, tmp_path / "ours" / "model.safetensors")
    source, target = golden["input.source"], golden["input.target"]
    assert torch.equal(ours.logits(source, target), model.logits(source, target))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    refused = command(*convert, tmp_path / "mine")
    assert refused.returncode == 1
    assert "holds files that this command did not make" in refused.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    joint = command(*convert, tmp_path / "joint", "--vocabulary", vocabularies[0])
    assert joint.returncode == 0, joint.stderr
    assert (tmp_path / "joint" / "spm.model").read_text() == "de"


def test_source_and_target_sizes_may_differ(
    golden: dict[str, Tensor], model: TranslationModel
) -> None:
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    source_embed = "encoder.emb_layer.emb_layer.weight"
    smaller = from_reference(
        {**weights, source_embed: weights[source_embed][:40]}, num_heads=4, pad_idx=0
    )
    assert smaller.source_embed.num_embeddings == 40
    source, target = golden["input.source"].clamp(max=39), golden["input.target"]
    assert torch.equal(smaller.logits(source, target), model.logits(source, target))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/evil-was-here",)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (Evil(), "not a file of tensors only"),
        ({"weight": torch.zeros(3)}, "not a RingFormer"),
        (
            {"encoder.lev_param_FF_01": torch.zeros(2, 2, 8)},
            "tensor 'encoder.emb_layer.emb_layer.weight' is missing",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    content: object, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(content, tmp_path / "their.pt")
    arguments = [str(tmp_path / "their.pt"), str(tmp_path / "ours")]
    monkeypatch.setattr("sys.argv", ["reference", *arguments])
    with pytest.raises(SystemExit, match=expected):
        reference.main()
    assert not (tmp_path / "ours").exists()
    assert not Path("/tmp/evil-was-here").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04", b"no checkpoint"])
def test_half_a_file_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their.pt").write_bytes(content)
    monkeypatch.setattr("sys.argv", ["reference", str(tmp_path / "their.pt"), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"their\.pt: not a file of tensors only: \w"):
        reference.main()


def test_missing_tensor_is_named(golden: dict[str, Tensor]) -> None:
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    del weights["decoder.lev_param_SA_K_02"]
    with pytest.raises(KeyError, match="lev_param_SA_K_02"):
        from_reference(weights, num_heads=4, pad_idx=0)
