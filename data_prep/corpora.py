"""Finding, cutting and reading parallel corpora."""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_prep import toy_corpus
from data_prep.config import DataConfig, ToyCorpusConfig, TrainingCorpus
from data_prep.downloads import download
from data_prep.files import DataError, first_line, sha256_of
from data_prep.fingerprints import fingerprints, keep, was_changed
from data_prep.pieces import map_pieces
from data_prep.stage import Record, run_stage
from data_prep.text import normalise_lines

VERSION = 2  # raise it when the same files would be cut differently


class Slice(Record):
    """A slice of a corpus file, wherever corpora lie."""

    path: str
    """From the folder of the fetch stage if a stage made the file, else below `data.root`."""

    made: bool
    """Whether a stage made the file: generated it, unpacked it to plain text, or translated."""

    begin: int
    """Its first byte."""

    end: int
    """The byte after its last."""

    sha256: str

    def place(self, config: DataConfig, folder: Path) -> Path:
        """Return where the file is.

        :param folder: of the fetch stage.
        """
        if self.made:  # `..` is of the name: the folder may be a link
            return Path(os.path.normpath(folder / self.path))
        return config.root / self.path


class Piece(Record):
    """A piece is a slice of a training corpus that one worker takes at once."""

    corpus: int
    """Index in `data.train`."""

    line: int
    """Number of its first line in the corpus, from 1."""

    pairs: int
    source: Slice
    target: Slice
    """Of a corpus with one file, both are slices of that until the other side is made."""

    def lines(self, side: Slice, config: DataConfig, folder: Path) -> list[str]:
        """Return the lines of a side, normalised.

        :param folder: of the fetch stage.
        :raises DataError: invalid UTF-8, or another text than was found.
        """
        text = _read_slice(side, side.place(config, folder), self.line)
        return normalise_lines(text)[: self.pairs]


class FetchedFile(Record):
    """The record says what a corpus file is."""

    sha256: str

    made: bool
    """Whether the fetch stage generated it; else it is below `data.root`."""


class Fetched(Record):
    """The record holds what later stages need to know of the fetch stage."""

    files: dict[str, FetchedFile]
    """Of each path that the recipe names."""

    pieces: tuple[Piece, ...]
    """Of all training corpora, in order."""

    synthetic: dict[str, str] = Field(default_factory=dict)
    """A digest of what a model has made of each corpus that says `translate_with`, by its name."""

    def place(self, config: DataConfig, folder: Path, path: str) -> Path:
        """Return where a file that the recipe names is.

        :param folder: of the fetch stage.
        """
        return (folder if self.files[path].made else config.root) / path

    def check(self, config: DataConfig, folder: Path, paths: Iterable[str]) -> None:
        """Check that files are those that were found, after they were read.

        :param folder: of the fetch stage.
        :raises DataError: one is another by now.
        """
        for path in paths:
            place = self.place(config, folder, path)
            if sha256_of(place) != self.files[path].sha256:
                raise was_changed(place, self.files[path].made)


