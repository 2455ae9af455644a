"""This command counts a model's parameters, and its operations in a forward pass.

python -m models.count --config RECIPE [--source_tokens 32 --target_tokens 32] [--classes 10]
                       [--SECTION.KEY VALUE]...
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from fairseq2.nn import BatchLayout
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_prep.taken_vocabulary import vocabulary_sizes
from models.config import ModelConfig, VisionConfig
from models.factory import abstract_classifier, abstract_model
from models.image_classifier import ImageShape
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import positive_argument, run_command
from pipeline.recipe import Recipe, UsageError
from pipeline.translation_recipe import TranslationRecipe


class Counts(NamedTuple):
    """These are the numbers of a model."""

    total: int
    core: int
    """Without embeddings and output projection; or patches, class token and head."""

    parts: dict[str, int]
    """Parameters of each direct part that no part before it has."""

    flops: int
    """Floating-point operations of a forward pass; a multiplication and an addition are two."""


class Lengths(NamedTuple):
    """A sentence pair has these lengths, in tokens."""

    source: int
    target: int


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
        **model.parameter_counts._asdict(),
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
        **model.parameter_counts._asdict(),
        parts=_parts(model),
        flops=_flops(model, lambda: model.head(model.encode(images)[:, 0])),
    )


def _parts(model: nn.Module) -> dict[str, int]:
    """Count the parameters in each direct part of a model, each shared one once."""
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        numbers[part] = numbers.get(part, 0) + parameter.numel()
    return numbers


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


def count_recipe(recipe: Recipe, lengths: Lengths, classes: int | None) -> list[Counts]:
    """Count the model that a recipe describes, and a Transformer of its width and depth.

    :param lengths: of a sentence pair.
    :param classes: how many there are, where the recipe does not name them.
    :raises UsageError: nobody says how many classes there are, or the pair is too long.
    """
    if isinstance(recipe, ClassificationRecipe):
        number = len(recipe.data.classes or ()) or classes
        if number is None:
            raise UsageError("data.classes names none; say with --classes how many there are")
        image = ImageShape(recipe.data.channels, recipe.data.image_size)
        return [
            count_classifier(each, image, number) for each in (recipe.model, recipe.model.plain)
        ]
    assert isinstance(recipe, TranslationRecipe)
    if max(lengths) > recipe.model.max_seq_len:
        raise UsageError(
            f"model.max_seq_len is {recipe.model.max_seq_len}: give --source_tokens and "
            "--target_tokens that are no larger"
        )
    sizes = vocabulary_sizes(recipe.data.vocabulary)
    return [count_translation(each, sizes, lengths) for each in (recipe.model, recipe.model.plain)]


def print_counts(architecture: str, ours: Counts, transformer: Counts, unit: str) -> None:
    """Print both models' numbers beside each other.

    :param unit: what a forward pass is of.
    """
    table = Table("", title="A model, and a Transformer of its width and depth")
    for column in (architecture, "transformer", "ratio"):
        table.add_column(column, justify="right")

    def row(name: str, number: int, other: int) -> None:
        table.add_row(name, f"{number:,}", f"{other:,}", f"{number / other:.3f}" if other else "")

    row("parameters", ours.total, transformer.total)
    row("  core", ours.core, transformer.core)
    for name, number in ours.parts.items():
        row(f"  {name}", number, transformer.parts.get(name, 0))
    row(f"FLOPs of {unit}", ours.flops, transformer.flops)
    Console().print(table)


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the numbers of the model that a recipe describes."""
    lengths = Lengths(arguments.source_tokens, arguments.target_tokens)
    ours, transformer = count_recipe(recipe, lengths, arguments.classes)
    unit = "an image"
    if isinstance(recipe, TranslationRecipe):
        unit = f"a pair of {lengths.source} and {lengths.target} tokens"
    print_counts(recipe.model.architecture, ours, transformer, unit)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--source_tokens", type=positive_argument, default=32, help="[32]")
    parser.add_argument("--target_tokens", type=positive_argument, default=32, help="[32]")
    parser.add_argument(
        "--classes", type=positive_argument, help="how many, where the recipe does not name them"
    )


if __name__ == "__main__":
    run_command(
        "count",
        "A model's parameters, and operations of a forward pass.",
        main,
        _add_arguments,
        kind=Recipe,
    )
