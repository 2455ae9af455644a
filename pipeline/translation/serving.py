"""Translate text: what every translator does, whatever engine runs the model.

This file needs `sentencepiece` and `pydantic`, and of our other modules `data_prep/text.py` and
`models/export_format.py` with what that needs alone, so that all can be copied to where a model is
served (`ctranslate2_translator.py`, `onnx_translator.py`).
"""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sentencepiece import SentencePieceProcessor

from data_prep.text import normalise, split_to_fit, unseen_words, visible, vocabulary_files
from models.export_format import (
    DIVERGED,
    SHORTLISTS,
    ExportSettings,
    Format,
    ModelError,
    read_settings,
)
from models.search_config import SearchConfig

if TYPE_CHECKING:
    from pipeline.translation.constrained_search import Terms
    from pipeline.translation.glossary import Glossary

log = logging.getLogger("translate")

PairIds = tuple[list[list[int]], list[list[int]]]
"""Token ids of sources, and of their targets, each with EOS."""


@dataclass(frozen=True)
class Hypothesis:
    """A translation that a search has found, of a sentence or of a part of one."""

    tokens: list[int]
    """Token ids with EOS, without BOS."""

    score: float
    """Log-probability ÷ (number of tokens, EOS included) to the power of the length penalty."""


class Part(NamedTuple):
    """A sentence to translate, or a part of one that is too long."""

    source: list[int]
    """Token ids with EOS."""

    prefix: Sequence[int] = ()
    """Token ids that the translation begins with."""

    place: tuple[int, int] = (0, 0)
    """The number of its line, and of the part in that: what is drawn depends on it."""

    text: str = ""
    """What was encoded, normalised."""

    terms: Terms | None = None
    """What the translation must have."""


class Translation(NamedTuple):
    """A translation of a sentence, as text."""

    score: float
    """See `Hypothesis`."""

    text: str

    found: Sequence[tuple[Part, Hypothesis]] = ()
    """The parts of the sentence, and of each what was found for it."""


class Pair(NamedTuple):
    """A sentence and a translation of it."""

    source: str
    target: str


class Forced(NamedTuple):
    """A model has been led through a translation."""

    tokens: list[str]
    """As text, with EOS."""

    log_probs: list[float]
    """Of each token, given the source and the tokens before it (natural logarithm)."""

    @property
    def log_prob(self) -> float:
        """Return the log-probability of the translation: the sum."""
        return math.fsum(self.log_probs)

    def score(self, length_penalty: float) -> float:
        """Return what a search compares: log-probability ÷ number of tokens to that power."""
        return self.log_prob / math.pow(len(self.tokens), length_penalty)


def length_limit(source_length: int, search: SearchConfig, longest: int) -> int:
    """Return how many tokens a translation may have, EOS included.

    It depends on no other sentence of the batch.

    :param source_length: in tokens, EOS included.
    :param longest: the most that the model can produce.
    """
    wanted = int(search.max_length_ratio * source_length + search.max_length_offset)
    return max(1, min(wanted, longest))


