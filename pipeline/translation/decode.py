"""Which way a batch of sentences is translated: by beam search, with terms that are required or
without, or by drawing tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.translation.constrained_search import Terms, constrained_batch
from pipeline.translation.search import Decoding, sample_batch, search_batch
from pipeline.translation.serving import Hypothesis

if TYPE_CHECKING:  # where this file is served there is no recipe
    from models.search_config import SearchConfig


def decode_batch(
    decoding: Decoding,
    lengths: Sequence[int],
    search: SearchConfig,
    longest: int,
    prefixes: Sequence[Sequence[int]] = (),
    places: Sequence[Sequence[int]] = (),
    terms: Sequence[Terms | None] = (),
) -> list[list[Hypothesis]]:
    """Translate the sentences of a batch as `search` says.

    :param terms: what each translation must have; all of a batch have some, or none has any. The
        other parameters are those of `search_batch` and `sample_batch`.
    """
    if search.sampling_topk is not None:
        return sample_batch(decoding, lengths, search, longest, prefixes, places)
    if required := [own for own in terms if own is not None]:
        return constrained_batch(decoding, lengths, search, longest, required, prefixes)
    return search_batch(decoding, lengths, search, longest, prefixes)
