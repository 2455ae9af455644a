"""How words change: noun phrases by case and number, verbs by mode and person, numbers."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from data_prep.toy_corpus import lexicon as lex
from data_prep.toy_corpus.lexicon import Det, Noun, Pair, Verb

NOM, ACC, DAT, GEN = range(4)

# Case endings, nominative to genitive, by gender ("p": plural).
DER = {
    "m": ("der", "den", "dem", "des"),
    "f": ("die", "die", "der", "der"),
    "n": ("das", "das", "dem", "des"),
    "p": ("die", "die", "den", "der"),
}
DIESER = {
    "m": ("er", "en", "em", "es"),
    "f": ("e", "e", "er", "er"),
    "n": ("es", "es", "em", "es"),
    "p": ("e", "e", "en", "er"),
}
EIN = {**DIESER, "m": ("", "en", "em", "es"), "n": ("", "", "em", "es")}
STRONG = {**DIESER, "m": ("er", "en", "em", "en"), "n": ("es", "es", "em", "en")}
WEAK = {
    "m": ("e", "en", "en", "en"),
    "f": ("e", "e", "en", "en"),
    "n": ("e", "e", "en", "en"),
    "p": ("en", "en", "en", "en"),
}
RELATIVE = {**DER, "p": ("die", "die", "denen", "deren")}

# Finite forms for ich, du, er/sie/es, wir, ihr, sie. Most keys are also names of modes.
PARADIGM = {
    name: tuple(forms.split())
    for name, forms in {
        "sein": "bin bist ist sind seid sind",
        "war": "war warst war waren wart waren",
        "haben": "habe hast hat haben habt haben",
        "mögen": "mag magst mag mögen mögt mögen",
        "wissen": "weiß weißt weiß wissen wisst wissen",
        "passive": "wurde wurdest wurde wurden wurdet wurden",
        "werden": "werde wirst wird werden werdet werden",
        "können": "kann kannst kann können könnt können",
        "konnte": "konnte konntest konnte konnten konntet konnten",
        "sollen": "soll sollst soll sollen sollt sollen",
        "möchte": "möchte möchtest möchte möchten möchtet möchten",
        "müssen": "muss musst muss müssen müsst müssen",
        "musste": "musste musstest musste mussten musstet mussten",
        "wollen": "will willst will wollen wollt wollen",
        "wollte": "wollte wolltest wollte wollten wolltet wollten",
    }.items()
}
BE = ("am", "are", "is", "are", "are", "are")
WAS = ("was", "were", "was", "were", "were", "were")
# English modals that are operators themselves, with what follows them before the base form ...
OPERATORS = {
    "werden": ("will", ""),
    "können": ("can", ""),
    "konnte": ("could", ""),
    "sollen": ("should", ""),
    "möchte": ("would", "like to"),
}
# ... and German modals that are ordinary verbs in English, so that they need "do".
LEXICAL_MODALS = {
    "müssen": ("have", "has", ""),
    "musste": ("have", "", "had"),
    "wollen": ("want", "wants", ""),
    "wollte": ("want", "", "wanted"),
}


class NP(NamedTuple):
    """A noun phrase is in both languages, with all that agreement and word order ask about it."""

    de: tuple[str, ...]  # by case
    en: str
    en_object: str
    who: int  # 0-5: ich, du, er/sie/es, wir, ihr, sie
    gender: str  # m, f, n, p: the German pronoun
    sex: str  # the same for the English one
    form: str  # "pronoun", "definite" or "indefinite"
    kind: str = "adult"


def _pronoun(de: str, en: str, who: int, gender: str = "", sex: str = "") -> NP:
    subject, obj = en.split()
    return NP(tuple(de.split()), subject, obj, who, gender, sex or gender, "pronoun")


SPEAKERS = (
    _pronoun("ich mich mir", "I me", 0),
    _pronoun("du dich dir", "you you", 1),
    _pronoun("wir uns uns", "we us", 3),
    _pronoun("ihr euch euch", "you you", 4),
)
GERMAN_PRONOUN = {"m": "er ihn ihm", "f": "sie sie ihr", "n": "es es ihm", "p": "sie sie ihnen"}
ENGLISH_PRONOUN = {"m": "he him", "f": "she her", "n": "it it", "p": "they them"}
HE, SHE, THEY = (
    _pronoun(GERMAN_PRONOUN[g], ENGLISH_PRONOUN[g], who, g)
    for g, who in (("m", 2), ("f", 2), ("p", 5))
)
NAMES = [
    NP((name,) * 3, name, name, 2, sex, sex, "definite")
    for sex, names in lex.NAMES.items()
    for name in names
]


def couple(first: NP, second: NP) -> NP:
    """Return two people with names as one noun phrase: Anna und Peter."""
    english = f"{first.en} and {second.en}"
    return NP((f"{first.en} und {second.en}",) * 3, english, english, 5, "p", "p", "definite")


def pronoun_for(np: NP) -> NP:
    """Return the pronoun, by grammatical gender in German (Tisch: er), by natural in English."""
    if np.form == "pronoun":
        return np
    german, english = GERMAN_PRONOUN[np.gender], ENGLISH_PRONOUN[np.sex]
    return _pronoun(german, english, np.who, np.gender, np.sex)._replace(kind=np.kind)


def own(np: NP) -> Det:
    """Return the possessive that points back to this subject."""
    if np.who == 2:
        german = "ihr" if np.gender == "f" else "sein"
        return {"m": lex.HIS, "f": lex.HER, "n": lex.ITS}[np.sex]._replace(stem=german)
    return (lex.MY, lex.YOUR, lex.HIS, lex.OUR, lex.YOUR_PL, lex.THEIR)[np.who]


def _determiner(det: Det, gender: str, case: int) -> tuple[str, bool]:
    """Return the determiner, and whether it shows the case itself."""
    if det.family == "der":
        return DER[gender][case], True
    if not det.family:
        return det.stem, False
    ending = (EIN if det.family == "ein" else DIESER)[gender][case]
    stem = "eur" if det.stem == "euer" and ending else det.stem
    return stem + ending, bool(ending)


@cache
def noun_phrase(det: Det, adjective: Pair | None, noun: Noun, plural: bool = False) -> NP:
    mass = noun.pl == "-"
    plural = plural and not mass
    if det is lex.A and (plural or mass):
        det = lex.BARE
    gender = "p" if plural else noun.gender
    n_declension = noun.gender == "m" and noun.gen == noun.pl
    german = []
    for case in (NOM, ACC, DAT, GEN):
        word = noun.gen if case == GEN or (n_declension and case != NOM) else noun.sg
        if plural:
            word = noun.pl + ("n" if case == DAT and noun.pl[-1] not in "ns" else "")
        article, shows_case = _determiner(det, gender, case)
        # The adjective takes the ending that shows the case only if the determiner does not.
        ending = (WEAK if shows_case else STRONG)[gender][case]
        german.append(join(article, adjective[0] + ending if adjective else "", word))
    article = det.en_pl if plural or (mass and det is lex.NO) else det.en
    phrase = join(adjective[1] if adjective else "", noun.en_pl if plural else noun.en)
    if article == "a" and phrase[0] in "aeiou":
        article = "an"
    english = join(article, phrase)
    form = "indefinite" if det.family == "" or det in (lex.A, lex.NO) else "definite"
    return NP(
        tuple(german),
        english,
        english,
        5 if plural else 2,
        gender,
        "p" if plural else noun.sex,
        form,
        noun.kind,
    )


def possessed(owner: NP, noun: Noun, adjective: Pair | None) -> NP:
    """Make phrases such as das neue Auto des alten Lehrers, the old teacher's new car."""
    english = f"{owner.en}'s"
    if owner in NAMES:
        name = Det(owner.en + "s", "", english, english)
        return noun_phrase(name, adjective, noun)._replace(form="definite")
    np = noun_phrase(lex.THE, adjective, noun)
    german, english = tuple(f"{form} {owner.de[GEN]}" for form in np.de), english + np.en[3:]
    return np._replace(de=german, en=english, en_object=english)


