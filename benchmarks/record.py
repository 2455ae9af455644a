"""What trainings have been measured to come to, in a file that outlives the models.

Each line is one measurement. What the file says is not measured again, so that it grows over days
and machines, and docs/results.md is drawn from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, TypeAdapter, ValidationError

from benchmarks.architectures import counts_of, translation_of
from benchmarks.runs import Run
from data_prep.corpora import read_text
from data_prep.files import locked, write_atomically
from pipeline.recipe import slug_of
from pipeline.tracking.tracker import history_of
from pipeline.translation.scores import paired_bootstrap


class Measurement(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str


class Settings(Measurement):
    """What all the trainings have in common; the file's first line."""

    kind: Literal["settings"] = "settings"
    recipe: str
    overrides: dict[str, str]


class Attempt(Measurement):
    """A training, whatever it came to."""

    system: str
    model: dict[str, str]
    """The recipe's keys of the section `model` that make the system."""

    seed: int
    learning_rate: str


class Training(Attempt):
    """A trained model."""

    kind: Literal["training"] = "training"
    core_parameters: int
    parameters: int
    """With embeddings."""

    valid_losses: dict[int, float]
    """By step."""

    bleu: float
    chrf: float
    minutes: float
    """How long it takes at its median speed; others may have shared the machine."""

    memory_gib: float

    @property
    def valid_loss(self) -> float:
        return min(self.valid_losses.values())


class GivenUp(Attempt):
    """A training that was stopped, since another learning rate did much better."""

    kind: Literal["given up"] = "given up"
    step: int
    """The last that was validated."""

    valid_loss: float


class Export(Measurement):
    """The int8 export of a training's model."""

    kind: Literal["export"] = "export"
    system: str
    format: str
    megabytes: float
    """All of its files but the model card."""

    bleu: float
    milliseconds: list[float]
    """Of a sentence, round by round."""

    reference_milliseconds: list[float]
    """The same of the reference in the same rounds."""


class Comparison(Measurement):
    """The paired bootstrap test of two models with the same seed."""

    kind: Literal["comparison"] = "comparison"
    ours: str
    theirs: str
    seed: int
    difference: float
    p: float


class ImageTraining(Measurement):
    """A trained classifier of images."""

    kind: Literal["image training"] = "image training"
    system: str
    seed: int
    keys: dict[str, str]
    """The recipe's keys that make the system, its learning rate among them."""

    accuracy: float
    """On the test set, in percent."""


M = TypeVar("M", bound=Measurement)
Line = Annotated[
    Settings | Training | GivenUp | Export | Comparison | ImageTraining, Discriminator("kind")
]
LINE: TypeAdapter[Line] = TypeAdapter(Line)


class Record:
    """The measurements in a file; threads and processes may share it."""

    def __init__(self, path: Path, settings: Settings | None = None) -> None:
        """
        :param settings: of what will be added; None: the file is only read.
        :raises SystemExit: the file has other settings, or a line that is no measurement; or it is
            only to be read, and is not there.
        """
        self.path, self.lock = path, Lock()
        self.lines: list[Line]
        if path.exists():
            self.lines = list(_lines_of(path))
            if settings and self.lines[:1] != [settings]:
                raise SystemExit(f"{path}, line 1: measured with other settings; now:\n{settings}")
        elif settings:
            self.lines = [settings]
        else:
            raise SystemExit(f"{path}: there is no such record")

    def add(self, line: Line) -> None:
        """Add a measurement to the file, and whatever others have added."""
        with self.lock, locked(self.path.with_name(f".{self.path.name}.lock")):
            if self.path.exists():
                self.lines = list(_lines_of(self.path))
            self.lines.append(line)
            text = "".join(f"{each.model_dump_json()}\n" for each in self.lines)
            write_atomically(self.path, text)

    def all(self, kind: type[M]) -> list[M]:
        """Return the measurements of a kind."""
        return [line for line in self.lines if isinstance(line, kind)]

    def find(self, run: Run) -> Attempt | None:
        """Return what a run came to, if it has been trained.

        :raises SystemExit: a system of that name was another model.
        """
        key = run.system, run.seed, run.overrides["training.learning_rate"]
        attempts = self.all(Attempt)
        found = next((a for a in attempts if (a.system, a.seed, a.learning_rate) == key), None)
        if found and found.model != model_of(run):
            raise SystemExit(f"{self.path}: {run.system} was {found.model}, now {model_of(run)}")
        return found

    def trainings(self, system: str) -> Sequence[Training]:
        """Return a system's models with the learning rate that suits it, in the order of seeds."""
        found = [each for each in self.all(Training) if each.system == system]
        best = min(found, key=lambda each: each.valid_loss, default=None)
        chosen = (each for each in found if best and each.learning_rate == best.learning_rate)
        return sorted(chosen, key=lambda each: each.seed)

    def exports(self, system: str) -> Sequence[Export]:
        """Return what a system was exported to."""
        return [each for each in self.all(Export) if each.system == system]

    def comparisons(self, ours: str, theirs: str) -> Sequence[Comparison]:
        """Return the comparisons of two systems in the order of their seeds."""
        pairs = [c for c in self.all(Comparison) if (c.ours, c.theirs) == (ours, theirs)]
        return sorted(pairs, key=lambda each: each.seed)


def _lines_of(path: Path) -> Iterator[Line]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            yield LINE.validate_json(line)
        except ValidationError as error:
            raise SystemExit(f"{path}, line {number}: {error}") from error


def model_of(run: Run) -> dict[str, str]:
    """Return the overrides of the section `model`."""
    return {key: value for key, value in run.overrides.items() if key.startswith("model.")}


def measured(run: Run) -> Training:
    """Return what a trained and evaluated run came to."""
    recipe, history = translation_of(run), history_of(run.recipe)
    counts = counts_of(recipe)
    speed = median(history["speed/steps_per_second"].values())
    return Training(
        system=run.system,
        model=model_of(run),
        seed=run.seed,
        learning_rate=run.overrides["training.learning_rate"],
        core_parameters=counts.core,
        parameters=counts.total,
        valid_losses={step: round(loss, 4) for step, loss in run.valid_losses.items()},
        bleu=run.scores["bleu"],
        chrf=run.scores["chrf"],
        minutes=round(recipe.training.max_steps / speed / 60, 1),
        memory_gib=round(max(history["speed/memory_gib"].values()), 2),
    )


def given_up(run: Run) -> GivenUp:
    """Return how far a run came that was given up."""
    step, loss = max(run.valid_losses.items())
    rate = run.overrides["training.learning_rate"]
    return GivenUp(
        system=run.system,
        model=model_of(run),
        seed=run.seed,
        learning_rate=rate,
        step=step,
        valid_loss=round(loss, 4),
    )


def compared(ours: Run, theirs: Run) -> Comparison:
    """Return how the translations of two models with the same seed differ."""
    data = translation_of(ours).data
    references = read_text(ours.run_dir / "clean" / f"test.{data.target_lang}")
    hypotheses = Path("evaluation", slug_of(data.test.name), "hypotheses.txt")
    found, other = (read_text(run.run_dir / hypotheses) for run in (ours, theirs))
    test = paired_bootstrap(other, found, [references], data.target_lang)["bleu"]
    return Comparison(
        ours=ours.system,
        theirs=theirs.system,
        seed=ours.seed,
        difference=test["difference"],
        p=test["p"],
    )
