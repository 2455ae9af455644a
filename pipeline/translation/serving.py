"""Text in, text out, and a folder that `./run.sh export --format ctranslate2` wrote.

This file needs `ctranslate2` and `sentencepiece` and nothing else of ours:

    CTranslate2Translator(Path("my-model")).translate(["Guten Morgen."])
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import ctranslate2
from sentencepiece import SentencePieceProcessor

if TYPE_CHECKING:  # where this file is served there is no recipe
    from pipeline.recipe import SearchConfig

log = logging.getLogger("translate")

SETTINGS = "export.json"  # beside the weights, in every format
DIVERGED = "The model's output is not a number; its training has diverged"
VOCABULARIES = (("spm.model",), ("spm.source.model", "spm.target.model"))
# Where a line may be cut, the best places first; last of all anywhere.
BREAKS = [
    re.compile(r"[.!?…]['\"”“»«’)\]]*\s+|[。！？]+"),  # a sentence ends
    re.compile(r"[,;:)–—]\s+|[、，；：]"),
    re.compile(r"\s+"),
]


class ModelError(Exception):
    """A folder is not an exported model, or the model gives no usable probabilities."""


@dataclass(frozen=True)
class Hypothesis:
    """A translation of one sentence."""

    tokens: list[int]
    """With EOS, without BOS."""

    score: float
    """Log-probability ÷ tokens to the power of the length penalty."""


def length_limit(source_length: int, search: SearchConfig, longest: int) -> int:
    """Longest translation in tokens, EOS included; a function of its own source only.

    :param longest: that the model can produce.
    """
    wanted = int(search.max_length_ratio * source_length + search.max_length_offset)
    return max(1, min(wanted, longest))


def batches(lengths: Mapping[int, int], search: SearchConfig) -> Iterator[list[int]]:
    """Keys of `lengths` (source tokens), the longest first, in batches of similar length.

    As many go together as `batch_tokens` allows.
    """
    batch: list[int] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (len(batch) + 1) * longest * search.beam_size > search.batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def split(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Cut `text` in halves, and those again, until every part fits.

    It is cut at the end of a sentence, else after a comma or the like, else at a space, else
    anywhere; of several such places at the one nearest to the middle.
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
    return [*split(text[:cut], fits), *split(text[cut:], fits)]


class TextTranslator(ABC):
    """Translates sentences, whatever searches for the translations."""

    def __init__(
        self,
        vocabularies: tuple[SentencePieceProcessor, SentencePieceProcessor],
        search: SearchConfig,
        max_source_tokens: int,
        backend: str,
    ) -> None:
        """
        :param max_source_tokens: EOS included; longer lines are translated in parts.
        :param backend: what translates and where, for people.
        """
        self.source_vocabulary, self.target_vocabulary = vocabularies
        self.search, self.max_source_tokens, self.backend = search, max_source_tokens, backend

    @abstractmethod
    def search_batches(
        self, batches: Iterable[list[list[int]]]
    ) -> Iterator[Sequence[Sequence[Hypothesis]]]:
        """Translate batches of token ids with EOS, in their order.

        :returns: at most `beam_size` hypotheses of each sentence, best first.
        """

    def translate(
        self,
        sentences: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
        first_line: int = 1,
    ) -> list[str]:
        """Translate sentences; an empty one gives an empty one.

        :param progress: called with the number of sentences just finished.
        :param first_line: number of the first sentence, in warnings.
        """
        return [best[0][1] for best in self.n_best(sentences, progress, first_line)]

    def n_best(
        self,
        sentences: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
        first_line: int = 1,
    ) -> list[list[tuple[float, str]]]:
        """Up to beam_size (score, translation) of each sentence, best first.

        A sentence that was too long has one: the best of its parts, one after the other.
        """
        parts, of_sentence = self._encode(sentences, first_line)
        found: list[Sequence[Hypothesis]] = [[] for _ in parts]
        owner = [index for index, own in enumerate(of_sentence) for _ in own]
        left = [len(own) for own in of_sentence]
        progress(left.count(0))
        order = list(batches({index: len(ids) for index, ids in enumerate(parts)}, self.search))
        results = self.search_batches([parts[index] for index in batch] for batch in order)
        for batch, result in zip(order, results, strict=True):
            for index, hypotheses in zip(batch, result, strict=True):
                found[index] = hypotheses
                left[owner[index]] -= 1
            progress(sum(left[index] == 0 for index in {owner[index] for index in batch}))
        return [self._texts([found[index] for index in own]) for own in of_sentence]

    def _encode(
        self, sentences: Sequence[str], first_line: int
    ) -> tuple[list[list[int]], list[range]]:
        """Token ids of all parts, and which of them are a sentence's: none if it is empty."""
        encode, limit = self.source_vocabulary.encode, self.max_source_tokens
        parts: list[list[int]] = []
        of_sentence = []
        for number, ids in enumerate(encode(list(sentences), add_eos=True)):
            begin = len(parts)
            if len(ids) <= limit:
                own = [ids]
            else:
                texts = split(sentences[number], lambda text: len(encode(text)) < limit)
                own = encode(texts, add_eos=True)
                log.warning(
                    "line %d: %d tokens, more than the %d that the model takes; "
                    "translated in %d parts", first_line + number, len(ids), limit, len(own),
                )  # fmt: skip
            parts += [ids for ids in own if len(ids) > 1]  # else only EOS
            of_sentence.append(range(begin, len(parts)))
        return parts, of_sentence

    def _texts(self, parts: Sequence[Sequence[Hypothesis]]) -> list[tuple[float, str]]:
        """:param parts: the hypotheses of each part of a sentence."""
        if len(parts) == 1:
            return [(h.score, self._text(h)) for h in parts[0]]
        best = [hypotheses[0] for hypotheses in parts]
        penalty = self.search.length_penalty
        total = sum(h.score * len(h.tokens) ** penalty for h in best)
        length = max(1, sum(len(h.tokens) for h in best))
        return [(total / length**penalty, " ".join(filter(None, map(self._text, best))))]

    def _text(self, hypothesis: Hypothesis) -> str:
        # Byte fallback can spell a line break; one line in is one line out.
        return " ".join(self.target_vocabulary.decode(hypothesis.tokens).split())


