"""The pages say what is there: links, keys, recipes, files and modules."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline import recipe_page
from pipeline.command_line import DEFAULT_RECIPE
from pipeline.recipe import Recipe
from pipeline.recipe_file import TASKS, Draft, load_recipe, recipe_keys
from pipeline.sweeping.config import read_sweep
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"""(?:\]\(|src=")([^)"\s]+)""")
SECTIONS = "data|model|training|evaluation|tracking"
FLAG = re.compile(rf"--((?:{SECTIONS})\.[\w.]+)")
KEY = re.compile(rf"`((?:{SECTIONS})\.[\w.]+)")
MESSAGE = re.compile(r"(?<!`)``(?!`).+?``(?!`)")  # quoted; may hold a wrong key
FILES = {"model.safetensors", "model.bin", "model.onnx"}  # what looks like a key
MODULE = re.compile(r"python -m ((?:pipeline|data_prep|models|benchmarks)[\w.]*)")
SOURCE = re.compile(r"`(?!runs/|build/)([\w.]+/[\w./]*\.(?:py|sh|yaml|json|md))`")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = sum(
            re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found
        )
        found.add(f"{slug}-{number}" if number else slug)
    return found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{target}: there is no {place}"
        assert not anchor or anchor in anchors(place), f"{target}: no such heading in {place.name}"


@every_page
def test_keys_are_keys_of_a_recipe(page: Path) -> None:
    keys = {key for recipe in TASKS.values() for key, _ in recipe_keys(recipe)}
    sections = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    text = MESSAGE.sub("", page.read_text(encoding="utf-8"))
    assert set(FLAG.findall(text)) <= keys
    if page not in recipe_page.PAGES.values():  # has keys of list elements, too
        assert set(KEY.findall(text)) - FILES <= keys | sections


def recipes_in(page: Path) -> Iterator[str]:
    """Yield the YAML blocks of a page."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            yield block


def completed(base: Any, part: Any) -> Any:
    """Return `part` where it says something, else `base`."""
    if not (isinstance(base, dict) and isinstance(part, dict)):
        return part
    return {**base, **{key: completed(base.get(key), value) for key, value in part.items()}}


@every_page
def test_recipes_load(page: Path, tmp_path: Path) -> None:
    yaml = YAML(typ="safe")
    quickstart = yaml.load(DEFAULT_RECIPE)
    for number, block in enumerate(recipes_in(page)):
        recipe = yaml.load(block)
        path = tmp_path / f"{number}.yaml"
        if "space" in recipe:  # a sweep's file
            path.write_text(block, encoding="utf-8")
            read_sweep(path, Draft(DEFAULT_RECIPE))
            continue
        if "run_dir" not in recipe:  # a part of one
            recipe = completed(quickstart, recipe)
        yaml.dump(recipe, path)
        load_recipe(path, kind=Recipe)


@every_page
def test_modules_and_files_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in MODULE.findall(text):
        place = ROOT / module.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").exists(), module
    for name in SOURCE.findall(text):
        if name.split("/")[0] in {path.name for path in ROOT.iterdir()}:
            assert (ROOT / name).exists(), name


def test_the_split_of_a_corpus_is_a_shuffle(tmp_path: Path) -> None:
    """your_corpus.md's commands keep sides aligned, separate neighbours, and can be repeated."""
    page = (ROOT / "docs" / "your_corpus.md").read_text(encoding="utf-8")
    (commands,) = (block for _, block in FENCE.findall(page) if "all.tsv" in block)
    pairs, splits = 20_000, ("train", "valid", "test")
    numbers = [*range(pairs), *range(0, pairs, 100)]  # some pairs occur twice
    drawn: list[dict[str, list[int]]] = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        folder.mkdir()
        german = "".join(f"Satz Ä{n}\t!\r\n" for n in numbers)
        (folder / "all.de").write_bytes(german.encode())
        (folder / "all.en").write_text("".join(f"Sentence {n}\n" for n in numbers))
        subprocess.run(["bash", "-e", "-c", commands], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        drawn.append({})
        for split in splits:
            sides = [(folder / "data" / "mine" / f"{split}.{side}") for side in ("de", "en")]
            german_lines, english_lines = (side.read_text().splitlines() for side in sides)
            order = [int(line.split()[1]) for line in english_lines]
            assert german_lines == [f"Satz Ä{n} !" for n in order]
            drawn[-1][split] = order
    once, again = drawn
    assert once == again
    assert sorted(number for order in once.values() for number in order) == [*range(pairs)]
    assert [len(once[split]) for split in splits] == [pairs - 2000, 1000, 1000]
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(once["train"]))
    assert neighbours < 20  # 2 are to be expected
    for split in ("valid", "test"):  # of all parts of the corpus alike: 100 ± 9.5 of each tenth
        tenths = Counter(number * 10 // pairs for number in once[split])
        assert all(60 < tenths[tenth] < 140 for tenth in range(10))


@pytest.mark.parametrize("task", TASKS)
def test_recipe_pages_are_up_to_date(task: str) -> None:
    written = recipe_page.PAGES[task].read_text(encoding="utf-8")
    assert written == recipe_page.page(task), "run `python -m pipeline.recipe_page`"
