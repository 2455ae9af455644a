"""A small German-English grammar that writes the quickstart's parallel corpus.

A clause is put together once, as a subject, a verb, a mode and a list of parts, and then spoken
twice, in German and in English.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_prep.toy_corpus.lexicon import Pair
from data_prep.toy_corpus.templates import Templates

VERSION = 2  # raise it when the same seed would give other sentences
MIN_WORDS, MAX_WORDS = 2, 22
MAX_MISSES = 20_000  # after so many sentences without a new one, the grammar has run dry


def sentences(seed: int) -> Iterator[Pair]:
    """Yield (German, English) pairs without end; a pair may come again."""
    templates = Templates(seed)
    while True:
        german, english = templates.sentence()
        if all(MIN_WORDS <= text.count(" ") + 1 <= MAX_WORDS for text in (german, english)):
            yield german, english


def generate(counts: Mapping[str, int], seed: int) -> dict[str, list[Pair]]:
    """Make as many pairs as each split should have; the first split is the one to train on.

    Every German sentence occurs once over all splits, and no English sentence of a later split
    occurs in another one.

    :param counts: number of pairs of each split, by name.
    :raises ValueError: the grammar cannot supply that many.
    """
    if any(count < 0 for count in counts.values()):
        raise ValueError(f"cannot generate a negative number of pairs: {dict(counts)}")
    splits: dict[str, list[Pair]] = {name: [] for name in counts}
    stream = sentences(seed)
    seen: set[str] = set()
    barred: set[str] = set()  # English sides of held-out pairs
    names = list(counts)
    for name in names[1:] + names[:1]:  # held-out splits first: training then avoids their English
        misses = 0
        while len(splits[name]) < counts[name]:
            pair = next(stream)
            if pair[0] in seen or pair[1] in barred:
                misses += 1
                if misses > MAX_MISSES:
                    raise ValueError(
                        f"the toy grammar found only {len(splits[name])} of the "
                        f"{counts[name]} sentence pairs wanted for {name!r}"
                    )
                continue
            misses = 0
            seen.add(pair[0])
            splits[name].append(pair)
            if name != names[0]:
                barred.add(pair[1])
    return splits
