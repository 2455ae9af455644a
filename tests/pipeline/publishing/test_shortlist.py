"""Shortlists of real text: what they allow, that exports translate with them, and as without."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.prepare import prepare
from data_prep.shards import ShardReader
from models.export_format import SHORTLISTS, Format, ModelError
from pipeline.publishing.exports import export
from pipeline.publishing.shortlist import coverage, make_shortlist
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.translation.serving import Part
from pipeline.translation.shortlist import Shortlist
from pipeline.translation.translator import load_exports
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.conftest import encoded
from tests.pipeline.ranks import train

pytestmark = pytest.mark.slow  # they prepare a corpus, and train a little

CAPTIONS = ROOT / "recipes" / "multi30k_de_en.yaml"
KEYS = {
    "data.vocabulary.size": 16_000, "model.model_dim": 32, "model.ffn_inner_dim": 64,
    "model.num_levels": 2, "training.max_steps": 120, "training.warmup_steps": 30,
    "evaluation.average_checkpoints": 1, "evaluation.shortlist": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def captions(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> TranslationRecipe:
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
def shortlist(captions: TranslationRecipe) -> Shortlist:
    """Return the shortlist of that training."""
    return make_shortlist(captions.shards)


@pytest.fixture(scope="module", params=["ctranslate2", "onnx"])
def format(request: pytest.FixtureRequest) -> Format:
    """Return a format that has shortlists."""
    format: Format = request.param
    return format


@pytest.fixture(scope="module")
def folder(captions: TranslationRecipe, format: Format) -> Path:
    """Return the folder of an export of that training, in float32."""
    folder = captions.run_dir.parent / format
    export(captions, folder, format)
    return folder


@pytest.fixture(scope="module")
def lines(shared: Path) -> list[str]:
    """Return sentences that are not in the training text, and such as no one expects."""
    path = shared / "data" / "multi30k" / "test_2016_flickr.de.gz"
    real = gzip.decompress(path.read_bytes()).decode().split("\n")[:200]
    return ["", *real, "猫 🐈 ЖЖЖ", "   ", "x", "Ein Hund läuft. " * 60, "<unk> </s> ▁ \t ."]


def test_it_covers_references_it_was_not_made_from(
    captions: TranslationRecipe, shortlist: Shortlist
) -> None:
    size, covered = coverage(shortlist, ShardReader(captions.shards, "test"))
    assert covered > 0.96
    assert size < 2000  # of 16,000


def test_the_same_bytes_with_more_threads(
    captions: TranslationRecipe, format: Format, folder: Path
) -> None:
    text = "to_text(*map(tokens_of, load_vocabularies(shards))).encode()"
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.publishing.shortlist import make_shortlist\n"
        "from pipeline.translation.serving import tokens_of\n"
        "from data_prep.vocabulary import load_vocabularies\n"
        f"shards = Path({str(captions.shards)!r})\n"
        "shortlist = make_shortlist(shards)\n"
        f"sys.stdout.buffer.write(shortlist.{text if format == 'ctranslate2' else 'to_bytes()'})"
    )
    threads = str(torch.get_num_threads() + 2)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (folder / SHORTLISTS[format]).read_bytes()


def test_translations_have_only_what_it_allows(
    format: Format, folder: Path, shortlist: Shortlist, lines: list[str]
) -> None:
    """CTranslate2 reads its file as we do. It adds UNK and BOS."""
    translator = load_exports(folder)
    free = load_exports(folder, shortlist=False)
    vocabulary = translator.target_vocabulary
    within = 0
    for source in encoded(translator, lines):
        ((hypotheses,),) = translator.search_batches([[Part(source)]])
        allowed = {*shortlist.allowed(source).tolist(), vocabulary.unk_id(), vocabulary.bos_id()}
        others = [h.tokens for h in hypotheses if not allowed.issuperset(h.tokens)]
        within += not others
        if others:  # one was cut at the limit, and so the sentence was translated without
            assert format == "ctranslate2"
            ((expected,),) = free.search_batches([[Part(source)]])
            assert hypotheses == expected
    assert within > 0.9 * len(lines)


def test_most_translations_are_those_of_the_whole_vocabulary(
    folder: Path, lines: list[str]
) -> None:
    found, expected = (
        load_exports(folder, beam_size=1, shortlist=shortlist).translate(lines)
        for shortlist in (True, False)
    )
    same = sum(one == other for one, other in zip(found, expected, strict=True))
    assert same > 0.9 * len(lines)


@pytest.mark.parametrize("share", [0, 1])
def test_a_translation_does_not_depend_on_its_neighbours(
    share: float, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together the sentences may have much of the vocabulary; ONNX Runtime then multiplies with all
    of it."""
    translator = load_exports(folder)
    by_itself = [translator.n_best([line])[0] for line in lines]
    monkeypatch.setattr("pipeline.translation.onnx_translator.LARGE_SHARE", share)
    together = translator.n_best(lines)
    for found, alone in zip(together, by_itself, strict=True):
        assert [each.text for each in found] == [each.text for each in alone]
        scores = [each.score for each in alone]
        assert [each.score for each in found] == pytest.approx(scores, abs=1e-4)
    assert len(together) == len(lines)
    assert [each.text for each in together[0]] == [""]