def number(n: int) -> Pair:
    """Return a number in words: einundzwanzig, twenty-one."""
    if n < 20:
        return lex.UNITS[n]
    (tens, en_tens), (unit, en_unit) = lex.TENS[n // 10], lex.UNITS[n % 10]
    return (f"{unit}und{tens}", f"{en_tens}-{en_unit}") if unit else (tens, en_tens)


def join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _present(verb: Verb) -> tuple[str, ...]:
    if verb.stem in PARADIGM:
        return PARADIGM[verb.stem]
    third, stem = verb.third, verb.stem[:-2]
    second = third if third[-2] in "sßz" else third[:-1] + "st"
    plural = stem + ("et" if stem[-1] in "td" else "t")
    return (stem + "e", second, third, verb.stem, plural, verb.stem)


@cache
def german_verb(verb: Verb, mode: str, who: int) -> tuple[str, str, str]:
    """Return the finite verb, what ends the clause, and both where they meet there."""
    if mode in ("pres", "now"):
        finite = _present(verb)[who]
        return finite, verb.prefix, verb.prefix + finite
    if mode == "past" and verb.stem == "sein":
        return PARADIGM["war"][who], "", PARADIGM["war"][who]
    finite = PARADIGM[verb.auxiliary if mode == "past" else mode][who]
    tail = verb.participle if mode in ("past", "passive") else verb.prefix + verb.stem
    return finite, tail, f"{tail} {finite}"


@cache
def english_verb(verb: Verb, mode: str, who: int) -> tuple[str, str, str]:
    """Return operator, the verb behind it, and the finite form for both unless "do" is due."""
    base, past, participle = verb.en
    if mode == "passive":
        return WAS[who], participle, ""
    if mode == "now":
        return BE[who], join(lex.with_ing(base), verb.rest), ""
    if mode in OPERATORS:
        operator, link = OPERATORS[mode]
        return operator, join(link, base, verb.rest), ""
    if base == "be":
        return (BE if mode == "pres" else WAS)[who], "", ""
    rest, third = verb.rest, lex.with_s(base)
    if mode in LEXICAL_MODALS:
        rest = join("to", base, rest)
        base, third, past = LEXICAL_MODALS[mode]
    if mode in ("past", "musste", "wollte"):
        return "did", join(base, rest), join(past, rest)
    if who == 2:
        return "does", join(base, rest), join(third, rest)
    return "do", join(base, rest), join(base, rest)
