"""What a task is to the trainer, which knows no more of any task than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from data_prep.batch_plan import BATCH_PLAN_VERSION, BatchPlan, GlobalBatch, Indices
from pipeline.checkpoints.folder import Criterion
from pipeline.recipe import Recipe
from pipeline.tracking.provenance import DataFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from models.stack import ParameterCounts
    from pipeline.training.trainer import Trainer
    from pipeline.training.validation import Interruption

    Model = Callable[..., Tensor]


class MicroBatch(Protocol):
    """What one forward pass works on. In words it is its size: `64 × 8 + 8 tokens`."""

    @property
    def positions(self) -> int:
        """Positions that the model computes, padding included."""


Batch = TypeVar("Batch", bound=MicroBatch)


class Task(ABC, Generic[Batch]):
    """A task: its data, model, loss and judgement.

    It is cheap to make: neither torch nor data are needed to ask for its identity and criterion.
    """

    unit: str
    """What an example is measured in; progress tells how many a second."""

    target_unit: str
    """What the loss is summed over, likewise."""

    words: ClassVar[Mapping[str, str]] = {"train_loss": "loss %.4f"}
    """How the log says a metric, if not by its name and four digits."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.end = ExitStack()
        """Ends, when training does, what the task has started."""

    @property
    @abstractmethod
    def criterion(self) -> Criterion:
        """Which of the metrics of `validate` says which step is the best."""

    @cached_property
    @abstractmethod
    def model_identity(self) -> dict[str, Any]:
        """Return what a model's weights are bound to: JSON values, each under the words that an
        error calls it.

        :raises DataError: there are no prepared data.
        """

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint is bound to: besides the weights what a step counts batches of.

        :raises DataError: there are no prepared data.
        """
        training = self.recipe.training
        sizes = (training.batch_key, training.micro_batch_key)
        batches = [BATCH_PLAN_VERSION, training.seed, *(getattr(training, key) for key in sizes)]
        frozen = training.freeze
        return {**self.model_identity, "batch plan": batches, "frozen parameters": frozen}

    def check_recipe(self) -> None:
        """Compare the recipe and the files that it names with what the data were made from.

        :raises DataError: they differ, in what, and what to do.
        """

    def check_base(self, folder: Path) -> None:
        """Compare an export with the model and the data of a training that starts from its weights.

        :raises CheckpointError: they do not fit together.
        """

    @abstractmethod
    def check_data(self) -> str:
        """Read all data that training needs and compare them with their checksums.

        :returns: what there is, in words.
        :raises DataError: something is missing or damaged, and what to do.
        """

    @abstractmethod
    def data_facts(self) -> DataFacts:
        """Return what tracking tells of the data."""

    @cached_property
    @abstractmethod
    def parameter_counts(self) -> ParameterCounts:
        """Return how many parameters the model has."""

    @abstractmethod
    def create_model(self, *, begins: bool = True) -> nn.Module:
        """Return the model as training starts with it, ready for the forward pass of training.

        :param begins: with the weights of `training.init_from`; a checkpoint has others.
        :raises CheckpointError: `training.init_from` does not fit.
        """

    @property
    @abstractmethod
    def plan(self) -> BatchPlan:
        """Which examples each step sees."""

    @abstractmethod
    def collate(self, examples: Indices, seed: int, device: torch.device) -> Batch:
        """Read `examples` into one micro-batch. Of no examples it is one with a loss of zero.

        Threads call this beside training, which draws from torch's global random numbers: whatever
        is random here comes from `seed`.
        """

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the training loss of `batch`, summed over the targets that `normaliser` counts."""

    def normaliser(self, batch: GlobalBatch) -> int:
        """Return the number of targets of a global batch: what its summed loss is divided by."""
        return batch.target_tokens

    @abstractmethod
    def units(self, batch: GlobalBatch) -> int:
        """Return the size of a global batch in `unit`s."""

    def loss_metrics(self, loss: float) -> dict[str, float]:
        """Return the metrics that tell of the training loss (of one target), the first of them
        `train_loss`."""
        return {"train_loss": loss}

    def dearest(self) -> Task[Batch]:
        """Return this task with whatever varies from step to step at what takes most memory."""
        return self

    def rehearse_validation(self, trainer: Trainer[Batch]) -> None:
        """Do once what `validate` needs memory for besides forward passes. Every rank calls this
        before training, on GPUs."""

    @abstractmethod
    def validate(self, trainer: Trainer[Batch], interruption: Interruption) -> dict[str, float]:
        """Judge the model that `trainer` has. Every rank calls this.

        :returns: metrics, the same on every rank, `valid_loss` among them; and the one of
            `criterion`, where it is due at this step.
        :raises Stopped: a signal has come; `interruption` is asked after every batch.
        """

    def in_words(self, metrics: Mapping[str, float]) -> str:
        """Return what the log says of the metrics of `validate`, or of `loss_metrics`."""
        return " | ".join(
            self.words.get(name, f"{name.replace('_', ' ')} %.4f") % value
            for name, value in metrics.items()
        )
