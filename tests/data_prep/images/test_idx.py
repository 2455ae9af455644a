"""IDX files are read as they are meant, and refused by name where they are not."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.files import DataError
from data_prep.images.shards import ImageReader
from tests.data_prep.images.small_sets import (
    IDX_SETS,
    config_of,
    draw_images,
    prepare,
    write_idx,
    write_idx_sets,
)


def test_values_and_labels(tmp_path: Path) -> None:
    """Test images keep their order; those of training and validation are all there, once."""
    write_idx_sets(tmp_path)
    made = prepare(config_of(tmp_path, IDX_SETS, images_per_shard=25), tmp_path / "run")
    readers = {
        split: ImageReader(tmp_path / "run" / "shards", split, verify=True) for split in made.totals
    }
    images, labels = readers["test"].read(np.arange(9))
    assert np.array_equal(images[:, 0], draw_images(9, seed=2))
    assert (labels == np.arange(9) % 3).all()
    both = [readers[split].read(np.arange(len(readers[split]))) for split in ("train", "valid")]
    assert [len(labels) for _, labels in both] == [54, 6]
    assert len(made.of_split("train")) == 3
    rows = {image.tobytes(): row for row, image in enumerate(draw_images(60, seed=1))}
    order = [
        (rows[image.tobytes()], label)
        for images, labels in both
        for image, label in zip(images[:, 0], labels.tolist(), strict=True)
    ]
    assert sorted(order) == [(row, row % 3) for row in range(60)]
    assert order[:54] != sorted(order[:54])
    assert order[54:] == sorted(order[54:])


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path) -> None:
    write_idx_sets(tmp_path)
    made = prepare(config_of(tmp_path, IDX_SETS, channels=3), tmp_path / "run")
    reader = ImageReader(tmp_path / "run" / "shards", "train")
    pixels = reader.read(np.arange(len(reader)))[0] / 255.0
    assert pixels.shape == (54, 3, 8, 8)
    np.testing.assert_allclose(made.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(made.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)


def test_images_that_never_change_can_be_normalised(tmp_path: Path) -> None:
    write_idx_sets(tmp_path)
    write_idx(tmp_path / "train-images", np.full((60, 8, 8), 51, np.uint8))
    made = prepare(config_of(tmp_path, IDX_SETS, drop_repeated=False), tmp_path / "run")
    assert (made.mean, made.std) == ((0.2,), (1.0,))


def test_validation_images_are_drawn_of_each_class(tmp_path: Path) -> None:
    """Of 30, 20 and 10 images, 7 are 3.5, 2.33 and 1.17: largest remainders get the rest."""
    write_idx_sets(tmp_path)
    labels = np.repeat(np.arange(3, dtype=np.uint8), (30, 20, 10))
    write_idx(tmp_path / "train-labels.gz", labels)
    drawn = set()
    for seed in (1, 2):
        run = tmp_path / f"run{seed}"
        made = prepare(config_of(tmp_path, IDX_SETS, valid_images=7, seed=seed), run)
        assert made.totals["valid"].classes == (4, 2, 1)
        assert made.totals["train"].classes == (26, 18, 9)
        drawn.add(ImageReader(run / "shards", "valid").read(np.arange(7))[0].tobytes())
    assert len(drawn) == 2


def test_the_last_image_of_a_class_stays_in_training(tmp_path: Path) -> None:
    write_idx_sets(tmp_path)
    labels = np.repeat(np.arange(3, dtype=np.uint8), (58, 1, 1))
    write_idx(tmp_path / "train-labels.gz", labels)
    made = prepare(config_of(tmp_path, IDX_SETS, valid_images=57), tmp_path / "run")
    assert made.totals["train"].classes == (1, 1, 1)
    with pytest.raises(DataError, match="valid_images 58 leaves some class no image to train on"):
        prepare(config_of(tmp_path, IDX_SETS, valid_images=58), tmp_path / "run")


def test_a_label_that_occurs_nowhere_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx_sets(tmp_path)
    config = config_of(tmp_path, IDX_SETS, classes=["hat", "shoe", "sock", "glove"])
    made = prepare(config, tmp_path / "run")
    assert made.classes == ("hat", "shoe", "sock", "glove")
    assert made.totals["train"].classes == (18, 18, 18, 0)
    assert "shards: train has no image of glove" in caplog.messages


def another_magic(root: Path) -> None:
    (root / "train-images").write_bytes(b"\x89PNG\r\n\x1a\n" * 9)


def an_empty_file(root: Path) -> None:
    (root / "train-images").write_bytes(b"")


def floats(root: Path) -> None:
    path = root / "train-images"
    path.write_bytes(b"\0\0\x0d\x03" + path.read_bytes()[4:])


def swapped(root: Path) -> None:
    (root / "train-images").write_bytes(gzip.decompress((root / "train-labels.gz").read_bytes()))


def a_cut_head(root: Path) -> None:
    (root / "train-images").write_bytes((root / "train-images").read_bytes()[:9])


def cut_values(root: Path) -> None:
    (root / "train-images").write_bytes((root / "train-images").read_bytes()[:-5])


def more_values(root: Path) -> None:
    (root / "train-images").write_bytes((root / "train-images").read_bytes() + b"\0")


def a_cut_gz(root: Path) -> None:
    (root / "test-images.gz").write_bytes((root / "test-images.gz").read_bytes()[:-20])


def a_damaged_gz(root: Path) -> None:
    content = bytearray((root / "test-images.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (root / "test-images.gz").write_bytes(content)


def no_gz(root: Path) -> None:
    (root / "test-images.gz").write_bytes(gzip.decompress((root / "test-images.gz").read_bytes()))


def fewer_labels(root: Path) -> None:
    write_idx(root / "train-labels.gz", np.zeros(59, np.uint8))


def no_images(root: Path) -> None:
    write_idx(root / "train-images", np.zeros((0, 8, 8), np.uint8))


def a_large_label(root: Path) -> None:
    labels = np.zeros(9, np.uint8)
    labels[[4, 7]] = 3
    write_idx(root / "test-labels", labels)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (another_magic, r"train-images: not an IDX file \(it begins with '89 50 4e 47'\)"),
        (an_empty_file, "train-images: not an IDX file"),
        (floats, "train-images: its values are of IDX type 0x0d; images must be unsigned bytes"),
        (swapped, "train-images: has 1 dimensions, images have 3"),
        (a_cut_head, "train-images: truncated in its head"),
        (cut_values, r"train-images: truncated: .* 3840 bytes of images \(60 × 8 × 8\), 5 are mis"),
        (more_values, "train-images: goes on after its 60 images"),
        (a_cut_gz, "test-images.gz: damaged or truncated"),
        (a_damaged_gz, "test-images.gz: damaged or truncated"),
        (no_gz, "test-images.gz: damaged or truncated: Not a gzipped file"),
        (fewer_labels, "train-images has 60 images but .*train-labels.gz has 59 labels"),
        (no_images, "train-images: holds no images"),
        (a_large_label, r"test-labels: image 4 has the label 3, but there are 3 .* \(2 such"),
        (lambda root: (root / "test-labels").unlink(), "(?s)Image files not found.*test-labels"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    write_idx_sets(tmp_path)
    harm(tmp_path)
    with pytest.raises(DataError, match=said):
        prepare(config_of(tmp_path, IDX_SETS), tmp_path / "run")
