"""MLflow's store beside `run_dir`, moved or copied: it knows its files by whole paths."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.recipe import Recipe

log = logging.getLogger("tracking")

FILES = "mlartifacts"  # beside the store
COLUMNS = {  # of MLflow's tables, with the URI of a folder
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def follow_store(recipe: Recipe) -> None:
    """Have the store beside `run_dir` look for its files beside itself, and for new ones put them
    there. Where `tracking.uri` names a store, its files may be anywhere, and stay.

    A copy would otherwise write into its original.
    """
    store, here = recipe.store, recipe.store.with_name(FILES)
    if recipe.tracking.uri or not store.is_file():
        return
    with (
        closing(sqlite3.connect(store, timeout=30)) as connection,
        suppress(sqlite3.OperationalError),  # MLflow is only making it
    ):
        found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (old,) in found:
            place = Path(unquote(urlsplit(str(old)).path))
            if not str(old).startswith("file:") or place.name != FILES or _is(place, here):
                continue
            with connection:
                for table, columns in COLUMNS.items():
                    for column in columns:
                        connection.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                            (here.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                        )
            log.warning(
                "%s is a copy, or was moved: its files are %s now, not %s", store, here, place
            )


def _is(one: Path, other: Path) -> bool:
    """Tell whether two paths are of one folder, by way of links perhaps."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))
