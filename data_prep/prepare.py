"""The stages in their order: fetch → clean → vocabulary → binarize."""

from __future__ import annotations

from pathlib import Path

from data_prep.binarize import binarize
from data_prep.clean import clean
from data_prep.config import DataConfig
from data_prep.corpora import fetch
from data_prep.files import only_command_in
from data_prep.pieces import executor_of
from data_prep.stage import Manifest
from data_prep.vocabulary import train_vocabulary


def prepare(config: DataConfig, run_dir: Path) -> Manifest:
    """Bring `RUN_DIR/{fetch,clean,vocabulary,shards}` up to date.

    :returns: the manifest of the shards.
    """
    folder = run_dir.absolute()
    text, models = folder / "clean", folder / "vocabulary"
    with only_command_in(folder), executor_of(config) as executor:
        fetched = fetch(config, folder / "fetch", executor)
        cleaned = clean(config, fetched, folder / "fetch", text, executor)
        vocabulary = train_vocabulary(config, cleaned, text, models, executor)
        return binarize(config, cleaned, vocabulary, text, models, folder / "shards", executor)
