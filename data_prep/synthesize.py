"""Synthetic corpora: a model makes a side of them, before they are cleaned.

Without a target it is sequence-level knowledge distillation, with one interpolation (Kim & Rush
2016); without a source it is back-translation (Sennrich et al. 2016). Which model translates, and
by which engine, is the caller's: this file knows it as a `Teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial as bind
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.bleu import bleu_metric
from data_prep.config import DataConfig, TrainingCorpus
from data_prep.corpora import Fetched, Piece, Slice
from data_prep.files import DataError, save_array, sha256_of
from data_prep.pieces import map_pieces, open_executor
from data_prep.stage import DIGEST, FETCH, SYNTHETIC, Manifest, begun, is_up_to_date, run_stage

VERSION = 1  # raise it when the same settings would give other translations
TEXT, SCORES = "text.txt", "scores.npy"  # of a piece, a line and a float32 for each of its lines
TRANSLATIONS = "translations"  # folder of the pieces


class Candidate(Protocol):
    """A candidate is a translation that a teacher has found."""

    @property
    def score(self) -> float: ...
    @property
    def text(self) -> str: ...


class Teacher(Protocol):
    """A teacher is a model that translates. It is pickled, and loaded by workers that need it."""

    @property
    def digest(self) -> str:
        """Return a digest of the model's files."""

    @property
    def search(self) -> Mapping[str, Any]:
        """Return how it translates, as JSON values."""

    @property
    def workers(self) -> int | None:
        """Return how many processes translate best; None: one for each core."""

    def n_best(self, sentences: Sequence[str], first_line: int) -> Sequence[Sequence[Candidate]]:
        """Return at least one translation of each sentence, best first, or as they were drawn.

        :param first_line: number of the first sentence: what is drawn depends on it.
        """


OpenTeacher = Callable[[TrainingCorpus, tuple[str, str]], Teacher]
"""Returns the teacher of a corpus of these source and target languages, or says what is wrong with
it by a DataError."""


def synthesize(
    config: DataConfig,
    fetched: Fetched,
    teachers: Mapping[str, Teacher],
    run_dir: Path,
    executor: Executor,
) -> Fetched:
    """Bring `RUN_DIR/synthetic/NAME` up to date for each corpus that a teacher makes a side of.

    :param teachers: by the names of their corpora.
    :returns: what is fetched, with pieces that have the side that was made.
    :raises DataError: a model has changed before all was translated.
    """
    pieces, digests = list(fetched.pieces), {}
    for index, corpus in enumerate(config.train):
        if corpus.name not in teachers:
            continue
        own = [place for place, piece in enumerate(pieces) if piece.corpus == index]
        todo = [pieces[place] for place in own]
        folder = run_dir / SYNTHETIC / corpus.name
        made = _translate(config, corpus, fetched, teachers[corpus.name], todo, folder, executor)
        digests[corpus.name] = made[DIGEST]
        for number, place in enumerate(own):
            name = f"{TRANSLATIONS}/{number:05d}/{TEXT}"
            size = made["bytes"][name]
            path = f"../{SYNTHETIC}/{corpus.name}/{name}"
            digest = made["pieces"][number]["sha256"]
            side = {corpus.made_side: Slice(path=path, made=True, begin=0, end=size, sha256=digest)}
            pieces[place] = pieces[place].model_copy(update=side)
    return fetched.model_copy(update={"pieces": tuple(pieces), "synthetic": digests})


def scores_of(
    corpus: TrainingCorpus, piece: Piece, config: DataConfig, folder: Path
) -> NDArray[np.float32]:
    """Return the scores of the translations of a piece.

    :param folder: of the fetch stage.
    """
    text: Slice = getattr(piece, corpus.made_side)
    scores: NDArray[np.float32] = np.load(text.place(config, folder).with_name(SCORES))
    return scores


def _translate(
    config: DataConfig,
    corpus: TrainingCorpus,
    fetched: Fetched,
    teacher: Teacher,
    pieces: Sequence[Piece],
    folder: Path,
    executor: Executor,
) -> Manifest:
    """Translate a corpus, unless that is done.

    :returns: the manifest, which has the model and how it translated for each piece.
    """
    inputs = {
        "text": {side: fetched.files[path].sha256 for side, path in corpus.files.items()},
        "lines": [piece.pairs for piece in pieces],
        "languages": config.languages,
        "model": teacher.digest,
        "search": dict(teacher.search),
        "version": VERSION,
    }
    if not is_up_to_date(folder, inputs):
        _refuse_another_model(corpus, folder, teacher)

    def build(partial: Path) -> dict[str, Any]:
        work = bind(_translate_piece, config, corpus, teacher, folder.parents[1] / FETCH)
        place = partial / TRANSLATIONS
        with _workers_of(teacher, config, executor) as workers:
            made = map_pieces(workers, work, pieces, place, lines=lambda piece: piece.pairs)
        return {"pieces": made}

    return run_stage(folder, inputs, build, stage=SYNTHETIC)


@contextmanager
def _workers_of(teacher: Teacher, config: DataConfig, executor: Executor) -> Iterator[Executor]:
    """Return those of `executor`, unless a teacher wants fewer and the recipe does not say how
    many."""
    if config.workers or teacher.workers is None:
        yield executor
    else:
        with open_executor(config.model_copy(update={"workers": teacher.workers})) as own:
            yield own


def _refuse_another_model(corpus: TrainingCorpus, folder: Path, teacher: Teacher) -> None:
    """Check that the pieces that are finished were translated by the same model.

    :raises DataError: they were not.
    """
    partial, inputs = begun(folder)
    finished = len([*(partial / TRANSLATIONS).glob("[!.]*")])
    if finished and inputs.get("model", teacher.digest) != teacher.digest:
        assert corpus.translate_with is not None
        names = ", ".join(map(str, corpus.translate_with.models))
        raise DataError(
            f"data.train: {corpus.name}: {finished} pieces were translated by another model than "
            f"{names}; bring that one back to go on, or delete {partial} to translate all of them "
            "with this one"
        )


def _translate_piece(
    config: DataConfig,
    corpus: TrainingCorpus,
    teacher: Teacher,
    source: Path,
    piece: Piece,
    folder: Path,
) -> dict[str, Any]:
    """Write the translations of a piece and their scores; record who made them, and how.

    :param source: folder of the fetch stage.
    """
    given, made = piece.source, piece.target
    if corpus.made_side == "source":
        given, made = made, given
    found = teacher.n_best(piece.lines(given, config, source), piece.line)
    if len(corpus.files) == 2:
        references = piece.lines(made, config, source)
        chosen = _nearest(found, references, config.target_lang)
    else:
        chosen = [candidates[0] for candidates in found]
    text = "".join(f"{one.text}\n" for one in chosen)
    (folder / TEXT).write_bytes(text.encode())
    save_array(folder / SCORES, np.array([one.score for one in chosen], np.float32))
    return {
        "first_line": piece.line,
        "lines": len(chosen),
        "sha256": sha256_of(folder / TEXT),
        "model": teacher.digest,
        "search": dict(teacher.search),
    }


def _nearest(
    found: Sequence[Sequence[Candidate]], references: Sequence[str], target_lang: str
) -> list[Candidate]:
    """Return of each sentence's translations the nearest to its reference by sentence BLEU, the
    first of those that are equally near."""
    metric = bleu_metric(target_lang, effective_order=True)
    return [
        max(candidates, key=lambda one: metric.sentence_score(one.text, [reference]).score)
        for candidates, reference in zip(found, references, strict=True)
    ]
