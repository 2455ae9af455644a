"""A small German-English grammar that writes the quickstart's parallel corpus.

A clause is put together once, as a subject, a verb, a mode and a list of parts, and then spoken
twice: German orders the parts by rank between the two halves of its verb, English lines them up
behind a verb that may need "do". English is a function of the German: where a word such as "sie"
could mean several things, only one of them is ever built, or the sentence itself decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

Pair = tuple[str, str]
MIN_WORDS, MAX_WORDS = 4, 22
MAX_MISSES = 20_000  # this many sentences without a new one: the grammar has run dry
NOM, ACC, DAT, GEN = range(4)

# --- Lexicon -------------------------------------------------------------------------------------
# Nouns by kind: gender, singular, genitive, plural ("-": mass noun), English singular/plural, and
# a last letter where natural gender differs from grammatical gender.
NOUN_TABLE = {
    "adult": "m Mann Mannes Männer man/men, f Frau Frau Frauen woman/women, m Arzt Arztes Ärzte"
    " doctor, f Ärztin Ärztin Ärztinnen doctor, m Lehrer Lehrers Lehrer teacher,"
    " f Lehrerin Lehrerin Lehrerinnen teacher, m Nachbar Nachbarn Nachbarn neighbor,"
    " m Student Studenten Studenten student",
    "child": "n Kind Kindes Kinder child/children, m Junge Jungen Jungen boy,"
    " n Mädchen Mädchens Mädchen girl f",
    "kin": "m Vater Vaters Väter father, f Mutter Mutter Mütter mother, m Bruder Bruders Brüder"
    " brother, f Schwester Schwester Schwestern sister, m Freund Freundes Freunde friend,"
    " f Freundin Freundin Freundinnen friend",
    "drink": "m Kaffee Kaffees - coffee, m Tee Tees - tea, f Milch Milch - milk,"
    " n Wasser Wassers - water, m Orangensaft Orangensafts - orange_juice",
    "food": "m Apfel Apfels Äpfel apple, m Kuchen Kuchens Kuchen cake, n Brot Brotes - bread,"
    " n Ei Eis Eier egg, m Apfelkuchen Apfelkuchens Apfelkuchen apple_cake",
    "text": "n Buch Buches Bücher book, m Brief Briefes Briefe letter,"
    " f Geschichte Geschichte Geschichten story",
    "paper": "f Zeitung Zeitung Zeitungen newspaper",
    "clothes": "m Mantel Mantels Mäntel coat, m Hut Hutes Hüte hat, n Kleid Kleides Kleider"
    " dress/dresses, f Jacke Jacke Jacken jacket",
    "small": "m Schlüssel Schlüssels Schlüssel key, f Tasche Tasche Taschen bag,"
    " m Regenschirm Regenschirms Regenschirme umbrella,"
    " m Haustürschlüssel Haustürschlüssels Haustürschlüssel front_door_key,"
    " f Kaffeetasse Kaffeetasse Kaffeetassen coffee_cup",
    "vehicle": "n Auto Autos Autos car, n Fahrrad Fahrrads Fahrräder bicycle",
    "transit": "m Zug Zuges Züge train, m Bus Busses Busse bus/buses",
    "device": "f Lampe Lampe Lampen lamp, m Computer Computers Computer computer,"
    " n Radio Radios Radios radio, f Waschmaschine Waschmaschine Waschmaschinen washing_machine",
    "furniture": "m Tisch Tisches Tische table, m Stuhl Stuhls Stühle chair, n Bett Bettes Betten"
    " bed, m Küchentisch Küchentischs Küchentische kitchen_table",
    "opening": "f Tür Tür Türen door, n Fenster Fensters Fenster window,"
    " f Haustür Haustür Haustüren front_door",
    "room": "f Küche Küche Küchen kitchen, n Schlafzimmer Schlafzimmers Schlafzimmer bedroom,"
    " n Zimmer Zimmers Zimmer room",
    "building": "n Haus Hauses Häuser house, f Schule Schule Schulen school",
    "event": "n Konzert Konzerts Konzerte concert, f Reise Reise Reisen trip",
}
PEOPLE = ("adult", "child", "kin")

# Adjectives by the kinds they fit: German positive (with "/stem" if it changes before an ending),
# comparative, superlative stem; English positive/comparative ("more ..." if none is given).
ADJECTIVE_TABLE = {
    "adult kin child": "klug klüger klügst clever/cleverer, nett netter nettest nice/nicer,"
    " müde/müd müder - tired, glücklich glücklicher glücklichst happy/happier",
    "adult kin": "jung jünger jüngst young/younger, alt älter ältest old/older,"
    " reich reicher reichst rich/richer, berühmt berühmter berühmtest famous",
    "drink food": "kalt kälter - cold/colder, warm wärmer - warm/warmer,"
    " gut besser best good/better",
    "text paper": "kurz kürzer kürzest short/shorter, lang länger längst long/longer,"
    " interessant interessanter interessantest interesting, gut besser best good/better/best",
    "event": "lang länger längst long/longer, teuer/teur teurer teuerst expensive,"
    " schön schöner schönst beautiful",
    "clothes small vehicle device furniture": "alt älter ältest old/older, neu neuer neuest"
    " new/newer, klein kleiner kleinst small/smaller, schwer schwerer schwerst heavy/heavier,"
    " teuer/teur teurer teuerst expensive, rot - - red, blau - - blue, schwarz - - black,"
    " schön schöner schönst beautiful",
    "opening room building": "alt älter ältest old/older, groß größer größt big/bigger,"
    " klein kleiner kleinst small/smaller, dunkel/dunkl dunkler dunkelst dark/darker,"
    " neu neuer neuest new/newer, schön schöner schönst beautiful",
}

# Verbs: infinitive ("|" parts a separable prefix), er-form, participle ("ist:" if with sein);
# English base/past/participle, words that stay behind it ("~": behind a pronoun object only);
# frame and kinds of object; flags. Frames: A, D, DA objects by case, a preposition with its case,
# go/trip/from directions. Flags: = stative, + enjoyed, 1 not a habit, ! not done on purpose,
# r reflexive, @ may name a place, m may name a companion, f may name a beneficiary.
VERB_TABLE = """
kaufen kauft gekauft; buy/bought; A food drink text clothes vehicle device furniture; 1f
verkaufen verkauft verkauft; sell/sold; A vehicle device furniture clothes; 1
lesen liest gelesen; read/read; A text paper; +@
schreiben schreibt geschrieben; write/wrote/written; A text; +@
trinken trinkt getrunken; drink/drank/drunk; A drink; +@m
essen isst gegessen; eat/ate/eaten; A food; +@m
suchen sucht gesucht; look for; A text clothes small kin; @
finden findet gefunden; find/found; A text clothes small; 1!@
verlieren verliert verloren; lose/lost; A clothes small; 1!@
vergessen vergisst vergessen; forget/forgot/forgotten; A clothes small text; 1!
reparieren repariert repariert; repair; A vehicle device furniture opening; 1f
waschen wäscht gewaschen; wash; A clothes vehicle;
putzen putzt geputzt; clean; A room opening; f
besuchen besucht besucht; visit; A adult child kin; +m
brauchen braucht gebraucht; need; A small drink clothes vehicle furniture; =
verstehen versteht verstanden; understand/understood; A adult child kin text; =
sehen sieht gesehen; see/saw/seen; A adult child kin building; 1!@
bauen baut gebaut; build/built; A building furniture; 1f
tragen trägt getragen; wear/wore/worn; A clothes; +
an|rufen ruft angerufen; call; A adult kin; m
ab|holen holt abgeholt; pick ~up; A adult child kin; m
ein|laden lädt eingeladen; invite; A adult child kin; +
auf|machen macht aufgemacht; open; A opening; f
zu|machen macht zugemacht; close; A opening;
ein|schalten schaltet eingeschaltet; turn ~on; A device;
aus|schalten schaltet ausgeschaltet; turn ~off; A device;
weg|werfen wirft weggeworfen; throw/threw/thrown ~away; A paper text clothes; 1
auf|räumen räumt aufgeräumt; tidy; A room; m
an|ziehen zieht angezogen; put/put ~on; A clothes;
helfen hilft geholfen; help; D adult child kin; +@
vertrauen vertraut vertraut; trust; D adult child kin; =
zu|hören hört zugehört; listen to; D adult child kin; +
geben gibt gegeben; give/gave/given; DA text small food; @
zeigen zeigt gezeigt; show/showed/shown; DA text clothes room vehicle;
bringen bringt gebracht; bring/brought; DA drink food paper;
warten wartet gewartet; wait for; auf:acc adult child kin transit; @m
denken denkt gedacht; think/thought of; an:acc adult child kin event;
sprechen spricht gesprochen; speak/spoke/spoken to; mit:dat adult child kin; +@
träumen träumt geträumt; dream of; von:dat building vehicle event; !
freuen freut gefreut; look forward to; auf:acc event; =r
schlafen schläft geschlafen; sleep/slept; -; @
arbeiten arbeitet gearbeitet; work; -; +@m
tanzen tanzt getanzt; dance; -; +@m
wohnen wohnt gewohnt; live; in:city; =m
gehen geht ist:gegangen; go/went/gone; go; +m
fahren fährt ist:gefahren; travel; trip; +m
fliegen fliegt ist:geflogen; fly/flew/flown; trip; +m
zurück|kommen kommt ist:zurückgekommen; come/came/come back; from; 1m
auf|stehen steht ist:aufgestanden; get/got up; -;
ein|schlafen schläft ist:eingeschlafen; fall/fell asleep; -; !@
"""
# Verbs that only certain sentences use: (German, English, frame, flags) as above.
SPECIAL_TABLE = """
sein ist ist:gewesen; be; -; =
an|kommen kommt ist:angekommen; arrive; -;
ab|fahren fährt ist:abgefahren; leave/left; -;
gefallen gefällt gefallen; like; -; =
gehören gehört gehört; belong to; -; =
liegen liegt gelegen; be; -; =
stehen steht gestanden; be; -; =
legen legt gelegt; put/put; -;
stellen stellt gestellt; put/put; -;
kosten kostet gekostet; cost/cost; -; =
wissen weiß gewusst; know/knew; -; =
glauben glaubt geglaubt; believe; -; =
hoffen hofft gehofft; hope; -; =
sagen sagt gesagt; say/said; -;
versuchen versucht versucht; try; -;
vergessen vergisst vergessen; forget/forgot; -;
versprechen verspricht versprochen; promise; -;
"""

# Finite forms for ich, du, er/sie/es, wir, ihr, sie. The keys are also the names of the modes.
FORMS = {
    "sein": "bin bist ist sind seid sind",
    "war": "war warst war waren wart waren",
    "haben": "habe hast hat haben habt haben",
    "wissen": "weiß weißt weiß wissen wisst wissen",
    "wurde": "wurde wurdest wurde wurden wurdet wurden",
    "werden": "werde wirst wird werden werdet werden",
    "können": "kann kannst kann können könnt können",
    "konnte": "konnte konntest konnte konnten konntet konnten",
    "sollen": "soll sollst soll sollen sollt sollen",
    "möchte": "möchte möchtest möchte möchten möchtet möchten",
    "müssen": "muss musst muss müssen müsst müssen",
    "musste": "musste musstest musste mussten musstet mussten",
    "wollen": "will willst will wollen wollt wollen",
    "wollte": "wollte wolltest wollte wollten wolltet wollten",
    "dürfen": "darf darfst darf dürfen dürft dürfen",
}
PARADIGM = {name: tuple(forms.split()) for name, forms in FORMS.items()}
BE = ("am", "are", "is", "are", "are", "are")
WAS = ("was", "were", "was", "were", "were", "were")
# English modals that are operators themselves, with what follows them before the base form ...
OPERATORS = {"werden": ("will", ""), "können": ("can", ""), "konnte": ("could", ""),
             "sollen": ("should", ""), "möchte": ("would", "like to ")}
# ... and German modals that are ordinary verbs in English, so that they need "do".
LEXICAL_MODALS = {"müssen": ("have", "pres"), "musste": ("have", "past"),
                  "wollen": ("want", "pres"), "wollte": ("want", "past"), "gern": ("like", "pres")}
MODES = ["past"] * 20 + ["pres"] * 12 + ["werden"] * 4 + ["können", "müssen", "wollen"] * 2 + [
    "gern", "gern", "konnte", "musste", "wollte", "sollen", "möchte", "möchte", "dürfen"]

# Case endings, nominative to genitive, by gender ("p": plural).
DER = {"m": ("der", "den", "dem", "des"), "f": ("die", "die", "der", "der"),
       "n": ("das", "das", "dem", "des"), "p": ("die", "die", "den", "der")}
DIESER = {"m": ("er", "en", "em", "es"), "f": ("e", "e", "er", "er"),
          "n": ("es", "es", "em", "es"), "p": ("e", "e", "en", "er")}
EIN = {**DIESER, "m": ("", "en", "em", "es"), "n": ("", "", "em", "es")}
STRONG = {**DIESER, "m": ("er", "en", "em", "en"), "n": ("es", "es", "em", "en")}
WEAK = {"m": ("e", "en", "en", "en"), "f": ("e", "e", "en", "en"),
        "n": ("e", "e", "en", "en"), "p": ("en", "en", "en", "en")}
RELATIVE = {**DER, "m": (*DER["m"][:3], "dessen"), "f": (*DER["f"][:3], "deren"),
            "n": (*DER["n"][:3], "dessen"), "p": ("die", "die", "denen", "deren")}
REFLEXIVE = ("mich", "dich", "sich", "uns", "euch", "sich")

FEMALE, MALE = ("Anna", "Maria", "Julia", "Clara"), ("Peter", "Paul", "Martin", "David")
CITIES = (("Berlin", "Berlin"), ("München", "Munich"), ("Wien", "Vienna"), ("Köln", "Cologne"),
          ("Hamburg", "Hamburg"), ("Paris", "Paris"))
PLACES = (("im Garten", "in the garden"), ("in der Küche", "in the kitchen"),
          ("im Park", "in the park"), ("zu Hause", "at home"), ("in der Schule", "at school"),
          ("im Büro", "at the office"), ("am Bahnhof", "at the station"))
INDOORS = (PLACES[1], PLACES[4], PLACES[5])
DIRECTIONS = (("in den Park", "to the park"), ("nach Hause", "home"), ("ins Büro", "to the office"),
              ("zum Bahnhof", "to the station"), ("in die Schule", "to school"))
BESIDE = (("auf", "on"), ("unter", "under"), ("neben", "next to"), ("hinter", "behind"))
DAYS = (("am Montag", "on Monday"), ("am Mittwoch", "on Wednesday"), ("am Freitag", "on Friday"),
        ("am Sonntag", "on Sunday"))
PAST_TIMES = (("gestern", "yesterday"), ("letzte Woche", "last week"),
              ("heute Morgen", "this morning"))
FUTURE_TIMES = (("morgen", "tomorrow"), ("nächste Woche", "next week"), ("bald", "soon"),
                ("heute Abend", "this evening"))
HABITS = (("jeden Tag", "every day"), ("jeden Morgen", "every morning"),
          ("sonntags", "on Sundays"), ("abends", "in the evening"), ("im Sommer", "in summer"))
MONTHS = (("März", "March"), ("Mai", "May"), ("Juni", "June"), ("Oktober", "October"))
FREQUENCIES = (("oft", "often"), ("nie", "never"), ("immer", "always"), ("manchmal", "sometimes"))

UNITS = ("", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
         "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn",
         "neunzehn")
TENS = ("", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig",
        "neunzig")
EN_UNITS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
            "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
            "eighteen", "nineteen")
EN_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


# --- Words ---------------------------------------------------------------------------------------
class Noun(NamedTuple):
    kind: str
    gender: str
    sg: str
    gen: str
    pl: str
    en: str
    en_pl: str
    sex: str  # which English pronoun: m, f or n


class Adjective(NamedTuple):
    predicative: str
    stem: str
    comparative: str  # "-" if the table has none, as for the superlative
    superlative: str
    en: str
    en_comparative: str
    en_superlative: str


class Verb(NamedTuple):
    prefix: str
    stem: str
    present: tuple[str, ...]
    preterite: tuple[str, ...]  # used for the past instead of the perfect, if there is one
    participle: str
    auxiliary: str
    en: tuple[str, str, str]  # base, past, participle
    rest: str  # stays right behind the English verb
    particle: str  # as does this one, except behind a pronoun object
    frame: str
    kinds: tuple[str, ...]
    flags: str


class Det(NamedTuple):
    """A determiner: inflected like der, dieser or ein; family "" does not inflect."""

    stem: str
    family: str
    en: str
    en_pl: str


THE, THIS = Det("", "der", "the", "the"), Det("dies", "dieser", "this", "these")
A, NO, BARE = Det("ein", "ein", "a", ""), Det("kein", "ein", "a", "any"), Det("", "", "", "")
MY, YOUR, HIS, HER, ITS, OUR, YOUR_PL, THEIR = (
    Det(de, "ein", en, en) for de, en in (
        ("mein", "my"), ("dein", "your"), ("sein", "his"), ("ihr", "her"), ("sein", "its"),
        ("unser", "our"), ("euer", "your"), ("ihr", "their")))


def _nouns() -> dict[str, list[Noun]]:
    table: dict[str, list[Noun]] = {}
    for kind, rows in NOUN_TABLE.items():
        for row in rows.split(","):
            gender, sg, gen, pl, en, *sex = row.split()
            one, _, many = en.replace("_", " ").partition("/")
            natural = sex[0] if sex else gender if kind in PEOPLE else "n"
            noun = Noun(kind, gender, sg, gen, pl, one, many or _third(one), natural)
            table.setdefault(kind, []).append(noun)
    return table


def _adjectives() -> dict[str, list[Adjective]]:
    table: dict[str, list[Adjective]] = {kind: [] for kind in NOUN_TABLE}
    for kinds, rows in ADJECTIVE_TABLE.items():
        for row in rows.split(","):
            positive, comparative, superlative, english = row.split()
            predicative, _, stem = positive.partition("/")
            en, *degrees = english.split("/")
            more = degrees[0] if degrees else f"more {en}"
            most = degrees[1] if degrees[1:] else more[:-2] + "est" if degrees else f"most {en}"
            for kind in kinds.split():
                table[kind].append(Adjective(predicative, stem or predicative, comparative,
                                             superlative, en, more, most))
    return table


def _third(word: str) -> str:
    """The English ending -s, of verbs and of regular plurals."""
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return {"be": "is", "have": "has"}.get(
        word, word + ("es" if word.endswith(("s", "sh", "ch", "x", "go")) else "s"))


def _past(base: str) -> str:
    if base.endswith("y") and base[-2] not in "aeou":
        return base[:-1] + "ied"
    return base + ("d" if base.endswith("e") else "ed")


def _present(infinitive: str, third: str) -> tuple[str, ...]:
    stem = infinitive[:-2] if infinitive.endswith("en") else infinitive[:-1]
    second = third if third[-2] in "sßz" else third[:-1] + "st"
    plural = stem + ("et" if stem[-1] in "td" else "t")
    return (stem + "e", second, third, infinitive, plural, infinitive)


def _verb(row: str) -> Verb:
    german, english, objects, *flags = (cell.strip() for cell in row.split(";"))
    infinitive, third, participle = german.split()
    prefix, _, stem = infinitive.rpartition("|")
    auxiliary, _, participle = participle.rpartition(":")
    parts, _, rest = english.partition(" ")
    base, *others = parts.split("/")
    past = others[0] if others else _past(base)
    particle = rest[1:] if rest.startswith("~") else ""
    frame, *kinds = objects.split()
    present = PARADIGM[stem] if stem in ("sein", "wissen") else _present(stem, third)
    return Verb(prefix, stem, present, PARADIGM["war"] if stem == "sein" else (), participle,
                "sein" if auxiliary else "haben", (base, past, others[1] if others[1:] else past),
                "" if particle else rest, particle, frame, tuple(kinds), "".join(flags))


NOUNS, ADJECTIVES = _nouns(), _adjectives()
VERBS = [_verb(row) for row in VERB_TABLE.strip().splitlines()]
SPECIAL = {verb.prefix + verb.stem: verb for verb in map(_verb, SPECIAL_TABLE.strip().splitlines())}


def _fits(verb: Verb, mode: str) -> bool:
    if mode == "gern":
        return "+" in verb.flags
    if "=" in verb.flags:
        return mode in ("pres", "past")
    if "1" in verb.flags and mode == "pres":
        return False
    return "!" not in verb.flags or mode in ("pres", "past", "werden")


MODES_OF = {verb: [mode for mode in MODES if _fits(verb, mode)] for verb in VERBS}


# --- Noun phrases --------------------------------------------------------------------------------
class NP(NamedTuple):
    """A noun phrase in both languages, with all that agreement and word order ask about it."""

    de: tuple[str, ...]  # by case
    en: str
    en_object: str
    who: int  # 0-5: ich, du, er/sie/es, wir, ihr, sie
    gender: str  # m, f, n, p: the German pronoun
    sex: str  # the same for the English one
    form: str  # "pronoun", "definite" or "indefinite"
    kind: str


def _pronoun(de: str, en: str, who: int, gender: str = "", sex: str = "") -> NP:
    subject, obj = en.split()
    return NP(tuple(de.split()), subject, obj, who, gender, sex or gender, "pronoun", "adult")


SPEAKERS = (_pronoun("ich mich mir", "I me", 0), _pronoun("du dich dir", "you you", 1),
            _pronoun("wir uns uns", "we us", 3), _pronoun("ihr euch euch", "you you", 4))
GERMAN_PRONOUN = {"m": "er ihn ihm", "f": "sie sie ihr", "n": "es es ihm", "p": "sie sie ihnen"}
ENGLISH_PRONOUN = {"m": "he him", "f": "she her", "n": "it it", "p": "they them"}
HE, SHE, IT, THEY = (_pronoun(GERMAN_PRONOUN[g], ENGLISH_PRONOUN[g], 5 if g == "p" else 2, g)
                     for g in "mfnp")
NAMES = [NP((name,) * 3, name, name, 2, sex, sex, "definite", "adult")
         for sex, names in (("f", FEMALE), ("m", MALE)) for name in names]


def pronoun_for(np: NP) -> NP:
    """Grammatical gender in German, natural gender in English: der Tisch is er and it."""
    if np.form == "pronoun":
        return np
    return _pronoun(GERMAN_PRONOUN[np.gender], ENGLISH_PRONOUN[np.sex], np.who, np.gender, np.sex)


def own(np: NP) -> Det:
    """The possessive that points back to this subject."""
    if np.who == 2:
        german = "ihr" if np.gender == "f" else "sein"
        return {"m": HIS, "f": HER, "n": ITS}[np.sex]._replace(stem=german)
    return (MY, YOUR, HIS, OUR, YOUR_PL, THEIR)[np.who]


def _determiner(det: Det, gender: str, case: int) -> tuple[str, bool]:
    """The determiner, and whether it shows the case itself."""
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
    if det.stem == "ein" and (plural or mass):
        det = BARE
    gender = "p" if plural else noun.gender
    n_declension = noun.gender == "m" and noun.gen == noun.pl
    german = []
    for case in (NOM, ACC, DAT, GEN):
        word = noun.sg if case == NOM or not n_declension else noun.gen
        if plural:
            word = noun.pl + ("n" if case == DAT and noun.pl[-1] not in "ns" else "")
        elif case == GEN:
            word = noun.gen
        article, shows_case = _determiner(det, gender, case)
        # The adjective takes the ending that shows the case only if the determiner does not.
        attribute = adjective and adjective[0] + (WEAK if shows_case else STRONG)[gender][case]
        german.append(_join(article, attribute or "", word))
    article = det.en_pl if plural or (mass and det.en == "a") else det.en
    phrase = _join(adjective[1] if adjective else "", noun.en_pl if plural else noun.en)
    if article == "a" and phrase[0] in "aeiou":
        article = "an"
    english = _join(article, phrase)
    return NP(tuple(german), english, english, 5 if plural else 2, gender, "p" if plural else
              noun.sex, "indefinite" if not det.family or
              det.stem in ("ein", "kein") else "definite", noun.kind)


def possessed(owner: NP, noun: Noun, adjective: Pair | None) -> NP:
    """das neue Auto des alten Lehrers, the old teacher's new car."""
    np = noun_phrase(THE, adjective, noun)
    english = owner.en + ("'" if owner.en.endswith("s") else "'s") + np.en[3:]
    return np._replace(de=tuple(f"{form} {owner.de[GEN]}" for form in np.de),
                       en=english, en_object=english)


