"""Downloading input files: they are continued where they stopped, checked, and unpacked."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import requests
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from tenacity import RetryCallState, retry, retry_if_exception, wait_exponential_jitter

from data_prep.config import Download, Preparation
from data_prep.files import DataError, first_line, locked, sha256_of
from data_prep.stage import log

RETRIES = 5
BLOCK = 1 << 16  # bytes; at most that much is lost when a connection breaks
CONNECT_AND_READ_TIMEOUT = (10, 60)  # seconds


def download(config: Preparation, missing: list[str], what: str = "Corpus files") -> None:
    """Download what provides the files `missing`.

    :param what: what the files are, for the error.
    :raises DataError: something cannot be downloaded; one message names all that is missing.
    """
    if not missing:
        return
    sources = {path: d for d in config.downloads for path in d.provides}
    if any(path not in sources for path in missing):
        raise DataError(
            f"{what} not found, and the recipe names no download for all of them:"
            f"{_places(config, missing, sources)}\n"
            "Put them there, or set --data.root to the folder that holds them."
        )
    config.root.mkdir(parents=True, exist_ok=True)
    with locked(config.root / ".download.lock"):  # other runs use the same root
        try:
            for path in missing:
                each = sources[path]
                if not (config.root / path).exists():  # nor came with another
                    _fetch(each, config.root)
        except requests.RequestException as error:
            still = [path for path in missing if not (config.root / path).exists()]
            raise DataError(
                f"Could not download {each.url} ({type(error).__name__}). Fetch by hand, "
                "unpack archives, and put these files where the arrows point, or set --data.root:"
                f"{_places(config, still, sources)}"
            ) from error


def _places(config: Preparation, missing: Iterable[str], sources: Mapping[str, Download]) -> str:
    """Return a line for every file: where it comes from, where it belongs, and what is there."""
    lines = []
    for path in missing:
        url = f"{sources[path].url}  →  " if path in sources else ""
        place = config.root / path
        found = f" (a {'folder' if place.is_dir() else 'file'} is there)" if place.exists() else ""
        lines.append(f"\n  {url}{place}{found}")
    return "".join(lines)


def _fetch(download: Download, root: Path) -> None:
    """Download a file, check it, and put it or what it holds below `root`."""
    folder = root / download.folder
    partial = folder / f".{download.url.rsplit('/', 1)[-1]}.download"  # no name of a member
    existing = next(parent for parent in partial.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    have = partial.stat().st_size if partial.exists() else 0
    if free + have < download.bytes * (5 if download.members else 1):
        raise DataError(
            f"{folder}: {free >> 20} MiB free is not enough for {download.url} "
            f"({download.bytes >> 20} MiB{' and its contents' if download.members else ''})"
        )
    _receive(download, partial)
    if sha256_of(partial) != download.sha256:
        partial.unlink()
        raise DataError(f"{download.url}: sha256 differs from the recipe's; the file was discarded")
    if download.members:
        _unpack(partial, folder, download.members)
        partial.unlink()
    else:
        partial.replace(root / download.provides[0])


def _is_temporary(error: BaseException) -> bool:
    """Return whether to try again: a connection was lost or a server is overloaded."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, requests.RequestException)


def _log_retry(state: RetryCallState) -> None:
    log.info("fetch: interrupted; tried again in %.0f s", state.upcoming_sleep)


@retry(
    retry=retry_if_exception(_is_temporary),
    stop=lambda state: state.attempt_number > RETRIES,
    wait=wait_exponential_jitter(initial=1, max=60),
    before_sleep=_log_retry,
    reraise=True,
)
def _receive(download: Download, partial: Path) -> None:
    """Download to `partial`, going on after what an interrupted attempt left there."""
    have = partial.stat().st_size if partial.exists() else 0
    if have > download.bytes:
        partial.unlink()
        have = 0
    if have == download.bytes:
        return
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        requests.get(
            download.url, headers=headers, stream=True, timeout=CONNECT_AND_READ_TIMEOUT
        ) as response,
    ):
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            have = 0  # the server sends the whole file
        partial.parent.mkdir(parents=True, exist_ok=True)
        task = progress.add_task(partial.stem[1:], total=download.bytes, completed=have)
        with partial.open("ab" if have else "wb") as file:
            for block in response.iter_content(BLOCK):
                file.write(block)
                progress.advance(task, len(block))
    size = partial.stat().st_size
    if size != download.bytes:
        if size > download.bytes:
            partial.unlink()
        raise DataError(
            f"{download.url}: got {size} bytes, the recipe says {download.bytes}; "
            "run the same command again to continue"
        )


def _unpack(archive: Path, folder: Path, members: Iterable[str]) -> None:
    """Unpack only the members that the recipe names, so that an archive cannot write elsewhere.

    Of a member that is a folder, all files below it are unpacked. What is there stays as it is: it
    may have been edited.

    :raises DataError: it is damaged, no tar archive, or has no such file or folder.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in members:
                target = folder / member
                if target.exists():
                    log.info("fetch: %s is there, and stays as it is", target)
                    continue
                log.info("fetch: unpacking %s", member)
                found = tar.getmember(member)
                if found.isdir():
                    _unpack_folder(tar, member, target)
                    continue
                partial = target.with_name(f".{target.name}.partial")
                if not _unpack_file(tar, found, partial):
                    raise tarfile.TarError(f"{member} is not a file there")
                partial.replace(target)
    except Exception as error:  # of many types: tarfile's, and those of each compression
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's
        raise DataError(
            f"{archive}: cannot unpack {', '.join(members)}: {first_line(error)}"
        ) from error


def _unpack_file(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> bool:
    """Write the file that a member is, or is a link to; tell whether the archive has it."""
    try:
        content = tar.extractfile(member)
    except (KeyError, RecursionError):  # links to nowhere, and to one another
        return False
    if content is None:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    return True


def _unpack_folder(tar: tarfile.TarFile, name: str, target: Path) -> None:
    """Unpack the files below a folder, which appears when all are there.

    A link to another file of the archive becomes a file with its content. Others could lead
    anywhere, and are left out.
    """
    left_out = []
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for member in tar.getmembers():
        inside = PurePosixPath(member.name.removeprefix(f"{name}/"))
        leaves = inside.is_absolute() or ".." in inside.parts
        if member.isdir() or not member.name.startswith(f"{name}/"):
            continue
        if leaves or not _unpack_file(tar, member, partial / inside):
            left_out.append(member.name)
    if not any(partial.iterdir()):
        raise tarfile.TarError(f"{name} has no files")
    if left_out:
        names = ", ".join(left_out[:5]) + (" …" if left_out[5:] else "")
        text = "fetch: %s: %d entries are no files, and are left out: %s"
        log.warning(text, target, len(left_out), names)
    partial.rename(target)
