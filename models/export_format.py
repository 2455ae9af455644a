"""This module is the one reader and the one writer of an exported model's folder.

The folder holds

    export.json         what the model is: `ExportSettings`
    model.safetensors   the weights, in format safetensors
    model.bin           the weights, in format ctranslate2, with CTranslate2's own config.json
    encoder.onnx, decoder.onnx, weights.bin     format onnx: graphs, and the weights of both
    model.safetensors, config.json, …           format huggingface, with SentencePiece models by its
                        names: `pipeline/publishing/huggingface.py`
    vmap.txt, or in format onnx shortlist.npz   a lexical shortlist, if there is one:
                        `pipeline/translation/shortlist.py`

and the SentencePiece models (`data_prep/vocabulary.py`). That of an image classifier holds

    export.json         what the model is: `ClassifierSettings`
    model.safetensors   the weights, in format safetensors
    model.onnx          format onnx: graph and weights

The module travels with a registered model to where there is no PyTorch. So at import it needs
pydantic only, and each function imports what else it needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, get_args

from pydantic import PositiveInt, ValidationError, model_validator

from data_prep.section import Section, fault_of
from models.config import ModelConfig, VisionConfig
from models.search_config import SearchConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

SETTINGS = "export.json"
WEIGHTS = "model.safetensors"
ENCODER, DECODER, ONNX_WEIGHTS = "encoder.onnx", "decoder.onnx", "weights.bin"
CLASSIFIER = "model.onnx"
ABOUT = {"README.md", "manifest.json"}  # files that only tell of the model

Format = Literal["safetensors", "ctranslate2", "onnx", "huggingface"]
ClassifierFormat = Literal["safetensors", "onnx"]
Quantization = Literal["int8"]

TRANSLATION: Final = "translation"
CLASSIFICATION: Final = "classification"
"""The tasks: export.json names the second one, and without a name it is of the first."""

SHORTLISTS: dict[Format, str] = {
    "ctranslate2": "vmap.txt",  # the name that CTranslate2 looks for
    "onnx": "shortlist.npz",
}


MAX_PIXELS = 50_000_000  # of an image: few bytes can claim more than fits into memory
DIVERGED = "The model's output is not a number; its training has diverged"


class ModelError(Exception):
    """A folder is not an exported model, or the model gives no usable probabilities."""


class ExportSettings(Section):
    """The settings are what export.json holds of a translation model."""

    format: Format
    quantization: Quantization | None = None
    """None: weights in float32."""

    model: ModelConfig
    """The recipe's `model` section."""

    evaluation: SearchConfig | None = None
    """The keys of the recipe's `evaluation` section that decide on translations; None: the model
    was converted, not trained by a recipe."""

    max_source_tokens: PositiveInt | None = None
    """EOS included; longer lines are translated in parts. None: the most the model can take."""

    source_lang: str | None = None
    target_lang: str | None = None

    shortlist: bool = False
    """A lexical shortlist is there, and translations have only what it allows."""


class ClassifierSettings(Section):
    """The settings are what export.json holds of an image classifier."""

    task: Literal["classification"] = CLASSIFICATION
    format: ClassifierFormat

    model: VisionConfig
    """The recipe's `model` section."""

    channels: PositiveInt
    image_size: PositiveInt
    """Side of the images that the model takes, in pixels."""

    stored_size: PositiveInt
    """Side that other images are scaled to before their middle is cut out."""

    classes: list[str]
    """Their names, in the order of the logits."""

    max_pixels: PositiveInt = MAX_PIXELS
    """Files of images with more pixels are refused."""

    @model_validator(mode="after")
    def _can_be_cut(self) -> ClassifierSettings:
        if self.image_size > self.stored_size:
            raise ValueError(
                f"image_size {self.image_size} does not fit into stored_size {self.stored_size}"
            )
        return self


SAID = {
    "beam_size", "length_penalty", "no_repeat_ngram_size", "max_length_ratio", "max_length_offset",
    "batch_tokens",
}  # fmt: skip
"""Search keys that every export for an engine has said: a damaged one gets no defaults."""