def number(n: int) -> Pair:
    """einundzwanzig, twenty-one."""
    if n < 20:
        return UNITS[n], EN_UNITS[n]
    tens, unit = divmod(n, 10)
    if not unit:
        return TENS[tens], EN_TENS[tens]
    return f"{UNITS[unit]}und{TENS[tens]}", f"{EN_TENS[tens]}-{EN_UNITS[unit]}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


# --- Clauses -------------------------------------------------------------------------------------
class Part(NamedTuple):
    """What a clause holds besides subject and verb; it has a place in each language."""

    rank: int  # German: pronouns, definite objects, time, nicht, indefinite objects, the rest
    de: str
    slot: int = 0  # English: object, predicate or direction, company, place, time
    en: str = ""
    front: str = ""  # may open the German sentence ("de"), or that and the English one ("both")


(PRONOUN, DATIVE, DEFINITE, TIME, NICHT, OFTEN, COMPANION, INDEFINITE, PLACE,
 END) = range(0, 20, 2)
OBJECT, PREDICATE, COMPANY, WHERE, WHEN = range(5)


@dataclass
class Clause:
    subject: NP
    verb: Verb
    mode: str  # pres, past, gern, passive or the name of a German auxiliary or modal
    parts: list[Part] = field(default_factory=list)
    negated: bool = False
    often: str = ""
    en_subject: NP | None = None  # where English has another one: mir gefällt, I like

    def find(self, front: str) -> Part | None:
        """The part that may open the sentence in this way."""
        return next((part for part in self.parts if front and part.front == front), None)


