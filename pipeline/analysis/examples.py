"""What an analysis needs to know of a task: which model, and examples of the validation set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import sha256_of
from models.export_format import WEIGHTS, ClassifierSettings, ExportSettings, ModelError
from pipeline.recipe import UsageError

if TYPE_CHECKING:  # that an analysis is up to date is told without PyTorch, which takes seconds
    from torch import Tensor, nn

    from models.stack import Layered

Numbers = NDArray[np.signedinteger[Any]]

LARGEST_BATCH = 32  # examples
LEAST_EXAMPLES = 4  # in a batch: CKA's estimator wants that many


class Subject(NamedTuple):
    """A model to analyse that is not loaded yet."""

    name: str
    weights: str
    """A digest of them."""

    bound_to: str
    """A digest of what its examples are made with: the vocabulary, the classes."""

    heads: int
    """Of an attention."""

    load: Callable[[], Layered]


def exported(
    folder: Path,
    settings: ExportSettings | ClassifierSettings,
    bound_to: Callable[[], str],
    load: Callable[[], Layered],
) -> Subject:
    """Return an exported model.

    :param bound_to: digests what its examples are made with.
    :raises ModelError: it is not whole.
    :raises UsageError: its format does not hold the model as PyTorch runs it.
    """
    if settings.format != "safetensors":
        raise UsageError(
            f"{folder}: an export in format {settings.format} does not show what it computes level "
            "by level; export with `--format safetensors`"
        )
    try:
        weights, digest = sha256_of(folder / WEIGHTS), bound_to()
    except OSError as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    place = folder.resolve()
    name = place.parent.name if place.name == "export" else place.name  # of a run, by default
    return Subject(name, weights, digest, settings.model.num_heads, load)


class Batch(NamedTuple):
    """Examples that go through a model together."""

    run: Callable[[nn.Module], object]
    """Calls a model with them."""

    real: Mapping[str, Tensor]
    """By stack, False where a position is padding, `[B, S]`; a stack without padding has none."""


class Analysis(NamedTuple):
    """An analysis is a JSON file and a picture."""

    name: str
    """Of both files."""

    content: Mapping[str, object]
    """Of the JSON."""

    draw: Callable[[Path], None]
    """Draws the PNG."""


class Settings(NamedTuple):
    """What the command line says."""

    examples: int
    """How many examples the measures are means over, at most."""

    head: int | None
    """The head whose attention is drawn, from 1; None: the mean over heads."""

    show: int | None
    """The example whose attention is drawn, its number in the validation set, from 1."""


class Examples(ABC):
    """Examples of a task's validation set, dealt to batches at random, the same each time."""

    what: ClassVar[str]
    """What they are, in the plural."""

    unit: ClassVar[str]
    """Of distances between positions."""

    class_token: ClassVar[bool]
    """Whether the first position stands for no place."""

    def __init__(self, chosen: Numbers) -> None:
        """Deal examples to batches of one size, as CKA wants them; what is left over is left out.

        :param chosen: their numbers.
        :raises UsageError: there are too few.
        """
        if len(chosen) < LEAST_EXAMPLES:
            raise UsageError(
                f"{len(chosen)} {self.what} of the validation set were chosen; an analysis takes "
                f"{LEAST_EXAMPLES} or more"
            )
        count = -(-len(chosen) // LARGEST_BATCH)
        size = len(chosen) // count
        self.dealt = chosen[: size * count].reshape(count, size)

    def __len__(self) -> int:
        return int(self.dealt.size)

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Read the batches, one after the other."""

    @abstractmethod
    def distances(self, positions: int) -> Tensor:
        """Return how far positions are apart that stand for a place, `[P, P]`."""

    @abstractmethod
    def attention_maps(self, model: Layered) -> Sequence[Analysis]:
        """Return who attends to what in an example or a few."""


def choose(count: int, wanted: int) -> NDArray[np.int64]:
    """Return the numbers of `wanted` of `count` examples (or of all, if there are fewer) in random
    order, the same each time."""
    return np.random.default_rng(seed=1).permutation(count)[:wanted]
