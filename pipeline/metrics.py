"""Scores of translations."""

from __future__ import annotations

from collections.abc import Sequence


def score(
    hypotheses: Sequence[str], references: Sequence[str], target_lang: str
) -> dict[str, float | str]:
    """BLEU and chrF of detokenised text against raw references, with sacreBLEU's signatures."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU(trg_lang=target_lang)), ("chrf", CHRF())):
        scores[name] = round(metric.corpus_score(hypotheses, [references]).score, 2)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