def read_settings(folder: Path) -> dict[str, Any]:
    """What `./run.sh export` wrote beside the weights.

    :raises ModelError: it wrote nothing here.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not an exported model: {error}") from error
    if not isinstance(settings, dict) or "format" not in settings:
        raise ModelError(f"{folder}: not an exported model: {SETTINGS} names no format")
    return settings


def threads() -> int:
    """OMP_NUM_THREADS, or all cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


class CTranslate2Translator(TextTranslator):
    """Beam search by CTranslate2 on the CPU: a worker for each core, each with its own batch.

    The search is that of `pipeline/search.py`, but for two things. What no_repeat_ngram_size
    forbids does not count in the probabilities of the rest. And where more than beam_size
    hypotheses have finished at once, the best are kept and not the first: the lower ranks of an
    n-best list may differ, its first may not.
    """

    def __init__(self, folder: Path, **search: object) -> None:
        """
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: it is not such a folder.
        :raises TypeError: there is no such key.
        """
        settings = read_settings(folder)
        try:
            if settings["format"] != "ctranslate2":
                raise ModelError(f"{folder}: not a CTranslate2 model but {settings['format']}")
            if unknown := search.keys() - settings["evaluation"].keys():
                raise TypeError(f"no such search option: {', '.join(sorted(unknown))}")
            names = VOCABULARIES[not (folder / VOCABULARIES[0][0]).exists()]
            files = [SentencePieceProcessor(model_file=str(folder / name)) for name in names]
            workers = threads()
            self.model = ctranslate2.Translator(str(folder), inter_threads=workers, intra_threads=1)
            super().__init__(
                (files[0], files[-1]),
                cast("SearchConfig", SimpleNamespace(**{**settings["evaluation"], **search})),
                settings["max_source_tokens"],
                f"CTranslate2 {self.model.compute_type}, {workers} worker(s) on the CPU",
            )
            self.max_target_tokens: int = settings["model"]["max_seq_len"]
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        self.workers = workers
        self._never = {self.target_vocabulary.pad_id(), self.target_vocabulary.bos_id()}
        self._tokens = tokens_of(self.source_vocabulary)
        self._ids = {token: i for i, token in enumerate(tokens_of(self.target_vocabulary))}

    def search_batches(
        self, batches: Iterable[list[list[int]]]
    ) -> Iterator[list[list[Hypothesis]]]:
        """See `TextTranslator`; later batches are at work while one is awaited."""
        waiting: deque[tuple[list[list[int]], int, list[Any]]] = deque()
        for sources in batches:
            limit = max(map(self._limit, sources))
            waiting.append((sources, limit, self._start(sources, limit)))
            if len(waiting) > 2 * self.workers:
                yield self._finish(*waiting.popleft())
        while waiting:
            yield self._finish(*waiting.popleft())

    def _limit(self, source: list[int]) -> int:
        return length_limit(len(source), self.search, self.max_target_tokens)

    def _spell(self, source: list[int]) -> list[str]:
        return [self._tokens[token] for token in source[:-1]]  # CTranslate2 adds EOS

    def _start(self, sources: list[list[int]], limit: int, *, suppress: bool = False) -> list[Any]:
        """
        :param limit: of the translations, EOS included, which is added in `_finish`.
        :param suppress: PAD and BOS, with which CTranslate2 computes other probabilities.
        """
        never = [[self.target_vocabulary.id_to_piece(index)] for index in self._never]
        futures: list[Any] = self.model.translate_batch(
            [self._spell(source) for source in sources],
            asynchronous=True,
            beam_size=self.search.beam_size,
            num_hypotheses=self.search.beam_size,
            # At 0 another rule would say when to stop.
            length_penalty=self.search.length_penalty or 1e-9,
            no_repeat_ngram_size=self.search.no_repeat_ngram_size,
            suppress_sequences=never if suppress else None,
            return_end_token=True,
            return_scores=True,
            max_input_length=0,
            min_decoding_length=0,
            max_decoding_length=max(1, limit - 1),
        )
        return futures

    def _finish(
        self, sources: list[list[int]], limit: int, futures: list[Any], *, suppress: bool = False
    ) -> list[list[Hypothesis]]:
        """What may have gone beyond its own limit (CTranslate2 has one for a batch), or has PAD or
        BOS in it (a trained model's has not), begins again."""
        found = [self._hypotheses(future.result()) for future in futures]
        again = defaultdict(list)
        for row, hypotheses in enumerate(found):
            own = self._limit(sources[row])
            late = own < limit and max(len(h.tokens) for h in hypotheses) >= own
            wrong = any(not self._never.isdisjoint(h.tokens) for h in hypotheses)
            if late or wrong:
                again[own, suppress or wrong].append(row)
            else:
                found[row] = self._end(sources[row], hypotheses)
        for (own, never), rows in again.items():
            some = [sources[row] for row in rows]
            started = self._start(some, own, suppress=never)
            better = self._finish(some, own, started, suppress=never)
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

    def _end(self, source: list[int], hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """EOS on those that the limit has cut, with the score of the whole."""
        eos = self.target_vocabulary.eos_id()
        cut = [h for h in hypotheses if h.tokens[-1] != eos]
        if not cut:
            return hypotheses
        target = [[self.target_vocabulary.id_to_piece(token) for token in h.tokens] for h in cut]
        scored = self.model.score_batch(
            [self._spell(source)] * len(cut), target, max_input_length=0
        )
        for h, result in zip(cut, scored, strict=True):
            tokens = [*h.tokens, eos]
            score = sum(result.log_probs) / len(tokens) ** self.search.length_penalty
            hypotheses[hypotheses.index(h)] = Hypothesis(tokens, score)
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)


def tokens_of(vocabulary: SentencePieceProcessor) -> list[str]:
    """Return the tokens of a vocabulary as text, in the order of their ids."""
    tokens: list[str] = vocabulary.id_to_piece(list(range(vocabulary.get_piece_size())))
    return tokens
