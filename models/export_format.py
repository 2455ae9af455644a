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

The module travels with a registered model to where only ctranslate2 and sentencepiece are
installed. So at import it needs the standard library only, and each function imports what else it
needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

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

TRANSLATION, CLASSIFICATION = "translation", "classification"
"""The tasks that export.json may name; without a name it is the first."""

SHORTLISTS: dict[Format, str] = {
    "ctranslate2": "vmap.txt",  # the name that CTranslate2 looks for
    "onnx": "shortlist.npz",
}


MAX_PIXELS = 50_000_000  # of an image: few bytes can claim more than fits into memory
DIVERGED = "The model's output is not a number; its training has diverged"


class ModelError(Exception):
    """A folder is not an exported model, or the model gives no usable probabilities."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The settings are what export.json holds of a translation model.

    A model that was converted, not trained by a recipe, has only `format` and `model`.
    """

    format: Format
    quantization: Quantization | None = None
    """None: weights in float32."""

    model: dict[str, Any]
    """The recipe's `model` section."""

    evaluation: dict[str, Any] | None = None
    """The keys of the recipe's `evaluation` section that decide on translations."""

    max_source_tokens: int | None = None
    """EOS included; longer lines are translated in parts. None: the most the model can take."""

    source_lang: str | None = None
    target_lang: str | None = None

    shortlist: bool = False
    """A lexical shortlist is there, and translations have only what it allows."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of export.json."""
        if self.evaluation is None:  # converted
            return {"format": self.format, "model": self.model}
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """The settings are what export.json holds of an image classifier, with its task."""

    format: ClassifierFormat

    model: dict[str, Any]
    """The recipe's `model` section."""

    channels: int
    image_size: int
    """Side of the images that the model takes, in pixels."""

    stored_size: int
    """Side that other images are scaled to before their middle is cut out."""

    classes: list[str]
    """Their names, in the order of the logits."""

    max_pixels: int = MAX_PIXELS
    """Files of images with more pixels are refused."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of export.json."""
        return {"task": CLASSIFICATION, **asdict(self)}


TYPES: dict[str, tuple[type, ...]] = {
    "model": (dict,),
    "quantization": (str, NoneType),
    "evaluation": (dict, NoneType),
    "max_source_tokens": (int, NoneType),
    "source_lang": (str, NoneType),
    "target_lang": (str, NoneType),
    "shortlist": (bool,),
}

CLASSIFIER_TYPES: dict[str, tuple[type, ...]] = {
    "model": (dict,),
    "channels": (int,),
    "image_size": (int,),
    "stored_size": (int,),
    "classes": (list,),
    "max_pixels": (int,),
}

# Keys of `evaluation` that translating without PyTorch needs. (pydantic, which checks the others'
# settings, may not be installed there.)
SEARCH_TYPES: dict[str, tuple[type, ...]] = {
    "beam_size": (int,),
    "length_penalty": (int, float),
    "no_repeat_ngram_size": (int,),
    "max_length_ratio": (int, float),
    "max_length_offset": (int,),
    "batch_tokens": (int,),
}


def read_settings(folder: Path) -> ExportSettings:
    """Read what the exported translation model in `folder` is.

    :raises ModelError: there is no exported model, or it is of another task, or not for us.
    """
    found = _read(folder, TRANSLATION, get_args(Format))
    if found["format"] == "huggingface":
        raise ModelError(
            f"{folder}: its format is huggingface, which the library transformers reads; "
            "`./run.sh export` writes the others"
        )
    found.setdefault("shortlist", False)  # which exports did not always say
    wrong = [key for key, types in TYPES.items() if not isinstance(found.get(key), types)]
    if not wrong and found["format"] != "safetensors":
        search = found.get("evaluation") or {}
        wrong = [key for key, types in SEARCH_TYPES.items() if type(search.get(key)) not in types]
        wrong += ["max_seq_len"] if type(found["model"].get("max_seq_len")) is not int else []
    _refuse(folder, wrong)
    known: dict[str, Any] = {key: found.get(key) for key in TYPES}
    return ExportSettings(format=found["format"], **known)


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
    # Exports of older versions do not say how large images may be.
    found = {"max_pixels": MAX_PIXELS, **_read(folder, CLASSIFICATION, get_args(ClassifierFormat))}
    types = CLASSIFIER_TYPES.items()
    wrong = [key for key, allowed in types if type(found.get(key)) not in allowed]
    if not wrong and not all(isinstance(name, str) for name in found["classes"]):
        wrong = ["classes"]
    _refuse(folder, wrong)
    if not 0 < found["image_size"] <= found["stored_size"]:
        raise ModelError(
            f"{folder}: not an exported model: {SETTINGS}: image_size {found['image_size']} does "
            f"not fit into stored_size {found['stored_size']}"
        )
    known: dict[str, Any] = {key: found[key] for key in CLASSIFIER_TYPES}
    return ClassifierSettings(format=found["format"], **known)


def _read(folder: Path, task: str, formats: Sequence[str]) -> dict[str, Any]:
    """Read export.json, of a model of the task that is wanted."""
    problem = f"{folder}: not an exported model"
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
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
    return found


def _refuse(folder: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise ModelError(
            f"{folder}: not an exported model: {SETTINGS}: {wrong[0]} is missing or of the wrong "
            "type"
        )


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

    write_json(folder / SETTINGS, settings.to_json())


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
