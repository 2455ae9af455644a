"""The toy corpus: reproducible, disjoint, well formed, and not to be had word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import sacrebleu

from data_prep.toy_corpus import MAX_WORDS, MIN_WORDS, Pair, generate, sentences

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 24_000, "valid": 500, "test": 1000}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    return generate(COUNTS, seed=1)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(islice(sentences(seed=2), 50_000))


def _digest(hash_seed: str, seed: int) -> str:
    code = (
        "import hashlib; from data_prep.toy_corpus import generate;"
        f"splits = generate({{'train': 500, 'test': 50}}, {seed});"
        "print(hashlib.sha256(repr(splits).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout


def test_same_seed_same_corpus_in_every_process() -> None:
    assert _digest("1", seed=7) == _digest("2", seed=7) != _digest("1", seed=8)


def test_splits_have_their_sizes_and_share_nothing(splits: dict[str, list[Pair]]) -> None:
    assert {name: len(split) for name, split in splits.items()} == COUNTS
    german = [pair[0] for split in splits.values() for pair in split]
    assert len(set(german)) == len(german)
    english = {name: {pair[1] for pair in split} for name, split in splits.items()}
    assert english["train"].isdisjoint(english["valid"] | english["test"])
    assert english["valid"].isdisjoint(english["test"])


def test_asking_for_too_much_is_a_readable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.toy_corpus.MAX_MISSES", 0)
    with pytest.raises(ValueError, match="of the 10000000 sentence pairs wanted for 'train'"):
        generate({"train": 10_000_000}, seed=1)


def test_negative_counts_and_no_counts() -> None:
    assert generate({}, seed=1) == {}
    with pytest.raises(ValueError, match="-1"):
        generate({"train": -1}, seed=1)


def test_one_german_sentence_has_one_english_one(pairs: list[Pair]) -> None:
    renderings: dict[str, str] = {}
    for german, english in pairs:
        assert renderings.setdefault(german, english) == english


def test_most_sentences_are_new(pairs: list[Pair]) -> None:
    assert len({german for german, _ in pairs}) > 0.95 * len(pairs)


def test_text_is_well_formed(pairs: list[Pair]) -> None:
    german_text = re.compile(r"[A-ZÄÖÜ][A-Za-zÄÖÜäöüß0-9,. ]*[a-zäöüß0-9][.?]")
    english_text = re.compile(r"[A-Z][A-Za-z0-9',\- ]*[a-z0-9'][.?]")
    broken = re.compile(r"  | [,.?]|,,|,\.|,[^ ]|\b([Dd]e|both|None)\b|([^\W\d]\. )")
    for german, english in pairs:
        assert german_text.fullmatch(german), german
        assert english_text.fullmatch(english), english
        assert not broken.search(german), german
        assert not broken.search(english), english
        assert german[-1] == english[-1]


def test_articles_and_agreement(pairs: list[Pair]) -> None:
    wrong_english = re.compile(
        r"\ba [aeiou]|\ban [^aeiou]|^(?:He|She|It) (?:have|are|do|were)\b"
        r"|^(?:I|You|We|They) (?:has|is|does)\b"
        r"|\b(?:does|did|do|will|can|could|should) not (?!need\b)\w+ed\b"
    )
    wrong_german = re.compile(
        r"\b(?:dem|den|des|einem|einer|meinem|diesem|diesen) "
        r"(?:alt|neu|klein|groß|klug|nett|jung|rot|kalt|warm|teur)(?:er|es|em|e) "
        r"|\b(?:ich|er) (?:haben|sind)\b|\bdu (?:hat|ist)\b|\b(?:wir) (?:hat|ist)\b"
        r"|(?<!, )\bvon dem [A-Z]"
    )
    for german, english in pairs:
        assert not wrong_english.search(english), english
        assert not wrong_german.search(german), german


# German and English pattern, one line per phenomenon; both must match the same pair.
PHENOMENA = {
    "masculine, feminine, neuter": (r"^(Der Mann|Die Frau|Das Kind) ", r"^The (man|woman|child) "),
    "accusative": (r"\beinen \w+en (Mantel|Brief|Tisch)\b", r"\ban? \w+ (coat|letter|table)\b"),
    "n-declension": (r"\bden (\w+en )?(Nachbarn|Studenten)\b", r"(neighbor|student)"),
    "dative plural": (r"\bden (Kindern|Männern|Ärzten)\b", r"the (children|men|doctors)"),
    "genitive": (r"\bdes (Nachbarn|Arztes)\b", r"the (neighbor|doctor)'s"),
    "strong ending": (r"\bkalten Kaffee\b", r"\bcold coffee\b"),
    "mixed ending": (r"\b[Ee]in kluger Mann\b", r"\b[Aa] clever man\b"),
    "weak ending": (r"\b[Dd]er kluge Mann\b", r"\b[Tt]he clever man\b"),
    "superlative": (r"\bälteste[nrs]? ", r"\boldest "),
    "comparative": (r"\b(größer|schwerer) als ", r"\b(bigger|heavier) than "),
    "more and most": (r"\bteurer als ", r"\bmore expensive than "),
    "inversion": (r"^Gestern (hat|haben) ", r"^Yesterday "),
    "fronted object": (r"^Den \w+ (hat|haben) (der|die|das) ", r"^The \w+ \w+ the "),
    "dass": (r", dass .* (hat|haben)\.", r" that "),
    "weil": (r", weil ", r" because "),
    "wenn, in front": (r"^Wenn .*, (wird|muss|kann|will) ", r"^If .*, "),
    "obwohl": (r", obwohl ", r" although "),
    "ob": (r"nicht, ob ", r"not know whether "),
    "relative, nominative": (r"^Der \w+, der .*,", r"^The \w+ who "),
    "relative, accusative": (r", den .* (hat|haben)\.", r" that "),
    "relative, dative": (r", (dem|der|denen) .* geholfen ", r" whom .* helped"),
    "relative, preposition": (r", auf (den|die|das) .* gewartet ", r" (that|whom) .* waited for"),
    "relative, genitive": (r", (dessen|deren) ", r" whose "),
    "separable, split": (r"^(Wann )?(kommt|ruft|lädt) .* (an|ein)[.?]", r"(arrive|call|invite)"),
    "separable, joined": (r"(, (wenn|dass|weil) .* (einlädt|anruft|abholt|aufsteht))", r"\w"),
    "separable participle": (r"\bangerufen\.", r"\bcalled\b"),
    "separable with zu": (r", .* einzuladen\.", r" to invite "),
    "particle behind a pronoun": (r"\b(mich|uns) .*abgeholt", r"\bpicked (me|us) up\b"),
    "modal": (r"\bmuss .* helfen\.", r"\bhas to help\b"),
    "modal, past": (r"\bwollte .* besuchen\.", r"\bwanted to visit\b"),
    "perfect with sein": (r"\b(ist|sind) .* gegangen\.", r"\bwent\b"),
    "future": (r"\bwird .* trinken\.", r"\bwill (often )?drink\b"),
    "passive": (r"\bwurde .* (von|vom) .* repariert\.", r"\bwas repaired\b.* by "),
    "kein": (r"\bkein(en)? \w+ gekauft\.", r"\bdid not buy an? "),
    "nicht": (r"\bnicht geholfen\.", r"\bdid not help\b"),
    "yes/no question": (r"^(Hat|Haben) .*\?", r"^Did .*\?"),
    "question word": (r"^Warum (hat|haben) ", r"^Why did "),
    "subject question": (r"^Wer hat ", r"^Who \w+"),
    "number": (r"\b(ein|zwei|drei)und(zwanzig|dreißig)\b", r"\b(twenty|thirty)-(one|two|three)\b"),
    "date": (r"\bam \d+\. Mai\b", r"\bon May \d+\b"),
    "time of day": (r"\bum halb vier\b", r"\bat half past three\b"),
    "year": (r"\bim Jahr (19|20)\d\d\b", r"\bin (19|20)\d\d\b"),
    "it for er": (r"\w+en .*, (aber|weil|obwohl) .*\b(er|ihn)\b", r"\bit\b"),
    "its owner": (r"^Anna hat ihren? \w+ ", r"^Anna \w+ her "),
    "their": (r"^Die Kinder haben ihren? \w+ ", r"^The children \w+ their "),
    "gern": (r"\bgern\b", r"\blikes? to\b"),
    "gefallen": (r"^Dem \w+ gefällt ", r"^The \w+ likes "),
    "compound": (r"\bHaustürschlüssel\b", r"\bfront door key\b"),
    "two-way preposition": (r"\bauf den Tisch (gelegt|gestellt)\.", r"\bput .* on the table\."),
    "um zu": (r", um .* zu ", r" to "),
    "there is": (r"\b[Ee]s gibt ", r"\b[Tt]here (is|are) "),
}


@pytest.mark.parametrize("name", PHENOMENA)
def test_phenomenon_occurs(name: str, pairs: list[Pair]) -> None:
    german, english = (re.compile(pattern) for pattern in PHENOMENA[name])
    assert any(german.search(pair[0]) and english.search(pair[1]) for pair in pairs)


# Whoever says the first must say the second.
GOLDEN = {
    r"Sie haben vergessen, [\w ]+ auszuschalten\.": r"They forgot to turn off [\w' ]+\.",
    r"Sie hat vergessen, [\w ]+ zu lesen\.": r"She forgot to read [\w' ]+\.",
    r"[\w ]+ schwerer als mein \w+\.": r"[\w' ]+ heavier than my [\w ]+\.",
    r"Er hat den \w+ \w+\.": r"He [\w ]+ the [\w ]+\.",
    r"Mir gefällt das \w+\.": r"I like the [\w ]+\.",
    r"Ihm gefällt die \w+ nicht\.": r"He does not like the [\w ]+\.",
    r"Wo hat er [\w ]+\?": r"Where did he [\w' ]+\?",
    r"Auf dem Tisch liegt eine \w+\.": r"There is an? [\w ]+ on the table\.",
    r"Den \w+ hat sie [\w ]+\.": r"She [\w' ]+ the [\w' ]+\.",
}


@pytest.mark.parametrize("german", GOLDEN)
def test_golden_sentences(german: str, pairs: list[Pair]) -> None:
    found = [english for text, english in pairs if re.fullmatch(german, text)]
    assert found
    assert all(re.fullmatch(GOLDEN[german], english) for english in found), found


def test_lengths_and_vocabulary(splits: dict[str, list[Pair]]) -> None:
    lengths = [len(text.split()) for pair in splits["train"] for text in pair]
    assert MIN_WORDS <= min(lengths) and max(lengths) <= MAX_WORDS
    assert 7 < sum(lengths) / len(lengths) < 11
    words = {w for _, text in splits["train"] for w in re.findall(r"[a-z]+", text.lower())}
    assert 250 < len(words) < 500


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+(?:-\w+)*|[^\w\s]", text)


def test_word_for_word_translation_scores_low(splits: dict[str, list[Pair]]) -> None:
    """The best that a dictionary can do: each word's partner by the Dice coefficient."""
    german_count, english_count, together = Counter[str](), Counter[str](), Counter[Pair]()
    for german, english in splits["train"]:
        source, target = set(_tokens(german)), set(_tokens(english))
        german_count.update(source)
        english_count.update(target)
        together.update((s, t) for s in source for t in target)
    best: dict[str, tuple[float, str]] = {}
    for (s, t), count in together.items():
        best[s] = max(best.get(s, (0.0, s)), (2 * count / (german_count[s] + english_count[t]), t))
    hypotheses, references = [], []
    for german, english in splits["test"][:500]:
        hypotheses.append(" ".join(best[s][1] if s in best else s for s in _tokens(german)))
        references.append(" ".join(_tokens(english)))
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="none", force=True).score
    assert 5 < bleu < 35
