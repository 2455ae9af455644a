"""Estimate what a training will need: memory per GPU by ZeRO stage, and bytes sent per step.

    python -m pipeline.estimate --config RECIPE --nodes 8 --gpus 8

Nothing is trained and no data is read; a small forward pass shows what activations take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.batch_plan import passes
from data_prep.files import DataError
from data_prep.images.shards import read_images_manifest
from data_prep.taken_vocabulary import vocabulary_sizes
from data_prep.text import PAD_IDX
from models.factory import abstract_classifier, abstract_model, create_classifier, create_model
from models.image_classifier import ImageShape, num_positions
from models.stack import Layered
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.command_line import positive_argument, run_command
from pipeline.preflight import GIB
from pipeline.recipe import Recipe, TrainingConfig, UsageError
from pipeline.training.deepspeed_config import (
    ON_GPU,
    activation_checkpointing,
    deepspeed_config,
    precision,
    reduce_bucket_size,
)
from pipeline.translation_recipe import TranslationRecipe

SENTENCE_TOKENS = 32  # tokens a side of the sentences that activations are measured with
ADAM_BYTES = 8  # bytes a parameter: two moments in float32


class StateBytes(NamedTuple):
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float


class Parameters(NamedTuple):
    """How many a model has."""

    all: int
    trained: int
    """But for those that `training.freeze` names."""

    @classmethod
    def of(cls, model: Layered, training: TrainingConfig) -> Parameters:
        """Count them."""
        _freeze(model, training)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return cls(model.parameter_counts.total, trained)


def _freeze(model: nn.Module, training: TrainingConfig) -> None:
    """Leave out of training what `training.freeze` names."""
    if training.freeze:
        from pipeline.training.trainer import freeze  # with DeepSpeed, which takes seconds

        freeze(model, training.freeze)


class Needs(NamedTuple):
    """What depends on what is learnt."""

    parameters: Parameters
    transformer_parameters: int
    """Of a Transformer of this width and depth."""

    unit: str
    """What batches are counted in: tokens or images."""

    batch: int
    micro_batch: int
    activations: float
    """Bytes kept for the backward pass, for each unit."""


def needs_of(recipe: Recipe, dtype: torch.dtype) -> Needs:
    """Return what the training of a recipe needs.

    :raises UsageError: nobody says how many classes of images there are.
    """
    if isinstance(recipe, ClassificationRecipe):
        return _needs_of_classification(recipe, dtype)
    assert isinstance(recipe, TranslationRecipe)
    training, vocab_sizes = recipe.training, vocabulary_sizes(recipe.data.vocabulary)
    plain = recipe.model.plain
    return Needs(
        parameters=Parameters.of(abstract_model(recipe.model, vocab_sizes), training),
        transformer_parameters=abstract_model(plain, vocab_sizes).parameter_counts.total,
        unit="tokens",
        batch=training.max_tokens,
        micro_batch=training.micro_batch,
        activations=activations_per_token(recipe, dtype),
    )


def _needs_of_classification(recipe: ClassificationRecipe, dtype: torch.dtype) -> Needs:
    training, model, classes = recipe.training, recipe.model, _classes(recipe)
    image, plain = ImageShape(recipe.data.channels, recipe.data.image_size), model.plain
    return Needs(
        parameters=Parameters.of(abstract_classifier(model, image, classes), training),
        transformer_parameters=abstract_classifier(plain, image, classes).parameter_counts.total,
        unit="images",
        batch=training.batch_size,
        micro_batch=training.micro_batch,
        activations=activations_per_image(recipe, classes, dtype),
    )


def _classes(recipe: ClassificationRecipe) -> int:
    if recipe.data.classes is not None:
        return len(recipe.data.classes)
    try:
        return len(read_images_manifest(recipe.shards).classes)
    except DataError as error:
        raise UsageError(
            "data.classes names none, and the images are not prepared yet: `./run.sh prepare` "
            "finds out how many classes there are"
        ) from error


def activations_per_token(recipe: TranslationRecipe, dtype: torch.dtype) -> float:
    """Return the bytes kept for each token position of the longer side, both stacks together."""
    size = min(*vocabulary_sizes(recipe.data.vocabulary), 1000)  # logits are never kept
    tokens = min(SENTENCE_TOKENS, recipe.model.max_seq_len)
    model = create_model(recipe.model, (size, size), PAD_IDX).train()
    _freeze(model, recipe.training)
    policy = activation_checkpointing(recipe.training, recipe.model)
    model.checkpoint_activations(policy)

    def loss(sentences: int) -> Tensor:
        source, target = torch.randint(4, size, (2, sentences, tokens))
        return model(source, model.layout(source), target, model.layout(target), target)

    per_token = _kept_each(model, loss, dtype) / tokens
    if policy.keep_attention:  # autograd does not see these outputs: encoder, decoder, cross
        outputs = recipe.model.encoder_levels + 2 * recipe.model.decoder_levels
        per_token += outputs * recipe.model.model_dim * dtype.itemsize
    return per_token


def activations_per_image(recipe: ClassificationRecipe, classes: int, dtype: torch.dtype) -> float:
    """Return the bytes kept for each image."""
    image = ImageShape(recipe.data.channels, recipe.data.image_size)
    model = create_classifier(recipe.model, image, classes).train()
    _freeze(model, recipe.training)
    policy = activation_checkpointing(recipe.training, recipe.model)
    model.checkpoint_activations(policy)

    def loss(images: int) -> Tensor:
        pixels = torch.zeros(images, image.channels, image.size, image.size, dtype=torch.uint8)
        return F.cross_entropy(model(pixels), torch.zeros(images, dtype=torch.int64))

    per_image = _kept_each(model, loss, dtype)
    if policy.keep_attention:  # the last level computes the class token alone
        outputs = (recipe.model.num_levels - 1) * num_positions(recipe.model, image) + 1
        per_image += outputs * recipe.model.model_dim * dtype.itemsize
    return per_image


def _kept_each(model: nn.Module, loss: Callable[[int], Tensor], dtype: torch.dtype) -> float:
    """Return how many bytes a forward pass keeps for the backward pass, for each example.

    It computes in float32, whatever trains: a CPU keeps attention's weights in 16 bits, which no
    GPU does.

    :param loss: computes that of so many examples.
    :param dtype: of the training.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept_by(examples: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(examples)
            del value
        return sum(kept.values())

    return (kept_by(12) - kept_by(4)) / 8 * (dtype.itemsize / torch.float32.itemsize)


class Widths(NamedTuple):
    """The widths of numbers in bytes, as `deepspeed_config` sets them where the JSON does not."""

    weights: int
    gradients: int
    """Those that a GPU keeps over its micro-batches."""

    sent: int
    """Gradients on the wire."""

    @classmethod
    def of(cls, precision: str, stage: int) -> Widths:
        """Return those of `fp32`, `bf16` or `fp16`; bf16 is summed in float32."""
        if precision == "fp32":
            return cls(4, 4, 4)
        if precision == "fp16":
            return cls(2, 2, 2)
        return cls(2, 2 if stage < 2 else 4, 4)


def state_bytes(parameters: Parameters, stage: int, gpus: int, precision: str) -> StateBytes:
    """Return what weights, gradients and optimizer take on each GPU.

    :param stage: of ZeRO.
    :param precision: with 16 bits, the optimizer has float32 copies of the weights.
    """
    width = Widths.of(precision, stage)
    optimizer = ADAM_BYTES + (0 if precision == "fp32" else 4)
    return StateBytes(
        weights=parameters.all * width.weights / (gpus if stage >= 3 else 1),
        gradients=parameters.trained * width.gradients / (gpus if stage >= 2 else 1),
        optimizer=parameters.trained * optimizer / (gpus if stage >= 1 else 1),
    )


def bucket_bytes(settings: dict[str, Any], parameters: int, stage: int, half: bool) -> float:
    """Return what the buffers take in which each GPU collects gradients before it reduces them.

    :param settings: DeepSpeed's JSON.
    """
    if stage == 0:
        return 0
    doubled = stage < 3 and settings.get("zero_optimization", {}).get("overlap_comm", False)
    return reduce_bucket_size(settings, parameters) * (2 if half else 4) * (2 if doubled else 1)


def sent_bytes(
    parameters: Parameters, stage: int, gpus: int, precision: str, accumulation: int
) -> float:
    """Return the bytes that each GPU sends in a step, with ring collectives.

    Stage 0 all-reduces the gradients, which sends them twice. Stage 1 reduces them to their owners
    and gathers the weights that have changed. Stage 2 reduces after every micro-batch. Stage 3 also
    gathers all weights for each forward and each backward pass.

    :param accumulation: micro-batches of a GPU in a step.
    """
    width = Widths.of(precision, stage)
    gradients, changed = parameters.trained * width.sent, parameters.trained * width.weights
    volume = {
        0: 2 * gradients,
        1: gradients + changed,
        2: accumulation * gradients + changed,
        3: accumulation * (gradients + 2 * parameters.all * width.weights),
    }
    return volume[stage] * (gpus - 1) / gpus


def print_estimate(recipe: Recipe, nodes: int, gpus_per_node: int) -> None:
    """Print what the recipe's training will need on that many GPUs."""
    gpus = nodes * gpus_per_node
    settings = deepspeed_config(recipe.training, accumulation_steps=1)
    kind = precision(settings)
    half = kind != "fp32"
    needs = needs_of(recipe, torch.bfloat16 if half else torch.float32)
    micro_batches = needs.batch // needs.micro_batch
    accumulation = passes(micro_batches, gpus)
    idle = max(0, gpus - micro_batches)
    activations = needs.activations * needs.micro_batch
    average = 4 * needs.parameters.all if recipe.training.ema_decay else 0
    frozen = needs.parameters.all - needs.parameters.trained
    transformer = Parameters(needs.transformer_parameters, needs.transformer_parameters)
    console = Console()
    console.print(
        f"{needs.parameters.all:,} parameters ({recipe.model.architecture}; a Transformer of this "
        f"width and depth has {transformer.all:,}), {'16' if half else '32'} bits"
        f"{f'; {frozen:,} are frozen' if frozen else ''}\n"
        f"{gpus} GPUs; a global batch of {needs.batch:,} {needs.unit} is {accumulation} × "
        f"{needs.micro_batch:,} {needs.unit} a GPU{f', and {idle} GPUs idle' if idle else ''}; "
        f"activations {activations / GIB:.2f} GiB"
        f"{f', moving average {average / GIB:.3f} GiB' if average else ''}\n"
    )
    table = Table("ZeRO", title="GiB per GPU, by ZeRO stage")
    for column in ("weights", "gradients", "Adam", "bucket", "all*", "sent†", "Transformer†"):
        table.add_column(column, justify="right")
    for stage in range(1 if half else 0, 4):  # training refuses 16 bits at stage 0
        state = state_bytes(needs.parameters, stage, gpus, kind)
        bucket = bucket_bytes(settings, needs.parameters.trained, stage, half)
        sent, transformer_sent = (
            sent_bytes(number, stage, gpus, kind, accumulation)
            for number in (needs.parameters, transformer)
        )
        everything = sum(state) + bucket + activations + average
        values = (*state, bucket, everything, sent, transformer_sent)
        table.add_row(str(stage), *(f"{value / GIB:.3f}" for value in values))
    console.print(table)
    console.print(
        "* with activations and a moving average; beside it the CUDA context, network buffers, of "
        "translations a chunk of logits (0.7 GiB), and what the allocator cannot reuse\n"
        "† in a step, by ring collectives; and what the Transformer would send, with nothing "
        "frozen\n"
        "Offload is not counted: it moves Adam, and with offload_param the weights, to the host."
    )


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the estimate for the GPUs that the command line names."""
    if recipe.training.deepspeed_config is None:  # GPUs take another one than this machine may
        training = recipe.training.model_copy(update={"deepspeed_config": ON_GPU})
        recipe = recipe.model_copy(update={"training": training})
    print_estimate(recipe, arguments.nodes, arguments.gpus)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--nodes", type=positive_argument, default=1, help="machines [1]")
    parser.add_argument("--gpus", type=positive_argument, default=1, help="GPUs of each [1]")


if __name__ == "__main__":
    run_command(
        "estimate",
        "Memory and communication of a training.",
        main,
        _add_arguments,
        kind=Recipe,
    )
