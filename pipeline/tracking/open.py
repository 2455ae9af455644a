"""TODO docstring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.recipe import Recipe
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:  # torch and deepspeed take seconds to import
    pass


def open_tracker(recipe: Recipe) -> Tracker:
    """The tracker of `run_dir`; of a checkpoint that was brought here it goes on with the run."""
    checkpoints = list_checkpoints(recipe.run_dir / "checkpoints")
    return Tracker(recipe, checkpoints[-1].info.get("tracker_run_id") if checkpoints else None)
