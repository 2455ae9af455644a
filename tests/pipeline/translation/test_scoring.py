"""How likely translations are: the same as the training loss, with every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.export_format import Format
from pipeline.checkpoints.weights import checkpoints_to_average
from pipeline.translation.batches import collate_ids
from pipeline.translation.serving import Forced, Pair, TextTranslator
from pipeline.translation.translator import Translator, load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import exported

PAIRS = [
    Pair("Ja.", "Yes."),
    Pair("Er  hat gesagt, dass die Kinder ein Buch lesen.", "The old teacher said so."),
    Pair("Das Haus ist 1,5 km weit weg.", ""),
    Pair("", "The house."),
    Pair("Der Mann kauft ein Buch.", "The man buys a book. 🙂 " * 3),
]


def total(forced: Forced | None) -> float:
    assert forced is not None
    return forced.log_prob


@pytest.fixture(scope="module")
def losses(talkative_run: TranslationRecipe) -> list[float]:
    """Return what the training loss says of each pair by itself."""
    of_run = Translator.of_run(talkative_run, checkpoints_to_average(talkative_run))
    found = []
    for source, target in PAIRS:
        text = " ".join(source.split()), " ".join(target.split())
        sides = zip((of_run.source_vocabulary, of_run.target_vocabulary), text, strict=True)
        ids: list[list[int]] = [each.encode(side, add_eos=True) for each, side in sides]
        batch = collate_ids(ids[:1], ids[1:], torch.device("cpu"))
        found.append(float(of_run.models[0](*batch).detach()))
    return found


@pytest.mark.parametrize("format", [None, "safetensors", "ctranslate2", "onnx"])
def test_a_score_is_the_training_loss(
    format: Format | None, talkative_run: TranslationRecipe, losses: list[float]
) -> None:
    """Whatever a pair is batched with."""

    def translator(**search: Any) -> TextTranslator:
        if format is not None:
            return load_exports(exported(talkative_run, format), **search)
        checkpoints = checkpoints_to_average(talkative_run)
        keys = talkative_run.evaluation.model_copy(update=search)
        return Translator.of_run(talkative_run.model_copy(update={"evaluation": keys}), checkpoints)

    counts: list[int] = []
    together = translator().score(PAIRS, counts.append)
    assert sum(counts) == len(PAIRS)
    assert [total(each) for each in together] == pytest.approx([-loss for loss in losses], rel=1e-5)
    alone = translator(batch_tokens=1).score(PAIRS)
    for one, other in zip(together, alone, strict=True):
        assert one is not None
        assert other is not None
        assert one.tokens == other.tokens
        assert one.log_probs == pytest.approx(other.log_probs, rel=1e-5, abs=1e-4)
        assert one.tokens[-1] == "</s>"
        assert len(one.tokens) == len(one.log_probs)
