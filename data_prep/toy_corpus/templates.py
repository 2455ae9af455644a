"""The sentence templates: statements, questions, what is said with several clauses."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.toy_corpus import inflection as inf
from data_prep.toy_corpus import lexicon as lex
from data_prep.toy_corpus.clause import Clause, Part, Role, accusative
from data_prep.toy_corpus.grammar import MODES, Grammar
from data_prep.toy_corpus.inflection import DAT, NOM, NP, noun_phrase
from data_prep.toy_corpus.lexicon import PEOPLE, THE, VERB, VERBS, Pair

# Without a word such as "oft", the German present says what is going on: in main clauses alone.
STATED_MODES = MODES + ["now"] * 8
ASKED_MODES = ("past", "past", "past", "werden", "wollen", "konnte")
TRANSITIVE = [verb for verb in VERBS if verb.frame == "A"]
HANDLING = [verb for verb in TRANSITIVE if not {*PEOPLE, "building"} & {*verb.kinds}]
COMING = [pair for pair in lex.GREETINGS if pair[1] not in ("good night", "thank you", "goodbye")]
PRONOUNS = (*inf.SPEAKERS, inf.HE, inf.SHE, inf.THEY)
LASTING = [verb for verb in VERBS if "=" in verb.flags] + [VERB["haben"]] * 2
LOCAL = [verb for verb in VERBS if "@" in verb.flags]


class Templates(Grammar):
    """The templates make up sentences."""

    def statement(self) -> Pair:
        if self.often(0.08):
            clause = self.clause(self.thing("animal"), STATED_MODES, verbs=lex.ANIMAL_VERBS)
        else:
            subject = self.person() if self.often(0.3) else self.subject()
            clause = self.clause(subject, STATED_MODES)
        german, english = clause.state(self.pick(("", "", "both", "both", "de")))
        if self.often(0.05):
            yes, en_yes = ("nein", "no") if clause.negated else ("ja", "yes")
            return f"{yes}, {german}", f"{en_yes}, {english}"
        return german, english

    def simple(self) -> Pair:
        """Say in few words what is going on, or how things are."""
        subject = self.pick(PRONOUNS) if self.often(0.6) else self.subject()
        mode, verbs = ("pres", LASTING) if self.often(0.4) else ("now", VERBS)
        clause = self.gapped(subject, (mode,), verbs, self.often(0.2))
        self.complements(clause)
        asked = subject.who not in (0, 3) and not clause.negated and self.often(0.25)
        return clause.ask() if asked else clause.state()

    def description(self) -> Pair:
        kind = self.pick([kind for kind in lex.NOUNS if kind not in PEOPLE])
        clause = self.copula(self.subject() if self.often(0.3) else self.thing(kind))
        asked = clause.subject.who != 0 and not clause.negated and self.often(0.25)
        return clause.ask() if asked else clause.state()

    def question(self) -> Pair:
        clause = self.clause(self.subject((0, 3)), STATED_MODES)  # one seldom asks about oneself
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

    def greeting(self) -> Pair:
        german, english = self.pick(lex.GREETINGS)
        if self.often(0.05):
            return f"{german}.", f"{english}."
        kin = noun_phrase(lex.MY, None, self.pick(lex.NOUNS["kin"]))
        whom = kin if self.often(0.3) else self.pick(inf.NAMES)
        return f"{german}, {whom.de[NOM]}.", f"{english}, {whom.en}."

    def well_being(self) -> Pair:
        """Make a sentence with "es geht", whose German dative is the English subject."""
        np = self.subject()
        verb = inf.BE[np.who]
        if np.who in (0, 3) or self.often(0.4):
            return f"{np.de[DAT]} geht es gut.", f"{np.en} {verb} fine."
        german, english = self.pick((("", ""), ("", ""), (" heute", " today"), (" jetzt", " now")))
        if np.who == 1 and self.often(0.5):
            name = self.pick(inf.NAMES).en
            german, english = f"{german}, {name}", f"{english}, {name}"
        return self.in_reply(f"wie geht es {np.de[DAT]}{german}?", f"how {verb} {np.en}{english}?")

    def in_reply(self, german: str, english: str) -> Pair:
        """Ask, maybe as somebody who was asked the same, or has just come."""
        before, en_before = self.pick((("und", "and"), ("und", "and"), *COMING))
        if self.often(0.5):
            return german, english
        comma = "" if before == "und" else ","
        return f"{before}{comma} {german}", f"{en_before}{comma} {english}"

    def single(self, kinds: Sequence[str]) -> NP:
        """Pick somebody of these kinds in particular."""
        while (np := self.subject((3, 4, 5))).kind not in kinds:
            pass
        return np

    def naming(self) -> Pair:
        while (np := self.single(PEOPLE)) in inf.NAMES:
            pass
        if self.often(0.6):
            np = self.pick((*inf.SPEAKERS[:2], inf.SPEAKERS[1], inf.HE, inf.SHE))
        whose = inf.own(np).en if np.form == "pronoun" else f"{np.en}'s"
        clause = Clause(np, VERB["heißen"], "pres")
        if np.who != 0 and self.often(0.4):
            return self.in_reply(clause.ask("wie")[0], f"what is {whose} name?")
        name = self.pick([name for name in inf.NAMES if np.sex in ("", "n", name.sex)]).en
        clause.parts.append(Part(Role.PREDICATE, name, ""))
        if np.who != 0 and self.often(0.3):
            return clause.ask()[0], f"is {whose} name {name}?"
        before, en_before = self.pick((("", ""), ("ja, ", "yes, "), ("nein, ", "no, ")))
        return f"{before}{clause.german()}.", f"{en_before}{whose} name is {name}."

    def profession(self) -> Pair:
        """Say what somebody is: Lehrer without an article, a teacher with one."""
        np = self.single(("adult", "kin"))
        nouns = [noun for noun in lex.PROFESSIONS if np.sex in ("", noun.sex)]
        noun = self.pick(nouns)
        if np.en.endswith(noun.en):  # the teacher is no teacher
            return self.profession()
        part = Part(Role.PREDICATE, noun.sg, noun_phrase(lex.A, None, noun).en)
        clause = Clause(np, VERB["sein"], self.pick(("pres", "pres", "past")), [part])
        return clause.ask() if np.who != 0 and self.often(0.25) else clause.state()

    def sentence(self) -> Pair:
        german, english = self.pick(TEMPLATES)(self)
        return german[0].upper() + german[1:], english[0].upper() + english[1:]


TEMPLATES = (
    [Templates.statement] * 14
    + [Templates.simple] * 6
    + [Templates.question] * 4
    + [Templates.wh_question] * 3
    + [Templates.complex_sentence] * 6
    + [Templates.reported] * 4
    + [Templates.infinitive] * 3
    + [Templates.relative_sentence] * 4
    + [Templates.description] * 3
    + [Templates.passive] * 2
    + [Templates.liking] * 2
    + [Templates.contrast] * 2
    + [Templates.greeting, Templates.profession]
    + [Templates.well_being, Templates.naming] * 2
)
