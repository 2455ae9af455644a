"""Words are aligned as the model's attention says, of which the truth is known by construction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.text import normalise
from data_prep.vocabulary import load_vocabularies
from models.ringformer import RingDecoder, RingEncoder
from models.seq2seq import TranslationModel
from pipeline.recipe import UsageError
from pipeline.translation.alignment import (
    Link,
    align_pairs,
    align_translations,
    check_engine,
    pharaoh,
)
from pipeline.translation.run_model import untrained_model
from pipeline.translation.serving import Pair, Translation
from pipeline.translation.translator import Translator, load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.conftest import exported

SHARP = 50  # of attention


def looking_straight(model: TranslationModel) -> TranslationModel:
    """Have a model's position j look at position j of the source, at the middle one of three
    levels, and at what is least like that at the other two."""
    model.source_embed.weight.zero_()
    model.target_embed.weight.zero_()
    for stack in (model.encoder, model.decoder):
        assert isinstance(stack, RingEncoder | RingDecoder)
        assert stack.ffn_down is not None
        stack.self_attn_output.zero_()
        stack.ffn_down.zero_()
    decoder = model.decoder
    assert isinstance(decoder, RingDecoder)
    dim, heads = model.config.model_dim, model.config.num_heads
    first = torch.eye(dim // heads, dim)  # the dimensions in which positions differ most
    decoder.cross_attn_q.copy_(first.repeat(heads, 1) * SHARP)
    decoder.cross_attn_kv.copy_(first.repeat(heads, 1))
    decoder.cross_attn_output.zero_()
    for level in (0, 2):
        decoder.self_attn_layer_norm[level, 0] = -1
        decoder.cross_attn_layer_norm[level, 0] = -1
    return model


@pytest.fixture(scope="module")
def straight(prepared: TranslationRecipe) -> Translator:
    """Return a translator whose model aligns the tokens of two texts one by one."""
    with torch.no_grad():
        model = looking_straight(untrained_model(prepared))
    return Translator([model], load_vocabularies(prepared.shards), prepared.evaluation)


def straight_links(count: int) -> list[Link]:
    return [Link(i, i) for i in range(count)]


def test_words_are_those_of_the_line_as_it_is_given(straight: Translator) -> None:
    """Whatever becomes of its characters; the same text on both sides has the same tokens."""
    texts = [
        "Der Mann kauft ein Buch, das teuer ist.",
        "  Zwei \t Lehrerinnen\u00a0warten.  ",
        "H\u200bund 🙂 x🙂🙂y ﬁn Ärztin ½ ¨ u\u0308ber",  # a space, unknown and composed characters
        '„Haus", ... -- !',
        "Haus",
    ]
    for text, links in zip(texts, align_pairs(straight, [Pair(t, t) for t in texts]), strict=True):
        assert links == straight_links(len(text.split())), text
    assert len(normalise(texts[2]).split()) == len(texts[2].split()) + 1
    assert align_pairs(straight, []) == []
    for pair in (Pair("", "Haus"), Pair("Haus", ""), Pair("", "")):
        assert align_pairs(straight, [pair]) == [[]]


def test_punctuation_does_not_outvote_its_word(straight: Translator) -> None:
    """Token by token `a...` looks at `a`, and with its stops at the second word."""
    encode = straight.source_vocabulary.encode
    alone, joined = encode("a ...", out_type=str), encode("a...", out_type=str)
    assert alone[0] == joined[0] == "▁a"
    assert len(joined) > 2
    assert align_pairs(straight, [Pair("a ...", "a..."), Pair("a...", "a ...")]) == [
        [Link(0, 0)],
        [Link(0, 0), Link(0, 1)],
    ]


def test_a_link_does_not_depend_on_the_batch(talkative_run: TranslationRecipe) -> None:
    """Nor on whether the models of an ensemble are the same."""
    folder = exported(talkative_run, "safetensors")
    pairs = [Pair("Das ist ein Haus.", "This is a house."), Pair("Ja.", "Yes, it is, he said.")]
    pairs += [Pair("", "Yes."), Pair("Der Mann kauft ein Buch. " * 2, "No.")]
    together = align_pairs(Translator.of_exports([folder]), pairs)
    alone = Translator.of_exports([folder, folder], batch_tokens=1)
    assert together == align_pairs(alone, pairs)
    for pair, links in zip(pairs, together, strict=True):
        aligned = range(len(pair.target.split())) if pair.source else ()
        assert [link.target for link in links] == list(aligned)


def test_parts_are_aligned_each_by_itself(talkative_run: TranslationRecipe) -> None:
    """Also where a word is cut; words are counted along the line."""
    translator = load_exports(exported(talkative_run, "safetensors"))
    assert isinstance(translator, Translator)
    long = "Der Mann kauft ein Buch, und die Frau liest. Ja, das Haus ist sehr alt. " * 5
    word = "Haus" * 100
    lines = ["Nein.", long, "", word]
    found = [best[:2] for best in translator.n_best(lines)]
    assert [[len(one.found) > 1 for one in best] for best in found] == [
        [False, False], [True], [False], [True],
    ]  # fmt: skip
    links = align_translations(translator, lines, found)
    for best, of_line in zip(found, links, strict=True):
        for one, of_one in zip(best, of_line, strict=True):
            assert [link.target for link in of_one] == list(range(len(one.text.split())))
    assert links[2] == [[]]
    assert {link.source for link in links[3][0]} == {0}
    expected, source, target = [], 0, 0
    for part, hypothesis in found[1][0].found:
        alone = Translation(0, "", [(part, hypothesis)])
        ((of_part,),) = align_translations(translator, [part.text], [[alone]])
        expected += [Link(source + link.source, target + link.target) for link in of_part]
        source += len(part.text.split())
        target += len(of_part)
    assert links[1] == [expected]


def test_both_doors_print_alignments(
    talkative_run: TranslationRecipe, ctranslate2_folder: Path, command: Command
) -> None:
    folder = exported(talkative_run, "safetensors")
    model = ["--model", folder, "--alignment"]
    translator = load_exports(folder)
    assert isinstance(translator, Translator)
    typed = "Das Haus ist alt.\tThe house\n\tThe\nJa.\tYes\n"
    done = command("pipeline.translate", *model, "--prefix", "--n_best", 2, stdin=typed)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0", "0", "1", "2", "2"]
    assert rows[2] == ["1", "0.0000", "", ""]
    sentences = ["Das Haus ist alt.", "", "Ja."]
    found = [best[:2] for best in translator.n_best(sentences, prefixes=["The house", "", "Yes"])]
    links = align_translations(translator, sentences, found)
    assert [row[2:] for row in rows] == [
        [one.text, pharaoh(of_one)]
        for best, of_line in zip(found, links, strict=True)
        for one, of_one in zip(best, of_line, strict=True)
    ]

    pairs = [Pair("Das Haus ist alt.", "The house is old."), Pair("Ja.", "Yes.")]
    long = "Ein Haus. " * 40
    typed = f"{pairs[0].source}\t{pairs[0].target}\n\n{long}\tA house.\nJa.\tYes.\n"
    done = command("pipeline.score", *model, "--tokens", stdin=typed)
    assert done.returncode == 0, done.stderr
    first, empty, no_score, last = done.stdout.splitlines()
    assert (empty, no_score) == ("", "nan\t")
    of_pairs = [pharaoh(of_pair) for of_pair in align_pairs(translator, pairs)]
    assert [line.split("\t")[1] for line in (first, last)] == of_pairs
    assert last.split("\t")[-1].startswith("</s> ")

    refused = command(
        "pipeline.translate", "--model", ctranslate2_folder, "--alignment", stdin="Ja.\n"
    )
    assert refused.returncode == 2
    assert "--alignment reads the attention of a PyTorch model, which CTranslate2" in refused.stderr
    assert "take an export in format safetensors, or the run's checkpoints" in refused.stderr
    with pytest.raises(UsageError, match="which ONNX Runtime"):
        check_engine(load_exports(exported(talkative_run, "onnx")))
