"""Images are prepared once, say what they were made from, and are read as they are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_prep.files import DataError, sha256_of
from data_prep.identity import check_corpora, check_recipe
from data_prep.images.fetch import fetch
from data_prep.images.pack import pack
from data_prep.images.prepare import prepare_images
from data_prep.images.shards import ImageReader, read_images_manifest
from data_prep.shards import ShardReader
from tests.conftest import Command, run_process
from tests.data_prep.images.small_sets import (
    FOLDER_SETS,
    IDX_SETS,
    config_of,
    draw_images,
    prepare,
    write_folders,
    write_idx,
    write_idx_sets,
)

# ── What is made ────────────────────────────────────────────────────────────────────────────────


def test_shards_are_plain_arrow(tmp_path: Path) -> None:
    write_folders(tmp_path)
    made = prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run")
    (shard,) = made.of_split("test")
    with pa.memory_map(str(tmp_path / "run" / "shards" / shard.name)) as file:
        table = pa.ipc.open_file(file).read_all()
        assert table.schema == pa.schema({"image": pa.binary(3 * 8 * 8), "label": pa.uint16()})
        first = np.frombuffer(table["image"][0].as_py(), np.uint8).reshape(3, 8, 8)
    assert np.array_equal(first, [draw_images(8, 12)[1]] * 3)  # cats come first
    assert made == read_images_manifest(tmp_path / "run" / "shards")
    assert made.totals["train"].classes == (4, 4)


def test_the_order_is_the_seeds_alone(tmp_path: Path) -> None:
    """Neither pieces nor shards change it."""
    write_idx_sets(tmp_path)
    read = {}
    for name, changes in {
        "one": {},
        "pieces": {"images_per_piece": 7},
        "shards": {"images_per_shard": 10},
        "seed": {"seed": 2},
    }.items():
        made = prepare(config_of(tmp_path, IDX_SETS, **changes), tmp_path / name)
        reader = ImageReader(tmp_path / name / "shards", "train")
        images, labels = reader.read(np.arange(54))
        read[name] = (images.tobytes(), labels.tobytes(), made.mean if name != "seed" else ())
    assert read["one"] == read["pieces"] == read["shards"]
    assert read["one"] != read["seed"]


def test_repeats_are_counted_and_do_not_leak(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_idx_sets(tmp_path)
    images = draw_images(60, seed=1)
    images[10] = images[20] = images[30]
    images[40:43] = draw_images(9, seed=2)[:3]
    write_idx(tmp_path / "train-images", images)
    write_idx(tmp_path / "valid-images", images[40:41])
    write_idx(tmp_path / "valid-labels", np.zeros(1, np.uint8))
    valid = {"name": "valid", "images": "valid-images", "labels": "valid-labels"}
    sets = {**IDX_SETS, "valid": valid, "valid_images": 0}
    made = prepare(config_of(tmp_path, sets), tmp_path / "run")
    counts = {"train": 2, "valid": 1, "test": 3, "valid_and_test": 1, "dropped": 3}
    assert made.repeats.model_dump() == counts
    assert made.totals["train"].images == 57
    assert any("1 training images are also validation images, 3 also" in m for m in caplog.messages)
    assert any("1 validation images are also test images, and" in m for m in caplog.messages)
    report = json.loads((tmp_path / "run" / "shards" / "report.json").read_text())
    assert report["repeats"] == made.repeats.model_dump()
    made = prepare(config_of(tmp_path, sets, drop_repeated=False), tmp_path / "run")
    assert (made.repeats.test, made.repeats.dropped, made.totals["train"].images) == (3, 0, 60)


def test_a_set_in_a_folder_of_another_one(tmp_path: Path) -> None:
    """The test set's images are in a folder of the training set's folder of cats."""
    write_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "train" / "cat" / "test")
    test = {"name": "photos-test", "folder": "train/cat/test"}
    made = prepare(config_of(tmp_path, {**FOLDER_SETS, "test": test}), tmp_path / "run")
    assert made.totals["train"].classes == made.totals["test"].classes == (4, 4)
    (train,) = (each for each in made.sets if each.split == "train")
    assert train.refused == {"a folder in the folder of a class": 1}


def test_other_files_of_the_same_size_and_time(tmp_path: Path) -> None:
    """As archives have them whose files all have one time: below another root, or put there."""
    made = []
    for root, seed in (("one", 1), ("other", 7), ("one", 8)):
        write_idx_sets(tmp_path / root)
        write_idx(tmp_path / root / "train-images", draw_images(60, seed))
        for path in (tmp_path / root).iterdir():
            os.utime(path, ns=(0, 0))
        made.append(prepare(config_of(tmp_path / root, IDX_SETS), tmp_path / "run"))
    assert len({each.files["train-images"] for each in made}) == 3
    assert len({each.of_split("train")[0].sha256 for each in made}) == 3


def test_an_image_that_is_changed_meanwhile(tmp_path: Path) -> None:
    """After the files were found, and before they are read."""
    write_folders(tmp_path)
    config, run_dir = config_of(tmp_path, FOLDER_SETS), tmp_path / "run"
    run_dir.mkdir()
    fetched = fetch(config, run_dir / "fetch")
    one, other = tmp_path / "test" / "cat" / "1.png", tmp_path / "test" / "dog" / "0.png"
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    stages = run_dir / "fetch", run_dir / "shards"
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(DataError, match=r"test/cat/1\.png was changed while it was prepared"):
            pack(config, fetched, *stages, executor)
        one.write_bytes(whole)
        made = pack(config, fetched, *stages, executor)
    write_folders(tmp_path / "again")
    again = prepare(config_of(tmp_path / "again", FOLDER_SETS), tmp_path / "other")
    assert made.shards == again.shards


def test_want_of_memory_is_no_damage() -> None:
    """It passes, and the image would be left out for ever."""
    program = """
