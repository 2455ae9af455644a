"""Beam search and text in and out, with a model of random weights."""

from __future__ import annotations

import pytest
import torch

from data_prep.vocabulary import BOS_IDX, EOS_IDX, PAD_IDX, load_vocabulary
from pipeline.config import Recipe
from pipeline.translator import Translator, untrained_model

SENTENCES = [
    "Der Mann kauft ein Buch.",
    "",
    "Die Kinder, die im Garten spielen, haben den Hund gesehen.",
    "Ja.",
    "   ",
    "Die Frau kauft ein Haus.",
]


@pytest.fixture(scope="module")
def recipe(prepared: Recipe) -> Recipe:
    return prepared


def translator(recipe: Recipe, **search: object) -> Translator:
    vocabulary = load_vocabulary(recipe.run_dir / "shards" / "spm.model")
    model = untrained_model(recipe).eval()
    with torch.no_grad():  # sharper than at initialisation, so that ties are out of the question
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return Translator(model, vocabulary, recipe.evaluation.model_copy(update=search))


def greedy(translator: Translator, sentence: str) -> str:
    """Argmax decoding without a cache, one sentence at a time."""
    source = torch.tensor([translator.vocabulary.encode(sentence, add_eos=True)])
    search = translator.search
    limit = int(search.max_length_ratio * source.size(1) + search.max_length_offset)
    output = [BOS_IDX]
    while len(output) < limit and output[-1] != EOS_IDX:
        with torch.no_grad():
            logits = translator.model.logits(source, torch.tensor([output]))[0, -1]
        logits[[PAD_IDX, BOS_IDX]] = -torch.inf  # never produced
        output.append(int(logits.argmax()))
    return " ".join(translator.vocabulary.decode(output[1:]).split())


def test_beam_1_is_uncached_argmax(recipe: Recipe) -> None:
    one = translator(recipe, beam_size=1)
    for sentence, translation in zip(SENTENCES, one.translate(SENTENCES), strict=True):
        expected = greedy(one, sentence) if sentence.strip() else ""
        assert translation == expected


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_translation_does_not_depend_on_its_neighbours(recipe: Recipe, beam_size: int) -> None:
    beam = translator(recipe, beam_size=beam_size)
    together = beam.translate(SENTENCES)
    assert together == [beam.translate([sentence])[0] for sentence in SENTENCES]
    assert together == translator(recipe, beam_size=beam_size, batch_tokens=1).translate(SENTENCES)


def test_progress_counts_every_sentence(recipe: Recipe) -> None:
    counts: list[int] = []
    translator(recipe).translate(SENTENCES, counts.append)
    assert sum(counts) == len(SENTENCES)


def test_an_overlong_sentence_is_cut_with_a_warning(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    (translation,) = translator(recipe).translate(["Der Mann kauft ein Buch. " * 50])
    assert "was cut to" in caplog.text
    assert "\n" not in translation
