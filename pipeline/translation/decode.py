"""Which way a batch of sentences is translated: by beam search, with terms that are required or
without, or by drawing tokens."""

from __future__ import annotations

from collections.abc import Sequence

from models.search_config import SearchConfig
from pipeline.translation.constrained_search import constrained_batch
from pipeline.translation.search import Decoding, sample_batch, search_batch
from pipeline.translation.serving import Hypothesis, Part


def decode_batch(
    decoding: Decoding, parts: Sequence[Part], search: SearchConfig, longest: int
) -> list[list[Hypothesis]]:
    """Translate the sentences of a batch as `search` says.

    :param decoding: of their sources, before its first step.
    :param parts: all of them have terms, or none has any.
    :param longest: the most tokens that the model can produce.
    """
    lengths, prefixes = [len(part.source) for part in parts], [part.prefix for part in parts]
    if search.sampling_topk is not None:
        places = [part.place for part in parts]
        return sample_batch(decoding, lengths, search, longest, prefixes, places)
    if required := [part.terms for part in parts if part.terms is not None]:
        return constrained_batch(decoding, lengths, search, longest, required, prefixes)
    return search_batch(decoding, lengths, search, longest, prefixes)
