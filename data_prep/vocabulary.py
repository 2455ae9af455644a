"""One joint SentencePiece vocabulary, trained on the cleaned training text only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import SentencePieceProcessor

from data_prep.config import DataConfig
from data_prep.corpora import read_lines
from data_prep.stage import DataError, Manifest, digest_of, run_stage, sha256_of

VERSION = 1  # raise it when the same inputs would give another vocabulary
PAD_IDX, UNK_IDX, BOS_IDX, EOS_IDX = 0, 1, 2, 3


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
    joint = folder / "spm.model"
    separate = [folder / "spm.source.model", folder / "spm.target.model"]
    return separate if separate[0].exists() and not joint.exists() else [joint]


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


def train_vocabulary(config: DataConfig, cleaned: Manifest, text: Path, folder: Path) -> Manifest:
    """Train `spm.model` from `text`/train.* of the cleaning stage.

    :returns: manifest with `size` and `sha256` of the model.
    :raises DataError: the text does not support a vocabulary of that size.
    """
    settings = config.vocabulary
    inputs = {
        "cleaned": digest_of(cleaned),
        "vocabulary": settings.model_dump(),
        "seed": config.seed,
        "version": VERSION,
    }
    lines_per_side = cleaned["pairs"]["train"]

    def sample() -> Iterator[str]:
        paths = (text / f"train.{lang}" for lang in config.languages)
        share = settings.sample_lines / (2 * lines_per_side)
        generator = np.random.default_rng(config.seed)
        for path in paths:
            lines = read_lines(path)
            if share < 1:
                lines = compress(lines, iter(lambda: generator.random() < share, None))
            yield from lines

    def build(partial: Path) -> dict[str, Any]:
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sample(),
                model_writer=model,
                model_type=settings.type,
                vocab_size=settings.size,
                character_coverage=settings.character_coverage,
                byte_fallback=settings.byte_fallback,
                max_sentence_length=1 << 16,
                pad_id=PAD_IDX,
                unk_id=UNK_IDX,
                bos_id=BOS_IDX,
                eos_id=EOS_IDX,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).rsplit(") ", 1)[-1] or str(error)
            raise DataError(
                f"data.vocabulary.size {settings.size}: SentencePiece cannot make that vocabulary "
                f"from {2 * lines_per_side} lines: {reason}"
            ) from error
        (partial / "spm.model").write_bytes(model.getvalue())
        size = load_vocabulary(partial / "spm.model").get_piece_size()
        versions = {"sentencepiece": sentencepiece.__version__}
        return {"size": size, "sha256": sha256_of(partial / "spm.model"), "versions": versions}

    return run_stage(folder, inputs, build)