def batches_by_length(
    lengths: Mapping[int, int], search: SearchConfig, beam_size: int | None = None
) -> Iterator[list[int]]:
    """Group sentences of similar length, the longest first, as many as `batch_tokens` allows.

    :param lengths: source tokens of each sentence, by any key.
    :param beam_size: hypotheses of a sentence; None: as many as `search` has.
    :returns: the keys of each batch.
    """
    batch: list[int] = []
    beam_size = beam_size or search.beam_size
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (len(batch) + 1) * longest * beam_size > search.batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class TextTranslator(ABC):
    """Translates sentences, for several threads at once if need be; a subclass searches for the
    translations of token ids."""

    one_by_one = False
    """A shortlist makes it translate sentences one by one, which takes longer for many."""

    warns = True
    """It warns of lines that it translates in parts."""

    takes_terms = True
    """It can search for translations with given terms."""

    seen_words: frozenset[str] | None = None
    """The words of the text that the model was trained on, where they are few enough to be kept."""

    max_target_tokens: int
    """The most that the model can produce, EOS included; it can read as many."""

    def __init__(
        self,
        vocabularies: tuple[SentencePieceProcessor, SentencePieceProcessor],
        search: SearchConfig,
        max_source_tokens: int,
        backend: str,
    ) -> None:
        """Keep what every translator needs.

        :param vocabularies: of the source and the target side.
        :param max_source_tokens: EOS included; longer lines are translated in parts.
        :param backend: what translates and on which device, in words.
        """
        self.source_vocabulary, self.target_vocabulary = vocabularies
        self.search, self.max_source_tokens, self.backend = search, max_source_tokens, backend

    @abstractmethod
    def search_batches(
        self, batches: Iterable[list[Part]]
    ) -> Iterator[Sequence[Sequence[Hypothesis]]]:
        """Translate batches one after the other.

        :returns: for each batch at most `beam_size` hypotheses of each sentence, best first; or
            as they were drawn.
        """

    @abstractmethod
    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[Sequence[Sequence[float]]]:
        """Compute how likely given translations are, one batch after the other.

        :param batches: of sources and their targets, at most `max_target_tokens` each.
        :returns: for each batch the log-probabilities of each target's tokens, among the whole
            vocabulary.
        """

    def translate(
        self,
        sentences: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
        first_line: int = 1,
    ) -> list[str]:
        """Return the best translation of each sentence; that of an empty sentence is empty.

        :param progress: is called with the number of sentences just finished.
        :param first_line: number of the first sentence, for warnings.
        :raises ModelError: the model's output is not a number.
        """
        return [best[0].text for best in self.n_best(sentences, progress, first_line)]

    def n_best(
        self,
        sentences: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
        first_line: int = 1,
        prefixes: Sequence[str] = (),
        glossary: Glossary | None = None,
    ) -> list[list[Translation]]:
        """Return up to beam_size translations of each sentence, best first, or as they were drawn.

        A sentence that was translated in parts has one: the first translations of its parts,
        joined. The other parameters are those of `translate`.

        :param prefixes: what the translation of each sentence begins with; without any: freely.
        :param glossary: says which terms the translation of each sentence has.
        """
        if isinstance(sentences, str):
            raise TypeError("expected a list of sentences, not one sentence")
        if prefixes and (isinstance(prefixes, str) or len(prefixes) != len(sentences)):
            raise ValueError("expected as many prefixes as sentences, or none")
        parts, of_sentence = self._encode_parts(sentences, first_line)
        for number, own in enumerate(of_sentence if prefixes or glossary else ()):
            prefix, place = prefixes[number] if prefixes else "", slice(own.start, own.stop)
            parts[place] = self._bound(parts[place], sentences[number], prefix, glossary)
            if fault := self._fault_of(parts[place], prefix):
                raise ModelError(f"line {first_line + number}: {fault}")
        found: list[Sequence[Hypothesis]] = [[] for _ in parts]
        owner = [index for index, own in enumerate(of_sentence) for _ in own]
        left = [len(own) for own in of_sentence]
        progress(left.count(0))
        order: list[list[int]] = []
        for bound in (False, True):  # the search without terms is faster
            lengths = {
                i: len(p.source) for i, p in enumerate(parts) if (p.terms is not None) == bound
            }
            order += batches_by_length(lengths, self.search)
        results = self.search_batches([parts[index] for index in batch] for batch in order)
        for batch, result in zip(order, results, strict=True):
            for index, hypotheses in zip(batch, result, strict=True):
                found[index] = hypotheses
                left[owner[index]] -= 1
            progress(sum(left[index] == 0 for index in {owner[index] for index in batch}))
        return [
            self._join_parts([(parts[index], found[index]) for index in own]) for own in of_sentence
        ]

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        progress: Callable[[int], None] = lambda count: None,
        lines: Sequence[int] | None = None,
    ) -> list[Forced | None]:
        """Lead the model through translations that are given, and return how likely it finds each.

        :param pairs: a sentence and a translation of it; their text is normalised first.
        :param progress: is called with the number of pairs just finished.
        :param lines: the number of each pair's line, for warnings; None: from 1.
        :returns: None for a pair of which the model cannot take a side, for it is too long.
        :raises ModelError: the model's output is not a number.
        """
        if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
            raise TypeError("expected pairs of a sentence and a translation")
        sources, targets = (
            [vocabulary.encode(normalise(pair[side]), add_eos=True) for pair in pairs]
            for side, vocabulary in enumerate((self.source_vocabulary, self.target_vocabulary))
        )
        limit, lengths = self.max_target_tokens, dict[int, int]()
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if (length := max(len(source), len(target))) <= limit:
                lengths[number] = length
            elif self.warns:
                logging.getLogger("score").warning(
                    "line %d: %d tokens, more than the %d that the model takes; it has no score",
                    lines[number] if lines else number + 1, length, limit,
                )  # fmt: skip
        progress(len(pairs) - len(lengths))
        found: list[Forced | None] = [None] * len(pairs)
        order = list(batches_by_length(lengths, self.search, beam_size=1))
        results = self.score_batches(
            ([sources[i] for i in batch], [targets[i] for i in batch]) for batch in order
        )
        for batch, result in zip(order, results, strict=True):
            for number, log_probs in zip(batch, result, strict=True):
                if any(value != value for value in log_probs):
                    raise ModelError(DIVERGED)
                tokens = self.target_vocabulary.id_to_piece(targets[number])
                found[number] = Forced(tokens, [*log_probs])
            progress(len(batch))
        return found

    def _encode_parts(
        self, sentences: Sequence[str], first_line: int
    ) -> tuple[list[Part], list[range]]:
        """Encode sentences, normalised as training text was, and split those that are too long.

        :returns: all parts; and for each sentence which of them are its own (none if it is empty).
        """
        parts: list[Part] = []
        of_sentence = []
        texts = list(map(normalise, sentences))
        # Given a list, SentencePiece starts threads, which takes longer than most sentences.
        encoded = [self.source_vocabulary.encode(text, add_eos=True) for text in texts]
        for line, (text, ids) in enumerate(zip(texts, encoded, strict=True), start=first_line):
            begin, cut = len(parts), self._cut(text, ids)
            if self.warns and len(ids) > self.max_source_tokens:
                log.warning(
                    "line %d: %d tokens, more than the %d that the model takes; "
                    "translated in %d parts", line, len(ids), self.max_source_tokens, len(cut),
                )  # fmt: skip
            full = [part for part in cut if len(part.source) > 1]  # else only EOS
            parts += [part._replace(place=(line, which)) for which, part in enumerate(full)]
            of_sentence.append(range(begin, len(parts)))
        return parts, of_sentence

    def _cut(self, text: str, ids: list[int]) -> list[Part]:
        """Return a sentence in one part, or in as many as the model can take.

        :param ids: of the sentence, with EOS.
        """
        encode, limit = self.source_vocabulary.encode, self.max_source_tokens
        if len(ids) <= limit:
            return [Part(ids, text=text)]
        cut = split_to_fit(text, lambda text: len(encode(text)) < limit)
        both = zip(encode(cut, add_eos=True), cut, strict=True)
        return [Part(ids, text=text) for ids, text in both]

    def unseen(self, sentences: Iterable[str]) -> list[str]:
        """Return the words that the model was never trained on, in their order, each once.

        It has nothing to say of a model that was trained on text of many different words.
        """
        return unseen_words(sentences, self.seen_words)

    def fault(
        self, sentence: str, prefix: str = "", glossary: Glossary | None = None
    ) -> str | None:
        """Return why a sentence cannot have a translation with this prefix and its terms; None: it
        can."""
        text = normalise(sentence)
        parts = self._cut(text, self.source_vocabulary.encode(text, add_eos=True))
        return self._fault_of(self._bound(parts, text, prefix, glossary), prefix)

    def _bound(
        self, parts: list[Part], sentence: str, prefix: str, glossary: Glossary | None
    ) -> list[Part]:
        """Return the parts of a sentence with what their translations must have."""
        if parts and prefix:
            ids = self.target_vocabulary.encode(normalise(prefix))
            parts = [parts[0]._replace(prefix=ids), *parts[1:]]
        if glossary:
            terms = glossary.of_parts(normalise(sentence), [part.text for part in parts])
            parts = [part._replace(terms=own) for part, own in zip(parts, terms, strict=True)]
        return parts

    def _fault_of(self, parts: Sequence[Part], prefix: str) -> str | None:
        for part in parts:
            if part.prefix:
                spelled = self.target_vocabulary.decode([*part.prefix])
                if spelled.split() != normalise(prefix).split():
                    return f'the target vocabulary makes "{spelled}" of the prefix "{prefix}"'
            tokens = len(part.prefix) + (part.terms.count if part.terms else 0)
            if tokens >= self.max_target_tokens:
                what = " and ".join(
                    ["the prefix"] * bool(part.prefix) + ["the terms"] * bool(part.terms)
                )
                return (
                    f"{what} {'have' if part.terms else 'has'} {tokens} tokens, and the model can "
                    f"produce {self.max_target_tokens} in all"
                )
        return None

    def _join_parts(self, parts: Sequence[tuple[Part, Sequence[Hypothesis]]]) -> list[Translation]:
        """Return the translations of a sentence.

        :param parts: its parts, and the hypotheses of each.
        """
        if len(parts) == 1:
            ((part, hypotheses),) = parts
            return [Translation(h.score, self._decode(h), [(part, h)]) for h in hypotheses]
        found = [(part, hypotheses[0]) for part, hypotheses in parts]
        best = [hypothesis for _, hypothesis in found]
        penalty = self.search.length_penalty
        total = sum(h.score * len(h.tokens) ** penalty for h in best)
        length = max(1, sum(len(h.tokens) for h in best))
        text = " ".join(filter(None, map(self._decode, best)))
        return [Translation(total / length**penalty, text, found)]

    def _decode(self, hypothesis: Hypothesis) -> str:
        # Byte fallback can produce a line break, and one line in must be one line out; or a control
        # character, and whoever reads the line as a source would not read that.
        return " ".join(visible(self.target_vocabulary.decode(hypothesis.tokens)).split())


