"""The keys of a recipe for image classification."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, PositiveInt, model_validator
from pydantic import Field as Limit

from data_prep.images.config import ImagesConfig
from data_prep.section import Section
from models.config import VisionConfig
from pipeline.recipe import EvaluationConfig, Recipe, TrainingConfig

Probability = Annotated[float, Limit(ge=0, le=1)]


class Crop(Section):
    """Cut out a square of `data.image_size` anywhere, after a black margin was added."""

    transform: Literal["crop"] = "crop"

    padding: int = Limit(default=4, ge=0)
    """Width of the margin, in pixels."""


class ResizedCrop(Section):
    """Cut out a rectangle anywhere, and scale it to `data.image_size`."""

    transform: Literal["resized_crop"] = "resized_crop"

    min_scale: float = Limit(default=0.08, gt=0, le=1)
    """The least share of the image's area that it has."""


class Flip(Section):
    """Mirror left and right."""

    transform: Literal["flip"] = "flip"

    probability: Probability = 0.5
    """Of an image to be mirrored."""


class RandAugment(Section):
    """Apply some operations on colours and geometry, all equally strong (arXiv 1909.13719)."""

    transform: Literal["rand_augment"] = "rand_augment"

    num_ops: PositiveInt = 2
    """How many."""

    magnitude: int = Limit(default=9, ge=0, le=30)
    """How strong."""


class TrivialAugment(Section):
    """Apply one operation on colours or geometry, of random strength (arXiv 2103.10158)."""

    transform: Literal["trivial_augment"] = "trivial_augment"


class Erase(Section):
    """Black out a rectangle (arXiv 1708.04896)."""

    transform: Literal["erase"] = "erase"

    probability: Probability = 0.25
    """Of an image to be changed so."""


Transform = Annotated[
    Crop | ResizedCrop | Flip | RandAugment | TrivialAugment | Erase, Discriminator("transform")
]


class ClassificationTraining(TrainingConfig):
    """Optimisation and the training loop."""

    batch_key: ClassVar[str] = "batch_size"
    micro_batch_key: ClassVar[str] = "micro_batch_size"

    batch_size: PositiveInt = 256
    """Images in a global batch. It is the same however many ranks share it."""

    micro_batch_size: PositiveInt | None = None
    """Most images in one forward pass; a global batch of more is accumulated, or shared by ranks:
    more ranks than micro-batches are of no use. null: batch_size."""

    augmentation: tuple[Transform, ...] = ()
    """What is done to training images, in this order, each `{transform: NAME, SETTING: VALUE}`:
    crop, resized_crop, flip, rand_augment, trivial_augment, erase. What happens to an image depends
    on seed, step and its place in the batch alone."""

    @model_validator(mode="after")
    def _fits_together(self) -> ClassificationTraining:
        names = [each.transform for each in self.augmentation]
        if len(set(names)) < len(names):
            raise ValueError("augmentation: each transform can be named once")
        return self


class ClassificationEvaluation(EvaluationConfig):
    """Scoring."""

    batch_size: PositiveInt = 256
    """Images classified together."""


class ClassificationRecipe(Recipe):
    """A run from images to accuracy."""

    page = "recipe_images.md"

    task: Literal["classification"] = "classification"
    """What is learnt."""

    data: ImagesConfig
    model: VisionConfig = VisionConfig()
    training: ClassificationTraining = ClassificationTraining()
    evaluation: ClassificationEvaluation = ClassificationEvaluation()

    @property
    def test_set_names(self) -> tuple[str, ...]:
        return (self.data.test.name,)

    @model_validator(mode="after")
    def _fits_together(self) -> ClassificationRecipe:
        self.model.check_ranks()
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size ({self.data.image_size}) must be a multiple of model.patch_size "
                f"({self.model.patch_size})"
            )
        return self
