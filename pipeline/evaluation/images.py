"""Classify a test set and score that, unless it was done before."""

# Functions import torch (by way of the classifier) and rich themselves: when all scores are up to
# date, neither is needed.

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from data_prep.files import digest_of
from data_prep.identity import check_corpora
from data_prep.images.report import shortened
from data_prep.images.shards import ImageReader, ImagesManifest, read_images_manifest
from data_prep.stage import read_manifest
from models.export_format import DIVERGED, ModelError, read_classifier_settings
from pipeline.checkpoints.folder import Checkpoint, CheckpointError
from pipeline.classification.run_model import checkpoints_of_run
from pipeline.classification.scores import Probabilities, by_class, confusion, mcnemar, scores
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.answers import read_table, write_answers_page, write_table
from pipeline.evaluation.result import (
    EvaluatedModel,
    Evaluation,
    Result,
    Scores,
    bring_up_to_date,
    digest_of_weights,
    read_scores,
)
from pipeline.markdown import markdown_table
from pipeline.pictures import draw_confusion, draw_images
from pipeline.ranks import gather_shares, rank, share_progress, world_size
from pipeline.recipe import VALIDATION, slug_of

if TYPE_CHECKING:
    from pipeline.classification.serving import Classifier

log = logging.getLogger("evaluate")

VERSION = 2  # raise it when the same model would get other scores
MOST_WRONG = 40  # images of the contact sheet
MOST_CLASSES = 200  # of the confusion matrix: the first so many
TABLE_ROWS = 100
COLUMNS = ("image", "class", "predicted", "probability of its class", "of the predicted one")


def scores_of(recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint]) -> Scores:
    """Return the scores of these checkpoints on the test set as it is now; empty without any."""
    folder = recipe.evaluations / slug_of(recipe.data.test.name)
    found = read_scores(folder)
    wanted = {
        "test_set": recipe.data.test.name,
        "test_set_sha256": images_digest(read_images_manifest(recipe.shards), "test"),
        "weights_sha256": digest_of_weights(recipe, checkpoints),
    }
    return found if wanted.items() <= found.items() else {}


def images_digest(data: ImagesManifest, split: str) -> str:
    """Return a digest of the images of valid or test, with their classes, however they are stored:
    models that see them at other scales or in other colours answer the same questions."""
    return digest_of([list(data.classes), data.totals[split].content])


