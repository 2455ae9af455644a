"""The recipe of Fashion-MNIST prepares all of it, as it is."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from ruamel.yaml import YAML

from data_prep.images.config import ImagesConfig
from data_prep.images.prepare import prepare_images
from data_prep.images.shards import ImageReader
from tests.conftest import ROOT

HEAD = {"images": 16, "labels": 8}  # bytes before the values


def values(folder: Path, split: str, kind: str) -> NDArray[np.uint8]:
    (path,) = folder.glob(f"{split}-{kind}-*.gz")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=HEAD[kind])


@pytest.mark.slow
def test_all_of_it(shared: Path, tmp_path: Path) -> None:
    data = YAML(typ="safe").load(ROOT / "recipes" / "fashion_mnist.yaml")["data"]
    config = ImagesConfig.model_validate({**data, "root": shared / "data", "workers": 2})
    made = prepare_images(config, tmp_path)
    folder = shared / "data" / "fashion_mnist"
    readers = {split: ImageReader(tmp_path / "shards", split, verify=True) for split in made.totals}
    read = {split: reader.read(np.arange(len(reader))) for split, reader in readers.items()}

    images, labels = read["test"]
    assert made.totals["test"].classes == (1000,) * 10
    assert np.array_equal(images.ravel(), values(folder, "t10k", "images"))
    assert np.array_equal(labels, values(folder, "t10k", "labels"))

    assert made.totals["train"].classes == (5500,) * 10
    assert made.totals["valid"].classes == (500,) * 10
    pixels = values(folder, "train", "images").reshape(-1, 28 * 28)
    wanted = Counter(zip(map(bytes, pixels), values(folder, "train", "labels"), strict=True))
    found = Counter(
        pair
        for split in ("train", "valid")
        for pair in zip(map(bytes, read[split][0]), read[split][1], strict=True)
    )
    assert found == wanted
    assert Counter(label for _, label in wanted) == dict.fromkeys(range(10), 6000)

    assert set(made.repeats.model_dump().values()) == {0}
    assert made.classes[9] == "Ankle boot"
    np.testing.assert_allclose(made.mean, (read["train"][0] / 255).mean(), rtol=1e-12)
    np.testing.assert_allclose(made.std, (read["train"][0] / 255).std(), rtol=1e-12)
