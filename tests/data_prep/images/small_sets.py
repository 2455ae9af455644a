"""Small sets of images that tests make: folders of files, IDX files, and their preparation."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.images.config import ImagesConfig
from data_prep.images.fetch import fetch
from data_prep.images.pack import pack
from data_prep.images.shards import ImagesManifest

SIZE = 8


def draw_images(number: int, seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    """Return random images `[number, size, size]`."""
    draw = np.random.default_rng(seed)
    return draw.integers(256, size=(number, size, size), dtype=np.uint8)


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    """Write an IDX file of bytes; a `.gz` one as such."""
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    content = head + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def write_idx_sets(root: Path) -> None:
    """Write 60 training images of 3 classes, 20 to a class, and 9 to test."""
    write_idx(root / "train-images", draw_images(60, seed=1))
    write_idx(root / "train-labels.gz", np.arange(60, dtype=np.uint8) % 3)
    write_idx(root / "test-images.gz", draw_images(9, seed=2))
    write_idx(root / "test-labels", np.arange(9, dtype=np.uint8) % 3)


IDX_SETS: Mapping[str, Any] = {
    "train": [{"name": "made", "images": "train-images", "labels": "train-labels.gz"}],
    "test": {"name": "made-test", "images": "test-images.gz", "labels": "test-labels"},
    "valid_images": 6,
    "channels": 1,
}
FOLDER_SETS: Mapping[str, Any] = {
    "train": [{"name": "photos", "folder": "train"}],
    "valid": {"name": "photos-valid", "folder": "valid"},
    "test": {"name": "photos-test", "folder": "test"},
}


def write_folders(root: Path) -> None:
    """Write a folder each of train, valid and test, with 4 images of cats and of dogs."""
    for seed, split in enumerate(("train", "valid", "test")):
        for number, image in enumerate(draw_images(8, 10 + seed)):
            folder = root / split / ("cat" if number % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").save(folder / f"{number}.png")


def config_of(root: Path, sets: Mapping[str, Any], **changes: Any) -> ImagesConfig:
    """Return a configuration of images below `root`."""
    keys = {"root": root, "image_size": SIZE, "workers": 2, **sets, **changes}
    return ImagesConfig.model_validate(keys)


def prepare(config: ImagesConfig, run_dir: Path) -> ImagesManifest:
    """Run the stages in this process."""
    run_dir.mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as executor:
        fetched = fetch(config, run_dir / "fetch")
        return pack(config, fetched, run_dir / "fetch", run_dir / "shards", executor)
