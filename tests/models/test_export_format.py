"""These tests write folders of exported models and read them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from models.config import ModelConfig, VisionConfig
from models.export_format import (
    ClassifierFormat,
    ClassifierSettings,
    ExportSettings,
    Format,
    ModelError,
    load_weights,
    read_classifier_settings,
    read_settings,
    write_settings,
    write_weights,
)
from models.factory import create_model
from models.search_config import SearchConfig
from models.seq2seq import TranslationModel
from tests.conftest import run_process

CONFIG = ModelConfig(model_dim=16, num_heads=2, ffn_inner_dim=32, num_levels=2)


def model(seed: int) -> TranslationModel:
    torch.manual_seed(seed)
    return create_model(CONFIG, (40, 40), 0)


def test_weights_come_back(tmp_path: Path) -> None:
    written, read = model(1), model(2)
    write_weights(written, tmp_path)
    load_weights(read, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    for name, weight in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name


@pytest.mark.parametrize("format", ["safetensors", "ctranslate2", "onnx"])
def test_settings_come_back(format: Format, tmp_path: Path) -> None:
    trained = ExportSettings(
        format=format,
        model=CONFIG,
        evaluation=SearchConfig(),
        max_source_tokens=64,
        source_lang="de",
        target_lang="en",
    )
    write_settings(tmp_path, trained)
    assert read_settings(tmp_path) == trained
    keys = list(json.loads((tmp_path / "export.json").read_text()))
    assert keys == [
        "format", "quantization", "model", "evaluation", "max_source_tokens", "source_lang",
        "target_lang", "shortlist",
    ]  # fmt: skip


def test_a_converted_model_has_no_search(tmp_path: Path) -> None:
    converted = ExportSettings(format="safetensors", model=CONFIG)
    write_settings(tmp_path, converted)
    assert read_settings(tmp_path) == converted
    assert read_settings(tmp_path).evaluation is None


def test_what_older_exports_do_not_say_has_its_default(tmp_path: Path) -> None:
    evaluation = {"beam_size": 2, "length_penalty": 0.5, "no_repeat_ngram_size": 0,
                  "max_length_ratio": 2, "max_length_offset": 20, "batch_tokens": 4096}  # fmt: skip
    model = {"model_dim": 16, "max_seq_len": 512}
    content = {"format": "onnx", "model": model, "evaluation": evaluation}
    (tmp_path / "export.json").write_text(json.dumps(content))
    assert read_settings(tmp_path) == ExportSettings(
        format="onnx",
        model=ModelConfig(model_dim=16),
        evaluation=SearchConfig(beam_size=2, length_penalty=0.5, max_length_ratio=2.0),
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "export.json names no format"),
        ('{"model": {}}', "export.json names no format"),
        (
            '{"format": "pickle", "model": {}}',
            "names format 'pickle', which is none of safetensors",
        ),
        ('{"format": "safetensors"}', "`model` is missing"),
        (
            '{"format": "safetensors", "model": {}, "max_source_tokens": "64"}',
            "`max_source_tokens`: Input should be a valid integer",
        ),
    ],
)
def test_what_is_no_exported_model_is_refused(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "export.json").write_text(content)
    with pytest.raises(ModelError, match=f"{tmp_path.name}: not an exported model: .*{expected}"):
        read_settings(tmp_path)


CLASSIFIER = ClassifierSettings(
    format="safetensors",
    model=VisionConfig(),
    channels=3,
    image_size=32,
    stored_size=36,
    classes=["cat", "dog"],
)


@pytest.mark.parametrize("format", get_args(ClassifierFormat))
def test_settings_of_a_classifier_come_back(format: ClassifierFormat, tmp_path: Path) -> None:
    settings = CLASSIFIER.model_copy(update={"format": format})
    write_settings(tmp_path, settings)
    assert read_classifier_settings(tmp_path) == settings
    keys = list(json.loads((tmp_path / "export.json").read_text()))
    sizes = ["channels", "image_size", "stored_size"]
    assert keys == ["task", "format", "model", *sizes, "classes", "max_pixels"]
    older = settings.model_dump_json(exclude={"max_pixels"})
    (tmp_path / "export.json").write_text(older)
    assert read_classifier_settings(tmp_path) == settings


def test_a_model_for_another_task_is_refused(tmp_path: Path) -> None:
    write_settings(tmp_path, CLASSIFIER)
    with pytest.raises(ModelError, match="a model for classification, and one for translation is"):
        read_settings(tmp_path)
    write_settings(tmp_path, ExportSettings(format="safetensors", model=CONFIG))
    with pytest.raises(ModelError, match="a model for translation, and one for classification is"):
        read_classifier_settings(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "ctranslate2"}, "'ctranslate2', which is none of safetensors, onnx"),
        ({"image_size": True}, "image_size cannot be true"),
        ({"image_size": 0}, "`image_size`: Input should be greater than 0"),
        ({"stored_size": 31}, "image_size 32 does not fit into stored_size 31"),
        ({"classes": None}, "`classes`: Input should be a valid array"),
        ({"classes": ["cat", 2]}, r"`classes\.1`: Input should be a valid string"),
        ({"model": []}, "`model`: Input should be an object"),
    ],
)
def test_what_is_no_exported_classifier_is_refused(
    changes: dict[str, object], expected: str, tmp_path: Path
) -> None:
    content = {**CLASSIFIER.model_dump(), **changes}
    (tmp_path / "export.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"not an exported model: .*{expected}"):
        read_classifier_settings(tmp_path)


def test_reading_settings_needs_no_pytorch(tmp_path: Path) -> None:
    settings = ExportSettings(format="ctranslate2", model=CONFIG, evaluation=SearchConfig())
    write_settings(tmp_path, settings)
    blocked = ["torch", "numpy", "safetensors", "fairseq2"]
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"  # importing one of them now fails
        "from models.export_format import read_settings\n"
        f"print(read_settings(Path({str(tmp_path)!r})).model.model_dim)"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "16"
