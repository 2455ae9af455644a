"""Measure word alignments where the truth is known: on the quickstart's test set.

Its lexicon says which English word a German noun, adjective, verb, name or city becomes. A word of
a reference counts where it is there once, and one word of the sentence alone can have become it.

python -m benchmarks.alignment [--config recipes/quickstart.yaml] [--run_dir runs/quickstart]
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from benchmarks.rounds import print_table
from data_prep.corpora import read_lines
from data_prep.toy_corpus import lexicon
from pipeline.command_line import DEFAULT_RECIPE
from pipeline.recipe_file import load_recipe
from pipeline.translation.alignment import align_pairs
from pipeline.translation.run_model import checkpoints_of_run
from pipeline.translation.serving import Pair
from pipeline.translation.translator import Translator

Dictionary = Mapping[str, set[str]]
"""English words by the German one."""


def dictionary() -> Dictionary:
    """Return what the lexicon knows, of words that are one word on either side."""
    found = defaultdict[str, set[str]](set)
    for german, english in _entries():
        if " " not in f"{german}{english}":
            found[german].add(english)
    return found


def _entries() -> Iterator[lexicon.Pair]:
    for nouns in lexicon.NOUNS.values():
        for noun in nouns:
            forms = [(noun.sg, noun.en), (noun.gen, noun.en)]
            yield from [*forms, (noun.pl, noun.en_pl), (f"{noun.pl}n", noun.en_pl)]
    for adjectives in lexicon.ADJECTIVES.values():
        for adjective in adjectives:
            yield from ((adjective.stem + end, adjective.en) for end in ("e", "en", "er", "es"))
            yield adjective.predicative, adjective.en
            yield adjective.comparative, adjective.en_comparative
    for verb in lexicon.VERBS:
        if not verb.prefix and not verb.rest:
            forms_of_verb = verb.stem, verb.third, verb.participle
            forms_in_english = {*verb.en, lexicon.with_ing(verb.en[0])}
            yield from product(forms_of_verb, forms_in_english)
    for names in lexicon.NAMES.values():
        yield from ((name, name) for name in names)
    yield from (*lexicon.CITIES, *lexicon.MONTHS, *lexicon.FREQUENCIES)


def known_links(pair: Pair, known: Dictionary) -> dict[int, int]:
    """Return the number of the source word of each target word of which it is known."""
    source, target = ([word.strip('.,?!"„“') for word in side.split()] for side in pair)
    links = {}
    for number, word in enumerate(target):
        origins = [i for i, german in enumerate(source) if word in known.get(german, ())]
        if len(origins) == 1 and target.count(word) == 1:
            links[number] = origins[0]
    return links


def main() -> None:
    """Align the references of the test set, and print how many links are right."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_RECIPE)
    parser.add_argument("--run_dir", help="of the trained model [that of the recipe]")
    arguments = parser.parse_args()
    overrides = [("run_dir", arguments.run_dir)] if arguments.run_dir else []
    recipe = load_recipe(arguments.config, overrides)
    files = [recipe.clean_text / f"test.{lang}" for lang in recipe.data.languages]
    pairs = [Pair(*sides) for sides in zip(*map(read_lines, files), strict=True)]
    translator = Translator.of_run(recipe, checkpoints_of_run(recipe))
    known, words, right = dictionary(), 0, 0
    for pair, links in zip(pairs, align_pairs(translator, pairs), strict=True):
        found = {link.target: link.source for link in links}
        expected = known_links(pair, known)
        words += len(expected)
        right += sum(found.get(target) == source for target, source in expected.items())
    caption = f"Words of {recipe.data.test.name} whose source the lexicon tells"
    print_table(
        caption, ("pairs", "words", "linked to it"), [(len(pairs), words, f"{right / words:.1%}")]
    )


if __name__ == "__main__":
    main()