def open_export(
    folder: Path, format: Format, search: Mapping[str, object]
) -> tuple[ExportSettings, tuple[SentencePieceProcessor, SentencePieceProcessor], SearchConfig]:
    """Read what an exported model is, its vocabularies, and how it translates.

    :param search: `evaluation` keys that differ from what the model was exported with.
    :raises ModelError: `folder` holds no exported model of that format.
    :raises TypeError: there is no such key.
    :raises ValueError: a key cannot have this value.
    """
    settings = read_settings(folder)
    if settings.format != format:
        raise ModelError(f"{folder}: its format is {settings.format}, not {format}")
    if settings.shortlist and not (folder / SHORTLISTS[format]).is_file():
        raise ModelError(f"{folder}: not an exported model: {SHORTLISTS[format]} is missing")
    options = (settings.evaluation or SearchConfig()).replaced(search)
    try:
        files = [SentencePieceProcessor(model_file=str(path)) for path in vocabulary_files(folder)]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    shortlist = settings.shortlist and options.shortlist is not False
    return settings, (files[0], files[-1]), options.model_copy(update={"shortlist": shortlist})


def thread_count() -> int:
    """Return OMP_NUM_THREADS, or the number of cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


def tokens_of(vocabulary: SentencePieceProcessor) -> list[str]:
    """Return the tokens of a vocabulary as text, in the order of their ids."""
    tokens: list[str] = vocabulary.id_to_piece(list(range(vocabulary.get_piece_size())))
    return tokens
