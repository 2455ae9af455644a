"""Image classification as a task for the trainer: images in, cross-entropy of their classes out."""

# Methods import torch and what needs it themselves: that takes seconds, and a command that asks
# whether there are steps left to train needs none of it.

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from data_prep.batch_plan import BatchPlan, GlobalBatch, Indices
from data_prep.identity import check_corpora
from data_prep.images.shards import ImageReader
from data_prep.stage import read_manifest
from models.export_format import ClassifierSettings, ModelError, read_classifier_settings
from pipeline.checkpoints.folder import Criterion
from pipeline.classification.run_model import model_for, model_identity, parameter_counts
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import UsageError
from pipeline.tracking.provenance import DataFacts
from pipeline.training.deepspeed_config import activation_checkpointing
from pipeline.training.initial_weights import check_initial_weights, load_initial_weights
from pipeline.training.task import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.image_classifier import ImageClassifier
    from models.stack import ParameterCounts
    from pipeline.classification.augmentation import AugmentedImages
    from pipeline.classification.batches import ImageBatch
    from pipeline.training.task import Model
    from pipeline.training.trainer import Trainer
    from pipeline.training.validation import Interruption


class ClassificationTask(Task["ImageBatch"]):
    """Trains an image classifier on the shards of `run_dir`."""

    unit = "images"
    target_unit = "images"
    words: ClassVar[Mapping[str, str]] = {**Task.words, "valid_accuracy": "accuracy %.2f%%"}
    recipe: ClassificationRecipe

    def __init__(self, recipe: ClassificationRecipe) -> None:
        super().__init__(recipe)
        self._starting = Lock()  # the feed's threads start with the same step

    @property
    def criterion(self) -> Criterion:
        return Criterion("valid_accuracy", larger_is_better=True)

    # ── Data ────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def images(self) -> ImageReader:
        """Open the training images."""
        return ImageReader(self.recipe.shards, "train")

    @cached_property
    def valid_images(self) -> ImageReader:
        """Open the validation images."""
        return ImageReader(self.recipe.shards, "valid")

    @cached_property
    def plan(self) -> BatchPlan:
        training = self.recipe.training
        return _plan(
            len(self.images), training.batch_size, training.micro_batch_size, training.seed
        )

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        return model_identity(self.recipe)

    def check_recipe(self) -> None:
        check_corpora(self.recipe.data, self.recipe.run_dir)

    def check_data(self) -> str:
        train = ImageReader(self.recipe.shards, "train", verify=True)
        if (size := self.recipe.training.batch_size) > len(train):
            raise UsageError(
                f"training.batch_size ({size}) exceeds the {len(train)} training images"
            )
        ImageReader(self.recipe.shards, "valid", verify=True)
        return f"{len(train):,} training images of {len(train.data.classes)} classes"

    @cached_property
    def _augmented(self) -> AugmentedImages:
        from pipeline.classification.augmentation import AugmentedImages

        recipe = self.recipe
        transforms, size = recipe.training.augmentation, recipe.data.image_size
        images = AugmentedImages(recipe.shards, transforms, size)
        self.end.callback(images.close)
        return images

    def collate(self, examples: Indices, seed: int, device: torch.device) -> ImageBatch:
        from pipeline.classification.batches import collate

        read = self.images.read
        if self.recipe.training.augmentation:
            with self._starting:
                read = partial(self._augmented.read, seed=seed)
        return collate(read, examples, self.recipe.data.image_size, device)

    def units(self, batch: GlobalBatch) -> int:
        return batch.source_tokens  # an image is one

    def data_facts(self) -> DataFacts:
        shards, data = self.recipe.shards, self.recipe.data
        train = "+".join(images.name for images in data.train)
        valid = data.valid.name if data.valid else f"{data.valid_images} of {train}"
        manifest = read_manifest(shards)
        shape: dict[str, Any] = {}
        if manifest is not None:
            images = self.images
            shape = {"train": len(images), "classes": len(images.data.classes)}
        return DataFacts(
            names={"data.train": train, "data.valid": valid, "data.test": data.test.name},
            manifest=manifest,
            shape=shape,
            files=(shards / "report.json", shards / "report.png"),
            sets=(("training", "train", train), ("validation", "valid", valid)),
        )

    # ── Model and loss ──────────────────────────────────────────────────────────────────────────

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        return parameter_counts(self.recipe, self.images.data)

    def create_model(self, *, begins: bool = True) -> ImageClassifier:
        recipe, training = self.recipe, self.recipe.training
        model = model_for(recipe, self.images.data)
        if training.init_from and begins:
            self.check_base(training.init_from)
            load_initial_weights(model, training.init_from)
        model.checkpoint_activations(activation_checkpointing(training, recipe.model))
        if training.compile:
            model.compile_layers()
        return model

    def check_base(self, folder: Path) -> None:
        data, size = self.images.data, self.recipe.data.image_size

        def read() -> ClassifierSettings:
            settings = read_classifier_settings(folder)
            if settings.classes != list(data.classes):
                raise ModelError(f"{folder} has other classes than {self.recipe.shards}")
            theirs = settings.channels, settings.image_size
            if theirs != (data.channels, size):
                raise ModelError(
                    f"{folder} takes {theirs[0]} channels of {theirs[1]} × {theirs[1]} pixels, the "
                    f"recipe's images are {data.channels} of {size} × {size}"
                )
            return settings

        check_initial_weights(folder, read, self.recipe.model)

    def loss(self, model: Model, batch: ImageBatch) -> Tensor:
        return _cross_entropy(model(batch.to_device()), batch, self.recipe.training.label_smoothing)

    # ── Validation ──────────────────────────────────────────────────────────────────────────────

    def validate(
        self, trainer: Trainer[ImageBatch], interruption: Interruption
    ) -> dict[str, float]:
        import torch

        from pipeline.classification.batches import collate
        from pipeline.training.validation import sum_over

        reader = self.valid_images
        plan = _plan(len(reader), self.recipe.training.micro_batch, None, 0)

        def measure(examples: Indices) -> Tensor:
            batch = collate(reader.read, examples, self.recipe.data.image_size, trainer.device)
            logits = trainer.engine(batch.to_device())
            right = (logits.argmax(dim=1) == batch.labels).sum()
            return torch.stack([_cross_entropy(logits, batch), right])

        sums = sum_over(plan, trainer, interruption, measure)
        loss, accuracy = (value / len(reader) for value in sums)
        if not math.isfinite(loss):  # the largest of logits that are no numbers says nothing
            accuracy = math.nan
        return {"valid_loss": loss, "valid_accuracy": 100 * accuracy}


def _cross_entropy(logits: Tensor, batch: ImageBatch, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of the classes of `batch`, summed (nats)."""
    from torch.nn import functional as F

    from pipeline.classification.batches import NO_CLASS

    return F.cross_entropy(
        logits.float(),
        batch.labels,
        ignore_index=NO_CLASS,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def _plan(images: int, batch_size: int, micro_batch_size: int | None, seed: int) -> BatchPlan:
    """Plan batches of images: each counts as one token on both sides."""
    lengths = np.ones(images, np.int8)
    return BatchPlan(
        lengths,
        lengths,
        max_tokens=batch_size,
        micro_batch_tokens=micro_batch_size,
        seed=seed,
    )
