"""Batches of bare token ids, to translate by the beam search of PyTorch models."""

from __future__ import annotations

from collections.abc import Sequence

from models.search_config import SearchConfig
from models.seq2seq import TranslationModel
from pipeline.translation import beam_search
from pipeline.translation.constrained_search import Terms
from pipeline.translation.serving import Hypothesis, Part


def translate(
    models: TranslationModel | Sequence[TranslationModel],
    sources: Sequence[list[int]],
    search: SearchConfig,
    prefixes: Sequence[Sequence[int]] = (),
    places: Sequence[tuple[int, int]] = (),
    terms: Sequence[Terms] = (),
) -> list[list[Hypothesis]]:
    """Translate sentences in one batch.

    :param prefixes, places, terms: of each; without any they are freely translated, one a line.
    """
    models = [models] if isinstance(models, TranslationModel) else models
    parts = [
        Part(
            source,
            prefix=prefixes[row] if prefixes else (),
            place=places[row] if places else (row, 0),
            terms=terms[row] if terms else None,
        )
        for row, source in enumerate(sources)
    ]
    return beam_search.beam_search(models, parts, search)