@cache
def _german_verb(verb: Verb, mode: str, who: int) -> tuple[str, str, str]:
    """The finite verb, what stands at the end of the clause, and both where they meet there."""
    if mode in ("pres", "gern"):
        finite = verb.present[who]
        return finite, verb.prefix, verb.prefix + finite
    if mode == "past" and verb.preterite:
        return verb.preterite[who], "", verb.preterite[who]
    if mode in ("past", "passive"):
        tail, auxiliary = verb.participle, "wurde" if mode == "passive" else verb.auxiliary
    else:
        tail, auxiliary = verb.prefix + verb.stem, mode
    return PARADIGM[auxiliary][who], tail, f"{tail} {PARADIGM[auxiliary][who]}"


@cache
def _english_verb(verb: Verb, mode: str, who: int) -> tuple[str, str, str]:
    """Operator, the verb behind it, and the finite form that stands for both unless "do" is due."""
    base, past, participle = verb.en
    if mode == "passive":
        return WAS[who], participle, ""
    if mode in OPERATORS:
        operator, link = OPERATORS[mode]
        return operator, _join(link + base, verb.rest), ""
    if mode == "dürfen":
        return BE[who], _join("allowed to", base, verb.rest), ""
    if mode in ("pres", "past"):
        if base == "be":
            return (BE if mode == "pres" else WAS)[who], verb.rest, ""
        head, tense, rest = base, mode, verb.rest
    else:
        (head, tense), rest = LEXICAL_MODALS[mode], _join("to", base, verb.rest)
        past = {"have": "had", "want": "wanted"}.get(head, "")
    third = tense == "pres" and who == 2
    finite = _third(head) if third else head if tense == "pres" else past
    operator = "does" if third else "do" if tense == "pres" else "did"
    return operator, _join(head, rest), _join(finite, rest)


