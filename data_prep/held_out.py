"""Test sets besides `data.test`: what of them is, or must not be, in the training text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.config import DataConfig
from data_prep.corpora import read_pairs
from data_prep.files import digest_of, sha256_of
from data_prep.stage import read_manifest
from data_prep.text import normalise

Digests = Mapping[str, "str | None"]
"""Of the text of test sets, by their names; None where it was not at hand."""


class HeldOut(NamedTuple):
    """A test set that must not be in the training text."""

    name: str
    files: tuple[Path, ...]
    """Source, then references; none where they are not known."""

    @property
    def digest(self) -> str | None:
        """Return a digest of its text; None if a file of it is not at hand."""
        if not self.files or not all(path.is_file() for path in self.files):
            return None
        return digest_of([sha256_of(path) for path in self.files])

    def pairs(self) -> list[tuple[str, str]]:
        """Read its sources with each of its references, normalised.

        :raises DataError: as `read_pairs` does.
        """
        source, *references = self.files
        return [
            (normalise(s), normalise(t))
            for reference in references
            for s, t in read_pairs(source, reference)
        ]


def is_settled(name: str, now: str | None, before: Digests, *, trained: bool) -> bool:
    """Tell whether the training text need not be compared with a test set anew.

    What is absent cannot have changed. What has arrived since must not cost a model that has learnt
    from the text its training: then its scores are told with what the text has of it.

    :param now: its digest.
    :param before: of the test sets that the text was compared with.
    :param trained: whether a model has learnt from the text.
    """
    if name not in before:
        return False
    return now in (None, before[name]) or (before[name] is None and trained)


def in_training_text(
    config: DataConfig, text: Path, wanted: Sequence[frozenset[bytes]]
) -> list[set[bytes]] | None:
    """Look for lines in the training text.

    :param text: folder of the cleaning stage.
    :param wanted: normalised lines in UTF-8, those of the source and those of the target side.
    :returns: those of each side that the training text has; None if that is not here.
    """
    names = (read_manifest(text) or {"bytes": {}})["bytes"]
    found: list[set[bytes]] = []
    for lang, lines in zip(config.languages, wanted, strict=True):
        files = [text / name for name in names if Path(name).match(f"train/*/text.{lang}")]
        if not files or not all(path.is_file() for path in files):
            return None
        found.append(set())
        of_source = lang == config.source_lang
        tags = {f"{each.tag} ".encode() for each in config.train if each.tag and of_source}
        for path in files:
            text_of_piece = path.read_bytes().split(b"\n")
            found[-1] |= lines.intersection(text_of_piece)
            for tag in tags:
                bare = (line[len(tag) :] for line in text_of_piece if line.startswith(tag))
                found[-1] |= lines.intersection(bare)
    return found
