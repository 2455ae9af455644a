"""Downloads write below `data.root` only, whatever a recipe or an archive says."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_prep.config import Download
from data_prep.downloads import download
from data_prep.files import DataError
from data_prep.fingerprints import fingerprints
from data_prep.images.config import ImagesConfig
from tests.data_prep.test_corpora import config_of, server  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "changed",
    [
        {"members": ["../../x"]}, {"members": ["a/../../x"]}, {"members": ["/etc/x"]},
        {"members": ["a", "."]}, {"members": [""]}, {"members": ["a\0b"]}, {"folder": "../.."},
        {"folder": "/tmp"}, {"folder": "a/.."}, {"url": "http://host/.."}, {"url": "http://host/"},
        {"url": "host/c.tgz"}, {"url": "ftp://host/c.tgz"},
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_that_leaves_data_root(changed: dict[str, object]) -> None:
    whole = {"url": "http://host/c.tgz", "bytes": 1, "sha256": "0" * 64, **changed}
    with pytest.raises(ValidationError, match="expected"):
        Download.model_validate(whole)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar_of(*members: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for member in members:
            tar.addfile(member)
    return content.getvalue()


def zip_of(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "Hallo\n")
    return content.getvalue()


NAME, SECRET = "train/c.de", "../../../secret.txt"


@pytest.mark.parametrize(
    "content",
    [
        tar_of(link(NAME, SECRET)),
        tar_of(link(NAME, SECRET, tarfile.LNKTYPE)),
        tar_of(link(NAME, NAME)),
        tar_of(link(NAME, "c.en"), link("train/c.en", "c.de")),
        tar_of(link("train", ".."), link(NAME, "x")),
        zip_of(NAME),
        b"",
        b"\x1f\x8b" + 50 * b"\0",
        b"BZh9" + 50 * b"1",
        b"\xfd7zXZ\0" + 50 * b"1",
    ],
    ids=["symbolic link", "hard link", "loop", "loop of two", "folder is a link", "zip", "empty",
         "broken gzip", "broken bzip2", "broken xz"],
)  # fmt: skip
def test_an_archive_without_such_a_file(
    tmp_path: Path,
    server: str,  # noqa: F811 (the fixture)
    content: bytes,
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "served" / "c.tgz").write_bytes(content)
    size = len(content) or 1  # of an empty one the recipe's is wrong, too
    checks = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    config = config_of(tmp_path / "root", f"{server}/c.tgz", checks)
    with pytest.raises(DataError) as caught:
        download(config, ["wmt/train/c.de"])
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "root").rglob("[!.]*.*"))
    assert (tmp_path / "secret.txt").read_text() == "secret"


def test_a_file_that_is_there_and_is_another_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checks = {"bytes": 6, "sha256": hashlib.sha256(b"theirs").hexdigest()}
    config = config_of(tmp_path, "http://nowhere/c.de", {**checks, "members": []})
    own = config.downloads[0].model_copy(update={"folder": "wmt/train"})
    config = config.model_copy(update={"downloads": (own,)})
    folder = tmp_path / "wmt" / "train"
    folder.mkdir(parents=True)
    (folder / "c.en").write_text("theirs")
    for text, told in (("theirs", 0), ("mine", 1)):
        (folder / "c.de").write_text(text)
        fingerprints(config, tmp_path)
        assert len(caplog.messages) == told
    assert caplog.messages == [
        "wmt/train/c.de is used, and is not the file of the recipe's download"
    ]


def test_a_file_that_is_there_is_not_unpacked_again(
    tmp_path: Path,
    server: str,  # noqa: F811 (the fixture)
) -> None:
    """It may have been edited. What two downloads take from one archive comes, too."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("train/c.de", "train/c.en"):
            file = tarfile.TarInfo(name)
            file.size = 3
            tar.addfile(file, io.BytesIO(b"old"))
    (tmp_path / "served" / "c.tar").write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    checks = {"bytes": len(content.getvalue()), "sha256": digest}
    root = tmp_path / "root"
    config = config_of(root, f"{server}/c.tar", checks)
    (root / "wmt" / "train").mkdir(parents=True)
    (root / "wmt" / "train" / "c.de").write_text("mine")
    download(config, ["wmt/train/c.en"])
    assert (root / "wmt" / "train" / "c.de").read_text() == "mine"
    assert (root / "wmt" / "train" / "c.en").read_text() == "old"

    both = [
        {**config.downloads[0].model_dump(), "folder": folder, "members": [f"train/c.{side}"]}
        for folder, side in (("a", "de"), ("b", "en"))
    ]
    config = config.model_copy(update={"downloads": tuple(map(Download.model_validate, both))})
    download(config, ["a/train/c.de", "b/train/c.en"])
    assert (root / "a" / "train" / "c.de").read_text() == "old"
    assert (root / "b" / "train" / "c.en").read_text() == "old"


def test_a_folder_of_an_archive(
    tmp_path: Path,
    server: str,  # noqa: F811 (the fixture)
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All files below it are unpacked, and links to them, but nothing of elsewhere."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in ("photos", "photos/train", "photos/train/cat", "photos/valid"):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        out = ("train/../../out.png", f"train/{tmp_path}/out.png")
        for name in ("train/cat/1.png", "train/cat/2.png", "valid/3.png", *out):
            file = tarfile.TarInfo(f"photos/{name}")
            file.size = 3
            tar.addfile(file, io.BytesIO(b"png"))
        tar.addfile(link("photos/train/cat/4.png", SECRET))
        tar.addfile(link("photos/train/cat/5.png", "photos/train/cat/1.png", tarfile.LNKTYPE))
        tar.addfile(link("photos/train/cat/6.png", "2.png"))
        tar.addfile(link("photos/train/cat/7.png", "7.png"))
    (tmp_path / "served" / "c.tgz").write_bytes(content.getvalue())
    check = {
        "url": f"{server}/c.tgz",
        "bytes": len(content.getvalue()),
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "members": ["photos/train"],
    }
    root = tmp_path / "root"
    config = ImagesConfig.model_validate(
        {
            "root": root,
            "train": [{"name": "photos", "folder": "photos/train"}],
            "valid_images": 1,
            "test": {"name": "photos", "folder": "photos/train"},
            "image_size": 8,
            "downloads": [check],
        }
    )
    half = root / "photos" / ".train.partial" / "cat"  # of an interrupted command
    half.mkdir(parents=True)
    (half / "0.png").touch()
    download(config, ["photos/train"])
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found - {".download.lock"} == {f"photos/train/cat/{n}.png" for n in (1, 2, 5, 6)}
    assert (root / "photos/train/cat/6.png").read_bytes() == b"png"
    assert not (root / "photos/train/cat/6.png").is_symlink()
    assert "4 entries are no files, and are left out: photos/train/../../out.png" in caplog.text
    assert not list(tmp_path.rglob("out.png"))
