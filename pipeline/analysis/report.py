"""The analyses of a run's model, alone or beside another model: the files of a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.files import are_whole, digest_of, read_json, sha256_of, write_json
from data_prep.stage import read_manifest
from pipeline.analysis import classification, translation
from pipeline.analysis.examples import Analysis, Examples, Settings, Subject
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.ranks import share_progress
from pipeline.recipe import Recipe, UsageError, slug_of
from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import Tracker
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    import torch

    from models.stack import Layered

log = logging.getLogger("analyse")

VERSION = 1  # raise it when the same model would give other files
SUMMARY = "analysis.json"  # written last: it describes the others
WHAT_MODELS_SHARE = {
    "translation": "languages or vocabularies are",
    "classification": "classes or images are",
}
LIBRARIES = ("torch", "matplotlib")  # that files can differ by


@dataclass
class Report:
    """The analyses of a model, or of two that are compared."""

    recipe: Recipe
    settings: Settings

    subjects: Sequence[Subject]
    """The run's model, and the one that it is compared with, if there is one."""

    against: Path | None = None
    """Where that was named: a recipe, or the folder of an export."""

    _found: dict[str, Any] = field(init=False)
    """Content of the summary; empty if there is none."""

    def __post_init__(self) -> None:
        self._found = read_json(self.folder / SUMMARY)

    @classmethod
    def of(cls, recipe: Recipe, against: Path | None, settings: Settings) -> Report:
        """Return what there is to report.

        :param against: a recipe, or the folder of an export: the model to compare with.
        :raises CheckpointError: a run has no checkpoint.
        :raises UsageError: the two models do not take the same examples.
        """
        own = _subject_of(recipe)
        if settings.head is not None and settings.head > own.heads:
            raise UsageError(f"--head {settings.head}: the model has {own.heads} heads")
        if against is None:
            return cls(recipe, settings, [own])
        if settings.head is not None or settings.show is not None:
            raise UsageError("--head and --show say whose attention is drawn; --against draws none")
        other = _subject_at(against, recipe)
        if other.bound_to != own.bound_to:
            raise UsageError(
                f"--against {against}: its {WHAT_MODELS_SHARE[recipe.task]} not those of "
                f"{recipe.run_dir}, so the two models cannot be compared on the same examples"
            )
        if other.name == own.name:
            other = other._replace(name=f"{other.name}-2")
        return cls(recipe, settings, [own, other], against.resolve())

    @property
    def _against(self) -> str:
        """Return the name of the folder of a comparison; empty if there is none."""
        return "".join(f"against-{slug_of(other.name)}" for other in self.subjects[1:])

    @property
    def folder(self) -> Path:
        """Return the folder of all files."""
        return self.recipe.run_dir / "analysis" / self._against

    @cached_property
    def fingerprint(self) -> str:
        """Return a digest of everything that the files depend on."""
        return digest_of(
            {
                "version": VERSION,
                "libraries": [version(library) for library in LIBRARIES],
                "settings": self.settings._asdict(),
                "models": [(subject.name, subject.weights) for subject in self.subjects],
                "shards": read_manifest(self.recipe.shards),
            }
        )

    @property
    def files(self) -> list[Path]:
        """Return the files that were written, the summary last."""
        names = self._found.get("files", {})
        return [self.folder / name for name in (*names, SUMMARY)]

    @property
    def up_to_date(self) -> bool:
        """Tell whether all files are there and whole, made from what the fingerprint stands for."""
        made_from = self._found.get("fingerprint")
        return made_from == self.fingerprint and are_whole(self.folder, self._found["files"])

    def bring_up_to_date(self) -> None:
        """Analyse, unless that was done before."""
        if self.up_to_date:
            log.info("%s: up to date", self.folder)
            return
        self._refuse_to_replace()
        analyses = list(self.analyses())  # what is there stays if the settings are wrong
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SUMMARY).unlink(missing_ok=True)
        for name in self._found.get("files", {}):  # of other settings, perhaps other names
            (self.folder / name).unlink(missing_ok=True)
        files: dict[str, str] = {}
        for analysis in analyses:
            json, png = (self.folder / f"{analysis.name}.{ending}" for ending in ("json", "png"))
            write_json(json, analysis.content)
            analysis.draw(png)
            files |= {path.name: sha256_of(path) for path in (json, png)}
        self._found = {
            "models": [
                {"name": subject.name, "weights_sha256": subject.weights}
                for subject in self.subjects
            ],
            "against": str(self.against) if self.against else None,
            **self.settings._asdict(),
            "files": files,
            "fingerprint": self.fingerprint,
        }
        write_json(self.folder / SUMMARY, self._found)

    def _refuse_to_replace(self) -> None:
        """Check that this comparison would not take the place of one with another model.

        :raises UsageError: it would.
        """
        other = self._found.get("against")
        if other and self.against and Path(other).exists() and Path(other) != self.against:
            raise UsageError(
                f"{self.folder} compares with {other}, and one with {self.against} would be called "
                "the same: rename one of the two"
            )

    def analyses(self) -> Iterator[Analysis]:
        """Load the models and analyse them."""
        import torch

        from pipeline.analysis.measures import measure

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = {subject.name: subject.load().eval().to(device) for subject in self.subjects}
        examples = _examples_of(self.recipe, self.settings, list(models.values()), device)
        log.info("%s: %d %s", " and ".join(models), len(examples), examples.what)
        with share_progress("analysing", len(examples.dealt)) as advance:
            yield from measure(models, examples, partial(advance, 1))
        if len(models) == 1:
            (model,) = models.values()
            yield from examples.attention_maps(model)

    def log(self, tracker: Tracker) -> None:
        """Log the files to MLflow, but for what was logged before."""
        for path in self.files:
            tracker.log_artifact(path, "/".join(filter(None, ["analysis", self._against])))


# ── What depends on the task ────────────────────────────────────────────────────────────────────


def _subject_of(recipe: Recipe) -> Subject:
    """Return the model of a run."""
    if isinstance(recipe, ClassificationRecipe):
        return classification.subject_of_run(recipe)
    assert isinstance(recipe, TranslationRecipe)
    return translation.subject_of_run(recipe)


def _subject_at(place: Path, recipe: Recipe) -> Subject:
    """Return the model of another recipe, or in the folder of an export.

    :raises UsageError: there is neither, or it is of another task than `recipe`.
    """
    if place.is_dir():
        if isinstance(recipe, ClassificationRecipe):
            return classification.subject_of_export(place)
        return translation.subject_of_export(place)
    if not place.exists():
        raise UsageError(f"--against {place}: neither a recipe nor the folder of an export")
    other = load_recipe(place, kind=Recipe)
    if other.task != recipe.task:
        raise UsageError(
            f"--against {place} is a recipe for {other.task}, this one is for {recipe.task}"
        )
    return _subject_of(other)


def _examples_of(
    recipe: Recipe, settings: Settings, models: Sequence[Layered], device: torch.device
) -> Examples:
    """Return examples of the recipe's validation set that all models can take.

    :raises UsageError: there are too few.
    """
    if isinstance(recipe, ClassificationRecipe):
        from pipeline.analysis.images import Images

        return Images(recipe.shards, recipe.data.image_size, settings, device)
    from pipeline.analysis.pairs import Pairs

    longest = min(int(model.max_source_seq_len) for model in models)  # type: ignore[arg-type]
    return Pairs(recipe.shards, settings, longest, device)
