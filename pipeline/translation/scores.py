"""Scores of translations by sacreBLEU: detokenised text against raw references."""

# Functions import sacrebleu themselves: a command that scores nothing need not wait for it.

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data_prep.bleu import bleu_metric, sacrebleu_language

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEUScore

    Metrics = dict[str, Any]  # our name of a metric → sacreBLEU's metric

RESAMPLES = 1000  # of every bootstrap; sacreBLEU's seed makes the intervals the same each time
LENGTH_BUCKETS = (10, 20, 30, 40, 60)  # upper bounds in source tokens; one more bucket is open
OVERLONG_CHARACTERS = 20  # what a translation may have beyond twice the length of its reference

References = Sequence[Sequence[str]]
"""The references of one or more translators, each with a line for every source sentence."""


def bleu(hypotheses: Sequence[str], references: References, target_lang: str) -> BLEUScore:
    """Return the BLEU of a corpus, without a confidence interval.

    :param target_lang: chooses sacreBLEU's tokeniser.
    """
    score: BLEUScore = bleu_metric(target_lang).corpus_score(hypotheses, references)
    return score


def corpus_scores(
    hypotheses: Sequence[str], references: References, target_lang: str
) -> dict[str, Any]:
    """Return BLEU, chrF2 and TER of a corpus.

    :returns: for each of bleu, chrf and ter the score, half of its 95% confidence interval, and
        sacreBLEU's signature (`bleu`, `bleu_ci`, `bleu_signature`, …); and the `length_ratio` of
        translations to references.
    """
    found, signatures = _bootstrap([hypotheses], references, _all_metrics(target_lang))
    scores: dict[str, Any] = {}
    for name, (result,) in found.items():
        scores[name] = round(result.score, 2)
        scores[f"{name}_ci"] = round(float(result.ci), 2)
        scores[f"{name}_signature"] = signatures[name]
    ratio = bleu(hypotheses, references, target_lang).ratio
    return {**scores, "length_ratio": round(ratio, 3)}


def paired_bootstrap(
    baseline: Sequence[str],
    hypotheses: Sequence[str],
    references: References,
    target_lang: str,
) -> dict[str, dict[str, float]]:
    """Compare hypotheses with a baseline's by sacreBLEU's paired bootstrap.

    :returns: for bleu, chrf and ter the `baseline`'s score, the `difference` to it, and the
        probability `p` of a difference as large if the systems were equally good.
    """
    found, _ = _bootstrap([baseline, hypotheses], references, _all_metrics(target_lang))
    return {
        name: {
            "baseline": round(before.score, 2),
            "difference": round(after.score - before.score, 2),
            # Of equal systems sacreBLEU says 0.001: it counts differences that are larger than 0.
            "p": 1.0 if after.score == before.score else round(after.p_value, 4),
        }
        for name, (before, after) in found.items()
    }


def by_source_length(
    lengths: Sequence[int], hypotheses: Sequence[str], references: References, target_lang: str
) -> list[dict[str, Any]]:
    """Return the BLEU of the sentences in each bucket of source length, shortest first.

    :param lengths: of the sources, in tokens.
    :returns: for each bucket that has sentences `source_tokens` (its range as text), `sentences`
        (how many), `bleu` and `bleu_ci`.
    """
    buckets = []
    edges = [-1, *LENGTH_BUCKETS, max([LENGTH_BUCKETS[-1], *lengths]) + 1]
    for above, upto in pairwise(edges):
        rows = [row for row, length in enumerate(lengths) if above < length <= upto]
        if rows:
            part = [[reference[row] for row in rows] for reference in references]
            some = [hypotheses[row] for row in rows]
            found, _ = _bootstrap([some], part, {"bleu": bleu_metric(target_lang)})
            (result,) = found["bleu"]
            name = f"{max(above, 0) + 1}–{upto}" if upto in LENGTH_BUCKETS else f"> {above}"
            buckets.append(
                {
                    "source_tokens": name,
                    "sentences": len(rows),
                    "bleu": round(result.score, 2),
                    "bleu_ci": round(float(result.ci), 2),
                }
            )
    return buckets


def sentence_scores(hypotheses: Sequence[str], references: References) -> list[float]:
    """Return the chrF2 of each sentence (BLEU says little about a single one)."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    rows = zip(hypotheses, zip(*references, strict=True), strict=True)
    return [round(chrf.sentence_score(hypothesis, row).score, 1) for hypothesis, row in rows]


def suspicious(
    sources: Sequence[str], hypotheses: Sequence[str], references: References
) -> dict[str, list[int]]:
    """Find translations that look wrong without knowing the language.

    :returns: row numbers, from 0, by what is wrong. `copied`: the translation is its source, and no
        reference is; `empty`: a source with text has no translation; `overlong`: the translation is
        more than twice as long as the longest reference.
    """
    found: dict[str, list[int]] = {"copied": [], "empty": [], "overlong": []}
    columns = zip(sources, hypotheses, zip(*references, strict=True), strict=True)
    for row, (source, hypothesis, right) in enumerate(columns):
        source, hypothesis = source.strip(), hypothesis.strip()
        right = tuple(reference.strip() for reference in right)
        if source and not hypothesis:
            found["empty"].append(row)
        elif hypothesis and hypothesis == source and hypothesis not in right:
            found["copied"].append(row)
        elif len(hypothesis) > 2 * max(map(len, right)) + OVERLONG_CHARACTERS:
            found["overlong"].append(row)
    return found


def _bootstrap(
    systems: Sequence[Sequence[str]], references: References, metrics: Metrics
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Score systems with sacreBLEU's paired bootstrap.

    (`corpus_score` can compute confidence intervals too, though not for every TER.)

    :returns: by metric, sacreBLEU's result of each system (score, ci, and p against the first); and
        by metric, the signature.
    """
    from sacrebleu.significance import PairedTest

    named = [(str(number), lines) for number, lines in enumerate(systems)]
    test: Any = PairedTest(named, metrics, references, "bs", RESAMPLES)
    signatures, results = test()
    del results["System"]  # the systems' names; the other columns are in the order of `metrics`
    return (
        dict(zip(metrics, results.values(), strict=True)),
        dict(zip(metrics, map(str, signatures.values()), strict=True)),
    )


def _all_metrics(target_lang: str) -> Metrics:
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    asian = sacrebleu_language(target_lang) in ("zh", "ja")  # where TER sets characters apart
    ter = TER(normalized=True, asian_support=True) if asian else TER()
    return {"bleu": bleu_metric(target_lang), "chrf": CHRF(), "ter": ter}
