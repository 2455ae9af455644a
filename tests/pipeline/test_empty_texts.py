"""Text in a recipe that says nothing: as a path it would be the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe import UsageError
from pipeline.recipe_file import load_recipe


@pytest.mark.parametrize("nothing", ["", "  ", "\t", "\0"])
@pytest.mark.parametrize(
    "key",
    [
        "run_dir", "data.root", "data.test.source", "training.init_from", "tracking.uri",
        "training.deepspeed_config", "data.test.name",
    ],
)  # fmt: skip
def test_on_the_command_line(tiny_recipe: Path, key: str, nothing: str) -> None:
    with pytest.raises(UsageError, match=rf"^command line: `{key}`: must not be empty$"):
        load_recipe(tiny_recipe, [(key, nothing)])


@pytest.mark.parametrize("nothing", ["", " ", "# none"])
@pytest.mark.parametrize("key", ["training.max_epochs", "evaluation.sampling_topk", "data.train"])
def test_what_is_no_text(tiny_recipe: Path, key: str, nothing: str) -> None:
    with pytest.raises(UsageError, match=rf"^command line: `{key}`: must not be empty; null is"):
        load_recipe(tiny_recipe, [(key, nothing)])


def test_what_no_file_can_hold(tiny_recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"`data.train.0.name`: '\\ud800' is not text in UTF-8"):
        load_recipe(tiny_recipe, [("data.train", '[{name: "\\ud800", source: a, target: b}]')])


def test_in_a_list_of_the_recipe(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = tiny_recipe.read_text()
    path.write_text(text.replace("source: toy/train.de", "source: ''"))
    line = text[: text.index("source: toy/train.de")].count("\n") + 1
    with pytest.raises(UsageError, match=rf"{path}:{line}: `data.train.0.source`: must not be"):
        load_recipe(path)


def test_a_download_may_have_no_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    download = f"{{url: http://x/y, bytes: 1, sha256: {'a' * 64}, folder: ''}}"
    text = tiny_recipe.read_text()
    path.write_text(text.replace("data:\n", f"data:\n  downloads: [{download}]\n", 1))
    assert load_recipe(path).data.downloads[0].provides == ("y",)
