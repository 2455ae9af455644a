"""A clause, and how it is spoken: German puts it around a verb in halves, English behind the verb.

Both languages are said from the same parts, each in its own order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from data_prep.toy_corpus.inflection import ACC, DAT, NOM, NP, english_verb, german_verb, join
from data_prep.toy_corpus.lexicon import Pair, Verb

PARTICLE = 1  # English rank: behind a pronoun, before any other object


class Role(Enum):
    """A role says what a part is to its clause, and its German and English rank."""

    PRONOUN = (0, 0)
    DATIVE_PRONOUN = (1, 3)
    DATIVE = (2, 3)
    OBJECT = (3, 2)
    TIME = (4, 6)
    NICHT = (5, 9)
    OFTEN = (6, 9)
    COMPANY = (7, 4)
    NEW_OBJECT = (8, 2)
    AGENT = (8, 3)
    PLACE = (9, 5)
    PREPOSITIONAL = (10, 2)
    PREDICATE = (10, 3)
    THAN = (11, 4)  # follows even a verb at the end of its clause


class Part(NamedTuple):
    """A part is what a clause holds besides subject and verb."""

    role: Role
    de: str
    en: str
    front: str = ""  # may open the German sentence ("de"), or that and the English one ("both")


def accusative(np: NP) -> Part:
    if np.form == "pronoun":
        return Part(Role.PRONOUN, np.de[ACC], np.en_object)
    role = Role.OBJECT if np.form == "definite" else Role.NEW_OBJECT
    return Part(role, np.de[ACC], np.en_object, _front(np, ACC))


def dative(np: NP, preposition: str = "") -> Part:
    role = Role.DATIVE_PRONOUN if np.form == "pronoun" else Role.DATIVE
    return Part(role, np.de[DAT], join(preposition, np.en_object), _front(np, DAT))


def _front(np: NP, case: int) -> str:
    """Return "de" if an object may open a German sentence: its case tells that it is no subject."""
    return "de" if np.form == "definite" and np.de[case] != np.de[NOM] else ""


@dataclass
class Clause:
    subject: NP
    verb: Verb
    mode: str  # pres, now (what is going on), past, passive or the name of a German modal or werden
    parts: list[Part] = field(default_factory=list)
    negated: bool = False
    often: Pair = ("", "")

    def _german_parts(self) -> list[Part]:
        parts = [*self.parts, Part(Role.OFTEN, self.often[0], "")]
        if self.negated and not any("kein" in part.de for part in parts):
            parts.append(Part(Role.NICHT, "nicht", ""))
        return sorted(parts, key=lambda part: part.role.value)

    def _english_rest(self) -> str:
        words = [(part.role.value[1], part.en) for part in self.parts]
        words.append((PARTICLE, self.verb.particle))
        return join(*(word for _, word in sorted(words, key=lambda word: word[0])))

    def german(self, opening: str | None = None) -> str:
        """Put the verb second, behind the subject, another opening, or nothing (""; a question)."""
        finite, tail, _ = german_verb(self.verb, self.mode, self.subject.who)
        subject = self.subject.de[NOM]
        start = (subject, finite) if opening is None else (opening, finite, subject)
        return join(*start, *(part.de for part in self._german_parts()), tail)

    def german_final(self, opening: str = "") -> str:
        """Put the verb last, behind a conjunction, a question word or a relative pronoun."""
        _, _, final = german_verb(self.verb, self.mode, self.subject.who)
        parts = self._german_parts()
        than = parts.pop().de if parts[-1].role is Role.THAN else ""
        return join(opening, self.subject.de[NOM], *(part.de for part in parts), final, than)

    def english(self) -> str:
        operator, bare, finite = english_verb(self.verb, self.mode, self.subject.who)
        if self.negated:
            verb = join("cannot" if operator == "can" else f"{operator} not", bare)
        else:
            verb = join(self.often[1], finite) if finite else join(operator, self.often[1], bare)
        return join(self.subject.en, verb, self._english_rest())

    def infinitive(self) -> Pair:
        prefix, stem = self.verb.prefix, self.verb.stem
        return (
            join(
                *(part.de for part in self._german_parts()),
                f"{prefix}zu{stem}" if prefix else f"zu {stem}",
            ),
            join("to", self.verb.en[0], self.verb.rest, self._english_rest()),
        )

    def state(self, front: str = "") -> Pair:
        """Make a statement, with a part of the clause in front if one may go there."""
        part = next((part for part in self.parts if front and part.front == front), None)
        if part is None:
            return f"{self.german()}.", f"{self.english()}."
        rest = replace(self, parts=[other for other in self.parts if other is not part])
        english = f"{part.en} {rest.english()}" if front == "both" else self.english()
        return f"{rest.german(part.de)}.", f"{english}."

    def ask(self, german: str = "", english: str = "") -> Pair:
        operator, bare, _ = english_verb(self.verb, self.mode, self.subject.who)
        question = join(
            english, operator, self.subject.en, self.often[1], bare, self._english_rest()
        )
        return f"{self.german(german)}?", f"{question}?"
