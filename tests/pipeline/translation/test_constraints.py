"""Translations have every term that they must have, whatever the model would rather say."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.files import DataError
from data_prep.text import EOS_IDX
from models.export_format import Format, ModelError
from models.search_config import SearchConfig
from pipeline.publishing.exports import export
from pipeline.recipe import UsageError
from pipeline.translation.beam_search import force
from pipeline.translation.constrained_search import Terms, Tokens
from pipeline.translation.glossary import Glossary, read_entries
from pipeline.translation.serving import TextTranslator
from pipeline.translation.translator import load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.conftest import exported
from tests.pipeline.translation.searches import translate
from tests.pipeline.translation.test_beam_search import SOURCES, VOCAB, model_of, set_bias

BREAKS = np.arange(VOCAB) % 3 == 0  # of made-up tokens; EOS is one
GLOSSARY = (
    "\ufeffHaus\thouse\r\n"
    "Mann\tgentleman\n"
    "\n"
    "  der  Mann \tthe man\n"
    "E-Mail\telectronic mail\n"
    "Mann\tgentleman\n"
    "Ja\tYes, indeed.\n"
)
LONG = "Der Mann kauft ein Haus und der Mann liest " * 4


def holds(tokens: list[int], terms: list[Tokens]) -> bool:
    """Tell whether tokens have all terms, each in a place of its own that ends a word."""
    return not terms or any(
        tuple(tokens[begin : begin + len(term)]) == term
        and BREAKS[tokens[begin + len(term)]]
        and holds(tokens[begin + len(term) :], terms[:i] + terms[i + 1 :])
        for begin in range(len(tokens))
        for i, term in enumerate(terms)
    )


def some_terms(rng: random.Random) -> list[Tokens]:
    """Return terms that begin alike, or hold each other, or are there twice."""
    terms = [
        (rng.randrange(6, VOCAB, 3), *(rng.randrange(4, 12) for _ in range(rng.randint(0, 3))))
        for _ in range(rng.randint(1, 3))
    ]
    return [*terms, *rng.choice([[], [terms[0]], [(*terms[0], 6, 7)]])]


@pytest.mark.parametrize("seed", range(5))
def test_every_hypothesis_has_all_terms(seed: int) -> None:
    """Whatever limits its length or its repetitions; and a batch changes nothing."""
    rng = random.Random(seed)
    model = model_of(seed=seed)
    set_bias(model, EOS_IDX, rng.choice([-2, 2, 5, 8]))
    search = SearchConfig(
        beam_size=rng.choice([1, 2, 4]),
        no_repeat_ngram_size=rng.choice([0, 1, 2]),
        length_penalty=rng.choice([0, 0.8, 1]),
        max_length_ratio=rng.choice([0.5, 1.5]),
        max_length_offset=rng.choice([0, 20]),
    )
    required = [some_terms(rng) for _ in SOURCES]
    terms = [Terms(each, BREAKS) for each in required]
    prefixes = [[], [7, 8], [9, 4, 4, 4], [9], required[4][0]]
    found = translate([model], SOURCES, search, prefixes, (), terms)
    for i, hypotheses in enumerate(found):
        assert 1 <= len(hypotheses) <= search.beam_size
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        for tokens in (h.tokens for h in hypotheses):
            assert holds(tokens, required[i])
            assert tokens[: len(prefixes[i])] == list(prefixes[i])
            assert tokens.index(EOS_IDX) == len(tokens) - 1
        values = force([model], ([SOURCES[i]] * len(hypotheses), [h.tokens for h in hypotheses]))
        scores = [sum(row) / len(row) ** search.length_penalty for row in values]
        assert [h.score for h in hypotheses] == pytest.approx(scores, rel=1e-4, abs=1e-4)
        assert scores == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
        one = translate([model], SOURCES[i : i + 1], search, prefixes[i : i + 1], (), [terms[i]])
        assert [h.tokens for h in one[0]] == [h.tokens for h in hypotheses]


def test_what_is_said_anyway_costs_next_to_nothing() -> None:
    model, search = model_of(), SearchConfig(beam_size=3)
    set_bias(model, EOS_IDX, 3)
    free = [hypotheses[0] for hypotheses in translate(model, SOURCES, search)]
    long = [i for i, hypothesis in enumerate(free) if len(hypothesis.tokens) > 3]
    everywhere = np.ones(VOCAB, np.bool_)
    terms = [Terms([tuple(free[i].tokens[1:3])], everywhere) for i in long]
    found = translate(model, [SOURCES[i] for i in long], search, (), (), terms)
    for i, hypotheses in zip(long, found, strict=True):
        assert hypotheses[0].score > free[i].score - 0.01
    assert len(long) > 2


def glossary_of(text: str, folder: Path, translator: TextTranslator) -> Glossary:
    """Return a glossary with that content."""
    path = folder / "terms.tsv"
    path.write_text(text, encoding="utf-8", newline="")
    return Glossary(path, read_entries(path), translator)


def missing(translator: TextTranslator, glossary: Glossary, sentence: str, text: str) -> list[str]:
    """Return the terms that are not in a translation, as whole words and as often as required."""
    decode = translator.target_vocabulary.decode
    wanted = Counter(decode(list(m.target)) for m in glossary.find(" ".join(sentence.split())))
    absent = []
    for term, count in sorted(wanted.items(), key=lambda item: -len(item[0])):
        text, found = re.subn(rf"(?<!\S){re.escape(term)}(?!\w)", "|", text)
        absent += [term] * (count - found)
    return absent


def test_where_terms_are_found(talkative_run: TranslationRecipe, tmp_path: Path) -> None:
    translator = load_exports(exported(talkative_run, "safetensors"))
    glossary = glossary_of(GLOSSARY, tmp_path, translator)

    def found(text: str) -> list[str]:
        decode = translator.target_vocabulary.decode
        return [decode(list(match.target)) for match in glossary.find(text)]

    assert found("Das Haus, Haus-Tür (Haus)") == ["house"] * 3
    assert found("Hausmann Haustür haus HAUS Häuser Haus2 Hau\u0308s Haus\u0301") == []
    assert found("der Mann sah den Mann, der Mann war") == ["the man", "gentleman", "the man"]
    assert found("E-Mail E - Mail E-Mails mE-Mail") == ["electronic mail"]
    assert found("") == []


@pytest.mark.parametrize(
    ("format", "shortlist"), [("safetensors", None), ("onnx", False), ("onnx", True)]
)
def test_translations_have_the_terms_of_their_sentences(
    format: Format,
    shortlist: bool | None,
    talkative_run: TranslationRecipe,
    sentences: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a shortlist does not allow them."""
    monkeypatch.setattr("pipeline.publishing.shortlist.LARGE_VOCABULARY", 0)
    evaluation = talkative_run.evaluation.model_copy(update={"shortlist": shortlist})
    recipe = talkative_run.model_copy(update={"evaluation": evaluation})
    export(recipe, tmp_path / "model", format)
    translator = load_exports(tmp_path / "model")
    assert ("shortlist" in translator.backend) == bool(shortlist)
    glossary = glossary_of(GLOSSARY, tmp_path, translator)
    lines = [
        *sentences,
        "Der Mann und der Mann: Haus, Haus, Haus.",
        LONG,
        "Nein.",
        "Ja, Ja. E-Mail",
    ]
    bound, free = (translator.n_best(lines, glossary=each) for each in (glossary, None))
    count = 0
    for line, best, before in zip(lines, bound, free, strict=True):
        assert [missing(translator, glossary, line, one.text) for one in best] == [[]] * len(best)
        count += any(missing(translator, glossary, line, one.text) for one in before)
        if not glossary.find(" ".join(line.split())):
            assert [one.text for one in best] == [one.text for one in before]
    assert count > 4
    assert len(bound[-3][0].found) > 1  # in parts
    order = list(range(len(lines)))[::-1]
    again = translator.n_best([lines[i] for i in order], glossary=glossary)
    assert [[one.text for one in again[i]] for i in order] == [
        [one.text for one in best] for best in bound
    ]