def _middle(clause: Clause, front: Part | None = None) -> str:
    parts = sorted(clause.parts, key=lambda part: part.rank)
    return _join(*(part.de for part in parts if part is not front))


def german_main(clause: Clause, front: str = "") -> str:
    """Verb second: the subject opens, or whatever is in front."""
    finite, tail, _ = _german_verb(clause.verb, clause.mode, clause.subject.who)
    part = clause.find(front)
    opening = part.de if part else "" if front in ("de", "both") else front
    subject = clause.subject.de[NOM]
    start = _join(opening, finite, subject) if opening else _join(subject, finite)
    return _join(start, _middle(clause, part), tail)


def german_question(clause: Clause) -> str:
    finite, tail, _ = _german_verb(clause.verb, clause.mode, clause.subject.who)
    return _join(finite, clause.subject.de[NOM], _middle(clause), tail)


def german_final(clause: Clause, opening: str) -> str:
    """Verb last, behind a conjunction, a question word or a relative pronoun."""
    final = _german_verb(clause.verb, clause.mode, clause.subject.who)[2]
    return _join(opening, clause.subject.de[NOM], _middle(clause), final)


def german_infinitive(clause: Clause) -> str:
    verb = clause.verb
    return _join(_middle(clause), f"{verb.prefix}zu{verb.stem}" if verb.prefix else
                 f"zu {verb.stem}")


def _tail(clause: Clause, front: str = "") -> str:
    part = clause.find(front) if front == "both" else None
    parts = sorted(clause.parts, key=lambda part: part.slot)
    return _join(*(p.en for p in parts if p is not part))


def english_main(clause: Clause, front: str = "") -> str:
    subject = clause.en_subject or clause.subject
    operator, bare, finite = _english_verb(clause.verb, clause.mode, subject.who)
    if clause.negated:
        verb = _join("cannot" if operator == "can" else f"{operator} not", bare)
    elif finite:
        verb = _join(clause.often, finite)
    else:
        verb = _join(operator, clause.often, bare)
    part = clause.find(front) if front == "both" else None
    return _join(part.en if part else "", subject.en, verb, _tail(clause, front))


def english_question(clause: Clause) -> str:
    subject = clause.en_subject or clause.subject
    operator, bare, _ = _english_verb(clause.verb, clause.mode, subject.who)
    return _join(operator, subject.en, clause.often, bare, _tail(clause))


def english_infinitive(clause: Clause) -> str:
    return _join("to", clause.verb.en[0], clause.verb.rest, _tail(clause))


def state(clause: Clause, front: str = "") -> Pair:
    return german_main(clause, front) + ".", english_main(clause, front) + "."


def ask(clause: Clause, german: str = "", english: str = "") -> Pair:
    return (_join(german, german_question(clause)) + "?",
            _join(english, english_question(clause)) + "?")


