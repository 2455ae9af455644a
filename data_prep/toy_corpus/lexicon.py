"""The words: tables that are easy to extend, and the typed entries made from them."""

from __future__ import annotations

import re
from typing import NamedTuple

Pair = tuple[str, str]  # German, English

# Nouns by kind: gender, singular, genitive, plural ("-": mass noun), English singular/plural, and
# a last letter where natural gender differs from grammatical gender.
NOUN_TABLE = {
    "adult": "m Mann Mannes Männer man/men, f Frau Frau Frauen woman/women, m Arzt Arztes Ärzte"
    " doctor, f Ärztin Ärztin Ärztinnen doctor, f Lehrerin Lehrerin Lehrerinnen teacher,"
    " m Lehrer Lehrers Lehrer teacher, m Nachbar Nachbarn Nachbarn neighbor,"
    " m Student Studenten Studenten student",
    "child": "n Kind Kindes Kinder child/children, m Junge Jungen Jungen boy,"
    " n Mädchen Mädchens Mädchen girl f",
    "kin": "m Vater Vaters - father, f Mutter Mutter - mother, m Bruder Bruders Brüder brother,"
    " f Schwester Schwester Schwestern sister, m Freund Freundes Freunde friend,"
    " f Freundin Freundin Freundinnen friend, m Sohn Sohnes Söhne son, f Tochter Tochter Töchter"
    " daughter",
    "animal": "m Hund Hundes Hunde dog, f Katze Katze Katzen cat",
    "drink": "m Kaffee Kaffees - coffee, m Tee Tees - tea, f Milch Milch - milk,"
    " n Wasser Wassers - water, m Orangensaft Orangensafts - orange_juice",
    "food": "m Apfel Apfels Äpfel apple, m Kuchen Kuchens Kuchen cake, n Brot Brotes - bread,"
    " n Ei Eis Eier egg, m Apfelkuchen Apfelkuchens Apfelkuchen apple_cake",
    "text": "n Buch Buches Bücher book, m Brief Briefes Briefe letter,"
    " f Geschichte Geschichte Geschichten story",
    "press": "f Zeitung Zeitung Zeitungen newspaper",
    "clothes": "m Mantel Mantels Mäntel coat, m Hut Hutes Hüte hat, n Kleid Kleides Kleider"
    " dress, f Jacke Jacke Jacken jacket",
    "small": "m Schlüssel Schlüssels Schlüssel key, f Tasche Tasche Taschen bag,"
    " m Haustürschlüssel Haustürschlüssels Haustürschlüssel front_door_key,"
    " f Kaffeetasse Kaffeetasse Kaffeetassen coffee_cup",
    "vehicle": "n Auto Autos Autos car, n Fahrrad Fahrrads Fahrräder bicycle",
    "device": "f Lampe Lampe Lampen lamp, m Computer Computers Computer computer,"
    " n Radio Radios Radios radio, f Waschmaschine Waschmaschine Waschmaschinen washing_machine",
    "furniture": "m Tisch Tisches Tische table, m Stuhl Stuhls Stühle chair, n Bett Bettes Betten"
    " bed, m Küchentisch Küchentischs Küchentische kitchen_table",
    "opening": "f Tür Tür Türen door, n Fenster Fensters Fenster window,"
    " f Haustür Haustür Haustüren front_door",
    "building": "n Haus Hauses Häuser house, f Schule Schule Schulen school, n Zimmer Zimmers"
    " Zimmer room",
}
PEOPLE = ("adult", "child", "kin")

