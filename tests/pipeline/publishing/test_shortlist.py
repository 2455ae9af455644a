"""Shortlists of real text: what they allow, that exports translate with them, and as without."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.prepare import prepare
from data_prep.shards import ShardReader
from models.export_format import SHORTLIST, ModelError
from pipeline.command_line import load_recipe
from pipeline.publishing.exports import export
from pipeline.publishing.shortlist import coverage
from pipeline.recipe import ROOT, Recipe
from pipeline.translation.serving import CTranslate2Translator, tokens_of
from pipeline.translation.shortlist import Shortlist, read_shortlist
from tests.conftest import run_process
from tests.pipeline.conftest import encoded
from tests.pipeline.ranks import train

pytestmark = pytest.mark.slow  # they prepare a corpus, and train a little

CAPTIONS = ROOT / "recipes" / "multi30k_de_en.yaml"
KEYS = {
    "data.vocabulary.size": 16_000, "model.model_dim": 32, "model.ffn_inner_dim": 64,
    "model.num_levels": 2, "training.max_steps": 120, "training.warmup_steps": 30,
    "evaluation.average_checkpoints": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def captions(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return the recipe of a short training on image captions."""
    run_dir = tmp_path_factory.mktemp("captions") / "run"
    keys = {**KEYS, "data.root": shared / "data"}
    texts = [(key, str(value)) for key, value in keys.items()]
    recipe = load_recipe(CAPTIONS, [("run_dir", str(run_dir)), *texts])
    prepare(recipe.data, recipe.run_dir)
    codes, said = train(CAPTIONS, run_dir, *(f"--{key}={text}" for key, text in texts))
    assert codes == [0], said
    return recipe


@pytest.fixture(scope="module")
def folder(captions: Recipe) -> Path:
    """Return the folder of its CTranslate2 export."""
    folder = captions.run_dir.parent / "export"
    export(captions, folder, "ctranslate2")
    return folder


@pytest.fixture(scope="module")
def lines(shared: Path) -> list[str]:
    """Return sentences that are not in the training text, and such as no one expects."""
    path = shared / "data" / "multi30k" / "test_2016_flickr.de.gz"
    real = gzip.decompress(path.read_bytes()).decode().split("\n")[:200]
    return ["", *real, "猫 🐈 ЖЖЖ", "   ", "x", "Ein Hund läuft. " * 60, "<unk> </s> ▁ \t ."]


def shortlist_of(folder: Path) -> Shortlist:
    translator = CTranslate2Translator(folder)
    vocabularies = (translator.source_vocabulary, translator.target_vocabulary)
    return read_shortlist(folder, *map(tokens_of, vocabularies))


def test_it_covers_references_it_was_not_made_from(captions: Recipe, folder: Path) -> None:
    size, covered = coverage(shortlist_of(folder), ShardReader(captions.shards, "test"))
    assert covered > 0.96
    assert size < 2000  # of 16,000


def test_the_same_bytes_with_any_number_of_threads(captions: Recipe, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.publishing.shortlist import make_shortlist\n"
        "from pipeline.translation.serving import tokens_of\n"
        "from data_prep.vocabulary import load_vocabularies\n"
        f"shards = Path({str(captions.shards)!r})\n"
        "text = make_shortlist(shards).to_text(*map(tokens_of, load_vocabularies(shards)))\n"
        "sys.stdout.buffer.write(text.encode())"
    )
    for threads in ("1", "3"):
        done = run_process([sys.executable, "-c", code], OMP_NUM_THREADS=threads)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (folder / SHORTLIST).read_text(encoding="utf-8")


def test_translations_have_only_what_it_allows(folder: Path, lines: list[str]) -> None:
    """CTranslate2 reads the file as we do. It adds UNK and BOS."""
    translator, shortlist = CTranslate2Translator(folder), shortlist_of(folder)
    free = CTranslate2Translator(folder, shortlist=False)
    vocabulary = translator.target_vocabulary
    within = 0
    for source in encoded(translator, lines):
        ((hypotheses,),) = translator.search_batches([[source]])
        allowed = {*shortlist.allowed(source).tolist(), vocabulary.unk_id(), vocabulary.bos_id()}
        others = [h.tokens for h in hypotheses if not allowed.issuperset(h.tokens)]
        within += not others
        if others:  # one was cut at the limit, and so the sentence was translated without
            ((expected,),) = free.search_batches([[source]])
            assert hypotheses == expected
    assert within > 0.9 * len(lines)


def test_most_translations_are_those_of_the_whole_vocabulary(
    folder: Path, lines: list[str]
) -> None:
    found, expected = (
        CTranslate2Translator(folder, beam_size=1, shortlist=shortlist).translate(lines)
        for shortlist in (True, False)
    )
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same > 0.9 * len(lines)


def test_a_translation_does_not_depend_on_its_neighbours(folder: Path, lines: list[str]) -> None:
    translator = CTranslate2Translator(folder)
    together = translator.translate(lines)
    assert together == [translator.translate([line])[0] for line in lines]
    assert len(together) == len(lines)
    assert together[0] == ""


def test_it_can_be_left_out(captions: Recipe, folder: Path, lines: list[str]) -> None:
    assert json.loads((folder / "export.json").read_text())["shortlist"] is True
    free = CTranslate2Translator(folder, shortlist=False)
    assert "shortlist" not in free.backend
    evaluation = captions.evaluation.model_copy(update={"shortlist": False})
    without = folder.with_name("without")
    export(captions.model_copy(update={"evaluation": evaluation}), without, "ctranslate2")
    assert not (without / SHORTLIST).exists()
    assert CTranslate2Translator(without).n_best(lines) == free.n_best(lines)


def test_an_older_export_translates_as_ever(folder: Path, tmp_path: Path, lines: list[str]) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    settings = json.loads((old / "export.json").read_text())
    del settings["shortlist"], settings["evaluation"]["shortlist"]
    (old / "export.json").write_text(json.dumps(settings))
    (old / SHORTLIST).unlink()
    expected = CTranslate2Translator(folder, shortlist=False).translate(lines)
    assert CTranslate2Translator(old).translate(lines) == expected
    assert CTranslate2Translator(old, shortlist=False).translate(lines) == expected


def test_symbols_with_white_space_are_left_out() -> None:
    shortlist = Shortlist(np.array([0, 1]), [np.array([1, 2]), np.array([2]), np.array([1])])
    assert shortlist.allowed([1]).tolist() == [0, 1, 2]
    text = shortlist.to_text(["▁a", "<x y>", "b"], ["</s>", "<x y>", "▁b"])
    assert text == "\t</s>\n▁a\t▁b\n"


def test_a_lost_or_damaged_shortlist(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "lost")
    (tmp_path / "lost" / SHORTLIST).unlink()
    with pytest.raises(ModelError, match=f"lost: not an exported model: {SHORTLIST} is missing"):
        CTranslate2Translator(tmp_path / "lost")
    (tmp_path / SHORTLIST).write_text("\t</s>\n▁Hund\t▁dog nosuchtoken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vmap.txt:2: 'nosuchtoken' is not in the vocabulary"):
        read_shortlist(tmp_path, ["▁Hund"], ["</s>", "▁dog"])
