"""Phrases and clauses: what may be said about whom; `templates.py` makes sentences of them.

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
KNOWN = (THE, THE, lex.THIS, lex.MY)


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
        barred = subject.en.split(" and ")
        while (np := self.person(kinds)).en in barred or np.form == "indefinite":
            pass
        return np

    def subject(self, barred: Sequence[int] = ()) -> NP:
        """Pick somebody to ask about or refer to: not "ein Mann", and no barred person (0: ich)."""
        np = self.person()
        if self.often(0.35):
            np = self.pick((*inf.SPEAKERS, inf.HE, inf.SHE, inf.THEY))
        elif self.often(0.05):
            np = inf.couple(*self.rng.sample(inf.NAMES, 2))
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
            german, english = self.pick(lex.GOALS[frame])
            if frame == "language" and clause.negated:
                german = f"kein {german}"
            parts.append(Part(Role.PREDICATE, german, english))

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
        elif active and (habit or self.often(0.2 if mode == "now" else 0.5)):
            parts.append(self.time(mode, clause.negated))
        if "@" in verb.flags and self.often(0.3):
            parts.append(Part(Role.PLACE, *self.pick(lex.PLACES), front="de"))
        elif "m" in verb.flags and self.often(0.25):
            np = self.other(clause.subject)
            parts.append(Part(Role.COMPANY, f"mit {np.de[DAT]}", f"with {np.en_object}"))

    def time(self, mode: str, negated: bool = False) -> Part:
        if mode == "now":
            return Part(Role.TIME, "jetzt", "now", "both")
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
