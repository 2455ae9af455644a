"""Text goes in and comes out, translated by a model of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

from data_prep.identity import write_identity
from data_prep.text import BOS_IDX, EOS_IDX, PAD_IDX, UNK_IDX
from data_prep.vocabulary import load_vocabularies
from pipeline.checkpoints.weights import checkpoints_to_average
from pipeline.publishing.exports import export
from pipeline.recipe_file import load_recipe
from pipeline.translation.run_model import untrained_model
from pipeline.translation.translator import Translator, load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import save_checkpoint

SENTENCES = [
    "Der Mann kauft ein Buch.",
    "",
    "Die Kinder, die im Garten spielen, haben den Hund gesehen.",
    "Ja.",
    "   ",
    "Die Frau kauft ein Haus.",
]


@pytest.fixture(scope="module")
def recipe(prepared: TranslationRecipe) -> TranslationRecipe:
    return prepared


def translator(recipe: TranslationRecipe, **search: object) -> Translator:
    """Return a translator with an untrained model and these search keys."""
    vocabularies = load_vocabularies(recipe.run_dir / "shards")
    model = untrained_model(recipe).eval()
    with torch.no_grad():  # sharper than at initialisation, so that ties are out of the question
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return Translator([model], vocabularies, recipe.evaluation.model_copy(update=search))


def greedy(translator: Translator, sentence: str) -> str:
    """Translate one sentence by the likeliest token each time, without a cache."""
    source = torch.tensor([translator.source_vocabulary.encode(sentence, add_eos=True)])
    search = translator.search
    limit = int(search.max_length_ratio * source.size(1) + search.max_length_offset)
    output = [BOS_IDX]
    while len(output) < limit and output[-1] != EOS_IDX:
        with torch.no_grad():
            logits = translator.models[0].logits(source, torch.tensor([output]))[0, -1]
        logits[[PAD_IDX, BOS_IDX]] = -torch.inf  # never produced
        output.append(int(logits.argmax()))
    return " ".join(translator.target_vocabulary.decode(output[1:]).split())


def test_beam_1_is_uncached_argmax(recipe: TranslationRecipe) -> None:
    one = translator(recipe, beam_size=1)
    for sentence, translation in zip(SENTENCES, one.translate(SENTENCES), strict=True):
        expected = greedy(one, sentence) if sentence.strip() else ""
        assert translation == expected


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_translation_does_not_depend_on_its_neighbours(
    recipe: TranslationRecipe, beam_size: int
) -> None:
    beam = translator(recipe, beam_size=beam_size)
    together = beam.translate(SENTENCES)
    assert together == [beam.translate([sentence])[0] for sentence in SENTENCES]
    assert together == translator(recipe, beam_size=beam_size, batch_tokens=1).translate(SENTENCES)


def test_progress_counts_every_sentence(recipe: TranslationRecipe) -> None:
    counts: list[int] = []
    translator(recipe).translate(SENTENCES, counts.append)
    assert sum(counts) == len(SENTENCES)


def test_an_export_keeps_the_vocabulary_of_each_side(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    keys = {"run_dir": str(tmp_path / "run"), "evaluation.beam_size": "1"}
    keys |= {"data.vocabulary.joint": "false", "model.tied_embeddings": "false"}
    recipe = load_recipe(tiny_recipe, list(keys.items()))
    shards = recipe.run_dir / "shards"
    sizes = {"source": 150, "target": 120}
    shutil.copytree(prepared.shards, shards, ignore=lambda _, names: {"spm.model"})
    write_identity(recipe.data, {}, {}, recipe.run_dir)
    for (side, size), language in zip(sizes.items(), recipe.data.languages, strict=True):
        SentencePieceTrainer.train(
            input=str(prepared.run_dir / "clean" / f"valid.{language}"),
            model_prefix=str(shards / f"spm.{side}"),
            model_type="bpe",
            vocab_size=size,
            pad_id=PAD_IDX,
            unk_id=UNK_IDX,
            bos_id=BOS_IDX,
            eos_id=EOS_IDX,
            minloglevel=2,
        )
    trained = translator(recipe)
    save_checkpoint(trained.models[0], recipe)

    export(recipe, tmp_path / "export")
    exported = load_exports(tmp_path / "export")
    assert isinstance(exported, Translator)
    (model,) = exported.models
    assert [model.source_embed.num_embeddings, model.final_proj.weight.size(0)] == [150, 120]
    expected = [greedy(trained, sentence) if sentence.strip() else "" for sentence in SENTENCES]
    assert exported.translate(SENTENCES) == expected
    of_run = Translator.of_run(recipe, checkpoints_to_average(recipe))
    assert of_run.translate(SENTENCES) == expected

    export(recipe, tmp_path / "theirs", "huggingface")
    theirs = tmp_path / "theirs"
    tokenizer = AutoTokenizer.from_pretrained(theirs)  # type: ignore[no-untyped-call]
    source, target = of_run.source_vocabulary, of_run.target_vocabulary
    assert tokenizer(SENTENCES).input_ids == source.encode(SENTENCES, add_eos=True)
    tokens = target.encode("They read.", add_bos=True, add_eos=True)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "They read."