def test_the_door_takes_a_glossary(
    talkative_run: TranslationRecipe,
    ctranslate2_folder: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    folder = exported(talkative_run, "safetensors")
    translator = load_exports(folder)
    glossary = glossary_of(GLOSSARY, tmp_path, translator)
    path = tmp_path / "terms.tsv"
    model = ["--model", folder, "--constraints", path, "--prefix", "--alignment"]
    texts = ["Das Haus ist alt.\tA house", "", "Ja.", "Nein."]
    done = command("pipeline.translate", *model, "--n_best", 2, stdin="\n".join(texts))
    assert done.returncode == 0, done.stderr
    assert f"translate: {path}: 5 terms" in done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list("0012233")
    sentences, prefixes = [text.split("\t")[0] for text in texts], ["A house", "", "", ""]
    expected = translator.n_best(sentences, lambda count: None, 1, prefixes, glossary)
    assert [row[2] for row in rows] == [one.text for best in expected for one in best[:2]]
    for number, _, text, links in rows:
        sentence = sentences[int(number)]
        assert missing(translator, glossary, sentence, text) == []
        assert len(links.split()) == len(text.split())
    assert all(row[2].startswith("A house") for row in rows[:2])

    many = "Ja " * 20 + "Ja"  # more than a translation can have
    done = command("pipeline.translate", *model[:4], stdin=f"Nein.\n{many}\n")
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)
    assert re.search(
        r"stdin:2: the terms have \d+ tokens, and the model can produce 96", done.stderr
    )
    with pytest.raises(ModelError, match=r"line 7: the prefix and the terms have \d+ tokens"):
        translator.n_best([many], first_line=7, prefixes=["The"], glossary=glossary)

    other = ["--model", ctranslate2_folder, "--constraints", path]
    done = command("pipeline.translate", *other, stdin="Ja.\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--constraints: CTranslate2 float32" in done.stderr
    assert "cannot search for given terms; take an export in format safetensors or" in done.stderr
    drawing = load_exports(folder, sampling_topk=3)
    with pytest.raises(UsageError, match=r"leave evaluation\.sampling_topk out"):
        glossary_of(GLOSSARY, tmp_path, drawing)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Haus\thouse\nMann man\n", "terms.tsv:2: expected a term, one tab, and what"),
        (b"Haus\thouse\tbuilding\n", "terms.tsv:1: expected a term, one tab, and what"),
        (b"Haus\thouse\n \thouse\n", "terms.tsv:2: the source term is empty"),
        (b"Haus\t \n", "terms.tsv:1: the target term is empty"),
        (b"Haus\thouse\n\nHaus \thome\n", '"Haus" is "home" here, and "house" in line 1'),
        (b"Haus\thouse\nMann\tm\xffn\n", "terms.tsv:2: not valid UTF-8"),
        (
            "Haus\thouse\nKatze\t猫\n".encode(),
            'terms.tsv:2: the target vocabulary does not know "猫"',
        ),
        (b"Haus\t" + b"house " * 60, "terms.tsv:1: the target term has "),
    ],
)
def test_a_glossary_that_is_wrong(
    content: bytes, said: str, talkative_run: TranslationRecipe,
    tmp_path: Path,
) -> None:  # fmt: skip
    translator = load_exports(exported(talkative_run, "onnx"))
    path = tmp_path / "terms.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)):
        Glossary(path, read_entries(path), translator)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match=f"--constraints {missing}: cannot be read: .+"):
            read_entries(missing)