# Adjectives by the kinds they fit: German positive (with "/stem" if it changes before an ending),
# comparative ("-": none); English positive/comparative ("more ..." if none is given).
ADJECTIVE_TABLE = {
    "adult kin child": "klug klüger clever/cleverer, nett netter nice/nicer,"
    " müde/müd müder tired, glücklich glücklicher happy/happier,"
    " groß größer tall/taller, klein kleiner small/smaller",
    "adult kin": "jung jünger young/younger, alt älter old/older, berühmt berühmter famous",
    "drink food": "kalt kälter cold/colder, warm wärmer warm/warmer, gut besser good/better",
    "animal": "jung jünger young/younger, alt älter old/older, groß größer big/bigger,"
    " klein kleiner small/smaller, schwarz - black",
    "animal vehicle": "schnell schneller fast/faster",
    "text press": "kurz kürzer short/shorter, lang länger long/longer,"
    " interessant interessanter interesting, gut besser good/better",
    "clothes small vehicle device furniture": "alt älter old/older, neu neuer new/newer,"
    " klein kleiner small/smaller, schwer schwerer heavy/heavier, schön schöner beautiful,"
    " teuer/teur teurer expensive, rot - red, schwarz - black, blau - blue",
    "opening building": "alt älter old/older, neu neuer new/newer, groß größer big/bigger,"
    " klein kleiner small/smaller, dunkel/dunkl dunkler dark/darker, schön schöner beautiful",
}

# Verbs: infinitive ("|" parts a separable prefix), er-form, participle ("ist:" if with sein);
# English base/past/participle, words that stay behind it ("~": behind a pronoun object only);
# frame and kinds of object; flags. Frames: A, D, DA objects by case, a preposition with its case,
# a key of GOALS, "-" nothing, "*" only certain sentences.
# Flags: = stative, 1 not a habit, ! not done on purpose, @ may name a place, m a companion, a
# animals do it, too.
VERB_TABLE = """
kaufen kauft gekauft; buy/bought; A food drink text press clothes animal vehicle device furniture; 1
verkaufen verkauft verkauft; sell/sold; A vehicle device furniture clothes animal; 1
lesen liest gelesen; read/read; A text press; @
schreiben schreibt geschrieben; write/wrote/written; A text; @
trinken trinkt getrunken; drink/drank/drunk; A drink; @m
essen isst gegessen; eat/ate/eaten; A food; @m
suchen sucht gesucht; look for; A text press clothes small kin animal; @
finden findet gefunden; find/found; A text press clothes small animal; 1!@
verlieren verliert verloren; lose/lost; A clothes small; 1!@
vergessen vergisst vergessen; forget/forgot/forgotten; A clothes small text press; 1!
reparieren repariert repariert; repair; A vehicle device furniture opening; 1
waschen wäscht gewaschen; wash; A clothes vehicle animal;
putzen putzt geputzt; clean; A opening building;
besuchen besucht besucht; visit; A adult child kin; m
brauchen braucht gebraucht; need; A small drink clothes vehicle furniture; =
verstehen versteht verstanden; understand/understood; A adult child kin text; =
sehen sieht gesehen; see/saw/seen; A adult child kin animal building; 1!@
bauen baut gebaut; build/built; A building furniture; 1
tragen trägt getragen; wear/wore/worn; A clothes;
an|rufen ruft angerufen; call; A adult kin; m
ab|holen holt abgeholt; pick ~up; A adult child kin; m
ein|laden lädt eingeladen; invite; A adult child kin;
lieben liebt geliebt; love; A adult child kin animal; =
mögen mag gemocht; like; A drink adult child kin; =
haben hat gehabt; have/had; A press small clothes vehicle device animal; =
auf|machen macht aufgemacht; open; A opening;
ein|schalten schaltet eingeschaltet; turn ~on; A device;
aus|schalten schaltet ausgeschaltet; turn ~off; A device;
weg|werfen wirft weggeworfen; throw/threw/thrown ~away; A text press clothes; 1
helfen hilft geholfen; help; D adult child kin; @
zu|hören hört zugehört; listen to; D adult child kin;
geben gibt gegeben; give/gave/given; DA text small food; @
zeigen zeigt gezeigt; show/showed/shown; DA text clothes vehicle;
warten wartet gewartet; wait for; auf:acc adult child kin; @m
sprechen spricht gesprochen; speak/spoke/spoken to; mit:dat adult child kin; @
schlafen schläft geschlafen; sleep/slept; -; @a
spielen spielt gespielt; play; -; @ma
laufen läuft ist:gelaufen; run/ran/run; -; @ma
sitzen sitzt gesessen; sit/sat; -; @ma
singen singt gesungen; sing/sang/sung; -; @m
kochen kocht gekocht; cook; -; @m
arbeiten arbeitet gearbeitet; work; -; @m
tanzen tanzt getanzt; dance; -; @m
lernen lernt gelernt; learn; language; m
wohnen wohnt gewohnt; live; live; =m
kommen kommt ist:gekommen; come/came/come; back; =
gehen geht ist:gegangen; go/went/gone; go; m
fahren fährt ist:gefahren; travel; trip; m
fliegen fliegt ist:geflogen; fly/flew/flown; trip; m
zurück|kommen kommt ist:zurückgekommen; come/came/come back; back; 1m
auf|stehen steht ist:aufgestanden; get/got up; -;
sein ist ist:gewesen; be; *; =
heißen heißt geheißen; be; *; =
gefallen gefällt gefallen; like; *; =
wissen weiß gewusst; know/knew; *; =
glauben glaubt geglaubt; believe; *; =
sagen sagt gesagt; say/said; *;
versuchen versucht versucht; try/tried; *;
versprechen verspricht versprochen; promise; *;
"""


