"""The sentence templates: what may be said about whom.

English is a function of the German: where a word such as "sie" could mean several things, only
one of them is ever built, or the sentence itself decides.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from data_prep.toy_corpus import inflection as inf
from data_prep.toy_corpus import lexicon as lex
from data_prep.toy_corpus.clause import Clause, Part, Role, accusative, dative
from data_prep.toy_corpus.inflection import ACC, DAT, NOM, NP, join, noun_phrase, number
from data_prep.toy_corpus.lexicon import PEOPLE, THE, VERB, VERBS, Det, Pair, Verb

MODES = (
    ["past"] * 20
    + ["pres"] * 12
    + ["werden"] * 4
    + ["können", "müssen", "wollen"] * 2
    + ["konnte", "musste", "wollte", "sollen", "möchte", "möchte"]
)
ASKED_MODES = ("past", "past", "past", "werden", "wollen", "konnte")
KNOWN = (THE, THE, lex.THIS, lex.MY)
TRANSITIVE = [verb for verb in VERBS if verb.frame == "A"]
HANDLING = [verb for verb in TRANSITIVE if not {*PEOPLE, "building"} & {*verb.kinds}]
LOCAL = [verb for verb in VERBS if "@" in verb.flags]


class Grammar:
    """The grammar makes up sentences; all chance comes from one random generator."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.pick = self.rng.choice

    def often(self, probability: float) -> bool:
        return self.rng.random() < probability

    # Noun phrases
    def adjective(self, kind: str) -> Pair | None:
        adjective = self.pick(lex.ADJECTIVES[kind])
        return (adjective.stem, adjective.en) if self.often(0.3) else None

    def person(self, kinds: Sequence[str] = PEOPLE) -> NP:
        """Pick someone, but not a pronoun."""
        if self.often(0.25):
            return self.pick(inf.NAMES)
        kind = self.pick(kinds)
        noun, adjective = self.pick(lex.NOUNS[kind]), self.adjective(kind)
        det = self.pick(
            (lex.MY, lex.YOUR, lex.OUR) if kind == "kin" else (THE, THE, THE, lex.THIS, lex.A)
        )
        if kind == "kin" and self.often(0.15):
            return self.owned(noun, adjective)
        return noun_phrase(det, adjective, noun, det is not lex.A and self.often(0.2))

    def owned(self, noun: lex.Noun, adjective: Pair | None) -> NP:
        owner = noun_phrase(self.pick((THE, lex.THIS)), None, self.pick(lex.NOUNS["adult"]))
        return inf.possessed(self.pick((owner, self.pick(inf.NAMES))), noun, adjective)

    def other(self, subject: NP, kinds: Sequence[str] = PEOPLE) -> NP:
        """Pick somebody in particular, but not the subject."""
        while (np := self.person(kinds)).en == subject.en or np.form == "indefinite":
            pass
        return np

    def subject(self, barred: Sequence[int] = ()) -> NP:
        """Pick somebody to ask about or refer to: not "ein Mann", and no barred person (0: ich)."""
        np = self.person()
        if self.often(0.35):
            np = self.pick((*inf.SPEAKERS, inf.HE, inf.SHE, inf.THEY))
        return self.subject(barred) if np.form == "indefinite" or np.who in barred else np

    def thing(self, kind: str, clause: Clause | None = None) -> NP:
        """Pick something; without a clause, something in particular."""
        noun, adjective = self.pick(lex.NOUNS[kind]), self.adjective(kind)
        mass, ownable = noun.pl == "-", kind not in ("building", "drink")
        det = self.pick((*KNOWN, *KNOWN, *[lex.A] * 7) if clause else KNOWN)
        plural = det is not lex.A and self.often(0.25)
        if (det is lex.THIS and mass) or (det is lex.MY and not ownable):
            det = THE
        if clause and ownable and self.often(0.2):
            det = inf.own(clause.subject)
        elif clause and clause.negated and det is lex.A:
            det = lex.NO
        elif clause and not clause.negated and ownable and not mass and self.often(0.1):
            german, english = number(self.rng.randint(2, 99 if self.often(0.5) else 12))
            det, plural = Det(german, "", english, english), True
        if det is THE and ownable and self.often(0.15):
            return self.owned(noun, adjective)
        return noun_phrase(det, adjective, noun, plural)

    def object(self, clause: Clause, kinds: Sequence[str]) -> NP:
        kind, subject = self.pick(kinds), clause.subject
        if kind not in PEOPLE:
            return self.thing(kind, clause)
        if self.often(0.2):  # "sie" alone is always her; and I do not see us
            return self.pick(
                [np for np in (*inf.SPEAKERS, inf.HE, inf.SHE) if np.who % 3 != subject.who % 3]
            )
        if kind == "kin" and self.often(0.4):
            return noun_phrase(inf.own(subject), None, self.pick(lex.NOUNS[kind]))
        return self.other(subject, (kind,))

    # Clauses
    def gapped(
        self, subject: NP, modes: Sequence[str], verbs: Sequence[Verb], negated: bool = False
    ) -> Clause:
        """Make a clause whose objects are still to come, or stand outside."""
        verb, mode = self.pick(verbs), self.pick(modes)
        while not verb.allows(mode):
            verb, mode = self.pick(verbs), self.pick(modes)
        return Clause(subject, verb, mode, negated=negated)

    def clause(
        self,
        subject: NP,
        modes: Sequence[str] = MODES,
        plain: bool = False,
        verbs: Sequence[Verb] = VERBS,
    ) -> Clause:
        """Make a clause about a person; a plain one is short and affirmative."""
        negated = not plain and subject.form != "indefinite" and self.often(0.18)
        clause = self.gapped(subject, modes, verbs, negated)
        self.complements(clause)
        if not plain:
            self.adverbials(clause)
        return clause

    def complements(self, clause: Clause) -> None:
        verb, frame, parts = clause.verb, clause.verb.frame, clause.parts
        if frame == "A":
            parts.append(accusative(self.object(clause, verb.kinds)))
        elif frame == "D":
            parts.append(dative(self.object(clause, verb.kinds)))
        elif frame == "DA":
            parts += [
                accusative(self.object(clause, verb.kinds)),
                dative(self.object(clause, PEOPLE), "to"),
            ]
        elif ":" in frame:
            preposition, case = frame.split(":")
            np = self.object(clause, verb.kinds)
            german = f"{preposition} {np.de[ACC if case == 'acc' else DAT]}"
            parts.append(Part(Role.PREPOSITIONAL, german, np.en_object))
        elif frame in lex.GOALS:
            parts.append(Part(Role.PREDICATE, *self.pick(lex.GOALS[frame])))

    def adverbials(self, clause: Clause) -> None:
        verb, mode, parts = clause.verb, clause.mode, clause.parts
        active, habit = "=" not in verb.flags, mode == "pres"
        if (
            active
            and mode in ("pres", "past")
            and not clause.negated
            and ("1" not in verb.flags and self.often(0.4 if habit else 0.15))
        ):
            clause.often = self.pick(lex.FREQUENCIES)
        elif active and (habit or self.often(0.5)):
            parts.append(self.time(mode, clause.negated))
        if "@" in verb.flags and self.often(0.3):
            parts.append(Part(Role.PLACE, *self.pick(lex.PLACES), front="de"))
        elif "m" in verb.flags and self.often(0.25):
            np = self.other(clause.subject)
            parts.append(Part(Role.COMPANY, f"mit {np.de[DAT]}", f"with {np.en_object}"))

    def time(self, mode: str, negated: bool = False) -> Part:
        past = mode in ("past", "konnte", "musste", "wollte", "passive")
        chance = self.rng.random()
        if mode == "pres":
            german, english = self.pick(lex.HABITS[2:] if negated else lex.HABITS)
        elif chance < 0.2:
            german, english = self.pick(lex.DAYS)
        elif chance < 0.4:
            day, (month, en_month) = self.rng.randint(1, 28), self.pick(lex.MONTHS)
            german, english = f"am {day}. {month}", f"on {en_month} {day}"
        else:
            german, english = self.pick(lex.PAST_TIMES if past else lex.FUTURE_TIMES)
        if german in ("gestern", "morgen", "am Montag", "am Freitag") and self.often(0.35):
            # German counts the half hour towards the next hour: halb vier is half past three.
            hour = self.rng.randint(2, 11)
            (this, en_this), (later, _) = number(hour), number(hour + 1)
            clock, en_clock = self.pick(
                (
                    (f"{this} Uhr", f"{en_this} o'clock"),
                    (f"halb {later}", f"half past {en_this}"),
                    (f"Viertel nach {this}", f"a quarter past {en_this}"),
                )
            )
            german, english = f"{german} um {clock}", f"at {en_clock} {english}"
        return Part(Role.TIME, german, english, "both")

    def copula(self, subject: NP, mode: str = "") -> Clause:
        """Say how somebody or something is or was, maybe compared."""
        clause = Clause(
            subject,
            VERB["sein"],
            mode or self.pick(("pres", "pres", "past")),
            negated=self.often(0.2),
        )
        adjective = self.pick(lex.ADJECTIVES[subject.kind])
        german, english = adjective.predicative, adjective.en
        if english in subject.en:  # the old man is not old
            return self.copula(subject, mode)
        chance, gradable = self.rng.random(), adjective.comparative != "-"
        if chance < 0.4 and subject.form != "pronoun":
            np = (
                self.other(subject, (subject.kind,))
                if subject.kind in PEOPLE
                else (self.thing(subject.kind))
            )
            if np.en.split()[-1] == subject.en.split()[-1] or english in np.en:
                return self.copula(subject, mode)
            if chance < 0.25 and gradable:
                german, english, than = adjective.comparative, adjective.en_comparative, "als/than"
            else:
                german, english, than = f"so {german}", f"as {english}", "wie/as"
            than, en_than = than.split("/")
            clause.parts = [Part(Role.THAN, f"{than} {np.de[NOM]}", f"{en_than} {np.en}")]
        elif chance < 0.5 and gradable:
            german, english = f"sehr {german}", f"very {english}"
        clause.parts.append(Part(Role.PREDICATE, german, english))
        return clause

    def relative(self, head: NP, avoid: Verb | None = None) -> Pair:
        """Make a relative clause about the head, with a gap at subject, object or dative."""
        pronouns, human = inf.RELATIVE[head.gender], head.kind in PEOPLE
        if human and self.often(0.6):
            clause = self.clause(head._replace(de=pronouns, en="who"), plain=self.often(0.5))
            return clause.german_final(), clause.english()
        # A feminine or neuter person could be subject or object: "die Frau, die die Ärztin sah".
        frames = ("A", "D") if not human or head.gender == "m" else ("D",)
        verbs = [
            verb
            for verb in VERBS
            if head.kind in verb.kinds
            and verb is not avoid
            and (verb.frame in frames or ":" in verb.frame)
        ]
        while (subject := self.subject()).en == head.en:
            pass
        clause = self.gapped(subject, ("past", "past", "pres", "wollte"), verbs)
        preposition, _, case = clause.verb.frame.rpartition(":")
        opening = join(preposition, pronouns[DAT if case in ("D", "dat") else ACC])
        return clause.german_final(opening), join("whom" if human else "that", clause.english())

    def subordinate(self, german: str, english: str, mode: str, subject: NP) -> Pair:
        """Make a clause behind a conjunction, often about the subject of the main clause."""
        about = inf.pronoun_for(subject)
        if self.often(0.4):  # but er or sie means nobody else
            about = self.pick((self.other(subject), *inf.SPEAKERS))
        modes = (mode, "konnte", "wollte") if mode == "past" else (mode, "wollen", "können")
        if german == "bevor":  # nothing lasting, nothing that did not happen
            clause = self.clause(about, ("past",), plain=True)
        else:
            clause = (
                self.copula(about, mode)
                if self.often(0.3)
                else (self.clause(about, modes, plain=self.often(0.6)))
            )
        return clause.german_final(german), join(english, clause.english())

    # Sentences
    def statement(self) -> Pair:
        clause = self.clause(self.person() if self.often(0.3) else self.subject())
        return clause.state(self.pick(("", "", "both", "both", "de")))

    def description(self) -> Pair:
        kind = self.pick([kind for kind in lex.NOUNS if kind not in PEOPLE])
        clause = self.copula(self.subject((0,)) if self.often(0.3) else self.thing(kind))
        return clause.ask() if not clause.negated and self.often(0.25) else clause.state()

    def question(self) -> Pair:
        clause = self.clause(self.subject((0, 3)))  # one seldom asks about oneself
        return self.question() if clause.negated or "nie" in clause.often else clause.ask()

    def wh_question(self) -> Pair:
        german, english = self.pick(
            (
                ("wo", "where"),
                ("wann", "when"),
                ("warum", "why"),
                ("wer", "who"),
                ("wen", "who"),
                ("was", "what"),
                ("wem", "who"),
            )
        )
        if german == "wer":
            clause = self.clause(inf.HE._replace(de=("wer",), en="who"), ASKED_MODES, plain=True)
            return clause.german() + "?", clause.english() + "?"
        subject = self.subject((0, 3))
        if german in ("wen", "was", "wem"):
            frame, human = "D" if german == "wem" else "A", german != "was"
            clause = self.gapped(
                subject,
                ASKED_MODES,
                [
                    verb
                    for verb in VERBS
                    if verb.frame == frame and any((kind in PEOPLE) == human for kind in verb.kinds)
                ],
            )
            if "=" not in clause.verb.flags and self.often(0.5):
                clause.parts.append(self.time(clause.mode))
        else:
            clause = self.clause(subject, ASKED_MODES, True, LOCAL if german == "wo" else VERBS)
        return clause.ask(german, english)

    def complex_sentence(self) -> Pair:
        german, english, mode = self.pick(
            (
                ("weil", "because", "past"),
                ("obwohl", "although", "past"),
                ("bevor", "before", "past"),
                ("wenn", "if", "pres"),
            )
        )
        modes = (
            ("past", "past", "konnte", "musste")
            if mode == "past"
            else ("werden", "können", "müssen", "wollen")
        )
        clause = self.clause(self.subject(), modes, plain=self.often(0.7))
        german, english = self.subordinate(german, english, mode, clause.subject)
        if self.often(0.4):
            return f"{clause.german(german + ',')}.", f"{english}, {clause.english()}."
        return f"{clause.german()}, {german}.", f"{clause.english()} {english}."

    def reported(self) -> Pair:
        """Put a clause with dass or ob behind a verb of saying or knowing."""
        verb, mode = self.pick(
            (
                ("wissen", "pres"),
                ("glauben", "pres"),
                ("sagen", "past"),
                ("wissen", "past"),
                ("glauben", "past"),
            )
        )
        main = Clause(self.subject(), VERB[verb], mode, negated=verb == "wissen")
        opening = ("ob", "whether") if main.negated else ("dass", "that")
        german, english = self.subordinate(*opening, self.pick(("past", mode)), main.subject)
        return f"{main.german()}, {german}.", f"{main.english()} {english}."

    def infinitive(self) -> Pair:
        verb = VERB[self.pick(("versuchen", "vergessen", "versprechen"))]
        main = Clause(self.subject(), verb, "past")
        german, english = self.clause(main.subject, ("wollen",), plain=True).infinitive()
        return f"{main.german()}, {german}.", f"{main.english()} {english}."

    def relative_sentence(self) -> Pair:
        """Put a relative clause at the subject or, behind the verb, at the object."""
        if self.often(0.5):
            noun = self.pick(lex.NOUNS[self.pick(("adult", "child"))])
            np = noun_phrase(self.pick((THE, THE, lex.THIS)), None, noun, self.often(0.25))
            german, english = self.relative(np)
            subject = np._replace(de=(f"{np.de[NOM]}, {german},",), en=f"{np.en} {english}")
            return (
                self.copula(subject)
                if self.often(0.3)
                else self.clause(subject, ("past", "past", "wollen", "werden"), plain=True)
            ).state()
        clause = self.gapped(self.subject(), ("past", "past", "möchte", "müssen"), TRANSITIVE)
        noun = self.pick(lex.NOUNS[self.pick([k for k in clause.verb.kinds if k != "kin"])])
        np = noun_phrase(self.pick((THE, THE, lex.A)), None, noun, self.often(0.2))
        german, english = self.relative(np, clause.verb)
        clause.parts = [accusative(np._replace(en_object=f"{np.en} {english}"))]
        return f"{clause.german()}, {german}.", f"{clause.english()}."

    def passive(self) -> Pair:
        verb = self.pick([verb for verb in HANDLING if not verb.rest and "=" not in verb.flags])
        parts = [self.time("passive")] if self.often(0.6) else []
        if self.often(0.5):
            np = self.person()
            german = f"von {np.de[DAT]}".replace("von dem ", "vom ")
            parts.append(Part(Role.AGENT, german, f"by {np.en_object}"))
        clause = Clause(self.thing(self.pick(verb.kinds)), verb, "passive", parts)
        return clause.ask() if self.often(0.2) else clause.state(self.pick(("", "both")))

    def liking(self) -> Pair:
        """Make a sentence with gefallen, whose German subject is the English object."""
        thing = self.thing(self.pick(("clothes", "small", "vehicle", "furniture", "text")))
        german = Clause(
            thing, VERB["gefallen"], self.pick(("pres", "pres", "past")), negated=self.often(0.2)
        )
        english = Clause(
            self.subject(), german.verb, german.mode, [accusative(thing)], german.negated
        )
        return f"{german.german(english.subject.de[DAT])}.", f"{english.english()}."

    def contrast(self) -> Pair:
        """Make two clauses about the same thing: er, sie or es in German, and it in English."""
        subject = self.subject()
        first = self.gapped(subject, ("past",), HANDLING)
        thing = self.thing(self.pick(first.verb.kinds))
        first.parts = [accusative(thing)]
        it = inf.pronoun_for(thing)
        if self.often(0.4) and subject.gender != thing.gender:
            second = self.copula(it, "past")
            german, english = self.pick((("weil", "because"), ("obwohl", "although")))
            return (
                f"{first.german()}, {second.german_final(german)}.",
                f"{first.english()} {english} {second.english()}.",
            )
        second = self.gapped(
            inf.pronoun_for(subject),
            ("past", "wollen", "konnte", "wollte"),
            [verb for verb in TRANSITIVE if thing.kind in verb.kinds and verb != first.verb],
            True,
        )
        second.parts = [accusative(it)]
        return (
            f"{first.german()}, aber {second.german()}.",
            f"{first.english()}, but {second.english()}.",
        )

    def sentence(self) -> Pair:
        german, english = self.pick(TEMPLATES)(self)
        return german[0].upper() + german[1:], english[0].upper() + english[1:]


TEMPLATES = (
    [Grammar.statement] * 14
    + [Grammar.question] * 4
    + [Grammar.wh_question] * 3
    + [Grammar.complex_sentence] * 6
    + [Grammar.reported] * 4
    + [Grammar.infinitive] * 3
    + [Grammar.relative_sentence] * 4
    + [Grammar.description] * 3
    + [Grammar.passive] * 2
    + [Grammar.liking] * 2
    + [Grammar.contrast] * 2
)
