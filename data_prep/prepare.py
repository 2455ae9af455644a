"""The stages in their order: fetch → synthesize → clean → vocabulary → binarize."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.binarize import binarize
from data_prep.clean import clean
from data_prep.config import DataConfig
from data_prep.corpora import fetch
from data_prep.files import only_command_in
from data_prep.held_out import HeldOut
from data_prep.identity import write_identity
from data_prep.pieces import open_executor
from data_prep.shards import ShardsManifest
from data_prep.stage import CLEAN, FETCH, SHARDS, VOCABULARY
from data_prep.synthesize import OpenTeacher, synthesize
from data_prep.taken_vocabulary import take_vocabulary
from data_prep.vocabulary import train_vocabulary


def prepare(
    config: DataConfig,
    run_dir: Path,
    test_sets: Sequence[HeldOut] = (),
    open_teacher: OpenTeacher | None = None,
    *,
    trained: bool = False,
) -> ShardsManifest:
    """Bring `RUN_DIR/{fetch,synthetic,clean,vocabulary,shards}` up to date.

    :param test_sets: those besides `data.test`, which must not be in the training text either.
    :param open_teacher: opens the models that corpora name with `translate_with`.
    :param trained: whether a model has learnt from what is there.
    :returns: what is in the shards.
    :raises DataError: something is wrong with the corpora, the disk or the workers; what is
        finished stays, and the next call goes on from there.
    """
    folder = run_dir.absolute()
    config = config.model_copy(update={"root": config.root.absolute()})  # for workers elsewhere
    raw, text, models, shards = (folder / name for name in (FETCH, CLEAN, VOCABULARY, SHARDS))
    with only_command_in(folder), open_executor(config) as executor:
        teachers = {}
        for corpus in config.train:
            if corpus.translate_with is not None:
                assert open_teacher is not None
                teachers[corpus.name] = open_teacher(corpus, config.languages)
        fetched = fetch(config, raw, executor)
        fetched = synthesize(config, fetched, teachers, folder, executor)
        cleaned = clean(config, fetched, test_sets, raw, text, executor, trained=trained)
        if config.vocabulary.taken_from is None:
            vocabulary = train_vocabulary(config, cleaned, text, models, executor)
        else:
            vocabulary = take_vocabulary(config, models)
        made = binarize(config, cleaned, vocabulary, text, models, shards, executor)
        write_identity(config, cleaned.files, cleaned.test_sets, folder)
        return made
