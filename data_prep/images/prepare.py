"""The stages of image data in their order: fetch → pack."""

from __future__ import annotations

from pathlib import Path

from data_prep.files import only_command_in
from data_prep.identity import write_identity
from data_prep.images.config import ImagesConfig
from data_prep.images.fetch import fetch
from data_prep.images.pack import pack
from data_prep.images.shards import ImagesManifest
from data_prep.pieces import open_executor
from data_prep.stage import FETCH, SHARDS


def prepare_images(config: ImagesConfig, run_dir: Path) -> ImagesManifest:
    """Bring `RUN_DIR/{fetch,shards}` up to date.

    :returns: what is in the shards.
    :raises DataError: something is wrong with the images, the disk or the workers; what is
        finished stays, and the next call goes on from there.
    """
    folder = run_dir.absolute()
    config = config.model_copy(update={"root": config.root.absolute()})  # for workers elsewhere
    raw, shards = folder / FETCH, folder / SHARDS
    with only_command_in(folder), open_executor(config) as executor:
        fetched = fetch(config, raw)
        made = pack(config, fetched, raw, shards, executor)
        write_identity(config, fetched.files, {}, folder)
        return made
