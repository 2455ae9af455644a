"""Scores of translations: detokenised text against raw references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU, BLEUScore


def bleu(hypotheses: Sequence[str], references: Sequence[str], target_lang: str) -> BLEUScore:
    found: BLEUScore = _bleu(target_lang).corpus_score(hypotheses, [references])
    return found


def score(
    hypotheses: Sequence[str], references: Sequence[str], target_lang: str
) -> dict[str, float | str]:
    """BLEU and chrF with sacreBLEU's signatures."""
    from sacrebleu.metrics.chrf import CHRF

    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", _bleu(target_lang)), ("chrf", CHRF())):
        scores[name] = round(metric.corpus_score(hypotheses, [references]).score, 2)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def _bleu(target_lang: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(trg_lang=target_lang)
