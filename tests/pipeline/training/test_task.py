"""The trainer takes any task, here one that tells even numbers from odd ones by their bits."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_prep.batch_plan import BatchPlan, GlobalBatch, Indices
from models.stack import ParameterCounts
from pipeline.checkpoints.folder import Criterion, list_checkpoints
from pipeline.checkpoints.resume import checkpoint_to_resume, is_finished
from pipeline.ranks import init_distributed, leave_ranks, rank
from pipeline.recipe_file import load_recipe
from pipeline.tracking.provenance import DataFacts
from pipeline.training.progress import start_logging
from pipeline.training.run import check_run, train
from pipeline.training.task import Task
from pipeline.training.trainer import Trainer
from pipeline.training.validation import Interruption, sum_over
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import finish, start_ranks, tracked, weights

if TYPE_CHECKING:
    from pipeline.training.task import Model

BITS = 16
TRAIN, VALID = 600, 200  # numbers
STEPS = 40


@dataclass(frozen=True)
class NumberBatch:
    """Holds a micro-batch of numbers."""

    bits: Tensor
    """Each bit as -1 or 1, lowest first, float32 `[B, 16]`."""

    parities: Tensor
    """0 of even numbers and 1 of odd ones, int64 `[B]`."""

    @property
    def positions(self) -> int:
        return len(self.parities)

    def __str__(self) -> str:
        return f"{len(self.parities)} numbers"


class ParityTask(Task[NumberBatch]):
    """Trains a network to say whether a number is odd. Its data are drawn from the seed."""

    recipe: TranslationRecipe

    unit = "numbers"
    target_unit = "answers"

    @property
    def criterion(self) -> Criterion:
        return Criterion("valid_accuracy", larger_is_better=True)

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The numbers to learn from, and those to validate with behind them."""
        draw = np.random.default_rng(self.recipe.training.seed)
        return draw.integers(0, 2**BITS, TRAIN + VALID)

    @cached_property
    def plan(self) -> BatchPlan:
        return self._plan(TRAIN)

    def _plan(self, numbers: int) -> BatchPlan:
        training, lengths = self.recipe.training, np.ones(numbers, np.int32)
        return BatchPlan(
            lengths,
            lengths,
            max_tokens=training.max_tokens,
            micro_batch_tokens=training.micro_batch_tokens,
            seed=training.seed,
        )

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        return {"model": "parity of bits", "data": [self.recipe.training.seed, TRAIN]}

    def check_data(self) -> str:
        return f"{TRAIN} numbers"

    def data_facts(self) -> DataFacts:
        return DataFacts(names={}, manifest=None, shape={}, files=(), sets=())

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        number = sum(parameter.numel() for parameter in self.create_model().parameters())
        return ParameterCounts(number, number)

    def create_model(self, *, begins: bool = True) -> nn.Module:
        return nn.Sequential(nn.Linear(BITS, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))

    def collate(self, examples: Indices, seed: int, device: torch.device) -> NumberBatch:
        bits = self.numbers[examples, None] >> np.arange(BITS) & 1
        vectors = torch.from_numpy(2 * bits - 1).to(device, torch.float32)
        return NumberBatch(vectors, torch.from_numpy(bits[:, 0]).to(device))

    def loss(self, model: Model, batch: NumberBatch) -> Tensor:
        return cross_entropy(model(batch.bits), batch.parities, reduction="sum")

    def units(self, batch: GlobalBatch) -> int:
        return batch.source_tokens

    def validate(
        self, trainer: Trainer[NumberBatch], interruption: Interruption
    ) -> dict[str, float]:
        def measure(examples: Indices) -> Tensor:
            batch = self.collate(TRAIN + examples, 0, trainer.device)
            logits = trainer.engine(batch.bits)
            right = (logits.argmax(1) == batch.parities).sum()
            return torch.stack([cross_entropy(logits, batch.parities, reduction="sum"), right])

        loss, right = sum_over(self._plan(VALID), trainer, interruption, measure)
        return {"valid_loss": loss / VALID, "valid_accuracy": right / VALID}


def recipe_of(path: Path, run_dir: Path) -> TranslationRecipe:
    """Return the tiny recipe with a `training` section for numbers instead of pairs."""
    training: dict[str, object] = {
        "max_steps": STEPS, "max_tokens": 64, "micro_batch_tokens": 16, "learning_rate": 1e-2,
        "log_every": 1, "validate_every": 4, "checkpoint_every": 8, "keep_checkpoints": STEPS,
    }  # fmt: skip
    keys = {f"training.{key}": str(value) for key, value in training.items()}
    keys |= {"run_dir": str(run_dir), "data.max_tokens_per_side": "8"}
    return load_recipe(path, list(keys.items()))


def main(arguments: list[str]) -> None:
    """Train as `pipeline/train.py` does.

    :param arguments: the tiny recipe; the run_dir.
    """
    path, run_dir = map(Path, arguments)
    task = ParityTask(recipe_of(path, run_dir))
    start_logging(rank())
    init_distributed()
    with ExitStack() as held:
        train(task, check_run(task, held), None)
    leave_ranks()


def train_parity(path: Path, run_dir: Path) -> None:
    """Train to the last step on one rank."""
    log = run_dir / "log"
    ranks = start_ranks(main, [str(path), str(run_dir)], log, 1)
    assert finish(ranks) == [0], log.read_text()


@pytest.fixture(scope="module")
def trained(tiny_recipe: Path) -> Path:
    """Return the run_dir of a training from step 0 to the last."""
    run_dir = tiny_recipe.parent / "parity" / "trained"
    run_dir.mkdir(parents=True)
    train_parity(tiny_recipe, run_dir)
    return run_dir


@pytest.mark.slow
def test_another_task_is_trained(tiny_recipe: Path, trained: Path) -> None:
    losses = tracked(trained, "train_loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]
    assert tracked(trained, "speed/answers_per_second").keys() == losses.keys()
    task = ParityTask(recipe_of(tiny_recipe, trained))
    newest = checkpoint_to_resume(task.recipe, task.identity(), task.criterion)
    assert newest is not None
    assert newest.step == STEPS
    assert is_finished(task.recipe, task.criterion, newest)


@pytest.mark.slow
def test_the_best_is_what_the_tasks_criterion_says(trained: Path) -> None:
    accuracies, losses = (tracked(trained, f"valid_{metric}") for metric in ("accuracy", "loss"))
    assert list(accuracies) == list(losses) == list(range(4, STEPS + 1, 4))
    best = max(accuracies, key=lambda step: accuracies[step])
    assert (trained / "checkpoints" / "best").read_text() == f"step-{best:08d}"
    assert best != min(losses, key=lambda step: losses[step])
    newest = list_checkpoints(trained / "checkpoints")[-1].info.validation
    assert (newest.criterion, newest.best) == ("valid_accuracy", accuracies[best])


@pytest.mark.slow
def test_another_task_goes_on_with_the_same_bits(tiny_recipe: Path, trained: Path) -> None:
    run_dir = trained.with_name("resumed")
    shutil.copytree(
        trained / "checkpoints" / "step-00000008", run_dir / "checkpoints" / "step-00000008"
    )
    train_parity(tiny_recipe, run_dir)
    assert f"resumed from {run_dir}/checkpoints/step-00000008" in (run_dir / "log").read_text()
    undisturbed = tracked(trained, "train_loss")
    expected = {step: loss for step, loss in undisturbed.items() if step > 8}
    assert tracked(run_dir, "train_loss") == expected
    theirs = weights(trained)
    for name, tensor in weights(run_dir).items():
        assert torch.equal(tensor, theirs[name]), name
