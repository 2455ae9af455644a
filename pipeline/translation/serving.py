"""Translate text: what every translator does, and the one that runs a CTranslate2 export.

This file needs `ctranslate2` (for its exports only), `sentencepiece`, and of our other modules
`models/export_format.py` and `data_prep/text.py` alone, so that all can be copied to where a model
is served:

    CTranslate2Translator(Path("my-model")).translate(["Guten Morgen."])
"""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from sentencepiece import SentencePieceProcessor

from data_prep.text import normalise
from models.export_format import SHORTLISTS, ExportSettings, Format, ModelError, read_settings

if TYPE_CHECKING:  # where this file is served there is no recipe
    from pipeline.translation_recipe import SearchConfig

log = logging.getLogger("translate")

DIVERGED = "The model's output is not a number; its training has diverged"
VOCABULARIES = (("spm.model",), ("spm.source.model", "spm.target.model"))
# Where a line may be cut, the best kind of place first. Without any it is cut in its middle.
BREAKS = [
    re.compile(r"[.!?…]['\"”“»«’)\]]*\s+|[。！？]+"),  # a sentence ends
    re.compile(r"[,;:)–—]\s+|[、，；：]"),
    re.compile(r"\s+"),
]


NEWER = {  # search keys that older exports do not have
    "shortlist": None,
    "sampling_topk": None,
    "sampling_temperature": 1.0,
    "sampling_seed": 1,
}

T = TypeVar("T")

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


class Translation(NamedTuple):
    """A translation of a sentence, as text."""

    score: float
    """See `Hypothesis`."""

    text: str


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


