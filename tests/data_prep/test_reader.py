"""Reading shards: lazily, without copies, and never damaged ones."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.files import DataError
from data_prep.prepare import prepare
from data_prep.shards import ShardReader, read_shards_manifest
from data_prep.stage import Manifest
from data_prep.vocabulary import load_vocabularies
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command, run_process


@pytest.fixture
def recipe(prepared: TranslationRecipe, tmp_path: Path) -> TranslationRecipe:
    """Copy the prepared recipe to a folder that a test may damage."""
    shutil.copytree(prepared.run_dir, tmp_path / "run")
    return prepared.model_copy(update={"run_dir": tmp_path / "run"})


@pytest.fixture
def shards(recipe: TranslationRecipe) -> Path:
    return recipe.run_dir / "shards"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def split_into(shards: Path, number: int) -> None:
    """Make the manifest name `number` training shards, all like the one that is there."""
    manifest = json.loads((shards / "manifest.json").read_text())
    (first,) = (shard for shard in manifest["shards"] if shard["split"] == "train")
    names = [f"train-{i:05d}.arrow" for i in range(number)]
    manifest["shards"] = [{**first, "name": name} for name in names]
    (shards / "manifest.json").write_text(json.dumps(manifest))


# ── The manifest ────────────────────────────────────────────────────────────────────────────────


def test_the_manifest_is_what_is_on_disk(shards: Path) -> None:
    reader = ShardReader(shards, "valid")
    on_disk = json.loads((shards / "manifest.json").read_text())
    assert reader.data.model_dump(mode="json").items() <= on_disk.items()
    assert reader.data == read_shards_manifest(shards)
    assert reader.data.totals["valid"].pairs == len(reader) == 40
    assert [shard.name for shard in reader.data.of_split("train")] == ["train-00000.arrow"]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda manifest: manifest.pop("vocabulary"), "`vocabulary` is missing"),
        (lambda manifest: manifest["shards"][1].pop("sha256"), r"`shards\.1\.sha256` is missing"),
        (
            lambda manifest: manifest["totals"]["train"].update(pairs="many"),
            r"`totals\.train\.pairs`: Input should be a valid integer",
        ),
    ],
)
def test_a_manifest_that_lacks_something(
    recipe: TranslationRecipe, shards: Path, damage: Callable[[Manifest], object], expected: str
) -> None:
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    remedy = rf"remove {shards} and run `\./run\.sh prepare`"
    with pytest.raises(DataError, match=rf"manifest\.json: key {expected}.*; {remedy}"):
        ShardReader(shards, "train")
    shutil.rmtree(shards)
    prepare(recipe.data, recipe.run_dir)
    ShardReader(shards, "train", verify=True)


# ── Opening ─────────────────────────────────────────────────────────────────────────────────────


def test_shards_are_opened_when_they_are_read(shards: Path) -> None:
    one = ShardReader(shards, "train")
    split_into(shards, 3000)  # of which only the first is there
    reader = ShardReader(shards, "train")
    assert len(reader) == 3000 * len(one)
    assert reader[5][0].tolist() == one[5][0].tolist()
    with pytest.raises(DataError, match=r"train-00001\.arrow: damaged or missing"):
        reader[len(one)]
    with pytest.raises(DataError, match=r"train-00001\.arrow: damaged or missing"):
        reader.lengths()


def test_open_shards_hold_no_file_descriptors(shards: Path) -> None:
    one = ShardReader(shards, "train")
    split_into(shards, 300)
    for number in range(1, 300):
        os.link(shards / "train-00000.arrow", shards / f"train-{number:05d}.arrow")
    reader = ShardReader(shards, "train")
    before = len(os.listdir("/proc/self/fd"))
    source, target = reader.lengths()
    assert len(os.listdir("/proc/self/fd")) == before
    for index in (0, len(one) - 1, len(one), 100 * len(one) + 7, len(reader) - 1):
        pair, expected = reader[index], one[index % len(one)]
        assert [side.tolist() for side in pair] == [side.tolist() for side in expected]
        assert [source[index], target[index]] == [len(side) for side in pair]
        assert not any(side.flags.owndata or side.flags.writeable for side in pair)


@pytest.mark.parametrize("outside", [-1, 600])
def test_there_are_no_other_pairs(shards: Path, outside: int) -> None:
    with pytest.raises(IndexError, match=f"pair {outside} of 600"):
        ShardReader(shards, "train")[outside]


# ── Damage ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_flipped_byte_is_found(shards: Path, split: str) -> None:
    flip_a_byte(shards / f"{split}-00000.arrow")
    ShardReader(shards, split)
    with pytest.raises(DataError, match=rf"{split}-00000\.arrow: checksum .* `\./run\.sh prepare`"):
        ShardReader(shards, split, verify=True)


def test_unreadable_shards_are_refused_by_name(shards: Path) -> None:
    path = shards / "train-00000.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-00000\.arrow: damaged or missing"):
        ShardReader(shards, "train")[0]
    path.write_bytes((shards / "valid-00000.arrow").read_bytes())
    with pytest.raises(DataError, match=r"train-00000\.arrow: 40 pairs, the manifest says 600"):
        ShardReader(shards, "train")[0]
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.arrow: damaged or missing"):
        ShardReader(shards, "train")[0]
    with pytest.raises(DataError, match=r"train-00000\.arrow: cannot read"):
        ShardReader(shards, "train", verify=True)
    with pytest.raises(DataError, match=r"run `\./run\.sh prepare`"):
        ShardReader(shards / "nothing", "train")


def test_another_vocabulary_is_refused(shards: Path) -> None:
    flip_a_byte(shards / "spm.model")
    with pytest.raises(DataError, match=r"spm\.model is not the vocabulary of these shards"):
        ShardReader(shards, "train")
    (shards / "spm.model").unlink()
    with pytest.raises(DataError, match=r"spm\.model: cannot read the vocabulary"):
        ShardReader(shards, "train")


@pytest.mark.parametrize("name", ["train-00000.arrow", "spm.model"])
def test_what_to_do_about_damage_helps(recipe: TranslationRecipe, shards: Path, name: str) -> None:
    intact = (shards / name).read_bytes()
    flip_a_byte(shards / name)
    with pytest.raises(DataError, match=r"without that file, `\./run\.sh prepare` makes it again"):
        ShardReader(shards, "train", verify=True)
    (shards / name).unlink()
    prepare(recipe.data, recipe.run_dir)
    assert (shards / name).read_bytes() == intact
    ShardReader(shards, "train", verify=True)


# ── python -m data_prep.inspect ─────────────────────────────────────────────────────────────────


def test_inspect_shows_what_is_there(recipe: TranslationRecipe, command: Command) -> None:
    done = command("data_prep.inspect", recipe.run_dir, "--samples", 3)
    assert done.returncode == 0, done.stderr
    reader = ShardReader(recipe.run_dir / "shards", "train")
    for length in reader.lengths():
        assert f"{length.sum():,}" in done.stdout
    for text in ("600", "toy", "300 joint tokens", "padding: ", "checksums: all 3 shards"):
        assert text in done.stdout
    same = command("data_prep.inspect", recipe.run_dir, "--samples", 3, "--seed", 1)
    assert same.stdout == done.stdout


def test_inspect_shows_pairs_by_their_numbers(recipe: TranslationRecipe, command: Command) -> None:
    reader = ShardReader(recipe.run_dir / "shards", "train")
    done = command("data_prep.inspect", recipe.run_dir, "--pairs", 7, 599)
    assert done.returncode == 0, done.stderr
    vocabularies = load_vocabularies(recipe.run_dir / "shards")
    for number in (7, 599):
        for vocabulary, ids in zip(vocabularies, reader[number], strict=True):
            assert {*vocabulary.decode(ids.tolist()).split()} <= {*done.stdout.split()}
    assert "checksums" not in done.stdout
    missing = command("data_prep.inspect", recipe.run_dir, "--pairs", 600)
    assert missing.returncode == 1
    assert missing.stderr.endswith("has no training pair 600; the last is 599\n")


def test_inspect_needs_no_deep_learning(recipe: TranslationRecipe) -> None:
    blocked = dict.fromkeys(("torch", "fairseq2", "deepspeed", "pipeline"))
    script = (
        f"import runpy, sys; sys.modules.update({blocked});"
        "runpy.run_module('data_prep.inspect', run_name='__main__', alter_sys=True)"
    )
    done = run_process([sys.executable, "-c", script, str(recipe.run_dir)])
    assert done.returncode == 0, done.stderr
    assert "checksums: all 3 shards" in done.stdout


def test_inspect_names_what_is_damaged(
    recipe: TranslationRecipe, shards: Path, command: Command
) -> None:
    flip_a_byte(shards / "test-00000.arrow")
    done = command("data_prep.inspect", recipe.run_dir)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("inspect: error: ")
    assert "test-00000.arrow: checksum" in line


@pytest.mark.parametrize("arguments", [[], ["a", "--samples", "-1"]])
def test_inspect_called_wrongly(arguments: list[str], command: Command) -> None:
    done = command("data_prep.inspect", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
