"""`./run.sh analyse` on a translation model: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from models.export_format import SETTINGS
from pipeline.analysis.examples import Settings
from pipeline.analysis.report import Report
from pipeline.recipe import UsageError
from pipeline.tracking.tracker import run_id_of
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command
from tests.pipeline.conftest import exported, run_of

ALL = Settings(examples=512, head=None, show=None)
ANALYSES = [
    "cka",
    "attention_distance",
    "state_similarity",
    "signals",
    "attention_encoder",
    "attention_decoder",
    "attention_cross",
]


def analysed(recipe: TranslationRecipe, against: Path | None = None, **changes: Any) -> Report:
    """Bring the analyses of a run up to date."""
    report = Report.of(recipe, against, ALL._replace(**changes))
    report.bring_up_to_date()
    return report


def content(report: Report, name: str) -> Any:
    return json.loads((report.folder / f"{name}.json").read_text())


def recipe_file(recipe: TranslationRecipe, folder: Path) -> Path:
    """Return a file that has the recipe."""
    path = folder / "other.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    return path


def test_a_ring_alone(talkative_run: TranslationRecipe) -> None:
    report = analysed(talkative_run)
    assert report.folder == talkative_run.run_dir / "analysis"
    names = [f"{name}.{ending}" for name in ANALYSES for ending in ("json", "png")]
    assert [path.name for path in report.files] == [*names, "analysis.json"]
    for path in report.files:
        assert path.suffix == ".json" or path.read_bytes().startswith(b"\x89PNG")

    cka = content(report, "cka")
    assert (cka["rows"], cka["columns"], cka["examples"]) == ("run", "run", 40)
    for matrix in map(np.array, cka["stacks"].values()):
        assert matrix.shape == (4, 4)
        np.testing.assert_allclose(matrix.diagonal(), 1)
        np.testing.assert_allclose(matrix, matrix.T)
    for cosines in content(report, "state_similarity")["models"]["run"].values():
        assert np.shape(cosines) == (4, 4)
    distances = content(report, "attention_distance")["models"]["run"]
    assert all(np.shape(stack["levels"]) == (3, 4) for stack in distances.values())
    assert distances["encoder"]["uniform"] > distances["decoder"]["uniform"]
    signals = content(report, "signals")["stacks"]
    assert list(signals["decoder"]) == ["q", "k", "v", "ffn"]

    cross = content(report, "attention_cross")
    assert cross["rows"][-1] == cross["columns"][-1] == "</s>"
    levels = np.array(cross["levels"])
    assert levels.shape == (3, len(cross["rows"]), len(cross["columns"]))
    np.testing.assert_allclose(levels.sum(2), 1, atol=1e-3)
    assert content(report, "attention_decoder")["rows"][0] == "<s>"


@pytest.mark.slow
def test_what_is_up_to_date_is_not_done_again(talkative_run: TranslationRecipe) -> None:
    report = analysed(talkative_run)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in report.files}
    again = analysed(talkative_run)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in again.files} == before
    (report.folder / "cka.png").write_bytes(b"damaged")
    again = analysed(talkative_run)
    assert {path: path.read_bytes() for path in again.files} == {
        path: content for path, (_, content) in before.items()
    }
    assert (report.folder / "cka.json").stat().st_mtime_ns > before[report.folder / "cka.json"][0]
    assert not Report.of(talkative_run, None, ALL._replace(head=2)).up_to_date


def test_settings(talkative_run: TranslationRecipe) -> None:
    settings = Settings(examples=9, head=2, show=3)
    found = {each.name: each for each in Report.of(talkative_run, None, settings).analyses()}
    assert found["cka"].content["examples"] == 9
    shown = found["attention_encoder"].content
    assert (shown["pair"], shown["heads"]) == (3, "head 2")


@pytest.mark.slow
def test_against_a_transformer(
    talkative_run: TranslationRecipe,
    prepared: TranslationRecipe,
    tiny_recipe: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    transformer = run_of(
        prepared, tiny_recipe, tmp_path / "plain", architecture="transformer", num_levels="2"
    )
    done = command(
        "pipeline.analyse",
        "--config",
        recipe_file(talkative_run, talkative_run.run_dir.parent),
        "--against",
        recipe_file(transformer, tmp_path),
    )
    assert done.returncode == 0, done.stderr
    folder = talkative_run.run_dir / "analysis" / "against-plain"
    names = ["cka", "attention_distance", "state_similarity"]
    assert done.stdout == f"{folder}: {', '.join(f'{name}.png' for name in names)}\n"
    files = [f"{name}.{ending}" for name in names for ending in ("json", "png")]
    cka = json.loads((folder / "cka.json").read_text())
    assert (cka["rows"], cka["columns"]) == ("run", "plain")
    assert np.shape(cka["stacks"]["encoder"]) == (4, 3)
    distances = json.loads((folder / "attention_distance.json").read_text())
    assert np.shape(distances["models"]["plain"]["decoder"]["levels"]) == (2, 4)

    client, run_id = MlflowClient(talkative_run.tracking_uri), run_id_of(talkative_run)
    assert run_id is not None
    logged = {each.path for each in client.list_artifacts(run_id, "analysis/against-plain")}
    assert logged == {f"analysis/against-plain/{name}" for name in (*files, "analysis.json")}


def test_against_an_export_of_the_same_model(talkative_run: TranslationRecipe) -> None:
    report = analysed(talkative_run, exported(talkative_run, "safetensors"))
    cka = content(report, "cka")
    assert (cka["rows"], cka["columns"]) == ("run", "run-safetensors-None")
    for matrix in map(np.array, cka["stacks"].values()):
        np.testing.assert_allclose(matrix.diagonal(), 1, atol=1e-5)


def test_a_ring_without_signals_says_so(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = run_of(prepared, tiny_recipe, tmp_path / "none", level_signals="none")
    found = {each.name: each for each in Report.of(recipe, None, ALL).analyses()}
    stacks = dict.fromkeys(("encoder", "decoder"), "no level signals")
    assert found["signals"].content["stacks"] == stacks
    found["signals"].draw(tmp_path / "signals.png")
    assert (tmp_path / "signals.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(
    talkative_run: TranslationRecipe, ctranslate2_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(exported(talkative_run, "safetensors"), tmp_path / "other")
    with (other / "spm.model").open("ab") as vocabulary:
        vocabulary.write(b"\0")
    back = shutil.copytree(exported(talkative_run, "safetensors"), tmp_path / "back")
    settings = json.loads((back / SETTINGS).read_text())
    way = {"source_lang": "en", "target_lang": "de"}
    (back / SETTINGS).write_text(json.dumps({**settings, **way}))
    for against, expected in (
        (tmp_path / "nothing", "neither a recipe nor the folder of an export"),
        (other, "its languages or vocabularies are not those of"),
        (back, "its languages or vocabularies are not those of"),
        (ctranslate2_folder, "export with `--format safetensors`"),
    ):
        with pytest.raises(UsageError, match=expected):
            analysed(talkative_run, against)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"head": 5}, "the model has 4 heads"),
        ({"examples": 3}, "4 or more"),
        ({"show": 41}, "--show 41"),
        ({"show": 4, "against": ctranslate2_folder}, "--against draws none"),
    ]
    for changes, expected in wrong:
        with pytest.raises(UsageError, match=expected):
            analysed(talkative_run, **changes)