def split_to_fit(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut `text` in two, and the parts again, until every part fits.

    The cut is at the end of a sentence; without one after a comma or the like; without one at a
    space; without one in the middle. Of several places the one nearest to the middle is taken.
    """
    text = text.strip()
    if len(text) < 2 or fits(text):
        return [text]
    middle = cut = len(text) // 2
    for pattern in BREAKS:
        places = [match.end() for match in pattern.finditer(text) if match.end() < len(text)]
        if places:
            cut = min(places, key=lambda place: abs(place - middle))
            break
    return [*split_to_fit(text[:cut], fits), *split_to_fit(text[cut:], fits)]


class TextTranslator(ABC):
    """Translates sentences; a subclass searches for the translations of token ids."""

    one_by_one = False
    """A shortlist makes it translate sentences one by one, which takes longer for many."""

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
    ) -> list[list[Translation]]:
        """Return up to beam_size translations of each sentence, best first, or as they were drawn.

        A sentence that was translated in parts has one: the first translations of its parts,
        joined. The other parameters are those of `translate`.

        :param prefixes: what the translation of each sentence begins with; without any: freely.
        """
        parts, of_sentence = self._encode_parts(sentences, first_line)
        for number, prefix in enumerate(prefixes):
            if own := of_sentence[number]:
                ids = self._encode_prefix(prefix, first_line + number)
                parts[own[0]] = parts[own[0]]._replace(prefix=ids)
        found: list[Sequence[Hypothesis]] = [[] for _ in parts]
        owner = [index for index, own in enumerate(of_sentence) for _ in own]
        left = [len(own) for own in of_sentence]
        progress(left.count(0))
        lengths = {index: len(part.source) for index, part in enumerate(parts)}
        order = list(batches_by_length(lengths, self.search))
        results = self.search_batches([parts[index] for index in batch] for batch in order)
        for batch, result in zip(order, results, strict=True):
            for index, hypotheses in zip(batch, result, strict=True):
                found[index] = hypotheses
                left[owner[index]] -= 1
            progress(sum(left[index] == 0 for index in {owner[index] for index in batch}))
        return [self._join_parts([found[index] for index in own]) for own in of_sentence]

    def _encode_parts(
        self, sentences: Sequence[str], first_line: int
    ) -> tuple[list[Part], list[range]]:
        """Encode sentences, normalised as training text was, and split those that are too long.

        :returns: all parts; and for each sentence which of them are its own (none if it is empty).
        """
        encode, limit = self.source_vocabulary.encode, self.max_source_tokens
        parts: list[Part] = []
        of_sentence = []
        texts = list(map(normalise, sentences))
        for number, ids in enumerate(encode(texts, add_eos=True)):
            begin, line = len(parts), first_line + number
            if len(ids) <= limit:
                own = [ids]
            else:
                cut = split_to_fit(texts[number], lambda text: len(encode(text)) < limit)
                own = encode(cut, add_eos=True)
                log.warning(
                    "line %d: %d tokens, more than the %d that the model takes; "
                    "translated in %d parts", line, len(ids), limit, len(own),
                )  # fmt: skip
            full = [ids for ids in own if len(ids) > 1]  # else only EOS
            parts += [Part(ids, place=(line, which)) for which, ids in enumerate(full)]
            of_sentence.append(range(begin, len(parts)))
        return parts, of_sentence

    def _encode_prefix(self, text: str, line: int) -> list[int]:
        ids: list[int] = self.target_vocabulary.encode(normalise(text))
        if len(ids) >= self.max_target_tokens:
            raise ModelError(
                f"line {line}: the prefix has {len(ids)} tokens, and the model can produce "
                f"{self.max_target_tokens} in all"
            )
        return ids

    def _join_parts(self, parts: Sequence[Sequence[Hypothesis]]) -> list[Translation]:
        """Return the translations of a sentence.

        :param parts: the hypotheses of each of its parts.
        """
        if len(parts) == 1:
            return [Translation(h.score, self._decode(h)) for h in parts[0]]
        best = [hypotheses[0] for hypotheses in parts]
        penalty = self.search.length_penalty
        total = sum(h.score * len(h.tokens) ** penalty for h in best)
        length = max(1, sum(len(h.tokens) for h in best))
        text = " ".join(filter(None, map(self._decode, best)))
        return [Translation(total / length**penalty, text)]

    def _decode(self, hypothesis: Hypothesis) -> str:
        # Byte fallback can produce a line break, and one line in must be one line out.
        return " ".join(self.target_vocabulary.decode(hypothesis.tokens).split())


def open_export(
    folder: Path, format: Format, search: Mapping[str, object]
) -> tuple[ExportSettings, tuple[SentencePieceProcessor, SentencePieceProcessor], SearchConfig]:
    """Read what an exported model is, its vocabularies, and how it translates.

    :param search: `evaluation` keys that differ from what the model was exported with.
    :raises ModelError: `folder` holds no exported model of that format.
    :raises TypeError: there is no such key.
    """
    settings = read_settings(folder)
    if settings.format != format:
        raise ModelError(f"{folder}: its format is {settings.format}, not {format}")
    if settings.shortlist and not (folder / SHORTLISTS[format]).is_file():
        raise ModelError(f"{folder}: not an exported model: {SHORTLISTS[format]} is missing")
    evaluation = {**NEWER, **(settings.evaluation or {})}
    if unknown := search.keys() - evaluation.keys():
        raise TypeError(f"no such search option: {', '.join(sorted(unknown))}")
    names = VOCABULARIES[not (folder / VOCABULARIES[0][0]).exists()]
    try:
        files = [SentencePieceProcessor(model_file=str(folder / name)) for name in names]
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    evaluation = {**evaluation, **search}
    evaluation["shortlist"] = settings.shortlist and evaluation["shortlist"] is not False
    options = cast("SearchConfig", SimpleNamespace(**evaluation))
    return settings, (files[0], files[-1]), options


def thread_count() -> int:
    """Return OMP_NUM_THREADS, or the number of cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


class CTranslate2Translator(TextTranslator):
    """Translates by CTranslate2's beam search on the CPU: a worker on each core has its own batch.

    The search is that of `pipeline/translation/search.py`, except for two things. Tokens that
    no_repeat_ngram_size forbids do not count in the probabilities of the others. And where more
    than beam_size hypotheses finish in the same step, the best of them are kept, not the first: the
    lower ranks of an n-best list may differ, the first rank does not.

    What it draws depends on the seed, and on all that was drawn before.

    With a shortlist (`pipeline/translation/shortlist.py`) a sentence is translated by itself:
    CTranslate2 would allow to all sentences of a batch what one of them allows. Probabilities are
    those among the tokens allowed.
    """

    def __init__(self, folder: Path, **search: object) -> None:
        """Load the model.

        :param folder: written by `./run.sh export --format ctranslate2`.
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: `folder` is no such folder.
        :raises TypeError: there is no such key.
        """
        import ctranslate2  # here, because other formats start sooner without it

        settings, vocabularies, options = open_export(folder, "ctranslate2", search)
        try:
            self.one_by_one = bool(options.shortlist)
            if self.one_by_one:  # which CTranslate2 has for a batch, and we for a sentence
                one_by_one = SimpleNamespace(**{**vars(options), "batch_tokens": 1})
                options = cast("SearchConfig", one_by_one)
            workers, threads = thread_count(), 1
            if options.sampling_topk is not None:  # one worker draws the same numbers every time
                workers, threads = 1, workers
                ctranslate2.set_random_seed(options.sampling_seed % 2**32)
            self.model = ctranslate2.Translator(
                str(folder), inter_threads=workers, intra_threads=threads
            )
            super().__init__(
                vocabularies,
                options,
                settings.max_source_tokens or settings.model["max_seq_len"],
                f"CTranslate2 {self.model.compute_type}, {workers} worker(s) on the CPU"
                + ", sentence by sentence with a shortlist" * self.one_by_one,
            )
            self.max_target_tokens: int = settings.model["max_seq_len"]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        self.workers = workers
        self._forbidden = {self.target_vocabulary.pad_id(), self.target_vocabulary.bos_id()}
        self._tokens = tokens_of(self.source_vocabulary)
        self._ids = {token: i for i, token in enumerate(tokens_of(self.target_vocabulary))}

    def search_batches(self, batches: Iterable[list[Part]]) -> Iterator[list[list[Hypothesis]]]:
        """Translate batches in parallel, and return them in order; see `TextTranslator`."""

        def submitted() -> Iterator[tuple[list[Part], int, list[Any]]]:
            for parts in batches:
                limit = max(map(self._length_limit, parts))
                yield parts, limit, self._submit(parts, limit, shortlisted=self.one_by_one)

        for batch in ahead(submitted(), 2 * self.workers):
            yield self._collect(*batch, shortlisted=self.one_by_one)

    def score_batches(self, batches: Iterable[PairIds]) -> Iterator[list[list[float]]]:
        """Score batches in parallel, and return them in order; see `TextTranslator`."""
        submitted = (self._submit_to_score(*pairs, asynchronous=True) for pairs in batches)
        for futures in ahead(submitted, 2 * self.workers):
            yield [future.result().log_probs for future in futures]

    def _length_limit(self, part: Part) -> int:
        limit = length_limit(len(part.source), self.search, self.max_target_tokens)
        return max(limit, len(part.prefix) + 1)

    def _source_tokens(self, source: list[int]) -> list[str]:
        return [self._tokens[token] for token in source[:-1]]  # CTranslate2 adds EOS

    def _submit(
        self, parts: list[Part], limit: int, *, shortlisted: bool, suppress: bool = False
    ) -> list[Any]:
        """Hand a batch to CTranslate2, and return its futures.

        :param limit: of the translations in tokens, EOS included (`_collect` adds EOS).
        :param shortlisted: allow only the target tokens of the shortlist.
        :param suppress: rule out PAD and BOS. CTranslate2 then computes other probabilities.
        """
        forbidden = [[self.target_vocabulary.id_to_piece(index)] for index in self._forbidden]
        topk = self.search.sampling_topk
        futures: list[Any] = self.model.translate_batch(
            [self._source_tokens(part.source) for part in parts],
            [self.target_vocabulary.id_to_piece(list(part.prefix)) for part in parts],
            asynchronous=True,
            beam_size=self.search.beam_size if topk is None else 1,
            num_hypotheses=self.search.beam_size,
            sampling_topk=1 if topk is None else topk,
            sampling_temperature=self.search.sampling_temperature,
            # At 0 CTranslate2 stops by another rule.
            length_penalty=self.search.length_penalty or 1e-9,
            no_repeat_ngram_size=self.search.no_repeat_ngram_size,
            suppress_sequences=forbidden if suppress else None,
            use_vmap=shortlisted,
            return_end_token=True,
            return_scores=True,
            max_input_length=0,
            min_decoding_length=0,
            max_decoding_length=max(1, limit - 1),
        )
        return futures

    def _submit_to_score(
        self, sources: list[list[int]], targets: list[list[int]], *, asynchronous: bool = False
    ) -> list[Any]:
        """Hand translations, with EOS, to CTranslate2, and return its results or futures."""
        scored: list[Any] = self.model.score_batch(
            [self._source_tokens(source) for source in sources],
            [self.target_vocabulary.id_to_piece(target[:-1]) for target in targets],
            max_input_length=0,
            asynchronous=asynchronous,
        )
        return scored

    def _collect(
        self,
        parts: list[Part],
        limit: int,
        futures: list[Any],
        *,
        shortlisted: bool = False,
        suppress: bool = False,
    ) -> list[list[Hypothesis]]:
        """Wait for a batch, and return its hypotheses.

        Three kinds of sentences are translated again, with all of the vocabulary. CTranslate2 has
        one length limit for the whole batch, so a translation may have gone beyond its own; one may
        hold PAD or BOS (a trained model's do not); and where the limit cuts one, or there is a
        prefix, it is scored as a whole, which CTranslate2 cannot do with a shortlist.
        """
        eos = self.target_vocabulary.eos_id()
        found = [self._hypotheses(future.result()) for future in futures]
        again = defaultdict(list)
        for row, hypotheses in enumerate(found):
            own_limit = self._length_limit(parts[row])
            late = own_limit < limit and max(len(h.tokens) for h in hypotheses) >= own_limit
            wrong = any(not self._forbidden.isdisjoint(h.tokens) for h in hypotheses)
            whole = parts[row].prefix or any(h.tokens[-1] != eos for h in hypotheses)
            if late or wrong or (shortlisted and whole):
                again[own_limit, suppress or wrong].append(row)
            else:
                found[row] = self._score_whole(parts[row], hypotheses)
        for (own_limit, suppressed), rows in again.items():
            some = [parts[row] for row in rows]
            futures = self._submit(some, own_limit, shortlisted=False, suppress=suppressed)
            better = self._collect(some, own_limit, futures, suppress=suppressed)
            for row, hypotheses in zip(rows, better, strict=True):
                found[row] = hypotheses
        return found

    def _hypotheses(self, result: Any) -> list[Hypothesis]:
        if any(score != score for score in result.scores):
            raise ModelError(DIVERGED)
        return [
            Hypothesis([self._ids[token] for token in tokens], score)
            for tokens, score in zip(result.hypotheses, result.scores, strict=True)
        ]

    def _score_whole(self, part: Part, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Add EOS to the hypotheses that the limit has cut, and score them, or with a prefix all of
        them, as a whole."""
        eos = self.target_vocabulary.eos_id()
        some = [h for h in hypotheses if part.prefix or h.tokens[-1] != eos]
        if not some:
            return hypotheses
        completed = [h.tokens if h.tokens[-1] == eos else [*h.tokens, eos] for h in some]
        scored = self._submit_to_score([part.source] * len(some), completed)
        for h, tokens, result in zip(some, completed, scored, strict=True):
            score = sum(result.log_probs) / len(tokens) ** self.search.length_penalty
            hypotheses[hypotheses.index(h)] = Hypothesis(tokens, score)
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Return the items in order, and ask for so many more before one is needed: they are being
    worked on meanwhile."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def tokens_of(vocabulary: SentencePieceProcessor) -> list[str]:
    """Return the tokens of a vocabulary as text, in the order of their ids."""
    tokens: list[str] = vocabulary.id_to_piece(list(range(vocabulary.get_piece_size())))
    return tokens