# --- Sentences -----------------------------------------------------------------------------------
class Grammar:
    """Makes up sentences; all chance comes from one random generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pick = self.rng.choice

    def often(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Noun phrases
    def adjective(self, kind: str, superlative: bool) -> Pair:
        adjective = self.pick(ADJECTIVES[kind])
        if superlative and adjective.superlative != "-" and self.often(0.2):
            return adjective.superlative, adjective.en_superlative
        return adjective.stem, adjective.en

    def person(self, kinds: Sequence[str] = PEOPLE) -> NP:
        """Someone who is not a pronoun."""
        if self.often(0.25):
            return self.pick(NAMES)
        kind = self.pick(kinds)
        noun = self.pick(NOUNS[kind])
        plural = noun.sg not in ("Vater", "Mutter") and self.often(0.2)
        det = self.pick((MY, YOUR, OUR)) if kind == "kin" else self.pick((THE, THE, THE, THIS, A))
        plural = plural and det is not A
        adjective = self.adjective(kind, det is THE) if self.often(0.3) else None
        if kind == "kin" and self.often(0.15):
            return possessed(noun_phrase(THE, None, self.pick(NOUNS["adult"])), noun, adjective)
        return noun_phrase(det, adjective, noun, plural)

    def subject(self) -> NP:
        chance = self.rng.random()
        if chance < 0.2:
            return self.pick(SPEAKERS)
        return self.pick((HE, SHE, THEY)) if chance < 0.35 else self.person()

    def thing(self, kinds: Sequence[str], owner: NP | None, negated: bool = False,
              numbers: bool = True) -> NP:
        kind = self.pick(kinds)
        noun = self.pick(NOUNS[kind])
        plural = noun.pl != "-" and self.often(0.2)
        det = self.pick((THE, THE, THE, THE, THIS, A, A, A, A, MY, OUR))
        mine = kind not in ("event", "building", "transit", "drink")
        if (det in (MY, OUR) and not mine) or (det is THIS and noun.pl == "-"):
            det = THE
        if owner and mine and self.often(0.2):
            det = own(owner)
        if kind not in ("building", "transit", "room") and numbers and not negated and (
                noun.pl != "-" and self.often(0.08)):
            german, english = number(self.rng.randint(2, 99 if self.often(0.5) else 12))
            det, plural = Det(german, "", english, english), True
        if det is A:
            det = NO if negated else A
            plural = plural and kind in ("food", "text", "clothes", "small")
        adjective = self.adjective(kind, det is THE) if self.often(0.35) and (
            ADJECTIVES[kind]) else None
        if det is THE and mine and self.often(0.12):
            name = self.pick(NAMES)
            if self.often(0.5) and name.de[NOM][-1] != "s":
                of_name = Det(name.de[NOM] + "s", "", name.en + "'s", name.en + "'s")
                return noun_phrase(of_name, adjective, noun, plural)._replace(form="definite")
            adult = self.pick(NOUNS["adult"])
            return possessed(noun_phrase(self.pick((THE, THE, THIS)), None, adult), noun, adjective)
        return noun_phrase(det, adjective, noun, plural)

    def object(self, kinds: Sequence[str], clause: Clause) -> NP:
        kind = self.pick(kinds)
        if kind not in PEOPLE:
            gern = clause.mode == "gern"
            return self.thing((kind,), clause.subject, clause.negated and not gern, not gern)
        if self.often(0.2):
            # "sie" alone is always her; and I do not see us.
            others = [np for np in (*SPEAKERS, HE, SHE) if np.who % 3 != clause.subject.who % 3]
            return self.pick(others)
        if kind == "kin" and self.often(0.4):
            det = own(clause.subject)
            return noun_phrase(det, None, self.pick(NOUNS["kin"]))
        return self.other(clause.subject, (kind,))

    def other(self, subject: NP, kinds: Sequence[str] = PEOPLE) -> NP:
        """Somebody else than the subject."""
        while (np := self.person(kinds)).en == subject.en or np.form == "indefinite":
            pass
        return np

    # Parts of a clause
    def complements(self, clause: Clause) -> None:
        verb, frame = clause.verb, clause.verb.frame
        if "r" in verb.flags:
            clause.parts.append(Part(-1, REFLEXIVE[clause.subject.who]))
        if frame == "DA":
            to = self.object(PEOPLE, clause)
            clause.parts += [accusative(self.object(verb.kinds, clause), verb),
                             dative(to, PREDICATE, f"to {to.en_object}")]
        elif frame in ("A", "D"):
            np = self.object(verb.kinds, clause)
            clause.parts.append(accusative(np, verb) if frame == "A" else
                                dative(np, OBJECT, np.en_object))
        elif ":" in frame:
            preposition, case = frame.split(":")
            if case == "city":
                german, english = self.pick(CITIES)
                clause.parts.append(Part(END, f"in {german}", PREDICATE, f"in {english}"))
            else:
                np = self.object(verb.kinds, clause)
                german = f"{preposition} {np.de[ACC if case == 'acc' else DAT]}"
                clause.parts.append(Part(END, german.replace("von dem ", "vom "), OBJECT,
                                         np.en_object))
        elif frame == "go":
            german, english = self.pick(DIRECTIONS)
            clause.parts.append(Part(END, german, PREDICATE, english))
        elif frame in ("trip", "from"):
            german, english = self.pick(CITIES)
            prepositions = ("nach", "to") if frame == "trip" else ("aus", "from")
            clause.parts.append(Part(END, f"{prepositions[0]} {german}", PREDICATE,
                                     f"{prepositions[1]} {english}"))

    def time(self, mode: str, negated: bool = False) -> Part:
        if mode in ("pres", "gern"):
            german, english = self.pick(HABITS[2:] if negated else HABITS)
        else:
            past = mode in ("past", "konnte", "musste", "wollte", "passive")
            german, english = self.pick(PAST_TIMES if past else FUTURE_TIMES)
            chance = self.rng.random()
            if chance < 0.2:
                german, english = self.pick(DAYS)
            elif chance < 0.3 and past:
                count, counted = number(self.rng.randint(2, 12))
                german, english = f"vor {count} Tagen", f"{counted} days ago"
            elif chance < 0.4:
                day, (month, en_month) = self.rng.randint(1, 28), self.pick(MONTHS)
                german, english = f"am {day}. {month}", f"on {en_month} {day}"
            if german in ("gestern", "morgen", "am Montag", "am Freitag") and self.often(0.35):
                clock, en_clock = self.clock()
                german, english = f"{german} um {clock}", f"at {en_clock} {english}"
        return Part(TIME, german, WHEN, english, "both")

    def clock(self) -> Pair:
        """German counts the half hour towards the next hour: halb vier is half past three."""
        hour = self.rng.randint(2, 11)
        return self.pick((
            (f"{UNITS[hour]} Uhr", f"{EN_UNITS[hour]} o'clock"),
            (f"halb {UNITS[hour + 1]}", f"half past {EN_UNITS[hour]}"),
            (f"Viertel nach {UNITS[hour]}", f"a quarter past {EN_UNITS[hour]}"),
            (f"Viertel vor {UNITS[hour]}", f"a quarter to {EN_UNITS[hour]}")))

    def adverbials(self, clause: Clause) -> None:
        verb, mode, parts = clause.verb, clause.mode, clause.parts
        indefinite = any(part.rank in (INDEFINITE, INDEFINITE - 1) or " kein" in part.de
                         for part in parts)
        habit = mode == "pres" and "=" not in verb.flags
        if mode == "gern":
            parts.append(Part(OFTEN, "gern"))
        elif (habit or mode == "past") and not clause.negated and "1" not in verb.flags and (
                "=" not in verb.flags and self.often(0.4 if habit else 0.15)):
            german, clause.often = self.pick(FREQUENCIES)
            parts.append(Part(OFTEN, german))
        if clause.negated and (mode == "gern" or not indefinite):
            parts.append(Part(NICHT, "nicht"))
        if not clause.often and "=" not in verb.flags and (habit or self.often(0.45)):
            parts.append(self.time(mode, clause.negated))
        if "@" in verb.flags and self.often(0.3):
            german, english = self.pick(PLACES)
            parts.append(Part(PLACE, german, WHERE, english, "de"))
        elif "m" in verb.flags and self.often(0.25):
            np = self.other(clause.subject)
            parts.append(Part(COMPANION, f"mit {np.de[DAT]}", COMPANY, f"with {np.en_object}"))
        elif "f" in verb.flags and self.often(0.25):
            np = noun_phrase(own(clause.subject), None, self.pick(NOUNS["kin"]))
            parts.append(Part(COMPANION, f"für {np.de[ACC]}", COMPANY, f"for {np.en_object}"))

    def clause(self, subject: NP | None = None, modes: Sequence[str] = (), plain: bool = False,
               verb: Verb | None = None) -> Clause:
        """A clause about a person; a plain one is short and affirmative."""
        while not (verb and (allowed := [m for m in MODES_OF[verb] if not modes or m in modes])):
            verb = self.pick(VERBS)
        subject = subject or self.subject()
        negated = not plain and subject.form != "indefinite" and self.often(0.18)
        clause = Clause(subject, verb, self.pick(allowed), negated=negated)
        self.complements(clause)
        if not plain or clause.mode == "gern":
            self.adverbials(clause)
        return clause

    def copula(self, subject: NP, mode: str = "") -> Clause:
        """How somebody or something is or was, maybe compared."""
        mode = mode or self.pick(("pres", "pres", "past"))
        clause = Clause(subject, SPECIAL["sein"], mode, negated=self.often(0.2))
        while (adjective := self.pick(ADJECTIVES[subject.kind])).en[:4] in subject.en:
            pass
        german, english = adjective.predicative, adjective.en
        chance = self.rng.random()
        if chance < 0.3 and subject.form != "pronoun":
            np = self.other(subject, (subject.kind,)) if subject.kind in PEOPLE else (
                noun_phrase(self.pick((THE, THIS, MY)), None, self.pick(NOUNS[subject.kind])))
            if np.de != subject.de and chance < 0.2 and adjective.comparative != "-":
                german = f"{adjective.comparative} als {np.de[NOM]}"
                english = f"{adjective.en_comparative} than {np.en}"
            elif np.de != subject.de:
                german, english = f"so {german} wie {np.de[NOM]}", f"as {english} as {np.en}"
        elif chance < 0.45:
            german, english = f"sehr {german}", f"very {english}"
        if clause.negated:
            clause.parts.append(Part(NICHT, "nicht"))
        clause.parts.append(Part(END, german, PREDICATE, english))
        return clause

    def relative(self, head: NP, avoid: Verb | None = None) -> Pair:
        """A relative clause about the head, with a gap at subject, object, dative or owner."""
        pronouns, human = RELATIVE[head.gender], head.kind in PEOPLE
        chance = self.rng.random()
        if chance < 0.15:
            noun = self.pick(NOUNS["kin"])
            if human:
                owned = NP((f"{pronouns[GEN]} {noun.sg}",), f"whose {noun.en}", "", 2, "", "",
                           "definite", "kin")
                clause = self.copula(owned)
                return german_final(clause, ""), english_main(clause)
        if human and chance < 0.65:
            gap = NP((pronouns[NOM],), "who", "who", head.who, head.gender, head.sex, "definite",
                     head.kind)
            clause = self.clause(gap, plain=self.often(0.5))
            return german_final(clause, ""), english_main(clause)
        # A feminine or neuter person could be subject or object: "die Frau, die die Ärztin sah".
        cases = ("A", "D", ":") if not human or head.gender == "m" else ("D", ":")
        verbs = [verb for verb in VERBS if head.kind in verb.kinds and verb is not avoid and (
            verb.frame in cases or (":" in cases and ":" in verb.frame))]
        verb = self.pick(verbs)
        modes = [mode for mode in ("past", "past", "pres", "wollte") if _fits(verb, mode)]
        subject = self.subject()
        while subject.form == "indefinite" or subject.en == head.en:
            subject = self.subject()
        clause = Clause(subject, verb, self.pick(modes))
        if "r" in verb.flags:
            clause.parts.append(Part(-1, REFLEXIVE[subject.who]))
        if verb.particle:
            clause.parts.append(Part(-1, "", OBJECT, verb.particle))
        if clause.mode != "pres" and "=" not in verb.flags and self.often(0.3):
            clause.parts.append(self.time(clause.mode))
        preposition, _, case = verb.frame.rpartition(":")
        german = pronouns[DAT if case in ("D", "dat") else ACC]
        opening = _join(preposition, german)
        return german_final(clause, opening), _join("whom" if human else "that",
                                                    english_main(clause))

    # Whole sentences
    def statement(self) -> Pair:
        clause = self.clause()
        front = self.pick(("", "", "both", "both", "de"))
        return state(clause, front)

    def question(self) -> Pair:
        clause = self.clause(self.asked())
        while clause.negated or clause.often == "never":
            clause = self.clause(self.asked())
        return ask(clause)

    def definite(self) -> NP:
        while (np := self.subject()).form == "indefinite":
            pass
        return np

    def asked(self) -> NP:
        """Whom one may ask about: seldom oneself."""
        while (np := self.definite()).who in (0, 3):
            pass
        return np

    def wh_question(self) -> Pair:
        kind = self.pick(("wo", "wann", "warum", "wer", "wen", "was", "wem"))
        past = ("past", "past", "past", "werden", "wollen", "konnte")
        if kind == "wer":
            who = NP(("Wer",), "Who", "", 2, "m", "m", "pronoun", "adult")
            clause = self.clause(who, past, plain=True)
            return german_main(clause) + "?", english_main(clause) + "?"
        if kind in ("wen", "was", "wem"):
            frame = "D" if kind == "wem" else "A"
            verb = self.pick([verb for verb in VERBS if verb.frame == frame and any(
                (k in PEOPLE) == (kind != "was") for k in verb.kinds)])
            clause = Clause(self.asked(), verb, self.pick(
                [mode for mode in past if _fits(verb, mode)]))
            if verb.particle:
                clause.parts.append(Part(END, "", OBJECT, verb.particle))
            if self.often(0.3) and "=" not in verb.flags:
                clause.parts.append(self.time(clause.mode))
            german, english = kind, "what" if kind == "was" else "who"
        else:
            clause = self.clause(self.asked(), past, plain=True)
            german, english = kind, {"wo": "where", "wann": "when", "warum": "why"}[kind]
            while kind == "wo" and clause.verb.frame in ("go", "trip", "from", "in:city"):
                clause = self.clause(self.asked(), past, plain=True)
        return ask(clause, german, english)

    def subordinate(self, german: str, english: str, mode: str, subject: NP) -> Pair:
        """A clause behind a conjunction, often about the subject of the main clause."""
        chance = self.rng.random()
        if chance < 0.1:
            weather, en_weather = self.pick((("regn", "rain"), ("schnei", "snow")))
            if mode == "past":
                participle = "geregnet" if weather == "regn" else "geschneit"
                return f"{german} es {participle} hat", f"{english} it {en_weather}ed"
            ending = "et" if weather == "regn" else "t"
            return f"{german} es {weather}{ending}", f"{english} it {en_weather}s"
        about = pronoun_for(subject) if self.often(0.6) else self.definite()
        # Only the subject of the main clause may be meant by er or sie.
        while about.form == "pronoun" and about.who in (2, 5) and (
                about.de != pronoun_for(subject).de):
            about = self.definite()
        before = german in ("bevor", "wann")  # nothing lasting, nothing that did not happen
        clause = self.copula(about, mode) if chance < 0.4 and not before else self.clause(
            about, (mode, "konnte", "wollte") if mode == "past" else (mode, "wollen", "können"),
            plain=before or self.often(0.6))
        return german_final(clause, german), _join(english, english_main(clause))

    def complex_sentence(self) -> Pair:
        german, english, mode = self.pick((
            ("weil", "because", "past"), ("weil", "because", "past"),
            ("obwohl", "although", "past"), ("bevor", "before", "past"),
            ("wenn", "if", "pres"), ("wenn", "if", "pres")))
        modes = ("past", "past", "konnte", "musste") if mode == "past" else (
            "werden", "können", "müssen", "wollen")
        clause = self.clause(self.definite(), modes, plain=self.often(0.7))
        german, english = self.subordinate(german, english, mode, clause.subject)
        if self.often(0.4):
            return (f"{german_main(clause, german + ',')}.", f"{english}, {english_main(clause)}.")
        return f"{german_main(clause)}, {german}.", f"{english_main(clause)} {english}."

    def reported(self) -> Pair:
        """dass, ob and question words behind a verb of saying or knowing."""
        verb, mode = self.pick((("wissen", "pres"), ("glauben", "pres"), ("hoffen", "pres"),
                                ("sagen", "past"), ("wissen", "past"), ("glauben", "past")))
        matrix = Clause(self.definite(), SPECIAL[verb], mode)
        opening = ("dass", "that")
        if verb == "wissen" and self.often(0.6):
            matrix.negated = True
            matrix.parts.append(Part(NICHT, "nicht"))
            opening = self.pick((("ob", "whether"), ("warum", "why"), ("wann", "when")))
        inner = "past" if mode == "past" else self.pick(("past", "pres"))
        german, english = self.subordinate(*opening, inner, matrix.subject)
        return f"{german_main(matrix)}, {german}.", f"{english_main(matrix)} {english}."

    def infinitive(self) -> Pair:
        subject = self.definite()
        inner = self.clause(subject, ("wollen",), plain=True)
        if self.often(0.35):
            while inner.verb.frame in ("go", "trip"):
                inner = self.clause(subject, ("wollen",), plain=True)
            verb = self.pick([verb for verb in VERBS if verb.frame in ("go", "trip")])
            main = self.clause(subject, ("past", "past", "werden", "wollen"), True, verb)
            comma = ", um"
        else:
            name, mode = self.pick((("versuchen", "past"), ("vergessen", "past"),
                                    ("versprechen", "past"), ("hoffen", "pres"),
                                    ("versuchen", "werden")))
            main, comma = Clause(subject, SPECIAL[name], mode), ","
        return (f"{german_main(main)}{comma} {german_infinitive(inner)}.",
                f"{english_main(main)} {english_infinitive(inner)}.")

    def relative_sentence(self) -> Pair:
        """A relative clause at the subject or, behind the verb, at the object."""
        if self.often(0.5):
            noun = self.pick(NOUNS[self.pick(("adult", "child"))])
            np = noun_phrase(self.pick((THE, THE, THIS, A)), None, noun, self.often(0.25))
            german, english = self.relative(np)
            subject = np._replace(de=(f"{np.de[NOM]}, {german},",), en=f"{np.en} {english}")
            clause = self.copula(subject) if self.often(0.3) and np.form == "definite" else (
                self.clause(subject, ("past", "past", "wollen", "werden"), plain=True))
            return state(clause)
        verb = self.pick([verb for verb in VERBS if verb.frame == "A"])
        clause = self.clause(self.definite(), ("past", "past", "möchte", "müssen"), True, verb)
        clause.parts.clear()
        kind = self.pick([kind for kind in verb.kinds if kind != "kin"] or ["adult"])
        np = noun_phrase(self.pick((THE, THE, A)), None, self.pick(NOUNS[kind]), self.often(0.2))
        german, english = self.relative(np, verb)
        clause.parts.append(accusative(np._replace(en_object=f"{np.en} {english}"), verb))
        return f"{german_main(clause)}, {german}.", f"{english_main(clause)}."

    def description(self) -> Pair:
        """Copula, age and price."""
        chance = self.rng.random()
        if chance < 0.15:
            german, english = number(self.rng.randint(20, 99))
            clause = Clause(self.person(("adult",)), SPECIAL["sein"], "pres")
            clause.parts.append(Part(END, f"{german} Jahre alt", PREDICATE, f"{english} years old"))
        elif chance < 0.3:
            german, english = number(self.rng.randint(2, 99))
            thing = self.known(("clothes", "small", "furniture", "text"))
            clause = Clause(thing, SPECIAL["kosten"], "pres")
            clause.parts.append(Part(END, f"{german} Euro", PREDICATE, f"{english} euros"))
        elif chance < 0.5:
            clause = self.copula(self.definite())
        else:
            kinds = [kind for kind in ADJECTIVES if kind not in PEOPLE and ADJECTIVES[kind]]
            clause = self.copula(self.known(kinds))
        if not clause.negated and self.often(0.25):
            return ask(clause)
        return state(clause)

    def known(self, kinds: Sequence[str]) -> NP:
        """A definite thing, as subject."""
        while (np := self.thing(kinds, None)).form == "indefinite":
            pass
        return np

    def location(self) -> Pair:
        """Two-way prepositions: dative where something is, accusative where it is put."""
        surface = noun_phrase(self.pick((THE, THE, THIS, MY)), self.adjective("furniture", False)
                              if self.often(0.3) else None, self.pick(NOUNS["furniture"]))
        preposition, english = self.pick(BESIDE)
        upright = self.often(0.3)
        kinds = ("device",) if upright else ("small", "text", "paper", "clothes")
        english = f"{english} {surface.en}"
        if self.often(0.5):
            np = self.thing(kinds, None)
            verb = SPECIAL["stehen" if upright else "liegen"]
            clause = Clause(np, verb, "pres")
            part = Part(END, f"{preposition} {surface.de[DAT]}", PREDICATE, english, "de")
            clause.parts.append(part)
            if np.form == "indefinite":
                there = "There is" if np.who == 2 else "There are"
                return german_main(clause, "de") + ".", f"{there} {np.en} {english}."
            if self.often(0.3):
                return ask(clause)
        else:
            verb = SPECIAL["stellen" if upright else "legen"]
            mode = self.pick(("past", "past", "werden", "müssen", "sollen"))
            clause = Clause(self.subject(), verb, mode)
            clause.parts += [accusative(self.thing(kinds, clause.subject), verb),
                             Part(END, f"{preposition} {surface.de[ACC]}", PREDICATE, english)]
            if self.often(0.4):
                clause.parts.append(self.time(mode))
        front = self.pick(("", "both", "de"))
        return state(clause, front)

    def existence(self) -> Pair:
        german, english = self.pick(INDOORS)
        past = self.often(0.3)
        while (np := self.thing(("device", "furniture", "text"), None)).form != "indefinite":
            pass
        verb = "gab" if past else "gibt"
        be = (WAS if past else BE)[np.who]
        if self.often(0.25):
            return f"{verb} es {german} {np.de[ACC]}?", f"{be} there {np.en} {english}?"
        german = f"{german} {verb} es {np.de[ACC]}." if self.often(0.5) else (
            f"es {verb} {german} {np.de[ACC]}.")
        return german, f"there {be} {np.en} {english}."

    def passive(self) -> Pair:
        verb = self.pick([verb for verb in VERBS if verb.frame == "A" and not verb.rest and not (
            set(verb.kinds) & {"adult", "child", "kin"}) and "=" not in verb.flags])
        clause = Clause(self.known(verb.kinds), verb, "passive", negated=self.often(0.15))
        if verb.particle:
            clause.parts.append(Part(END, "", OBJECT, verb.particle))
        if clause.negated:
            clause.parts.append(Part(NICHT, "nicht"))
        if "building" in verb.kinds or verb.en[0] == "build":
            year = str(self.rng.randint(1950, 2020))
            clause.parts.append(Part(TIME, f"im Jahr {year}", WHEN, f"in {year}", "both"))
        elif self.often(0.6):
            clause.parts.append(self.time("passive"))
        if self.often(0.5):
            np = self.person()
            clause.parts.append(Part(END, f"von {np.de[DAT]}".replace("von dem ", "vom "),
                                     PREDICATE, f"by {np.en_object}"))
        if not clause.negated and self.often(0.2):
            return ask(clause)
        front = self.pick(("", "both"))
        return state(clause, front)

    def journey(self) -> Pair:
        """Trains and buses with their times."""
        (city, en_city), noun = self.pick(CITIES), self.pick(NOUNS["transit"])
        np = noun_phrase(self.pick((THE, THIS)), None, noun)
        arrives = self.often(0.5)
        link = self.pick(("aus", "nach"))
        en_link = "from" if link == "aus" else "to"
        np = np._replace(de=(f"{np.de[NOM]} {link} {city}",), en=f"{np.en} {en_link} {en_city}")
        clause = Clause(np, SPECIAL["ankommen" if arrives else "abfahren"],
                        self.pick(("pres", "past", "werden")))
        if self.often(0.3):
            return ask(clause, "wann", "when")
        clock, en_clock = self.clock()
        german, english = f"um {clock}", f"at {en_clock}"
        if self.often(0.5):
            day, en_day = self.pick((*DAYS, ("gestern", "yesterday") if clause.mode == "past" else
                                     ("morgen", "tomorrow")))
            german, english = f"{day} {german}", f"{english} {en_day}"
        clause.parts.append(Part(TIME, german, WHEN, english, "both"))
        front = self.pick(("", "both"))
        return state(clause, front)

    def liking(self) -> Pair:
        """gefallen, whose German subject is the English object; gehören."""
        kinds = ("clothes", "small", "vehicle", "furniture", "text", "device")
        thing = self.known(kinds)
        person = self.pick((*SPEAKERS, HE, SHE, THEY)) if self.often(0.4) else (
            self.other(thing))
        if self.often(0.3):
            clause = Clause(thing, SPECIAL["gehören"], "pres", negated=self.often(0.2))
            clause.parts.append(dative(person, PREDICATE, person.en_object))
        else:
            clause = Clause(thing, SPECIAL["gefallen"], self.pick(("pres", "pres", "past")),
                            negated=self.often(0.2), en_subject=person)
            clause.parts.append(dative(person, OBJECT, thing.en)._replace(front="de"))
        if clause.negated:
            clause.parts.append(Part(NICHT, "nicht"))
        if clause.verb is SPECIAL["gefallen"] and person.form == "pronoun":
            front = "de"
        else:
            front = self.pick(("", "de"))
        return state(clause, front)

    def contrast(self) -> Pair:
        """Two clauses about the same thing: er, sie, es and it."""
        verb = self.pick([verb for verb in VERBS if verb.frame == "A" and not set(verb.kinds) &
                          {*PEOPLE, "building"}])
        subject = self.definite()
        thing = self.thing(verb.kinds, subject)
        first = Clause(subject, verb, "past", [accusative(thing, verb)])
        if self.often(0.4) and subject.gender != thing.gender and ADJECTIVES[thing.kind]:
            second = self.copula(pronoun_for(thing), "past")
            adjective = self.pick(ADJECTIVES[thing.kind])
            second.parts = [part for part in second.parts if part.rank == NICHT] + [
                Part(END, adjective.predicative, PREDICATE, adjective.en)]
            german, english = self.pick((("weil", "because"), ("obwohl", "although")))
            german, english = german_final(second, german), _join(english, english_main(second))
            return f"{german_main(first)}, {german}.", f"{english_main(first)} {english}."
        others = [v for v in VERBS if v.frame == "A" and thing.kind in v.kinds and v is not verb]
        verb = self.pick(others or [verb])
        mode = self.pick([mode for mode in ("past", "wollen", "konnte", "wollte")
                          if _fits(verb, mode)])
        second = Clause(pronoun_for(subject), verb, mode, negated=True)
        second.parts += [accusative(pronoun_for(thing), verb), Part(NICHT, "nicht")]
        return (f"{german_main(first)}, aber {german_main(second)}.",
                f"{english_main(first)}, but {english_main(second)}.")

    def sentence(self) -> Pair:
        german, english = self.pick(TEMPLATES)(self)
        return german[0].upper() + german[1:], english[0].upper() + english[1:]


def accusative(np: NP, verb: Verb) -> Part:
    """The direct object; an English particle stands before it, but behind a pronoun."""
    pronoun = np.form == "pronoun"
    english = _join(np.en_object, verb.particle) if pronoun else _join(verb.particle, np.en_object)
    rank = {"pronoun": PRONOUN, "definite": DEFINITE}.get(np.form, INDEFINITE)
    return Part(rank, np.de[ACC], OBJECT, english, _marked(np, ACC))


def dative(np: NP, slot: int, english: str) -> Part:
    rank = {"pronoun": PRONOUN + 1, "definite": DATIVE}.get(np.form, INDEFINITE - 1)
    return Part(rank, np.de[DAT], slot, english, _marked(np, DAT))


def _marked(np: NP, case: int) -> str:
    """An object may open a German sentence if its case tells that it is no subject."""
    return "de" if np.form == "definite" and np.de[case] != np.de[NOM] else ""


TEMPLATES = [Grammar.statement] * 14 + [Grammar.question] * 4 + [Grammar.wh_question] * 3 + [
    Grammar.complex_sentence] * 6 + [Grammar.reported] * 4 + [Grammar.infinitive] * 3 + [
    Grammar.relative_sentence] * 4 + [Grammar.description] * 3 + [Grammar.location] * 2 + [
    Grammar.existence, Grammar.passive, Grammar.passive, Grammar.journey, Grammar.liking,
    Grammar.liking, Grammar.contrast, Grammar.contrast]


def sentences(seed: int) -> Iterator[Pair]:
    """Endless stream of (German, English) pairs; a pair may come again."""
    grammar = Grammar(seed)
    while True:
        german, english = grammar.sentence()
        if all(MIN_WORDS <= text.count(" ") + 1 <= MAX_WORDS for text in (german, english)):
            yield german, english


def generate(counts: Mapping[str, int], seed: int) -> dict[str, list[Pair]]:
    """Split name -> that many pairs; the first split is the one to train on.

    Every German sentence occurs once over all splits, and no English sentence of a later split
    occurs in another one. Raises ValueError if the grammar cannot supply that many.
    """
    if any(count < 0 for count in counts.values()):
        raise ValueError(f"cannot generate a negative number of pairs: {dict(counts)}")
    splits: dict[str, list[Pair]] = {name: [] for name in counts}
    stream = sentences(seed)
    seen: set[str] = set()
    barred: set[str] = set()  # English sides of held-out pairs
    names = list(counts)
    for name in names[1:] + names[:1]:  # held-out splits first: training then avoids their English
        misses = 0
        while len(splits[name]) < counts[name]:
            pair = next(stream)
            if pair[0] in seen or pair[1] in barred:
                misses += 1
                if misses > MAX_MISSES:
                    raise ValueError(f"the toy grammar found only {len(splits[name])} of the "
                                     f"{counts[name]} sentence pairs wanted for {name!r}")
                continue
            misses = 0
            seen.add(pair[0])
            splits[name].append(pair)
            if name != names[0]:
                barred.add(pair[1])
    return splits
