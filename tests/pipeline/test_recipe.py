"""Recipes: what is accepted, and how what is not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe import ROOT, Recipe, UsageError
from pipeline.recipe_file import Draft, load_recipe, recipe_keys
from pipeline.training.deepspeed_config import json_of
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load_recipe(path, kind=Recipe)
    assert recipe.run_dir == Path("runs") / path.stem
    assert json_of(recipe.training).is_file()


def test_a_home_is_that_of_whoever_asks(tiny_recipe: Path) -> None:
    assert load_recipe(tiny_recipe, [("run_dir", "~/run")]).run_dir == Path.home() / "run"


def test_every_key_is_documented() -> None:
    keys = dict(recipe_keys(TranslationRecipe))
    assert {
        "run_dir", "data.root", "training.seed", "training.max_steps", "training.max_tokens",
        "model.architecture", "model.model_dim", "model.num_levels", "evaluation.beam_size",
        "tracking.uri",
    } <= keys.keys()  # fmt: skip
    assert [key for key, field in keys.items() if not field.description] == []


def test_overrides(tiny_recipe: Path) -> None:
    recipe = load_recipe(
        tiny_recipe,
        [
            ("training.learning_rate", "7e-4"),
            ("data.vocabulary.size", "500"),
            ("run_dir", "123"),
            ("tracking.uri", "null"),
            ("data.train", "[{name: a, source: b, target: c}]"),
        ],
    )
    assert recipe.training.learning_rate == 7e-4
    assert recipe.data.vocabulary.size == 500
    assert recipe.run_dir == Path("123")
    assert recipe.tracking.uri is None
    assert recipe.data.train[0].source == "b"


def test_a_path_with_a_hash_is_no_comment(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny_recipe.read_text().replace("{size: 300}", "{}"))

    def taken_from(text: str) -> object:
        return load_recipe(path, [("data.vocabulary.from", text)]).data.vocabulary.taken_from

    assert taken_from("runs/my run #2") == Path("runs/my run #2")
    with pytest.raises(UsageError, match="joint must be false"):  # these are two
        taken_from("[a.model, b.model]")


def test_a_key_that_others_overrule_is_refused(tiny_recipe: Path) -> None:
    levels = [("model.encoder_levels", "6"), ("model.decoder_levels", "2")]
    assert load_recipe(tiny_recipe, levels).model.decoder_levels == 2  # the file's says 3 of both
    assert load_recipe(tiny_recipe, [levels[0], ("model.num_levels", "4")])
    with pytest.raises(UsageError, match=r"^command line: `model\.num_levels`: says nothing where"):
        load_recipe(tiny_recipe, [*levels, ("model.num_levels", "4")])
    draft = Draft(tiny_recipe, levels)
    with pytest.raises(UsageError, match="says nothing where"):  # as a sweep would search it
        draft.recipe({"model.num_levels": 4})


def test_an_override_changes_no_section_that_was_alike(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = tiny_recipe.read_text()
    alike = "{name: toy-valid, source: toy/valid.de, target: toy/valid.en}"
    own = "{name: toy-test, source: toy/test.de, target: toy/test.en}"
    path.write_text(text.replace(alike, f"&one {alike}").replace(own, "*one"))
    draft = Draft(path, [("data.test.name", "other"), ("data.test.source", "toy/test.de")])
    recipe = draft.recipe()
    assert isinstance(recipe, TranslationRecipe)
    assert (recipe.data.valid.name, recipe.data.test.name) == ("toy-valid", "other")
    assert recipe.data.valid.source == "toy/valid.de"
    path.write_text(draft.text())  # as a sweep does
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("find", "replace", "expected"),
    [
        ("max_steps:", "max_step:", r":\d+: unknown key `training.max_step`; did you mean `training"
                                    r".max_steps`\?"),
        ("model:", "model:\n  architecture: transformer\n  signal_rank: 3",
         r"signal_rank \(3\) is for architecture ringformer with level_signals all or"),
        ("max_steps: 6", "max_steps: many", r":\d+: `training.max_steps`: .*integer.*'many'"),
        ("max_steps: 6", "max_steps: 0", r":\d+: `training.max_steps`: .*greater than 0.*0"),
        ("toy_corpus:", "target_lang: ko\n  toy_corpus:",
         r":\d+: `data`: target_lang: sacreBLEU needs more packages to score ko; .*\[ko\]"),
        ("toy_corpus:", "target_lang: zh/CN\n  toy_corpus:",
         r":\d+: `data.target_lang`: .*match pattern .*zh/CN"),
        ("max_steps: 6", "max_steps: true", r":\d+: `training`: max_steps cannot be true"),
        ("beam_size: 2", "beam_size: 2, sampling_topk: false",
         r":\d+: `evaluation`: sampling_topk cannot be false"),
        ("beam_size: 2", "beam_size: 2, test_sets: [{name: valid, source: a, references: [b]}]",
         r"`recipe`: the test set valid must not be called valid: the validation set is, in MLf"),
        ("num_heads: 4", "num_heads: 5", r":\d+: `model`: model_dim \(32\).*num_heads \(5\)"),
        ("max_seq_len: 96", "max_seq_len: 16", r"`recipe`: data.max_tokens_per_side \(64\)"),
        ("{size: 300}", "{size: 300, joint: false}",
         r"`recipe`: model.tied_embeddings must be false: data.vocabulary.joint"),
        ("beam_size: 2", "beam_size: 2, sampling_seed: 7",
         r":\d+: `evaluation`: .*set sampling_topk"),
        ("run_dir:", "rundir:", r"unknown key `rundir`; did you mean `run_dir`|`run_dir` is req"),
        ("source: toy/train.de,", "", r":\d+: `data.train.0`: source is required"),
        ("max_steps: 6", "max_steps: 99999999999999999999",
         r":\d+: `training.max_steps`: expected a number between ±9007199254740992, not 99"),
        ("source: toy/train.de, target: toy/train.en", "folder: toy",
         r":\d+: unknown key `data.train.0.folder`; it is one of `task: classification`, which"),
        ("{size: 300}", "{sise: 300}",
         r"unknown key `data.vocabulary.sise`; did you mean `data.vocabulary.size`\?"),
        ("data:", "data: [", r":\d+: not valid YAML"),
        ("data:", "data:\ndata:", r":\d+: not valid YAML: .*duplicate key"),
        ("name: toy,", "name: 2024-02-30,", r": not valid YAML: day is out of range for month"),
        ("name: toy,", 'name: toy, tag: "<a>\\n",', r":\d+: `data.train.0`: tag .* on one line"),
    ],
)  # fmt: skip
def test_bad_recipe_is_one_line_with_file_and_key(
    tiny_recipe: Path, tmp_path: Path, find: str, replace: str, expected: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(tiny_recipe.read_text().replace(find, replace, 1))
    with pytest.raises(UsageError, match=expected) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainin.max_steps", "3"], "did you mean `--training.max_steps`?"),
        (["--training.max_steps", "x"], "command line: `training.max_steps`"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot read the recipe"),
        (["stray"], "unknown argument `stray`"),
        (["--training.max_steps"], "expected one argument"),
        (["--config", "a.yaml", "--config", "a.yaml"], "--config is given twice"),
        (["--local_rank", "-1", "--local_rank", "-1"], "--local_rank is given twice"),
        (["--deepspeed_config", ""], "`training.deepspeed_config`: must not be empty"),
    ],
)
def test_bad_command_line_exits_2(command: Command, arguments: list[str], expected: str) -> None:
    done = command("pipeline.prepare", *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_shows_every_key_with_its_documentation(command: Command) -> None:
    done = command("pipeline.prepare", "--help_keys")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for key, field in recipe_keys(TranslationRecipe):
        assert f"--{key}" in text
        assert " ".join(field.description.split()[:4]) in text
