"""Translate text with an export for CTranslate2 (`models/ctranslate2_spec.py`).

This file needs `ctranslate2`, `sentencepiece`, and of our other modules `serving.py` and what that
needs:

    CTranslate2Translator(Path("my-model")).translate(["Guten Morgen."])
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ctranslate2

from data_prep.text import seen_words
from models.export_format import DIVERGED, ModelError
from pipeline.translation.serving import (
    Hypothesis,
    PairIds,
    Part,
    TextTranslator,
    length_limit,
    open_export,
    thread_count,
    tokens_of,
)

T = TypeVar("T")


class CTranslate2Translator(TextTranslator):
    """Translates by CTranslate2's beam search on the CPU: a worker on each core has its own batch.

    The search is that of `pipeline/translation/search.py`, except for four things. Tokens that
    no_repeat_ngram_size forbids do not count in the probabilities of the others. Where more than
    beam_size hypotheses finish in the same step, the best of them are kept, not the first: the
    lower ranks of an n-best list may differ, the first rank does not. Where a limit leaves room for
    EOS alone, there is a token before it. And hypotheses that a limit cuts may take the places of
    some that have ended.

    What it draws depends on the seed, and on all that was drawn before.

    With a shortlist (`pipeline/translation/shortlist.py`) a sentence is translated by itself:
    CTranslate2 would allow to all sentences of a batch what one of them allows. Probabilities are
    those among the tokens allowed.
    """

    takes_terms = False

    def __init__(self, folder: Path, threads: int | None = None, **search: object) -> None:
        """Load the model.

        :param folder: written by `./run.sh export --format ctranslate2`.
        :param threads: None: as many as `thread_count` says.
        :param search: `evaluation` keys that differ from what the model was exported with.
        :raises ModelError: `folder` is no such folder.
        :raises TypeError: there is no such key.
        """
        settings, vocabularies, options = open_export(folder, "ctranslate2", search)
        self.seen_words = seen_words(folder)
        try:
            self.one_by_one = bool(options.shortlist)
            if self.one_by_one:  # which CTranslate2 has for a batch, and we for a sentence
                options = options.model_copy(update={"batch_tokens": 1})
            workers, intra_threads = threads or thread_count(), 1
            if options.sampling_topk is not None:  # one worker draws the same numbers every time
                workers, intra_threads = 1, workers
                ctranslate2.set_random_seed(options.sampling_seed % 2**32)
            self.model = ctranslate2.Translator(
                str(folder), inter_threads=workers, intra_threads=intra_threads
            )
            super().__init__(
                vocabularies,
                options,
                settings.max_source_tokens or settings.model.max_seq_len,
                f"CTranslate2 {self.model.compute_type}, {workers} worker(s) on the CPU"
                + ", sentence by sentence with a shortlist" * self.one_by_one,
            )
            self.max_target_tokens: int = settings.model.max_seq_len
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"{folder}: not an exported model: {error}") from error
        self.workers = workers
        self._forbidden = {self.target_vocabulary.pad_id(), self.target_vocabulary.bos_id()}
        self._tokens = tokens_of(self.source_vocabulary)
        self._ids = {token: i for i, token in enumerate(tokens_of(self.target_vocabulary))}

    def search_batches(self, batches: Iterable[list[Part]]) -> Iterator[list[list[Hypothesis]]]:
        """Translate batches in parallel, and return them in order; see `TextTranslator`."""

        def submitted() -> Iterator[tuple[list[Part], int, list[Any], bool]]:
            for parts in batches:
                limit = max(map(self._length_limit, parts))
                # CTranslate2 cannot begin with what a sentence's shortlist does not allow.
                shortlisted = self.one_by_one and not any(part.prefix for part in parts)
                yield parts, limit, self._submit(parts, limit, shortlisted=shortlisted), shortlisted

        for parts, limit, futures, shortlisted in ahead(submitted(), 2 * self.workers):
            yield self._collect(parts, limit, futures, shortlisted=shortlisted)

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
        if topk is not None and topk >= self.target_vocabulary.get_piece_size():
            topk = 0  # from all
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
        hold PAD or BOS (a trained model's do not); and where the limit cuts one, it is scored as a
        whole, which CTranslate2 cannot do with a shortlist.
        """
        eos = self.target_vocabulary.eos_id()
        found = [self._hypotheses(future.result()) for future in futures]
        again = defaultdict(list)
        for row, hypotheses in enumerate(found):
            own_limit = self._length_limit(parts[row])
            late = own_limit < limit and max(len(h.tokens) for h in hypotheses) >= own_limit
            wrong = any(not self._forbidden.isdisjoint(h.tokens) for h in hypotheses)
            cut = any(h.tokens[-1] != eos for h in hypotheses)
            if late or wrong or (shortlisted and cut):
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
