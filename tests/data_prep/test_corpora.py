"""Fetching from a real HTTP server, and reading what WMT publishes."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import random
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
from tenacity import wait_none

from data_prep.config import DataConfig
from data_prep.corpora import fetch, read_lines
from data_prep.downloads import BLOCK
from data_prep.files import DataError


class Handler(http.server.SimpleHTTPRequestHandler):
    """The handler serves files with byte ranges and remembers what was asked for."""

    requests: list[str | None]
    failures: list[str]  # how the next requests fail, last first: "busy", "lost"

    def do_GET(self) -> None:
        begin = self.headers.get("Range")
        self.requests.append(begin)
        failure = self.failures.pop() if self.failures else ""
        if failure == "busy":
            self.send_error(503)
            return
        if failure == "lost":
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: BLOCK + 50])
            self.close_connection = True
            return
        if begin is None:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[int(begin.removeprefix("bytes=").removesuffix("-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve tmp_path/served on this machine."""
    (tmp_path / "served").mkdir()
    Handler.requests, Handler.failures = [], []
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def executor() -> Iterator[Executor]:
    with ThreadPoolExecutor() as threads:
        yield threads


def archive(path: Path, members: dict[str, str]) -> dict[str, object]:
    """Write a .tgz, and return its bytes and sha256 as a recipe has them."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def config_of(root: Path, url: str, checks: dict[str, object]) -> DataConfig:
    corpus = {"name": "c", "source": "wmt/train/c.de", "target": "wmt/train/c.en"}
    members = ["train/c.de", "train/c.en"]
    download = {"url": url, "folder": "wmt", "members": members, **checks}
    return DataConfig.model_validate(
        {"root": root, "train": [corpus], "valid": corpus, "test": corpus, "downloads": [download]}
    )


MEMBERS = {"train/c.de": "Hallo\n", "train/c.en": "Hello\n", "../evil": "out", "big": "x" * 9999}


def test_fetch_unpacks_only_the_named_members(
    tmp_path: Path, server: str, executor: Executor
) -> None:
    checks = archive(tmp_path / "served" / "c.tgz", MEMBERS)
    config = config_of(tmp_path / "root", f"{server}/c.tgz", checks)
    place = tmp_path / "run" / "fetch"
    fetched = fetch(config, place, executor)
    assert fetched.place(config, place, "wmt/train/c.de").read_text() == "Hallo\n"
    found = {str(p.relative_to(tmp_path / "root")) for p in (tmp_path / "root").rglob("[!.]*.*")}
    assert found == {"wmt/train/c.de", "wmt/train/c.en"}
    assert not (tmp_path / "evil").exists()
    fetch(config, tmp_path / "run" / "fetch", executor)
    assert len(Handler.requests) == 1  # the second call found the files and did not download


def test_fetch_continues_a_partial_download(
    tmp_path: Path, server: str, executor: Executor
) -> None:
    checks = archive(tmp_path / "served" / "c.tgz", MEMBERS)
    (tmp_path / "root" / "wmt").mkdir(parents=True)
    beginning = (tmp_path / "served" / "c.tgz").read_bytes()[:100]
    (tmp_path / "root" / "wmt" / ".c.tgz.download").write_bytes(beginning)
    config = config_of(tmp_path / "root", f"{server}/c.tgz", checks)
    fetch(config, tmp_path / "run" / "fetch", executor)
    assert Handler.requests == ["bytes=100-"]


def test_fetch_goes_on_after_a_lost_connection_and_a_busy_server(
    tmp_path: Path, server: str, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.downloads._receive.retry.wait", wait_none())
    noise = random.Random(1).randbytes(BLOCK).hex()
    checks = archive(tmp_path / "served" / "c.tgz", {**MEMBERS, "noise": noise})
    Handler.failures = ["busy", "lost"]
    config = config_of(tmp_path / "root", f"{server}/c.tgz", checks)
    fetch(config, tmp_path / "run" / "fetch", executor)
    assert Handler.requests == [None, f"bytes={BLOCK}-", f"bytes={BLOCK}-"]


def test_a_file_that_the_server_does_not_have_is_asked_for_once(
    tmp_path: Path, server: str, executor: Executor
) -> None:
    config = config_of(tmp_path / "root", f"{server}/c.tgz", {"bytes": 7, "sha256": "0" * 64})
    with pytest.raises(DataError, match="Could not download"):
        fetch(config, tmp_path / "run" / "fetch", executor)
    assert Handler.requests == [None]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"sha256": "0" * 64}, "sha256 differs"), ({"bytes": 7}, "got .* bytes, the recipe says 7")],
)
def test_fetch_refuses_other_content(
    tmp_path: Path, server: str, executor: Executor, changed: dict[str, object], expected: str
) -> None:
    checks = archive(tmp_path / "served" / "c.tgz", MEMBERS) | changed
    config = config_of(tmp_path / "root", f"{server}/c.tgz", checks)
    with pytest.raises(DataError, match=expected):
        fetch(config, tmp_path / "run" / "fetch", executor)
    assert not list((tmp_path / "root").rglob("c.*"))


def test_unreachable_server_lists_every_missing_file(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.downloads.RETRIES", 0)
    checks = {"bytes": 10, "sha256": "0" * 64}
    config = config_of(tmp_path / "root", "http://127.0.0.1:9/c.tgz", checks)
    with pytest.raises(DataError) as caught:
        fetch(config, tmp_path / "run" / "fetch", executor)
    for side in ("de", "en"):
        assert f"http://127.0.0.1:9/c.tgz  →  {tmp_path}/root/wmt/train/c.{side}" in str(
            caught.value
        )
    assert not [path for path in (tmp_path / "root").rglob("*") if path.name != ".download.lock"]


def test_sgm_test_sets(tmp_path: Path) -> None:
    path = tmp_path / "newstest-src.de.sgm"
    path.write_text(
        '<srcset setid="x" srclang="any">\n<doc docid="1">\n<p>\n'
        '<seg id="1">Müller &amp; Söhne</seg>\n<SEG id="2"> zwei\nZeilen&#39; </SEG>\n'
        "</p>\n</doc>\n</srcset>\n",
        encoding="utf-8",
    )
    zipped = path.with_name(f"{path.name}.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_lines(zipped)) == list(read_lines(path)) == ["Müller & Söhne", "zwei Zeilen'"]


def test_a_name_that_has_sgm_in_it_is_text(tmp_path: Path) -> None:
    path = tmp_path / "news.sgm.de"
    path.write_text("Eins\n")
    assert list(read_lines(path)) == ["Eins"]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path: Path) -> None:
    (tmp_path / "a.de").write_text("\ufeffEins\n\ufeffzwei\n", encoding="utf-8")
    assert list(read_lines(tmp_path / "a.de")) == ["Eins", "\ufeffzwei"]
