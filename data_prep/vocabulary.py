"""SentencePiece vocabularies, trained on a sample of the cleaned training text only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial as bind
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data_prep.config import DataConfig
from data_prep.corpora import read_lines
from data_prep.files import DataError, digest_of, sha256_of
from data_prep.pieces import map_pieces
from data_prep.stage import Manifest, run_stage

VERSION = 3  # raise it when the same inputs would give another vocabulary
PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX = 0, 1, 2, 3
JOINT = ("spm.model",)
SEPARATE = ("spm.source.model", "spm.target.model")


def load_vocabulary(path: Path) -> SentencePieceProcessor:
    """:raises DataError: no such file, not a SentencePiece model, or with other special ids."""
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot read the vocabulary: {error}") from error
    ids = (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id())
    if ids != (PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX):
        raise DataError(f"{path}: pad, unk, bos and eos have ids {ids}; they must be 0, 1, 2 and 3")
    return model


def vocabulary_files(folder: Path) -> list[Path]:
    """`spm.model`, or `spm.source.model` and `spm.target.model` where languages have their own."""
    joint, separate = ([folder / name for name in names] for names in (JOINT, SEPARATE))
    return separate if separate[0].exists() and not joint[0].exists() else joint


def load_vocabularies(folder: Path) -> tuple[SentencePieceProcessor, SentencePieceProcessor]:
    """Source and target vocabulary of a folder: the same object when they are joint.

    :raises DataError: as `load_vocabulary`.
    """
    models = [load_vocabulary(path) for path in vocabulary_files(folder)]
    return models[0], models[-1]


def vocabulary_digest(folder: Path) -> str:
    """What data sets, checkpoints and exports compare: changes with any byte of the models."""
    digests = [sha256_of(path) for path in vocabulary_files(folder)]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def train_vocabulary(
    config: DataConfig, cleaned: Manifest, text: Path, folder: Path, executor: Executor
) -> Manifest:
    """Train the vocabulary on `text`/train of the cleaning stage.

    :returns: manifest with `sizes` (source, target) and `sha256` (see `vocabulary_digest`).
    :raises DataError: the text does not support a vocabulary of that size.
    """
    settings = config.vocabulary
    inputs = {
        "cleaned": digest_of(cleaned),
        "vocabulary": settings.model_dump(),
        "seed": config.seed,
        "version": VERSION,
    }

    def build(partial: Path) -> dict[str, Any]:
        sample = partial / "scratch-sample"
        pieces = _pieces_to_sample(config, cleaned["kept"])
        map_pieces(executor, bind(_sample, config, text / "train"), pieces, sample)
        names = JOINT if settings.joint else SEPARATE
        sides = [config.languages] if settings.joint else [(lang,) for lang in config.languages]
        for name, languages in zip(names, sides, strict=True):
            files = [
                sample / f"{number:05d}" / f"text.{lang}"
                for lang in languages
                for number in range(len(pieces))
            ]
            (partial / name).write_bytes(_train(config, files))
        vocabularies = load_vocabularies(partial)
        return {
            "sizes": [vocabulary.get_piece_size() for vocabulary in vocabularies],
            "sha256": vocabulary_digest(partial),
            "versions": {"sentencepiece": sentencepiece.__version__},
        }

    return run_stage(folder, inputs, build)


def _pieces_to_sample(config: DataConfig, kept: Sequence[int]) -> list[tuple[int, int, int]]:
    """(piece, its pairs, how many of them to draw); each side of a pair is a line."""
    lines_a_pair = 2 if config.vocabulary.joint else 1
    wanted = config.vocabulary.sample_lines // lines_a_pair
    counts = np.array(kept)
    if counts.sum() > wanted:
        generator = np.random.default_rng(config.seed)
        counts = np.minimum(counts, generator.multinomial(wanted, counts / counts.sum()))
    return list(zip(range(len(kept)), kept, counts.tolist(), strict=True))


def _sample(
    config: DataConfig, train: Path, piece: tuple[int, int, int], folder: Path
) -> dict[str, Any]:
    """Write the drawn lines of both sides."""
    number, pairs, draw = piece
    generator = np.random.default_rng([config.seed, 1, number])
    rows = np.sort(generator.choice(pairs, draw, replace=False, shuffle=False)).tolist()
    for lang in config.languages:
        lines = (train / f"{number:05d}" / f"text.{lang}").read_bytes().split(b"\n")
        (folder / f"text.{lang}").write_bytes(b"".join(lines[row] + b"\n" for row in rows))
    return {}


def _train(config: DataConfig, files: Sequence[Path]) -> bytes:
    settings = config.vocabulary
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(read_lines, files)),
            model_writer=model,
            model_type=settings.type,
            vocab_size=settings.size,
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