def _pairs(table: str) -> list[Pair]:
    rows = (row.strip().partition("/") for row in table.split(","))
    return [(german, english) for german, _, english in rows]


NAMES = {"f": ("Anna", "Maria", "Julia", "Clara"), "m": ("Peter", "Paul", "Martin", "David")}
CITIES = _pairs("Berlin/Berlin, München/Munich, Wien/Vienna, Köln/Cologne, Paris/Paris")
PLACES = _pairs(
    "im Garten/in the garden, in der Küche/in the kitchen, im Park/in the park,"
    "zu Hause/at home, in der Schule/at school, im Büro/at the office, in der Stadt/in the city"
)
GOALS = {
    "go": _pairs(
        "in den Park/to the park, nach Hause/home, ins Büro/to the office,"
        "in die Schule/to school, in die Stadt/to the city"
    ),
    "language": _pairs("Deutsch/German, Englisch/English, Französisch/French"),
    "live": [(f"in {de}", f"in {en}") for de, en in CITIES],
    "trip": [(f"nach {de}", f"to {en}") for de, en in CITIES],
    "back": [(f"aus {de}", f"from {en}") for de, en in CITIES],
}
DAYS = _pairs("am Montag/on Monday, am Freitag/on Friday, am Sonntag/on Sunday")
PAST_TIMES = _pairs(
    "gestern/yesterday, letzte Woche/last week, heute Morgen/this morning, heute/today"
)
FUTURE_TIMES = _pairs(
    "morgen/tomorrow, nächste Woche/next week, bald/soon, heute Abend/this evening, heute/today"
)
HABITS = _pairs(
    "jeden Tag/every day, jeden Morgen/every morning, sonntags/on Sundays,"
    "abends/in the evening, im Sommer/in summer"
)
MONTHS = _pairs("März/March, Mai/May, Oktober/October")
FREQUENCIES = _pairs("oft/often, nie/never, immer/always, manchmal/sometimes")
GREETINGS = _pairs(
    "guten Morgen/good morning, guten Tag/good afternoon, guten Abend/good evening,"
    "gute Nacht/good night, hallo/hello, danke/thank you, auf Wiedersehen/goodbye"
)
UNITS = _pairs(
    "/, ein/one, zwei/two, drei/three, vier/four, fünf/five, sechs/six, sieben/seven,"
    "acht/eight, neun/nine, zehn/ten, elf/eleven, zwölf/twelve, dreizehn/thirteen,"
    "vierzehn/fourteen, fünfzehn/fifteen, sechzehn/sixteen, siebzehn/seventeen,"
    "achtzehn/eighteen, neunzehn/nineteen"
)
TENS = _pairs(
    "/, /, zwanzig/twenty, dreißig/thirty, vierzig/forty, fünfzig/fifty, sechzig/sixty,"
    "siebzig/seventy, achtzig/eighty, neunzig/ninety"
)


class Det(NamedTuple):
    """A determiner is inflected like der, dieser or ein; family "" does not inflect."""

    stem: str
    family: str
    en: str
    en_pl: str