def fetch(config: DataConfig, folder: Path, executor: Executor) -> Fetched:
    """Make every corpus file available, record what it holds, and cut training corpora into pieces.

    Files are looked for below `config.root`, then generated (toy corpus), then downloaded.

    :raises DataError: a file is missing or is not what the recipe says.
    """
    missing = [path for path in config.inputs if not (config.root / path).is_file()]
    if config.toy_corpus is not None:
        missing = [path for path in missing if not path.startswith("toy/")]
    download(config, missing)

    found = fingerprints(config, folder)
    generated = [path for path in config.inputs if path not in found]
    toy = config.toy_corpus if generated else None
    if toy and {*config.languages} != {"de", "en"}:
        raise DataError("The embedded toy corpus is German–English; use it as de → en, or en → de")
    inputs = {
        "train": [_how_to_cut(corpus) for corpus in config.train],
        "local": {path: file.sha256 for path, file in found.items()},
        "pairs_per_piece": config.pairs_per_piece,
        "version": VERSION,
        "toy_corpus": {
            **toy.model_dump(),
            "files": sorted(generated),
            "seed": config.seed,
            "version": toy_corpus.VERSION,
        }
        if toy
        else None,
    }

    def build(partial: Path) -> dict[str, Any]:
        files = {path: FetchedFile(sha256=f.sha256, made=False) for path, f in found.items()}
        if toy:
            _write_toy_corpus(config, toy, partial)
        for path in generated:
            if not (partial / path).is_file():
                raise DataError(f"{path}: the toy corpus has no such file")
            files[path] = FetchedFile(sha256=sha256_of(partial / path), made=True)
        fetched = Fetched(files=files, pieces=())
        cut = functools.partial(_cut, config, fetched, partial)
        cuts = map_pieces(executor, cut, range(len(config.train)), partial / "text")
        fetched.check(
            config, partial, (path for each in config.train for path in each.files.values())
        )
        pieces = tuple(_pieces(config, files, cuts))
        return fetched.model_copy(update={"pieces": pieces}).model_dump()

    fetched = Fetched.model_validate(run_stage(folder, inputs, build))
    keep(found, folder)
    return fetched


def _how_to_cut(corpus: TrainingCorpus) -> Any:
    """Return what the cuts of a corpus depend on, besides `data.pairs_per_piece`."""
    if corpus.translate_with is None:
        return list(corpus.files.values())
    return {**corpus.files, "every": corpus.translate_with.lines_per_piece}


def _every(config: DataConfig, corpus: TrainingCorpus) -> int:
    """Return the lines of a piece."""
    synthetic = corpus.translate_with
    return synthetic.lines_per_piece if synthetic else config.pairs_per_piece


def _cut(
    config: DataConfig, fetched: Fetched, source: Path, corpus: int, folder: Path
) -> dict[str, Any]:
    """Find where the pieces of a corpus begin; copy what is not plain text.

    :param source: folder of the fetch stage.
    """
    every, sides = _every(config, config.train[corpus]), dict[str, Any]()
    paths = {
        side: fetched.place(config, source, path)
        for side, path in config.train[corpus].files.items()
    }
    for side, path in paths.items():
        plain = path
        if path.suffix == ".gz" or _is_sgm(path):
            plain = folder / f"{side}.txt"
            with plain.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{line}\n" for line in read_lines(path))
        sides[side] = {"copied": plain != path, **_line_starts(plain, every)}
    _check_lengths([*paths.values()], [side["lines"] for side in sides.values()])
    return sides


def _line_starts(path: Path, every: int) -> dict[str, Any]:
    """Count lines, and find the first bytes of lines 0, `every`, 2 × `every`, …, and the end; and
    the sha256 of what is between them."""
    starts, lines, size, last = [0], 0, 0, b"\n"
    digests, digest = list[str](), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            first = every - lines % every - 1
            cuts = (ends[first::every] + 1).tolist()
            for begin, end in pairwise([0, *cuts]):
                digest.update(block[begin:end])
                digests.append(digest.hexdigest())
                digest = hashlib.sha256()
            digest.update(block[cuts[-1] if cuts else 0 :])
            starts += [size + cut for cut in cuts]
            lines, size, last = lines + len(ends), size + len(block), block[-1:]
    if last != b"\n":
        lines += 1
    starts = [at for at in starts if at < size]
    return {
        "lines": lines,
        "starts": [*starts, size],
        "sha256": [*digests, digest.hexdigest()][: len(starts)],
    }