@dataclass
class ImageResult(Result):
    """A test set of images, and how well a model has classified it."""

    files = (
        "scores.json", "predictions.txt", "predictions.tsv", "predictions.html", "confusion.png",
        "most_wrong.png",
    )  # fmt: skip
    answers_file = "predictions.txt"
    page_file = "predictions.html"
    comparison = "McNemar's test"
    logged_scores = (
        "accuracy", "accuracy_low", "accuracy_high", "top5_accuracy", "loss", "images_per_second",
    )  # fmt: skip
    logged_tags: ClassVar[dict[str, str]] = {}

    reader: ImageReader
    """Of its images."""

    @property
    def size(self) -> int:
        return len(self.reader)

    @property
    def line(self) -> str:
        scores = self.scores
        top5 = f"top-5 {scores['top5_accuracy']:.2f}%, " if "top5_accuracy" in scores else ""
        return (
            f"accuracy {scores['accuracy']:.2f}% ({scores['accuracy_low']:.2f} to "
            f"{scores['accuracy_high']:.2f}) on {scores['test_set']}, {top5}"
            f"loss {scores['loss']:.4f}"
        )

    def compare_with(self, answers: list[str]) -> dict[str, dict[str, float]]:
        classes = np.array(self.reader.data.classes)
        truth = classes[self.reader.labels()]
        return mcnemar(np.array(answers) == truth, np.array(self.answers) == truth)

    def write(self, probabilities: Probabilities, more: dict[str, Any]) -> None:
        """Score the predictions, and write the folder.

        :param more: further keys of scores.json.
        """
        labels, classes = self.reader.labels(), self.reader.data.classes
        predicted = probabilities.argmax(axis=1)
        drawn = classes[:MOST_CLASSES]
        counts = confusion(predicted, labels, len(drawn))
        content = {
            "test_set": self.test_set_name,
            "images": len(labels),
            **scores(probabilities, labels),
            "by_class": by_class(predicted, labels, classes),
            **({"confusion": counts.tolist()} if drawn == classes else {}),
            **more,
        }
        self.write_answers([classes[label] for label in predicted])
        title = f"accuracy {content['accuracy']:.2f}% on {self.test_set_name}"
        worst_first = self._write_predictions(title, probabilities)
        if drawn != classes:
            title += f"; the first {len(drawn)} of {len(classes)} classes"
        names = list(map(shortened, drawn))
        draw_confusion(title, counts, names, self.folder / "confusion.png")
        self._draw_most_wrong(probabilities, worst_first)
        self.write_scores(content)

    def _write_predictions(self, title: str, probabilities: Probabilities) -> list[int]:
        """Write every image's prediction, the most wrong first.

        :returns: the places of the images in the test set, in that order.
        """
        labels, classes, names = self.reader.labels(), self.reader.data.classes, self.reader.names()
        rows = np.arange(len(labels))
        predicted, of_class = probabilities.argmax(axis=1), probabilities[rows, labels]
        order = np.lexsort([rows, of_class, predicted == labels])
        lines: list[list[str]] = []
        for row in order:
            best = predicted[row]
            shares = (f"{of_class[row]:.4f}", f"{probabilities[row, best]:.4f}")
            lines.append([names[row], classes[labels[row]], classes[best], *shares])
        write_table(self.folder / "predictions.tsv", COLUMNS, lines)
        page = self.folder / self.page_file
        write_answers_page(page, title, COLUMNS, list(map(_values, lines)), "predictions.tsv")
        found: list[int] = order.tolist()
        return found

    def _draw_most_wrong(self, probabilities: Probabilities, worst_first: Sequence[int]) -> None:
        classes = self.reader.data.classes
        wrong = int((probabilities.argmax(axis=1) != self.reader.labels()).sum())
        chosen = np.array(worst_first[: max(1, min(wrong, MOST_WRONG))])
        images, labels = self.reader.read(chosen)
        names = list(map(shortened, classes))
        captions = [
            f"{names[label]}\nas {names[best]}, {share:.0%}"
            for label, best, share in zip(
                labels,
                probabilities[chosen].argmax(axis=1),
                probabilities[chosen].max(axis=1),
                strict=True,
            )
        ]
        title = f"{self.test_set_name}: what the model is most wrong about"
        if not wrong:
            title = f"{self.test_set_name}: nothing is wrong; what the model is least sure of"
        draw_images(title, images, captions, self.folder / "most_wrong.png")

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        lines = read_table(self.folder / "predictions.tsv")[:TABLE_ROWS]
        rows = [_values([*line.values()]) for line in lines]
        return {
            "most_wrong": {name: [row[place] for row in rows] for place, name in enumerate(COLUMNS)}
        }


def _values(line: Sequence[str]) -> list[Any]:
    """Return the cells of a line of predictions.tsv, numbers as such."""
    kinds = (str, str, str, float, float)
    return [kind(cell) for kind, cell in zip(kinds, line, strict=True)]


def table_of(scores: Sequence[Scores]) -> str:
    """Return scores on several sets of images as a Markdown table, with their intervals."""
    names = ("images of", "images", "accuracy (%)", "95% interval", "top-5 (%)", "cross-entropy")
    rows = []
    for s in scores:
        interval = f"{s['accuracy_low']:.2f} to {s['accuracy_high']:.2f}"
        top5 = f"{s['top5_accuracy']:.2f}" if "top5_accuracy" in s else "–"
        numbers = (f"{s['images']:,}", f"{s['accuracy']:.2f}", interval, top5, f"{s['loss']:.4f}")
        rows.append((s["test_set"], *numbers))
    return markdown_table(names, rows)


