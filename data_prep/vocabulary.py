"""SentencePiece vocabularies, trained on a sample of the cleaned training text only.

`taken_vocabulary.py` takes one from elsewhere instead.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial as bind
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data_prep.clean import Cleaned
from data_prep.config import DataConfig
from data_prep.corpora import read_lines
from data_prep.files import DataError, digest_of, first_line, sha256_of
from data_prep.pieces import map_pieces
from data_prep.stage import Record, run_stage
from data_prep.text import BOS_IDX, EOS_IDX, JOINT, PAD_IDX, SEPARATE, UNK_IDX, vocabulary_files

VERSION = 3  # raise it when the same inputs would give another vocabulary
SHOWN = 10  # characters that a line of the log names


class VocabularyInfo(Record):
    """The record identifies a vocabulary."""

    sizes: tuple[int, int]
    """Tokens of the source and the target vocabulary."""

    sha256: str
    """See `vocabulary_digest`."""


class Lost(Record):
    """The record says what of some lines does not come back from a vocabulary's tokens."""

    lines: int
    """How many of them do not."""

    characters: dict[str, int]
    """How often a character is missing then, the most frequent first."""

    def __str__(self) -> str:
        """Return what is missing, in words."""
        return _in_words(self.characters) or "their characters change places"


class Unknown(Record):
    """The record says what of some text a vocabulary does not know."""

    characters: int
    """Of the text, spaces included."""

    unknown_characters: int
    tokens: int
    """Of the text, EOS included."""

    unknown_tokens: int
    """Those that are `<unk>`; one may stand for several characters."""

    unknown: dict[str, int]
    """How often each unknown character occurs, the most frequent first."""

    @staticmethod
    def total(parts: Sequence[Unknown]) -> Unknown:
        """Return what a vocabulary does not know of several texts together."""
        unknown = sum((Counter(part.unknown) for part in parts), Counter[str]())
        return Unknown(
            characters=sum(part.characters for part in parts),
            unknown_characters=sum(part.unknown_characters for part in parts),
            tokens=sum(part.tokens for part in parts),
            unknown_tokens=sum(part.unknown_tokens for part in parts),
            unknown=dict(sorted(unknown.items(), key=lambda item: (-item[1], item[0]))),
        )

    @property
    def share(self) -> float:
        """Return the share of tokens that are `<unk>`."""
        return self.unknown_tokens / max(self.tokens, 1)

    def __str__(self) -> str:
        """Return the shares and the characters, in words."""
        if not self.unknown_tokens:
            return "nothing"
        characters, tokens = (
            f"{share:.2%}" if share >= 0.0001 else "under 0.01%"
            for share in (self.unknown_characters / self.characters, self.share)
        )
        return (
            f"{characters} of the characters ({tokens} of the tokens are <unk>): "
            f"{_in_words(self.unknown)}"
        )


def _in_words(characters: Mapping[str, int]) -> str:
    """Return the first of these characters, and how many there are of each."""
    shown = [
        f"{count} × U+{ord(each):04X} {each if each.isprintable() else ''}".rstrip()
        for each, count in islice(characters.items(), SHOWN)
    ]
    return ", ".join([*shown, *(["…"] if len(characters) > SHOWN else [])])


class PreparedVocabulary(VocabularyInfo):
    """The record holds what the binarize stage needs to know of the vocabulary stage."""

    versions: dict[str, str]
    """Versions of the libraries that made it."""


def load_vocabulary(path: Path) -> SentencePieceProcessor:
    """Load a SentencePiece model.

    :raises DataError: there is no such file, it is no model, or its special tokens have other ids.
    """
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot read the vocabulary: {first_line(error)}") from error
    ids = (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id())
    if ids != (PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX):
        raise DataError(
            f"{path}: pad, unk, bos and eos have ids {ids} (-1: there is none); they must be 0, 1, "
            "2 and 3"
        )
    return model


def load_vocabularies(folder: Path) -> tuple[SentencePieceProcessor, SentencePieceProcessor]:
    """Load source and target vocabulary of a folder; they are one object when they are joint.

    :raises DataError: as `load_vocabulary` does.
    """
    models = [load_vocabulary(path) for path in vocabulary_files(folder)]
    return models[0], models[-1]


def vocabulary_digest(folder: Path) -> str:
    """Return a digest of all bytes of the vocabulary, for data, checkpoints and exports to compare.

    :raises OSError: a file of it cannot be read.
    """
    return digest_of_files(vocabulary_files(folder))


def digest_of_files(files: Sequence[Path]) -> str:
    """Return the digest of a vocabulary of one file for both sides, or of one for each.

    :raises OSError: a file cannot be read.
    """
    digests = [sha256_of(path) for path in files]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def lost_by(vocabulary: SentencePieceProcessor, lines: Sequence[str]) -> Lost:
    """Compare lines with decode(encode(line)), apart from the kind and number of spaces."""
    lost, characters = 0, Counter[str]()
    for line in (" ".join(line.split()) for line in lines):
        decoded = vocabulary.decode(vocabulary.encode(line))
        if decoded != line:
            lost += 1
            characters += Counter(line) - Counter(decoded)
    return Lost(lines=lost, characters=dict(characters.most_common()))


