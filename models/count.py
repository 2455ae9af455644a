"""This command counts a model's parameters, and its operations in a forward pass.

python -m models.count --config RECIPE [--source_tokens 32 --target_tokens 32] [--classes 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from fairseq2.nn import BatchLayout
from pydantic import BaseModel, PositiveInt, ValidationError
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.config import VocabularyConfig
from data_prep.files import DataError
from data_prep.section import fault_of
from data_prep.taken_vocabulary import vocabulary_sizes
from models import image_classifier, seq2seq
from models.config import ModelConfig, VisionConfig
from models.export_format import CLASSIFICATION, TRANSLATION
from models.factory import abstract_classifier, abstract_model
from models.image_classifier import ImageShape


class Part(NamedTuple):
    """A part of a model has parameters that no part before it has."""

    name: str
    parameters: int


class Counts(NamedTuple):
    """These are the numbers of a model."""

    parameters: int
    core: int
    """Without embeddings and output projection; or patches, class token and head."""

    parts: tuple[Part, ...]
    flops: int
    """Floating-point operations of a forward pass; a multiplication and an addition are two."""


class Lengths(NamedTuple):
    """A sentence pair has these lengths, in tokens."""

    source: int
    target: int


class ImageData(BaseModel):
    """These keys of `data` decide on a classifier's size; others are none of it."""

    image_size: PositiveInt
    channels: PositiveInt = 3
    classes: tuple[str, ...] | None = None


class TextData(BaseModel):
    """These keys of `data` decide on a translation model's size; others are none of it."""

    vocabulary: VocabularyConfig = VocabularyConfig()


class TranslationRecipe(BaseModel):
    """What is counted of a recipe for translation."""

    model: ModelConfig = ModelConfig()
    data: TextData = TextData()


class ClassificationRecipe(BaseModel):
    """What is counted of a recipe for image classification."""

    model: VisionConfig = VisionConfig()
    data: ImageData


def count_translation(
    config: ModelConfig, vocab_sizes: tuple[int, int], lengths: Lengths
) -> Counts:
    """Count a translation model's parameters, and its operations for one sentence pair.

    Level signals are folded into the weights beforehand, as they are in serving.

    :param vocab_sizes: of the source and the target side.
    """
    model = abstract_model(config, vocab_sizes)
    source, target = (torch.ones(1, length, dtype=torch.int64, device="meta") for length in lengths)
    layouts = BatchLayout.of(source), BatchLayout.of(target)
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        core=seq2seq.core_parameters(model),
        parts=_parts(model),
        flops=_flops(model, lambda: model(source, layouts[0], target, layouts[1])),
    )


def count_classifier(config: VisionConfig, image: ImageShape, classes: int) -> Counts:
    """Count a classifier's parameters, and its operations for one image.

    The last level's are those of all positions, as usual, though it computes the class token alone.

    :raises ValueError: patches do not fill an image.
    """
    model = abstract_classifier(config, image, classes)
    images = torch.zeros(1, image.channels, image.size, image.size, device="meta")
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        core=image_classifier.core_parameters(model),
        parts=_parts(model),
        flops=_flops(model, lambda: model.head(model.encode(images)[:, 0])),
    )


def _parts(model: nn.Module) -> tuple[Part, ...]:
    """Count the parameters in each direct part of a model, each shared one once."""
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        numbers[part] = numbers.get(part, 0) + parameter.numel()
    return tuple(Part(*each) for each in numbers.items())


def _flops(model: nn.Module, forward: Callable[[], object]) -> int:
    """Count the operations of matrix products and convolutions.

    Attention is counted as the products it is made of: without memory for numbers, no fused kernel
    hides them.
    """
    model.eval()
    with torch.no_grad():
        forward()  # folds level signals
        with FlopCounterMode(display=False) as counter:
            forward()
    flops: int = counter.get_total_flops()
    return flops


Recipe = TranslationRecipe | ClassificationRecipe


def read_recipe(path: Path) -> Recipe:
    """Read what is counted of a recipe.

    :raises ValueError: it is none, or a key is wrong.
    """
    try:
        content = YAML(typ="safe").load(path)
    except YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict):
        raise ValueError("not a recipe")
    try:
        if (task := content.get("task", TRANSLATION)) == TRANSLATION:
            return TranslationRecipe.model_validate(content)
        if task == CLASSIFICATION:
            return ClassificationRecipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(fault_of(error)) from error
    raise ValueError(f"task: {task} is neither {TRANSLATION} nor {CLASSIFICATION}")


def count_recipe(recipe: Recipe, lengths: Lengths, classes: int | None) -> list[Counts]:
    """Count the model that a recipe describes, and a Transformer of its width and depth.

    :param lengths: of a sentence pair.
    :param classes: how many there are, where the recipe does not name them.
    :raises ValueError: nobody says how many classes there are, or patches do not fill an image.
    """
    if isinstance(recipe, TranslationRecipe):
        sizes = vocabulary_sizes(recipe.data.vocabulary)
        configs = (recipe.model, recipe.model.plain)
        return [count_translation(config, sizes, lengths) for config in configs]
    data = recipe.data
    number = len(data.classes) if data.classes else classes
    if number is None:
        raise ValueError("data.classes names none; say with --classes how many there are")
    image = ImageShape(data.channels, data.image_size)
    return [
        count_classifier(config, image, number) for config in (recipe.model, recipe.model.plain)
    ]


def print_counts(architecture: str, ours: Counts, transformer: Counts, unit: str) -> None:
    """Print both models' numbers beside each other.

    :param unit: what a forward pass is of.
    """
    table = Table("", title="A model, and a Transformer of its width and depth")
    for column in (architecture, "transformer", "ratio"):
        table.add_column(column, justify="right")

    def row(name: str, number: int, other: int) -> None:
        table.add_row(name, f"{number:,}", f"{other:,}", f"{number / other:.3f}" if other else "")

    row("parameters", ours.parameters, transformer.parameters)
    row("  core", ours.core, transformer.core)
    others = dict(transformer.parts)
    for name, number in ours.parts:
        row(f"  {name}", number, others.get(name, 0))
    row(f"FLOPs of {unit}", ours.flops, transformer.flops)
    Console().print(table)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m models.count",
        description="Count a recipe's model: parameters, and operations of a forward pass.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE")
    parser.add_argument("--source_tokens", type=int, default=32, help="[default 32]")
    parser.add_argument("--target_tokens", type=int, default=32, help="[default 32]")
    parser.add_argument("--classes", type=int, help="where the recipe does not name them")
    arguments = parser.parse_args()
    lengths = Lengths(arguments.source_tokens, arguments.target_tokens)
    try:
        recipe = read_recipe(arguments.config)
        ours, transformer = count_recipe(recipe, lengths, arguments.classes)
    except (OSError, DataError) as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        sys.exit(f"error: {arguments.config}: {error}")
    unit = "an image"
    if isinstance(recipe, TranslationRecipe):
        unit = f"a pair of {lengths.source} and {lengths.target} tokens"
    print_counts(recipe.model.architecture, ours, transformer, unit)


if __name__ == "__main__":
    main()
