"""A stage replaces what it has made itself, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.files import DataError
from data_prep.stage import read_manifest, run_stage


def make(folder: Path, number: int, stage: str | None = None, sealed: Sequence[str] = ()) -> None:
    """Run a stage that writes two files."""

    def build(partial: Path) -> dict[str, Any]:
        (partial / "part").mkdir(exist_ok=True)
        (partial / "data.txt").write_text(str(number))
        (partial / "part" / "more.txt").write_text("more")
        return {"recorded": [number]}

    run_stage(folder, {"number": number}, build, stage=stage, sealed=sealed)


def content(folder: Path) -> dict[str, str]:
    """What is in a folder, beside it too, links as such."""
    paths = [path for path in folder.parent.rglob("*") if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(folder.parent)): str(path.readlink())
        if path.is_symlink()
        else path.read_text()
        for path in paths
    }


def other_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")


def a_file(folder: Path) -> None:
    folder.write_text("mine")


def another_stage(folder: Path) -> None:
    make(folder, 1, "shards")


def a_users_file(folder: Path) -> None:
    make(folder, 1)
    (folder / "notes.txt").write_text("mine")


def a_users_hidden_file(folder: Path) -> None:
    make(folder, 1)
    (folder / "part" / ".hidden").write_text("mine")


def a_users_link(folder: Path) -> None:
    make(folder, 1)
    (folder / "link").symlink_to("/etc")


def a_foreign_partial(folder: Path) -> None:
    make(folder, 1)
    other_files(folder.with_name(".result.partial"))


def a_foreign_old(folder: Path) -> None:
    make(folder, 1)
    other_files(folder.with_name(".result.old"))


def an_old_of_another_stage(folder: Path) -> None:
    make(folder, 1)
    make(folder.with_name(".result.old"), 1, "shards")


def a_manifest_of_something_else(folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"inputs": null, "bytes": {"manifest.json": 1}}')


@pytest.mark.parametrize(
    "situation",
    [other_files, a_file, another_stage, a_users_file, a_users_hidden_file, a_users_link,
     a_foreign_partial, a_foreign_old, an_old_of_another_stage, a_manifest_of_something_else],
)  # fmt: skip
def test_what_a_stage_did_not_make_stays(tmp_path: Path, situation: Callable[[Path], None]) -> None:
    folder = tmp_path / "result"
    situation(folder)
    before = content(folder)
    with pytest.raises(DataError, match=r"\.?result.*(did not make|not a folder).*another folder"):
        make(folder, 2)
    assert content(folder) == before


@pytest.mark.parametrize("linked", [False, True])
def test_its_own_result_is_replaced(tmp_path: Path, linked: bool) -> None:
    folder = tmp_path / "result"
    if linked:
        (tmp_path / "disk").mkdir()
        folder.symlink_to("disk")
    make(folder, 1)
    make(folder, 2)
    assert (folder / "data.txt").read_text() == "2"
    assert folder.is_symlink() == linked
    assert not list(tmp_path.glob(".*"))


def test_nothing_is_deleted_that_a_manifest_does_not_own(tmp_path: Path) -> None:
    """A forged one names a file elsewhere."""
    folder = tmp_path / "result"
    make(folder, 1)
    (tmp_path / "thesis.txt").write_text("mine")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["bytes"]["../thesis.txt"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    make(folder, 1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert "../thesis.txt" not in json.loads((folder / "manifest.json").read_text())["bytes"]


@pytest.mark.parametrize("left", ["no files", "some files", "a manifest"])
def test_what_a_crash_leaves_is_known_as_ours(tmp_path: Path, left: str) -> None:
    """While the old result was being deleted, and a new one was begun."""
    folder, old = tmp_path / "result", tmp_path / ".result.old"
    make(folder, 1)
    make(old, 0, "result")
    (old / "data.txt").unlink()
    partial = tmp_path / ".result.partial"
    partial.mkdir()
    if left != "no files":
        (partial / ".inputs.json").write_text('{"number": 7}')
        (partial / "half.txt").write_text("ha")
    if left == "a manifest":
        make(tmp_path / "other", 9)
        (tmp_path / "other" / "manifest.json").rename(partial / "manifest.json")
    make(folder, 2)
    assert set(content(folder)) - {"other/data.txt", "other/part/more.txt"} == {
        "result/manifest.json", "result/data.txt", "result/part/more.txt"
    }  # fmt: skip
    assert (folder / "data.txt").read_text() == "2"


@pytest.mark.parametrize("damage", [{"recorded": None}, {"recorded": [2]}, {"bytes": {}}])
def test_a_damaged_manifest_is_made_anew(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = tmp_path / "result"
    make(folder, 1)
    path = folder / "manifest.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), **damage}))
    if damage == {"bytes": {}}:  # then nobody knows what is ours
        with pytest.raises(DataError, match=r"did not make: data\.txt and 1 more"):
            make(folder, 1)
    else:
        make(folder, 1)
        assert path.read_text() == whole


@pytest.mark.parametrize(
    "text", ["null", "3", "[]", '{"inputs": 1, "bytes": {}}', "[" * 100_000, "\x00\xff",
             '{"inputs": {}, "bytes": {"data.txt": null}}'],
)  # fmt: skip
def test_nonsense_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("changed_inputs", [False, True])
def test_an_edited_file_is_not_replaced_and_a_missing_one_is(
    tmp_path: Path, changed_inputs: bool
) -> None:
    """Where files are sealed; of others only the size is looked at."""
    folder, number = tmp_path / "result", 2 if changed_inputs else 1
    make(folder, 1, sealed=("*",))
    (folder / "part" / "more.txt").write_text("MORE")
    make(folder, 1, sealed=("*",))
    assert (folder / "part" / "more.txt").read_text() == "MORE"
    (folder / "data.txt").write_text("9")
    before = content(folder)
    with pytest.raises(DataError, match=r"data\.txt is not as it was written: it was edited, or"):
        make(folder, number, sealed=("*",))
    assert content(folder) == before
    (folder / "data.txt").unlink()
    make(folder, number, sealed=("*",))
    assert (folder / "data.txt").read_text() == str(number)