def unknown_characters(vocabulary: SentencePieceProcessor, lines: Sequence[str]) -> Counter[str]:
    """Count what a vocabulary makes `<unk>` of."""
    unknown = Counter[str]()
    for line in lines:  # as text an unknown token is what it stands for
        ids, texts = (vocabulary.encode(line, out_type=kind) for kind in (int, str))
        for token, text in zip(ids, texts, strict=True):
            unknown.update(text if token == UNK_IDX else "")
    return unknown


def train_vocabulary(
    config: DataConfig, cleaned: Cleaned, text: Path, folder: Path, executor: Executor
) -> PreparedVocabulary:
    """Train the vocabulary on a sample of the cleaned training text.

    :param text: folder of the cleaning stage.
    :raises DataError: the text does not support a vocabulary of that size.
    """
    settings = config.vocabulary
    inputs = {
        "cleaned": cleaned.digest,
        "vocabulary": settings.model_dump(exclude={"taken_from"}),
        "seed": config.seed,
        "version": VERSION,
    }

    def build(partial: Path) -> dict[str, Any]:
        sample = partial / "scratch-sample"
        draws = _draws(config, cleaned.kept)
        map_pieces(executor, bind(_sample, config, text / "train"), draws, sample)
        names = JOINT if settings.joint else SEPARATE
        sides = [config.languages] if settings.joint else [(lang,) for lang in config.languages]
        for name, languages in zip(names, sides, strict=True):
            files = [
                sample / f"{piece:05d}" / f"text.{lang}"
                for lang in languages
                for piece in range(len(draws))
            ]
            (partial / name).write_bytes(_train(config, files))
        return facts_of(partial)

    prepared = run_stage(folder, inputs, build, sealed=["*.model"])
    return PreparedVocabulary.model_validate(prepared)


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what a `PreparedVocabulary` says of the vocabulary in `folder`."""
    return {
        "sizes": [vocabulary.get_piece_size() for vocabulary in load_vocabularies(folder)],
        "sha256": vocabulary_digest(folder),
        "versions": {"sentencepiece": sentencepiece.__version__},
    }


class _Draw(NamedTuple):
    """A draw says how much the sample takes of a piece."""

    piece: int
    pairs: int
    """Pairs of the piece."""

    wanted: int
    """How many of them to draw."""


def _draws(config: DataConfig, kept: Sequence[int]) -> list[_Draw]:
    """Return how many pairs to draw from each piece, every pair being as likely as any other.

    A joint vocabulary is trained on both sides of a pair, and so a pair is two of its lines.

    :param kept: pairs of each piece.
    """
    lines_a_pair = 2 if config.vocabulary.joint else 1
    wanted = config.vocabulary.sample_lines // lines_a_pair
    counts = np.array(kept)
    if counts.sum() > wanted:
        generator = np.random.default_rng(config.seed)
        counts = np.minimum(counts, generator.multinomial(wanted, counts / counts.sum()))
    return list(map(_Draw, range(len(kept)), kept, counts.tolist()))


def _sample(config: DataConfig, train: Path, draw: _Draw, folder: Path) -> dict[str, Any]:
    """Write the drawn lines of both sides of a piece."""
    generator = np.random.default_rng([config.seed, 1, draw.piece])
    rows = generator.choice(draw.pairs, draw.wanted, replace=False, shuffle=False)
    rows = np.sort(rows).tolist()
    for lang in config.languages:
        lines = (train / f"{draw.piece:05d}" / f"text.{lang}").read_bytes().split(b"\n")
        (folder / f"text.{lang}").write_bytes(b"".join(lines[row] + b"\n" for row in rows))
    return {}


def _train(config: DataConfig, files: Sequence[Path]) -> bytes:
    """Return a SentencePiece model trained on the lines of `files`."""
    settings = config.vocabulary
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(read_lines, files)),
            model_writer=model,
            model_type=settings.type,
            vocab_size=settings.size,
            normalization_rule_name=settings.normalization,
            character_coverage=settings.character_coverage,
            byte_fallback=settings.byte_fallback,
            user_defined_symbols=list(settings.user_defined_symbols),
            max_sentence_length=1 << 16,
            pad_id=PAD_IDX,
            unk_id=UNK_IDX,
            bos_id=BOS_IDX,
            eos_id=EOS_IDX,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit(") ", 1)[-1] or str(error)
        lines = sum(path.read_bytes().count(b"\n") for path in files)
        raise DataError(
            f"data.vocabulary.size {settings.size}: SentencePiece cannot make that vocabulary from "
            f"{lines} lines: {reason}"
        ) from error
    return model.getvalue()