def test_a_prefix_may_have_what_it_does_not(
    format: Format, folder: Path, shortlist: Shortlist, lines: list[str]
) -> None:
    translator, free = load_exports(folder), load_exports(folder, shortlist=False)
    some = [line for line in lines if line][:8]
    allowed = {token for ids in encoded(translator, some) for token in shortlist.allowed(ids)}
    vocabulary = translator.target_vocabulary
    outside = next(
        piece[1:]
        for piece in map(vocabulary.id_to_piece, range(vocabulary.get_piece_size()))
        if piece.startswith("▁")
        and len(piece) > 3
        and not allowed.issuperset(vocabulary.encode(piece[1:]))
    )
    prefixes = [outside if number % 2 else "" for number in range(len(some))]
    found, expected = (each.n_best(some, prefixes=prefixes) for each in (translator, free))
    assert all(
        best.text.startswith(prefix) for (best, *_), prefix in zip(found, prefixes, strict=True)
    )
    if format == "ctranslate2":  # which translates such a sentence without a shortlist
        assert found[1::2] == expected[1::2]


def test_it_can_be_left_out(
    captions: TranslationRecipe, format: Format, folder: Path, lines: list[str]
) -> None:
    assert json.loads((folder / "export.json").read_text())["shortlist"] is True
    free = load_exports(folder, shortlist=False)
    assert "shortlist" not in free.backend
    assert "shortlist" in load_exports(folder).backend
    evaluation = captions.evaluation.model_copy(update={"shortlist": False})
    without = folder.with_name(f"{format}-without")
    export(captions.model_copy(update={"evaluation": evaluation}), without, format)
    assert not (without / SHORTLISTS[format]).exists()
    assert load_exports(without).n_best(lines) == free.n_best(lines)


def test_an_older_export_translates_as_ever(
    format: Format, folder: Path, tmp_path: Path, lines: list[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    settings = json.loads((old / "export.json").read_text())
    del settings["shortlist"], settings["evaluation"]["shortlist"]
    (old / "export.json").write_text(json.dumps(settings))
    (old / SHORTLISTS[format]).unlink()
    expected = load_exports(folder, shortlist=False).translate(lines)
    assert load_exports(old).translate(lines) == expected
    assert load_exports(old, shortlist=False).translate(lines) == expected


def test_symbols_with_white_space_are_left_out() -> None:
    lists = [np.array(ids) for ids in ([0, 1], [1, 2], [2], [1])]
    shortlist = Shortlist.of_lists(lists)
    assert shortlist.allowed([1]).tolist() == [0, 1, 2]
    text = shortlist.to_text(["▁a", "<x y>", "b"], ["</s>", "<x y>", "▁b"])
    assert text == "\t</s>\n▁a\t▁b\n"


def test_a_lost_shortlist(format: Format, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "lost")
    name = SHORTLISTS[format]
    (tmp_path / "lost" / name).unlink()
    with pytest.raises(ModelError, match=f"lost: not an exported model: {name} is missing"):
        load_exports(tmp_path / "lost")


def test_a_damaged_shortlist(
    captions: TranslationRecipe, shortlist: Shortlist, tmp_path: Path
) -> None:
    folder = tmp_path / "onnx"
    export(captions, folder, "onnx")
    path = folder / SHORTLISTS["onnx"]
    whole = path.read_bytes()
    assert whole == shortlist.to_bytes()
    other = Shortlist.of_lists([np.array([1, 2, 3]), np.array([4])]).to_bytes()
    ids = shortlist.ids.astype(np.int64)
    damage = [b"", whole[: len(whole) // 2], whole[:1000] + whole[2000:], other]
    damage += [Shortlist(ids + shift, shortlist.offsets).to_bytes() for shift in (-1_000, 16_000)]
    damage += [Shortlist(ids, shortlist.offsets[::-1]).to_bytes(), b"nothing"]
    for content in damage:
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"not an exported model: .*shortlist\.npz"):
            load_exports(folder)
