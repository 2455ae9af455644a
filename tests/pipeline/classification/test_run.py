"""From images to a registered classifier by the doors that `./run.sh` opens."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from data_prep.images.shards import ImageReader
from pipeline.classification.classifier import classifier_of_export
from pipeline.classification.scores import scores
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe_file import load_recipe
from tests.conftest import ROOT, Command, run_process
from tests.pipeline.classification.conftest import CLASSES
from tests.pipeline.ranks import finish, start

pytestmark = pytest.mark.slow

RUN = str(ROOT / "run.sh")


@pytest.fixture(scope="module")
def config(bars: Path) -> list[str]:
    """Return the options of a run of its own."""
    run_dir = bars.parent / "as-users-do" / "run"
    return ["--config", str(bars), "--run_dir", str(run_dir)]


@pytest.fixture(scope="module")
def done(
    config: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """Prepare, train and evaluate."""
    prepared = command("pipeline.prepare", *config)
    assert prepared.returncode == 0, prepared.stderr
    log = tmp_path_factory.mktemp("done") / "log"
    assert finish(start(config, log, ranks=1)) == [0], log.read_text()
    return command("pipeline.evaluate", *config)


@pytest.fixture(scope="module")
def recipe(bars: Path, config: list[str]) -> ClassificationRecipe:
    return load_recipe(bars, [("run_dir", config[-1])], kind=ClassificationRecipe)


def test_all_stages(done: subprocess.CompletedProcess[str], recipe: ClassificationRecipe) -> None:
    assert done.returncode == 0, done.stderr
    folder = recipe.run_dir / "evaluation" / "bars-test"
    found = json.loads((folder / "scores.json").read_text())
    assert found["accuracy"] > 70
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] <= 100
    assert done.stdout.startswith(f"accuracy {found['accuracy']:.2f}% (")
    reader = ImageReader(recipe.shards, "test")
    truth = [reader.data.classes[label] for label in reader.labels()]
    answers = (folder / "predictions.txt").read_text().splitlines()
    right = sum(answer == name for answer, name in zip(answers, truth, strict=True))
    assert found["accuracy"] == round(100 * right / 60, 2)
    assert [sum(row) for row in found["confusion"]] == [20, 20, 20]
    assert sum(found["confusion"][i][i] for i in range(3)) == right
    rows = [line.split("\t") for line in (folder / "predictions.tsv").read_text().splitlines()]
    wrong = [row for row in rows[1:] if row[1] != row[2]]
    assert rows[1 : 1 + len(wrong)] == wrong  # these come first
    assert sorted(row[0] for row in rows[1:]) == sorted(reader.names())
    name, truth_of_first = rows[1][:2]
    assert (recipe.data.root / name).is_file()
    assert Path(name).parent.name == truth_of_first


def test_what_mlflow_has(
    done: subprocess.CompletedProcess[str], recipe: ClassificationRecipe
) -> None:
    client = MlflowClient(recipe.tracking_uri)
    champion = client.get_model_version_by_alias("teams-bars-bars-test", "champion")
    run = client.get_run(str(champion.run_id))
    folder = recipe.run_dir / "evaluation" / "bars-test"
    found = json.loads((folder / "scores.json").read_text())
    for name in ("accuracy", "accuracy_low", "accuracy_high"):
        assert run.data.metrics[f"quality/test_{name}"] == found[name]
    assert run.data.metrics["loss/test_loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert {"quality/valid_accuracy", "loss/train_loss"} <= run.data.metrics.keys()
    assert run.data.params["data.train"] == "bars"
    assert run.data.params["shards.classes"] == "3"
    assert run.info.status == "FINISHED"
    place = run.data.tags["evaluation.bars-test"]
    names = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, place)}
    assert {"scores.json", "confusion.png", "most_wrong.png", "predictions.tsv"} <= names
    note = run.data.tags["mlflow.note.content"]
    interval = f"{found['accuracy_low']:.2f} to {found['accuracy_high']:.2f}"
    row = f"| bars-test | 60 | {found['accuracy']:.2f} | {interval} | – | {found['loss']:.4f} |\n"
    assert row in note.replace("&emsp;", "")
    assert "\n| validation&emsp; | 30&emsp; |" in note
    assert f"[bars-test](#/experiments/1/runs/{run.info.run_id}/artifacts/{place}/" in note
    assert "predictions.html" in names
    assert "\n./run.sh \\\n    --config " in note
    assert champion.tags["accuracy"] == str(found["accuracy"])
    assert f"accuracy **{found['accuracy']:.2f}%**" in str(champion.description)


def test_the_registered_model_classifies_files(
    done: subprocess.CompletedProcess[str], bars: Path, recipe: ClassificationRecipe
) -> None:
    code = (
        "import sys, mlflow; from pathlib import Path\n"
        f"mlflow.set_tracking_uri({recipe.tracking_uri!r})\n"
        "model = mlflow.pyfunc.load_model('models:/teams-bars-bars-test@champion')\n"
        "print(model.predict([Path(name).read_bytes() for name in sys.argv[1:]]))\n"
        "assert 'torch' not in sys.modules"
    )
    files = sorted((bars.parent / "data" / "test").glob("*/0[0-4].png"))
    served = run_process(["python", "-c", code, *map(str, files)], PYTHONPATH="")
    assert served.returncode == 0, served.stderr
    found = ast.literal_eval(served.stdout)
    best = [max(shares, key=shares.get) for shares in found]
    assert all(set(shares) == set(CLASSES) for shares in found)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found)
    assert sum(name == path.parent.name for name, path in zip(best, files, strict=True)) >= 9


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_an_export_is_the_model(
    done: subprocess.CompletedProcess[str],
    config: list[str],
    recipe: ClassificationRecipe,
    tmp_path: Path,
    command: Command,
    format: str,
) -> None:
    options = ["--format", format, "--output", tmp_path / "model"]
    exported = command("pipeline.export", *config, *options)
    assert exported.returncode == 0, exported.stderr
    reader = ImageReader(recipe.shards, "test")
    images, labels = reader.read(np.arange(len(reader)))
    probabilities = classifier_of_export(tmp_path / "model").probabilities(images)
    ours = json.loads((recipe.run_dir / "evaluation" / "bars-test" / "scores.json").read_text())
    again = scores(probabilities, labels)
    assert again["accuracy"] == ours["accuracy"]
    assert again["loss"] == pytest.approx(ours["loss"], abs=2e-5)
    if format == "onnx":
        evaluated = command("pipeline.evaluate", *config, "--model", tmp_path / "model")
        assert evaluated.returncode == 0, evaluated.stderr
        assert f"accuracy {ours['accuracy']:.2f}%" in evaluated.stdout
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"accuracy **{ours['accuracy']:.2f}%**" in card


def test_classify(
    done: subprocess.CompletedProcess[str], bars: Path, config: list[str], tmp_path: Path
) -> None:
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    whole = (bars.parent / "data" / "test" / "down" / "00.png").read_bytes()
    broken.write_bytes(whole[:60])
    text.write_text("no image")
    files = [bars.parent / "data" / "test" / kind / "01.png" for kind in CLASSES]
    paths = [str(path) for path in (files[0], broken, files[1], text, files[2])]
    found = run_process([RUN, "classify", *paths, *config, "--top", "2"])
    assert found.returncode == 1
    lines = [line.split("\t") for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == [str(path) for path in files]
    for line in lines:
        assert len(line) == 3
        (first, most), (second, less) = (part.rsplit(" ", 1) for part in line[1:])
        assert {first, second} <= set(CLASSES)
        assert 1 >= float(most) >= float(less) >= 0
    assert f"classify: {broken}: damaged or truncated" in found.stderr
    assert f"classify: {text}: neither JPEG nor PNG" in found.stderr


def test_a_baseline(
    done: subprocess.CompletedProcess[str],
    config: list[str],
    recipe: ClassificationRecipe,
    command: Command,
) -> None:
    run_id = json.loads((recipe.run_dir / "tracking" / "run.json").read_text())
    (state,) = run_id.values()
    compared = command("pipeline.evaluate", *config, "--baseline", state["run_id"])
    assert compared.returncode == 0, compared.stderr
    assert "bars-test: +0.00 points of accuracy, p = 1.000 (McNemar's test" in compared.stdout


@pytest.mark.parametrize(
    ("door", "options", "expected"),
    [
        ("translate", [], "this command is not for the task classification"),
        ("export", ["--format", "ctranslate2"], "--format ctranslate2 is for translation"),
        ("export", ["--quantization", "int8"], "--quantization int8 are for translation"),
        ("train", ["--model.patch_size", "5"], "must be a multiple of model.patch_size"),
        ("train", ["--training.max_tokens", "9"], "unknown argument `--training.max_tokens`"),
        ("train", ["--training.augmentation", "[{transform: spin}]"], "augmentation.0"),
    ],
)
def test_what_is_refused(
    bars: Path, command: Command, door: str, options: list[str], expected: str
) -> None:
    refused = command(f"pipeline.{door}", "--config", bars, *options)
    assert refused.returncode == 2
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