Settings = TypeVar("Settings", ExportSettings, ClassifierSettings)


def read_settings(folder: Path) -> ExportSettings:
    """Read what the exported translation model in `folder` is.

    :raises ModelError: there is no exported model, or it is of another task, or not for us.
    """
    settings = _read(folder, TRANSLATION, get_args(Format), ExportSettings)
    if settings.format == "huggingface":
        raise ModelError(
            f"{folder}: its format is huggingface, which the library transformers reads; "
            "`./run.sh export` writes the others"
        )
    if settings.format != "safetensors":
        search = settings.evaluation.model_fields_set if settings.evaluation else set()
        lost = sorted(SAID - search) or sorted({"max_seq_len"} - settings.model.model_fields_set)
        if lost:
            raise ModelError(f"{folder}: not an exported model: {SETTINGS}: `{lost[0]}` is missing")
    return settings


def read_ensemble(folders: Sequence[Path]) -> list[ExportSettings]:
    """Read what the exported translation models in `folders` are, which translate together.

    :raises ModelError: one is no such model, or has another format or direction than it needs.
    """
    found = [read_settings(folder) for folder in folders]
    for folder, settings in zip(folders, found, strict=True):
        if len(folders) > 1 and settings.format != "safetensors":
            raise ModelError(
                f"{folder}: its format is {settings.format}, and models of an ensemble must be "
                "exports in format safetensors"
            )
        ways = [(each.source_lang, each.target_lang) for each in (settings, found[0])]
        if ways[0] != ways[1]:
            own, others = (" to ".join(map(str, way)) for way in ways)
            raise ModelError(f"{folder} goes from {own}, and {folders[0]} from {others}")
    return found


def read_classifier_settings(folder: Path) -> ClassifierSettings:
    """Read what the exported image classifier in `folder` is.

    :raises ModelError: there is no exported model, or it is of another task.
    """
    return _read(folder, CLASSIFICATION, get_args(ClassifierFormat), ClassifierSettings)


def _read(folder: Path, task: str, formats: Sequence[str], kind: type[Settings]) -> Settings:
    """Read export.json, of a model of the task that is wanted."""
    problem = f"{folder}: not an exported model"
    try:
        text = (folder / SETTINGS).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{problem}: {error}") from error
    if not isinstance(found, dict) or "format" not in found:
        raise ModelError(f"{problem}: {SETTINGS} names no format")
    if (its := found.get("task", TRANSLATION)) != task:
        raise ModelError(f"{folder}: a model for {its}, and one for {task} is needed")
    if found["format"] not in formats:
        raise ModelError(
            f"{problem}: {SETTINGS} names format {found['format']!r}, which is none of "
            f"{', '.join(formats)}"
        )
    try:
        return kind.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise ModelError(f"{problem}: {SETTINGS}: {fault_of(error)}") from error


def digest_of_export(folder: Path) -> str:
    """Return a digest of all files of an exported model that decide on what it answers.

    :raises OSError: one cannot be read.
    """
    from data_prep.files import digest_of, sha256_of

    files = (path for path in sorted(folder.glob("[!.]*")) if path.is_file())
    return digest_of({path.name: sha256_of(path) for path in files if path.name not in ABOUT})


def write_settings(folder: Path, settings: ExportSettings | ClassifierSettings) -> None:
    """Write export.json into `folder`."""
    from data_prep.files import write_json

    write_json(folder / SETTINGS, settings.model_dump(mode="json"))


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights into `folder`, tied ones once, in the dtype that they have."""
    from safetensors.torch import save_file

    weights: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        weights.setdefault(place, (name, tensor.contiguous()))
    # `save_model` would write the names of tied ones too, in another order each time.
    save_file(dict(weights.values()), folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # as the other files; it is 0600


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights in `folder` into a model of the same shape.

    :raises OSError: there are none.
    :raises RuntimeError: they are of another model.
    :raises SafetensorError: the file is damaged.
    """
    from safetensors.torch import load_model

    load_model(model, folder / WEIGHTS)
