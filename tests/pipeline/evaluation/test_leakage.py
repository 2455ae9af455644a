"""What of a test set is in the training text is said beside its score."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.evaluate import summary
from pipeline.evaluation.evaluator import evaluate
from pipeline.evaluation.test_sets import Overlap, load_test_sets, overlap_of
from pipeline.publishing.model_card import model_card
from pipeline.recipe_file import load_recipe
from pipeline.train import STEPS_LEFT
from pipeline.translation.run_model import checkpoints_of_run, untrained_model
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command, run_process
from tests.pipeline.conftest import save_checkpoint


@pytest.fixture
def leaking(prepared: TranslationRecipe, tmp_path: Path) -> TranslationRecipe:
    """A prepared run, and a test set that was added later: three sentences, of which the training
    text has two sources and a second reference."""
    shutil.copytree(prepared.run_dir, tmp_path / "run", ignore=lambda _, names: {"checkpoints"})
    train = tmp_path / "run" / "clean" / "train" / "00000"
    german, english = ((train / f"text.{lang}").read_text().split("\n") for lang in ("de", "en"))
    sources = [f"\ufeff{german[0]} ", german[5], "Neu\rund\0alt.", ""]
    files = {
        "late.de": sources,
        "late.a.en": ["a", "b", "c", ""],
        "late.b.en": [english[7], "", "", ""],
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    late = "[{name: late, source: late.de, references: [late.a.en, late.b.en]}]"
    return load_recipe(
        prepared.run_dir.parent / "tiny.yaml",
        [
            ("run_dir", str(tmp_path / "run")),
            ("data.root", str(tmp_path)),
            ("evaluation.test_sets", late),
            ("evaluation.untrained_baseline", "false"),
        ],
    )


def test_leakage_is_said_beside_the_score(leaking: TranslationRecipe) -> None:
    save_checkpoint(untrained_model(leaking), leaking)
    results = evaluate(leaking).results
    own, late = (result.scores["in_training_text"] for result in results)
    assert own == {"sources": 0, "references": 0}
    assert late == {"sources": 2, "references": 1}
    table = results[1].tables()["translations"]
    assert table["source"][1:3] == [list(load_test_sets(leaking))[1].sources[1], "Neu und alt."]
    of_late, of_own = summary(leaking, results).split("\n")
    assert "of its 4 sentences the training text has 2 sources and 1 references" in of_late
    assert "training text" not in of_own
    card = model_card(leaking, checkpoints_of_run(leaking))
    assert "| 2 sources, 1 references |" in card


def test_training_wants_test_sets_taken_out_first(
    leaking: TranslationRecipe, command: Command
) -> None:
    path = leaking.run_dir.parent / "recipe.yaml"
    YAML().dump(leaking.model_dump(mode="json"), path)
    done = command("pipeline.train", "--config", path, "--steps_left")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "train: error: test set late was not among evaluation.test_sets when "
    )
    shutil.move(leaking.data.root / "late.b.en", leaking.run_dir)  # cannot be compared here
    assert command("pipeline.train", "--config", path, "--steps_left").returncode == STEPS_LEFT


def test_without_the_training_text_it_is_not_known(leaking: TranslationRecipe) -> None:
    test_sets = list(load_test_sets(leaking))
    assert [overlap_of(leaking, each) for each in test_sets] == [Overlap(0, 0), Overlap(2, 1)]
    text = leaking.clean_text / "train" / "00000" / "text.de"
    text.write_text("".join(f"<BT> {line}\n" for line in text.read_text().splitlines()))
    tagged = leaking.data.train[0].model_copy(update={"tag": "<BT>"})
    data = leaking.data.model_copy(update={"train": (tagged,)})
    assert overlap_of(leaking.model_copy(update={"data": data}), test_sets[1]) == Overlap(2, 1)
    shutil.rmtree(leaking.clean_text / "train")
    assert overlap_of(leaking, test_sets[1]) is None


def test_sacrebleus_cache_is_looked_at_and_nothing_fetched(
    prepared: TranslationRecipe, tmp_path: Path
) -> None:
    cache = tmp_path / "wmt14" / "full"
    cache.mkdir(parents=True)
    for field in ("src", "ref", "docid", "genre", "origlang"):
        (cache / f"wmt14_full.de-en.{field}").write_text("Ja.\n")
    code = (
        "import sys, socket; from pathlib import Path;"
        "socket.getaddrinfo = socket.create_connection = lambda *_, **__: sys.exit('fetched');"
        "from pipeline.recipe_file import load_recipe;"
        "from pipeline.evaluation.test_sets import held_out_of;"
        "recipe = load_recipe(Path(sys.argv[1]), [('evaluation.test_sets', sys.argv[2])]);"
        "print([(t.name, len(t.files), bool(t.digest)) for t in held_out_of(recipe)])"
    )
    recipe = str(prepared.run_dir.parent / "tiny.yaml")
    names = "[wmt14/full, wmt17, wmt21]"
    done = run_process([sys.executable, "-c", code, recipe, names], SACREBLEU=str(tmp_path))
    assert done.stdout == (
        "[('wmt14/full', 2, True), ('wmt17', 0, False), ('wmt21', 0, False)]\n"
    ), done.stderr
    done = run_process([sys.executable, "-c", code, recipe, "[wmt14/ful]"], SACREBLEU=str(tmp_path))
    assert "sacreBLEU has no test set wmt14/ful" in done.stderr