import io, resource
from pathlib import Path
from PIL import Image
from data_prep.images.read import read_image
file = io.BytesIO()
Image.new("RGB", (6000, 6000)).save(file, "PNG")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20),) * 2)
try:
    read_image(file.getvalue(), 50_000_000)
except MemoryError:
    print("no memory")
"""
    done = run_process([sys.executable, "-c", program])
    assert done.stdout == "no memory\n", done.stderr


def test_a_test_set_is_its_images(tmp_path: Path) -> None:
    """Whatever else lies there, and however they are stored."""
    write_folders(tmp_path)
    made = [prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run")]
    (tmp_path / "test" / ".DS_Store").write_text("x")
    made.append(prepare(config_of(tmp_path, FOLDER_SETS, channels=1), tmp_path / "run"))
    (tmp_path / "test" / "cat" / "1.png").unlink()
    made.append(prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run"))
    one, same, fewer = (each.totals["test"].content for each in made)
    assert one == same != fewer


def test_a_class_that_is_all_in_the_test_set(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for path in (tmp_path / "train" / "cat").iterdir():
        shutil.copy(path, tmp_path / "test" / "cat" / f"copy-{path.name}")
    with pytest.raises(DataError, match="Every training image of cat is also a validation or test"):
        prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run")


def test_folders_and_idx_files_together(tmp_path: Path) -> None:
    """Names of classes are folders' names, their order is that of the labels."""
    write_folders(tmp_path)
    write_idx_sets(tmp_path)
    sets = {**FOLDER_SETS, "train": [*FOLDER_SETS["train"], *IDX_SETS["train"]]}
    config = config_of(tmp_path, sets, classes=["dog", "cow", "cat"])
    made = prepare(config, tmp_path / "run")
    assert made.totals["train"].classes == (24, 20, 24)
    assert made.totals["test"].classes == (4, 0, 4)


# ── Once, and again ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_it_is_done_once_and_knows_what_it_was_made_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_folders(tmp_path / "data")
    run = tmp_path / "run"
    config = config_of(tmp_path / "data", FOLDER_SETS)
    first = prepare_images(config, run)
    check_corpora(config, run)
    caplog.clear()
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    check_corpora(config, run)  # what is absent cannot have changed
    config = config_of(tmp_path / "elsewhere", FOLDER_SETS)
    assert prepare_images(config, run) == first
    assert sum("up to date, reused" in message for message in caplog.messages) == 2

    other = config_of(tmp_path / "elsewhere", FOLDER_SETS, channels=1)
    with pytest.raises(DataError, match=r"data.channels 3, the recipe says 1; `./run.sh prepare`"):
        check_recipe(other, run)
    (tmp_path / "elsewhere" / "train" / "cat" / "1.png").rename(tmp_path / "elsewhere" / "1.png")
    with pytest.raises(DataError, match=r"elsewhere/train has changed since"):
        check_corpora(config, run)
    assert prepare_images(config, run).totals["train"].classes == (3, 4)
    check_corpora(config, run)


def test_a_broken_link_that_is_mended_is_seen(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "9.png").symlink_to(tmp_path / "9.png")
    config = config_of(tmp_path, FOLDER_SETS)
    assert prepare(config, tmp_path / "run").totals["train"].images == 8
    shutil.copy(tmp_path / "train" / "cat" / "1.png", tmp_path / "9.png")
    assert prepare(config, tmp_path / "run").totals["train"].images == 9


def test_a_report_is_drawn_of_any_classes(tmp_path: Path) -> None:
    """Names may be anything; of many classes some are shown."""
    write_folders(tmp_path)
    for split in ("train", "valid", "test"):
        (tmp_path / split / "cat").rename(tmp_path / split / ("$x^ {猫} _cat_" * 3))
    prepare(config_of(tmp_path, FOLDER_SETS), tmp_path / "run")
    assert (tmp_path / "run" / "shards" / "report.png").stat().st_size > 10_000
    write_idx_sets(tmp_path)
    classes = [f"class {number}" for number in range(200)]
    made = prepare(config_of(tmp_path, IDX_SETS, classes=classes), tmp_path / "many")
    assert len(made.totals["train"].classes) == 200


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_idx_sets(tmp_path)
    prepare(config_of(tmp_path, IDX_SETS, images_per_shard=10), tmp_path / "run")
    return tmp_path / "run" / "shards"


