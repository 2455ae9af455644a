"""The note that a run's page in MLflow begins with: its scores, its losses, how to reproduce it."""

from __future__ import annotations

import re

from pipeline.recipe import Recipe
from pipeline.tracking.provenance import DataFacts, how_to_reproduce
from pipeline.tracking.tracker import Tracker

LOSSES = "loss.png"


def log_note(tracker: Tracker, recipe: Recipe, data: DataFacts, scores: str | None) -> None:
    """Log the note of a run, instead of the one that it had.

    :param scores: of its model as it is now, as Markdown; None: it has none.
    """
    parts = [scores or "No scores yet: `./run.sh evaluate` makes them."]
    if (picture := recipe.run_dir / LOSSES).exists():
        tracker.log_artifact(picture)
        parts.append(f"![losses](artifact:{LOSSES})")
    parts += ["### How to reproduce it", how_to_reproduce(recipe, data, tracker.tags)]
    tracker.log_note(spaced("\n\n".join(parts)))


def spaced(text: str) -> str:
    """Return Markdown with spaces between the columns of its tables: MLflow puts none there."""
    rows = re.compile(r"^\| [^|].*", re.MULTILINE)
    return rows.sub(lambda row: row[0].replace(" | ", "&emsp; | "), text)
