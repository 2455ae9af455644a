"""Scores of translations by sacreBLEU: detokenised text against raw references."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU, BLEUScore

    Metrics = dict[str, Any]  # sacreBLEU's, by our names

RESAMPLES = 1000  # of every bootstrap, with sacreBLEU's seed: the same intervals each time
LENGTH_BUCKETS = (10, 20, 30, 40, 60)  # source tokens up to which one goes; the last has the rest
OVERLONG_CHARACTERS = 20  # by which a translation is more than twice its reference

References = Sequence[Sequence[str]]
"""Of one or more translators, each a line for every source sentence."""


def bleu(hypotheses: Sequence[str], references: References, target_lang: str) -> BLEUScore:
    score: BLEUScore = _bleu(target_lang).corpus_score(hypotheses, references)
    return score


def corpus_scores(
    hypotheses: Sequence[str], references: References, target_lang: str
) -> dict[str, Any]:
    """BLEU, chrF2 and TER, each with sacreBLEU's signature and half of its 95% confidence interval
    (`bleu`, `bleu_ci`, `bleu_signature`, …), and the `length_ratio` of translations to references.
    """
    found, signatures = _bootstrap([hypotheses], references, _metrics(target_lang))
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
    """How much better the hypotheses are than the baseline's, by sacreBLEU's paired bootstrap.

    :returns: for bleu, chrf and ter the `baseline`'s score, the `difference`, and the probability
        `p` of one as large if the systems were equally good.
    """
    found, _ = _bootstrap([baseline, hypotheses], references, _metrics(target_lang))
    return {
        name: {
            "baseline": round(before.score, 2),
            "difference": round(after.score - before.score, 2),
            "p": round(after.p_value, 4),
        }
        for name, (before, after) in found.items()
    }


def by_source_length(
    lengths: Sequence[int], hypotheses: Sequence[str], references: References, target_lang: str
) -> list[dict[str, Any]]:
    """BLEU of the sentences in each bucket of source length.

    :param lengths: of the sources, in tokens.
    """
    buckets = []
    edges = [-1, *LENGTH_BUCKETS, max([LENGTH_BUCKETS[-1], *lengths]) + 1]
    for above, upto in pairwise(edges):
        rows = [row for row, length in enumerate(lengths) if above < length <= upto]
        if rows:
            part = [[reference[row] for row in rows] for reference in references]
            some = [hypotheses[row] for row in rows]
            found, _ = _bootstrap([some], part, {"bleu": _bleu(target_lang)})
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
    """chrF2 of each sentence (BLEU says little of a single one)."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    rows = zip(hypotheses, zip(*references, strict=True), strict=True)
    return [round(chrf.sentence_score(hypothesis, row).score, 1) for hypothesis, row in rows]


def suspicious(
    sources: Sequence[str], hypotheses: Sequence[str], references: References
) -> dict[str, list[int]]:
    """Numbers (from 0) of the sentences that look wrong whatever they say.

    `copied`: the source again, which no reference has; `empty`: nothing, of a source with text;
    `overlong`: more than twice as long as the longest reference.
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
    """By metric: sacreBLEU's results of each system (score, ci, and p against the first); and the
    signature. (`corpus_score` can make intervals too, but not every TER's.)"""
    from sacrebleu.significance import PairedTest

    named = [(str(number), lines) for number, lines in enumerate(systems)]
    test: Any = PairedTest(named, metrics, references, "bs", RESAMPLES)
    signatures, results = test()
    del results["System"]  # their names; what is left is in the order of `metrics`
    return (
        dict(zip(metrics, results.values(), strict=True)),
        dict(zip(metrics, map(str, signatures.values()), strict=True)),
    )


def _metrics(target_lang: str) -> Metrics:
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    return {"bleu": _bleu(target_lang), "chrf": CHRF(), "ter": TER()}


def _bleu(target_lang: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(trg_lang=target_lang)