def test_any_images_in_any_order(shards: Path) -> None:
    reader = ImageReader(shards, "train")
    images, labels = reader.read(np.arange(len(reader)))
    wanted = np.array([53, 0, 17, 17, 9, 10])
    some, of_some = reader.read(wanted)
    assert (str(some.dtype), str(of_some.dtype)) == ("uint8", "int64")
    assert some.shape == (6, 1, 8, 8)
    assert np.array_equal(some, images[wanted])
    assert np.array_equal(of_some, labels[wanted])
    assert np.array_equal(reader.labels(), labels)
    none, of_none = reader.read(np.empty(0, int))
    assert (none.shape, of_none.shape) == ((0, 1, 8, 8), (0,))
    for beyond in (-1, 54):
        with pytest.raises(IndexError):
            reader.read(np.array([0, beyond]))


def test_damaged_shards(shards: Path) -> None:
    path = shards / "train-00001.arrow"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ImageReader(shards, "train")
    with pytest.raises(DataError, match=r"train-00001.arrow: checksum is not the manifest's"):
        ImageReader(shards, "train", verify=True)
    path.write_bytes(whole[:100])
    reader = ImageReader(shards, "train")
    assert len(reader.read(np.arange(10))[1]) == 10
    with pytest.raises(DataError, match=r"train-00001.arrow: damaged or missing shard"):
        reader.read(np.array([10]))
    shutil.copy(shards / "train-00005.arrow", path)
    with pytest.raises(DataError, match=r"train-00001.arrow: 4 images, the manifest says 10"):
        ImageReader(shards, "train").read(np.array([10]))
    shutil.copy(shards / "manifest.json", path)
    with pytest.raises(DataError, match="no prepared data here"):
        ImageReader(shards.parent / "fetch" / "gone", "train")


def test_shards_of_another_kind(shards: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: key `languages` is missing"):
        ShardReader(shards, "train")
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["classes"]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.json: key `classes` is missing"):
        ImageReader(shards, "train")


def test_checksums(shards: Path) -> None:
    data = read_images_manifest(shards)
    assert {each.name: each.sha256 for each in data.shards} == {
        path.name: sha256_of(path) for path in shards.glob("*-[0-9]*.arrow")
    }
    assert len(data.shards) == 8
    assert data.files["test-labels"] == sha256_of(shards.parent.parent / "test-labels")


def test_inspect_shows_what_is_there(shards: Path, command: Command) -> None:
    done = command("data_prep.inspect", shards.parent)
    assert done.returncode == 0, done.stderr
    for said in ("3 classes, 8 × 8 × 1", "all 8 shards", "made-test", "0 training images equal"):
        assert said in " ".join(done.stdout.split())
    assert "--pairs is of text" in command("data_prep.inspect", shards.parent, "--pairs", 1).stderr
    (shards / "test-00000.arrow").unlink()
    done = command("data_prep.inspect", shards.parent)
    assert done.returncode == 1
    assert "test-00000.arrow: cannot read the shard" in done.stderr


# ── Keys that do not fit together ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"valid_images": 0}, "valid and valid_images: expected one of them"),
        ({"valid": IDX_SETS["test"]}, "valid and valid_images: expected one of them"),
        ({"stored_size": 4}, r"stored_size \(4\) must not be less than image_size \(8\)"),
        ({"train": IDX_SETS["train"] * 2}, "every set needs a name of its own"),
        ({"classes": ["a", "a"]}, "every class needs a name of its own"),
        ({"train": [*IDX_SETS["train"], *FOLDER_SETS["train"]]}, "classes: needed where train has"),
        ({"test": {"name": "a"}}, "a: expected folder, or images and labels"),
        ({"test": {"name": "a", "images": "b"}}, "a: expected folder, or images and labels"),
        (
            {"test": {"name": "a", "images": "b", "labels": "c", "folder": "d"}},
            "a: expected folder, or images and labels",
        ),
        ({"test": {"name": "a", "folder": "../b"}}, "expected a path below data.root"),
        ({"executor": "dask"}, "executor dask and scheduler go together"),
        ({"max_pixels": 10**9}, "less than or equal to"),
        ({"channels": 4}, "channels"),
    ],
)
def test_keys_that_do_not_fit_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config_of(Path("data"), IDX_SETS, **changes)


def test_the_configuration_costs_nothing() -> None:
    script = "import sys, data_prep.images.config; print({'torch', 'PIL'} & sys.modules.keys())"
    assert run_process([sys.executable, "-c", script]).stdout == "set()\n"


def test_numbers_are_no_names(tmp_path: Path) -> None:
    """IDX files have numbers, folders names, in whose order `classes` would have to be."""
    sets = {**FOLDER_SETS, "test": IDX_SETS["test"]}
    with pytest.raises(ValueError, match="classes: needed where train has folders and test IDX"):
        config_of(tmp_path, sets)
    assert config_of(tmp_path, sets, classes=["dog", "cat"]).classes == ("dog", "cat")
    config_of(tmp_path, {**IDX_SETS, "test": FOLDER_SETS["test"]})  # names are found by name