THE, THIS = Det("", "der", "the", "the"), Det("dies", "dieser", "this", "these")
A, NO, BARE = Det("ein", "ein", "a", ""), Det("kein", "ein", "a", "any"), Det("", "", "", "")
MY, YOUR, HIS, HER, ITS, OUR, YOUR_PL, THEIR = (
    Det(de, "ein", en, en)
    for de, en in _pairs(
        "mein/my, dein/your, sein/his, ihr/her, sein/its, unser/our, euer/your, ihr/their"
    )
)


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
    comparative: str
    en: str
    en_comparative: str


class Verb(NamedTuple):
    prefix: str
    stem: str  # the infinitive without its prefix
    third: str
    participle: str
    auxiliary: str
    en: tuple[str, str, str]
    rest: str  # follows the English verb directly
    particle: str  # may follow a pronoun: pick him up
    frame: str
    kinds: tuple[str, ...]
    flags: str

    def allows(self, mode: str) -> bool:
        """Return whether somebody can be said to want, have to ... do this."""
        if mode == "now":
            return {"=", "!"}.isdisjoint(self.flags)
        if "=" in self.flags:
            return mode in ("pres", "past")
        return (
            "1" not in self.flags
            if mode == "pres"
            else ("!" not in self.flags or mode in ("past", "werden"))
        )


def with_s(word: str) -> str:
    """Add the English ending -s, of verbs and of regular plurals."""
    if word == "have":
        return "has"
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "sh", "ch", "x", "go")) else "s")


def with_ing(word: str) -> str:
    """Add the English ending -ing to a verb: making, getting, opening."""
    if word.endswith("e") and not word.endswith("ee"):
        return word[:-1] + "ing"
    doubled = re.fullmatch("[^aeiou]+[aeiou][^aeiouwxy]", word)
    return word + (word[-1] if doubled else "") + "ing"


def _nouns() -> dict[str, list[Noun]]:
    table: dict[str, list[Noun]] = {}
    for kind, rows in NOUN_TABLE.items():
        for row in rows.split(","):
            gender, sg, gen, pl, en, *sex = row.split()
            one, _, many = en.replace("_", " ").partition("/")
            natural = sex[0] if sex else gender if kind in PEOPLE else "n"
            noun = Noun(kind, gender, sg, gen, pl, one, many or with_s(one), natural)
            table.setdefault(kind, []).append(noun)
    return table


def _adjectives() -> dict[str, list[Adjective]]:
    table: dict[str, list[Adjective]] = {kind: [] for kind in NOUN_TABLE}
    for kinds, rows in ADJECTIVE_TABLE.items():
        for row in rows.split(","):
            positive, comparative, english = row.split()
            predicative, _, stem = positive.partition("/")
            en, _, more = english.partition("/")
            for kind in kinds.split():
                table[kind].append(
                    Adjective(
                        predicative, stem or predicative, comparative, en, more or f"more {en}"
                    )
                )
    return table


def _verb(row: str) -> Verb:
    german, english, objects, flags = (cell.strip() for cell in row.split(";"))
    infinitive, third, participle = german.split()
    prefix, _, stem = infinitive.rpartition("|")
    auxiliary, _, participle = participle.rpartition(":")
    parts, _, rest = english.partition(" ")
    base, *others = parts.split("/")
    past = others[0] if others else base + ("d" if base.endswith("e") else "ed")
    particle = rest[1:] if rest.startswith("~") else ""
    frame, *kinds = objects.split()
    return Verb(
        prefix,
        stem,
        third,
        participle,
        "sein" if auxiliary else "haben",
        (base, past, others[-1] if others else past),
        "" if particle else rest,
        particle,
        frame,
        tuple(kinds),
        flags,
    )


NOUNS, ADJECTIVES = _nouns(), _adjectives()
PROFESSIONS = [n for n in NOUNS["adult"] if n.en in ("doctor", "teacher", "student")]
VERB = {verb.prefix + verb.stem: verb for verb in map(_verb, VERB_TABLE.strip().splitlines())}
VERBS = [verb for verb in VERB.values() if verb.frame != "*"]
ANIMAL_VERBS = [verb for verb in VERBS if "a" in verb.flags]