def _pieces(
    config: DataConfig, files: Mapping[str, FetchedFile], cuts: Sequence[Mapping[str, Any]]
) -> Iterator[Piece]:
    """Yield the pieces of all training corpora, from where `_cut` found that lines begin."""
    for index, (corpus, cut) in enumerate(zip(config.train, cuts, strict=True)):
        every, lines = _every(config, corpus), next(iter(cut.values()))["lines"]
        for number, begin in enumerate(range(0, lines, every)):
            slices = {}
            for side, path in corpus.files.items():
                copied = cut[side]["copied"]
                first, end = cut[side]["starts"][number : number + 2]
                slices[side] = Slice(
                    path=f"text/{index:05d}/{side}.txt" if copied else path,
                    made=copied or files[path].made,
                    begin=first,
                    end=end,
                    sha256=cut[side]["sha256"][number],
                )
            pairs, there = min(every, lines - begin), next(iter(slices.values()))
            yield Piece(
                corpus=index,
                line=begin + 1,
                pairs=pairs,
                source=slices.get("source", there),
                target=slices.get("target", there),
            )


def _write_toy_corpus(config: DataConfig, sizes: ToyCorpusConfig, folder: Path) -> None:
    (folder / "toy").mkdir(exist_ok=True)
    splits = toy_corpus.generate(sizes.model_dump(), config.seed)
    for split, pairs in splits.items():
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            text = "".join(f"{line}\n" for line in lines)
            (folder / "toy" / f"{split}.{language}").write_bytes(text.encode())


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


def _read_slice(side: Slice, path: Path, line: int) -> str:
    """Return the text of a slice.

    :param path: of the file.
    :param line: number of the first line, for the error.
    :raises DataError: invalid UTF-8, or another text than was found.
    """
    with path.open("rb") as file:
        file.seek(side.begin)
        data = file.read(side.end - side.begin)
    if hashlib.sha256(data).hexdigest() != side.sha256:
        raise was_changed(path, side.made)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        place = error.start - (data.rfind(b"\n", 0, error.start) + 1)
        raise _not_utf8(path, line, place) from error


def _not_utf8(path: Path, line: int, place: int) -> DataError:
    return DataError(
        f"{path}:{line}: not valid UTF-8 (byte {place + 1} of the line); convert the file, for "
        "example with iconv"
    )


def read_text(path: Path) -> list[str]:
    """Return the lines of a file that a stage has written."""
    return path.read_bytes().decode().split("\n")[:-1]


def read_pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    """Return the pairs of two line-aligned files.

    :raises DataError: the files differ in their number of lines, hold invalid UTF-8, or are a
        damaged `.gz`; with the place.
    """
    sides = [list(read_lines(path)) for path in (source, target)]
    _check_lengths((source, target), [len(side) for side in sides])
    return list(zip(*sides, strict=True))


def _check_lengths(sides: Sequence[Path], lines: Sequence[int]) -> None:
    """Compare the numbers of lines of source and target, or of one of them alone.

    :raises DataError: one side has fewer lines.
    """
    if lines[0] != lines[-1]:
        shorter, longer = sides if lines[0] < lines[1] else reversed(sides)
        raise DataError(
            f"{shorter} ends after {min(lines)} lines but {longer} goes on: source and target "
            "must have a line for each other's"
        )


def _is_sgm(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".sgm")


def read_lines(path: Path) -> Iterator[str]:
    """Yield lines without their end; only LF ends a line (real corpora hold U+2028 and U+0085).

    :raises DataError: the file holds invalid UTF-8 or is a damaged `.gz`; with the place.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines: Iterable[bytes] = _segments(file.read()) if _is_sgm(path) else file
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8").rstrip("\r\n")
                yield text.removeprefix("\ufeff") if number == 1 else text  # the file's, no word's
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error.start) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: damaged or truncated after line {number}: {first_line(error)}"
        ) from error


def _segments(sgm: bytes) -> Iterator[bytes]:
    """Yield the segments of a WMT test set, one line each."""
    for segment in re.findall(rb"<seg\b[^>]*>(.*?)</seg>", sgm, re.DOTALL | re.IGNORECASE):
        yield " ".join(html.unescape(segment.decode("utf-8")).split()).encode()


def hash_text(text: str) -> int:
    """Return 64 bits that are the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
