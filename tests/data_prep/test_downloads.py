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
from tests.data_prep.test_corpora import config_of, server  # noqa: F401 (a fixture)


@pytest.mark.parametrize(
    "changed",
    [
        {"members": ["../../x"]}, {"members": ["a/../../x"]}, {"members": ["/etc/x"]},
        {"members": ["a", "."]}, {"members": [""]}, {"members": ["a\0b"]}, {"folder": "../.."},
        {"folder": "/tmp"}, {"folder": "a/.."}, {"url": "http://host/.."}, {"url": "http://host/"},
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