class EvaluatedClassifier(EvaluatedModel[ClassificationRecipe, ImageResult]):
    """The classifier to evaluate."""

    @classmethod
    def of(cls, recipe: ClassificationRecipe, export: Path | None) -> EvaluatedClassifier:
        """Return the model in the folder `export`, or that of the run's checkpoints if it is None.

        :raises CheckpointError: there is nothing to evaluate, or it belongs to other data.
        """
        checkpoints = [] if export else checkpoints_of_run(recipe)
        check_corpora(recipe.data, recipe.run_dir)  # the test set is among them
        if export is None:
            return cls(recipe, checkpoints, None)
        if read_manifest(export) is None:
            raise CheckpointError(f"{export}: not an exported model")
        settings, data = read_classifier_settings(export), ImageReader(recipe.shards, "test").data
        if settings.classes != list(data.classes) or settings.channels != data.channels:
            raise CheckpointError(
                f"{export} knows other classes, or other channels, than {recipe.shards} have"
            )
        if settings.stored_size != data.stored_size:  # the middle of it would be another part
            raise CheckpointError(
                f"{export} takes images that were scaled to {settings.stored_size} pixels, and "
                f"those of {recipe.shards} were scaled to {data.stored_size}"
            )
        return cls(recipe, [], export)

    def result(self, split: str) -> ImageResult:
        """Return the result on test or validation set: where its files belong, with the scores
        found there.

        :raises DataError: a shard is damaged.
        """
        recipe, reader = self.recipe, ImageReader(self.recipe.shards, split, verify=True)
        if split == "valid":
            valid = recipe.data.valid
            name, folder, prefix = valid.name if valid else VALIDATION, VALIDATION, VALIDATION
        else:
            name = recipe.data.test.name
            folder, prefix = f"{slug_of(name)}{self.variant}", f"test{self.variant}"
        sha256 = images_digest(reader.data, split)
        depends_on = {
            "version": VERSION,
            "weights": self.weights,
            "export": self.export_digest,
            "images": [shard.sha256 for shard in reader.shards],
            "test set": [name, sha256],
            "names": digest_of(reader.names()),
        }
        place = recipe.evaluations / folder
        return ImageResult(place, f"{prefix}_", digest_of(depends_on), name, sha256, reader)

    def results(self) -> list[ImageResult]:
        return [self.result("test")]

    def result_on_validation(self) -> ImageResult:
        return self.result("valid")

    def answer(self, missing: Sequence[ImageResult]) -> None:
        from pipeline.classification.classifier import classifier_of_export, classifier_of_run

        if self.export:
            classifier = classifier_of_export(self.export)
        else:
            classifier = classifier_of_run(self.recipe, self.checkpoints)
        for result in missing:
            _classify_and_score(self, classifier, result)


def evaluate_images(
    recipe: ClassificationRecipe, export: Path | None = None
) -> Evaluation[ImageResult]:
    """Bring the results up to date, on every rank; see `bring_up_to_date`.

    :param export: a folder written by `./run.sh export`, to evaluate instead of the checkpoints.
    :raises CheckpointError: there is nothing to evaluate, or it belongs to other data.
    :raises DataError: the images are missing or damaged.
    """
    return bring_up_to_date(lambda: EvaluatedClassifier.of(recipe, export))


def _classify_and_score(
    model: EvaluatedClassifier, classifier: Classifier, result: ImageResult
) -> None:
    """Classify a test set on all ranks; score that and write `result` on rank 0."""
    log.info("test set %s, %d images; %s", result.test_set_name, len(result.reader), model)
    started = time.monotonic()
    share = np.array_split(np.arange(len(result.reader)), world_size())[rank()]
    found = []
    with share_progress("classifying", len(share)) as advance:
        size = model.recipe.evaluation.batch_size
        for begin in range(0, len(share), size):
            images, _ = result.reader.read(share[begin : begin + size])
            found.append(classifier.probabilities(images))
            advance(len(images))
    probabilities = np.concatenate(gather_shares(found))
    if not np.isfinite(probabilities).all():  # on whichever rank
        raise ModelError(f"{model}: {DIVERGED}")
    seconds = time.monotonic() - started
    more = {
        **model.description,
        "images_per_second": round(len(probabilities) / seconds, 2),
        "ranks": world_size(),
    }
    if rank() == 0:
        result.write(probabilities, more)
