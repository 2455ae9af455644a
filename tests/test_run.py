"""`./run.sh` goes from corpora to BLEU, with the exit codes, files and pages that it promises."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from pipeline.checkpoints.folder import list_checkpoints
from pipeline.evaluation.test_sets import load_test_sets, load_validation_set
from pipeline.evaluation.translations import TranslationResult
from pipeline.publishing.registry import register
from pipeline.publishing.servable import servable_translation
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import Tracker, run_id_of, send_left_over
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import Command, free_port, mlflow_server, run_process, wait_for_answer
from tests.mlflow_ui import MlflowUi, needs_chromium

pytestmark = pytest.mark.slow

RUN = str(ROOT / "run.sh")
RIVAL_BLEU = 12.34


def champion_of(client: MlflowClient) -> ModelVersion:
    """Return the registered model that is champion."""
    return client.get_model_version_by_alias("ringformer-de-en-toy-test", "champion")


def told(run: Run) -> dict[str, str]:
    """Return the rows of the table that a run's note has, by their first cell."""
    note = run.data.tags["mlflow.note.content"].replace("&emsp;", "")
    rows = (line[2:].split(" | ", 1) for line in note.splitlines() if line.startswith("| "))
    return {name: cells for name, cells in rows}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path) -> Path:
    """Return the tiny recipe with enough steps that the model says something."""
    path = tiny_recipe.with_name("run_sh.yaml")
    text = tiny_recipe.read_text().replace("max_steps: 6", "max_steps: 80")
    text = text.replace("log_every: 2", "log_every: 20").replace("_every: 3", "_every: 40")
    path.write_text(f"# A recipe for tests.\n{text}")
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> subprocess.CompletedProcess[str]:
    """Run all stages of `./run.sh` with that recipe."""
    return run_process(
        [RUN, "--config", str(recipe)], MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="0.2"
    )


def test_one_command_ends_with_the_bleu_line(
    trained: subprocess.CompletedProcess[str], recipe: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    folder = load_recipe(recipe).run_dir / "evaluation" / "toy-test"
    scores = json.loads((folder / "scores.json").read_text())
    expected = {
        f"{metric}{part}"
        for metric in ("bleu", "chrf", "ter")
        for part in ("", "_ci", "_signature")
    }
    assert expected | {"sentences", "copy_rate", "length_ratio", "empty", "overlong"} <= set(scores)
    assert scores["test_set"] == "toy-test"
    hypotheses = (folder / "hypotheses.txt").read_text().split("\n")
    assert len(hypotheses) == scores["sentences"] + 1 == 21
    last_line = trained.stdout.rstrip().splitlines()[-1]
    run_id = run_id_of(load_recipe(recipe))
    bleu = f"BLEU {scores['bleu']} ± {scores['bleu_ci']}"
    assert f"{bleu} (untrained model: {scores['untrained_bleu']}) on toy-test" in last_line
    assert f"MLflow run {run_id}" in last_line
    assert f"./run.sh dashboard --tracking.uri {load_recipe(recipe).tracking_uri}" in last_line
    introduced = re.findall(r"^run\.sh: (.*)", trained.stderr, re.MULTILINE)
    assert introduced[0].startswith("A recipe for tests")
    assert f"all in {load_recipe(recipe).run_dir};" in introduced[1]
    assert len(introduced) == 3  # with the start of training


def things_to_try(trained: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the commands that the run's last lines propose."""
    lines = trained.stderr.rstrip("\n").split("\n")
    assert lines[-4] == "try:"
    return [line.strip() for line in lines[-3:]]


def test_mlflow_has_the_run(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe)
    run_id = run_id_of(loaded)
    assert run_id is not None
    client = MlflowClient(loaded.tracking_uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.architecture"] == "ringformer"
    assert run.data.params["deepspeed.zero_optimization.stage"] == "1"
    assert run.data.params["training.max_steps"] == "80"  # what this recipe sets is there
    assert "training.adam_betas" not in run.data.params  # and not what is the default
    assert len(run.data.params) < 45
    told_once = client.get_metric_history(run_id, "quality/test_chrf")
    assert len(told_once) == 1  # however often it is told
    logged = run.data.metrics.keys()
    assert {name.partition("/")[0] for name in logged} == {
        "loss", "quality", "speed", "system", "training",
    }  # fmt: skip
    assert {"quality/test_bleu", "quality/test_ter", "loss/valid_loss"} <= logged
    scores = json.loads((loaded.run_dir / "evaluation" / "toy-test" / "scores.json").read_text())
    ends = [run.data.metrics[f"quality/test_bleu_{end}"] for end in ("low", "high")]
    around = [scores["bleu"] - scores["bleu_ci"], scores["bleu"] + scores["bleu_ci"]]
    assert ends == pytest.approx([max(0, around[0]), around[1]])
    for name in ("loss/train_loss", "speed/memory_gib"):
        values = [metric.value for metric in client.get_metric_history(run_id, name)]
        assert values == [float(f"{value:.6g}") for value in values]
    steps = [metric.step for metric in client.get_metric_history(run_id, "loss/train_loss")]
    assert steps == [20, 40, 60, 80]
    rates = [
        metric.value
        for metric in client.get_metric_history(run_id, "speed/target_tokens_per_second")
    ]
    assert len(rates) == 4
    artifacts = {artifact.path for artifact in client.list_artifacts(run_id)}
    assert {"recipe.json", "deepspeed.json", "data", "evaluation", "loss.png"} <= artifacts
    data = {Path(artifact.path).name for artifact in client.list_artifacts(run_id, "data")}
    assert data == {"manifest.json", "report.json", "report.png", "spm.model"}
    evaluation = str(run.data.tags["evaluation.toy-test"])
    files = {Path(artifact.path).name for artifact in client.list_artifacts(run_id, evaluation)}
    assert files == {
        "scores.json", "hypotheses.txt", "sentences.tsv", "sentences.html", "by_length.png",
    }  # fmt: skip
    tables = [file.path for file in client.list_artifacts(run_id, "translations")]
    assert tables == ["translations/toy-test.json", "translations/validation.json"]
    journal = (loaded.run_dir / "tracking" / "journal.jsonl").read_text().splitlines()
    notes = [record["text"] for record in map(json.loads, journal) if record["kind"] == "note"]
    assert notes[0].startswith("No scores yet: `./run.sh evaluate` makes them.\n\n![losses](")
    every_key = client.download_artifacts(run_id, "recipe.json", str(tmp_path))
    assert load_recipe(Path(every_key)) == loaded
    tags = run.data.tags
    assert {"host", "cpus", "gpus", "version.torch", "version.fairseq2", "ranks"} <= tags.keys()
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", tags["mlflow.source.git.commit"])
        assert tags["git_dirty"] in ("true", "false")
    assert run.inputs is not None
    inputs = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert {context: data.name for context, data in inputs.items()} == {
        "training": "toy", "validation": "toy-valid", "evaluation": "toy-test",
    }  # fmt: skip
    assert all(len(data.digest) == 16 for data in inputs.values())


def test_the_evaluated_model_is_registered_and_served_from_its_artifact_alone(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path
) -> None:
    loaded = load_recipe(recipe)
    client = MlflowClient(loaded.tracking_uri)
    champion = champion_of(client)
    assert champion.run_id == run_id_of(loaded)
    folder = loaded.run_dir / "evaluation" / "toy-test"
    scores = json.loads((folder / "scores.json").read_text())
    assert champion.tags["bleu"] == str(scores["bleu"])
    registered = client.get_run(str(champion.run_id)).data.tags["registered"]
    assert registered == "ringformer-de-en-toy-test version 1: the first, and so champion"
    model = mlflow.pyfunc.load_model(
        client.get_model_version_download_uri("ringformer-de-en-toy-test", champion.version)
    )
    assert model.metadata.get_input_schema().to_dict() == [{"type": "string", "required": True}]
    assert model.input_example == (loaded.run_dir / "clean/test.de").read_text().split("\n")[:2]

    port = free_port()
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("mlflow")), "models", "serve", "--env-manager", "local",
         "-m", "models:/ringformer-de-en-toy-test@champion", "-p", str(port)],
        env={**os.environ, "MLFLOW_TRACKING_URI": loaded.tracking_uri, "PYTHONPATH": ""},
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/ping", server)
        sources = (loaded.run_dir / "clean" / "test.de").read_text().split("\n")[:-1]
        found = requests.post(
            f"http://127.0.0.1:{port}/invocations", json={"inputs": sources}, timeout=60
        ).json()
        assert found["predictions"] == (folder / "hypotheses.txt").read_text().split("\n")[:-1]
    finally:
        server.terminate()
        server.wait(30)


def test_another_model_is_champion_only_if_it_is_better(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    first = load_recipe(recipe)
    client = MlflowClient(first.tracking_uri)
    before = champion_of(client)
    for part in ("clean", "shards", "checkpoints"):
        shutil.copytree(first.run_dir / part, tmp_path / "again" / part)
    for path in (tmp_path / "again").glob("checkpoints/*/checkpoint.json"):  # of no MLflow run
        path.write_text(json.dumps({**json.loads(path.read_text()), "tracker_run_id": None}))
    # An earlier checkpoint, compared with the run that it was copied from; on a test set more.
    config = ["--run_dir", str(tmp_path / "again"), "--tracking.uri", first.tracking_uri]
    evaluate = ["pipeline.evaluate", "--config", str(recipe), *config]
    second = load_recipe(recipe, list(zip(["run_dir", "tracking.uri"], config[1::2], strict=True)))
    text = first.run_dir / "clean"
    more = f"[{{name: more, source: {text}/valid.de, references: [{text}/valid.en]}}]"
    options = ["--evaluation.checkpoint", 40, "--evaluation.test_sets", more]
    done = command(*evaluate, *options, "--baseline", run_id_of(first))
    assert done.returncode == 0, done.stderr
    verdict = f"version {before.version} stays champion: on toy-valid "
    assert verdict in done.stderr
    compared = rf"toy-test: [-+][\d.]+ BLEU, p = [\d.]+; .* against run {before.run_id}\)\n"
    assert re.search(compared, done.stdout)
    assert champion_of(client) == before
    run = client.get_run(str(run_id_of(second)))
    assert verdict in run.data.tags["registered"]
    assert 0 <= run.data.metrics["quality/p_against_champion"] <= 1
    assert list(told(run)) == ["test set", "toy-test", "more", "toy-valid"]
    # Of other weights the note has no more than they were scored on, and nothing of before.
    newest = command(*evaluate)
    assert newest.returncode == 0, newest.stderr
    found = told(client.get_run(run.info.run_id))
    assert list(found) == ["test set", "toy-test", "toy-valid"]
    assert found == told(client.get_run(str(run_id_of(first))))
    nobody = command(*evaluate, "--baseline", "0" * 32)
    assert (nobody.returncode, "Traceback" in nobody.stderr) == (1, False)
    assert f"--baseline {'0' * 32}: " in nobody.stderr

    # Translations that are better beyond chance, and then worse ones: as if by other models.
    (test_set,), valid_set = load_test_sets(second), load_validation_set(second)
    facts = {"checkpoints": ["step-00000080"], "step": 80, "beam_size": 2, "length_penalty": 1.0}
    champions = []
    for name, kept in (("better", 8), ("worse", 4)):
        results = []
        for folder, sentences in (("toy-test", test_set), ("validation", valid_set)):
            # On the test set all are alike: it does not count.
            words = kept if sentences is valid_set else 6
            hypotheses = [" ".join(line.split()[:words]) for line in sentences.references[0]]
            place = tmp_path / "again" / "evaluation" / folder
            identity = f"{name}-{folder}", sentences.name, sentences.sha256
            result = TranslationResult(place, f"{folder}_", *identity, sentences, "en")
            result.write(hypotheses, [9] * len(hypotheses), facts)
            results.append(result)
        tracker = Tracker(second)
        for result in results:
            result.log(tracker)
        tracker.close(status=None)
        checkpoints = list_checkpoints(second.run_dir / "checkpoints")[-1:]
        servable = servable_translation(second, checkpoints, results[0])
        register(second, servable, *results)
        champion = champion_of(client)
        champions.append(champion.tags["fingerprint"])
    assert champions == ["better-toy-test", "better-toy-test"]
    # As it was, for the other tests.
    client.set_registered_model_alias("ringformer-de-en-toy-test", "champion", before.version)


def test_an_export_is_evaluated(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    run_dir = load_recipe(recipe).run_dir
    config, exported = ["--config", recipe], tmp_path / "served"
    done = command("pipeline.export", *config, "--format", "ctranslate2", "--output", exported)
    assert done.returncode == 0, done.stderr
    done = command(
        "pipeline.evaluate", *config, "--model", exported, "--evaluation.checkpoint", "best"
    )
    assert done.returncode == 0, done.stderr
    assert "evaluation.checkpoint does not apply to an exported model: left out" in done.stderr
    own, other = (
        json.loads((run_dir / "evaluation" / name / "scores.json").read_text())
        for name in ("toy-test", "toy-test--served")
    )
    assert own["bleu"] == other["bleu"]
    run = MlflowClient(load_recipe(recipe).tracking_uri).get_run(
        str(run_id_of(load_recipe(recipe)))
    )
    assert run.data.metrics["quality/test--served_bleu"] == other["bleu"]
    assert "| toy-test | 20 |" in (exported / "README.md").read_text()


def test_records_that_could_not_be_sent_go_with_a_run_that_reuses_everything(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    away = command("pipeline.evaluate", "--config", recipe, "--tracking.uri", nobody)
    assert away.returncode == 0, away.stderr
    assert "could not be sent" in away.stderr
    assert "MLflow run not sent yet" in away.stdout
    assert "not registered in" in away.stderr
    port = free_port()
    with mlflow_server(tmp_path, port):
        elsewhere = f"http://127.0.0.1:{port}"
        keys = ["--tracking.uri", elsewhere, "--training.learning_rate", "0.5"]
        again = run_process([RUN, "--config", str(recipe), *keys])
        assert again.returncode == 0, again.stderr
        run_id = re.findall(r"MLflow run (\w{32})", again.stdout)[0]
        client = MlflowClient(elsewhere)
        assert client.get_run(run_id).data.metrics.keys() >= {
            "quality/test_bleu", "loss/train_loss",
        }  # fmt: skip
        champion = champion_of(client)
        assert (champion.version, champion.run_id) == ("1", run_id)
    assert list((tmp_path / "artifacts").rglob("model.bin"))  # by the server, not by us
    assert f"dashboard: {elsewhere}" in again.stdout
    assert "other values of training.learning_rate; those count" in again.stderr  # and are told
    assert again.stderr.count("up to date, reused") == 5  # four of data preparation, evaluation
    assert "train: finished: step 80 of 80" in again.stderr
    assert "run.sh: " not in again.stderr
    assert "./run.sh" not in again.stderr
    last_lines = (done.stdout.splitlines()[-1].split(" | ")[0] for done in (trained, again))
    assert len({*last_lines}) == 1


def test_other_settings_after_training_are_pointed_out(
    trained: subprocess.CompletedProcess[str], recipe: Path, command: Command
) -> None:
    done = command(
        "pipeline.train", "--steps_left", "--config", recipe, "--training.learning_rate", 1e-4,
        "--training.init_from", "gone", "--training.random_depth", "true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    others = "init_from, learning_rate, random_depth"
    assert f"it was trained with other values of {others}; for a new" in done.stderr


def test_export_leaves_a_folder_of_others_alone(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    done = command("pipeline.export", "--config", recipe, "--output", tmp_path)
    assert done.returncode == 1
    assert "holds files that this command did not make" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_translate_and_export(
    trained: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path, command: Command
) -> None:
    run_dir, config = load_recipe(recipe).run_dir, ["--config", str(recipe)]
    text = "\n" + (run_dir / "clean" / "test.de").read_text()
    direct = command("pipeline.translate", *config, stdin=text)
    assert direct.returncode == 0, direct.stderr
    hypotheses = run_dir / "evaluation" / "toy-test" / "hypotheses.txt"
    assert direct.stdout == "\n" + hypotheses.read_text()
    assert any(direct.stdout.split("\n"))
    exported = tmp_path / "my-model"
    (tmp_path / "run.sh").symlink_to(RUN)
    asked, served, _ = things_to_try(trained)
    tried = run_process(["bash", "-c", f"cd {tmp_path} && {asked}"])
    assert (tried.returncode, "never seen" in tried.stderr) == (0, False)
    assert tried.stdout in hypotheses.read_text().splitlines(keepends=True)
    assert asked.endswith(f"   # {tried.stdout.rstrip()}")
    port = free_port()
    with (tmp_path / "served.txt").open("wb") as output:
        server = subprocess.Popen(
            ["bash", "-c", served.replace("   #", f" --port {port}   #")],
            cwd=tmp_path, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", server, tmp_path / "served.txt")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert "in format ctranslate2, int8" in (tmp_path / "served.txt").read_text()
    whole = command("pipeline.export", *config, "--output", exported, "--quantization", "float32")
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "input.txt").write_text(text.rstrip("\n"))
    again = command("pipeline.translate", "--input", tmp_path / "input.txt", "--model", exported)
    assert again.stdout == direct.stdout
    translate = ["pipeline.translate", *config]
    many = command(*translate, "--n_best", 2, stdin="Gut.\n\nDie Zebras haben!\n")
    assert re.search(r"translate: words that the model has never seen .*: Zebras, !\n", many.stderr)
    rows = [line.split("\t") for line in many.stdout.splitlines()]
    assert [row[0] for row in rows] == ["0", "0", "1", "2", "2"]
    assert float(rows[0][1]) >= float(rows[1][1])
    more = command(*translate, "--n_best", 9, stdin="Gut.\n")
    assert more.returncode == 2
    assert "--n_best 9 exceeds evaluation.beam_size (2)" in more.stderr
    broken = command(*translate, stdin=b"Gut.\nK\xe4se\n")
    assert broken.returncode == 1
    assert "stdin:2: not valid UTF-8" in broken.stderr


@pytest.fixture(scope="module")
def rival(trained: subprocess.CompletedProcess[str], recipe: Path) -> TranslationRecipe:
    """Make another run in the same store: the first one's journal, with a BLEU of its own."""
    first = load_recipe(recipe)
    other = first.model_copy(update={"run_dir": first.run_dir.with_name("rival")})
    records = []
    for line in (first.run_dir / "tracking" / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "test_bleu" in record.get("metrics", {}):
            record["metrics"]["test_bleu"] = RIVAL_BLEU
        records.append(json.dumps(record) + "\n")
    (other.run_dir / "tracking").mkdir(parents=True)
    (other.run_dir / "tracking" / "journal.jsonl").write_text("".join(records))
    send_left_over(other)
    return other


@pytest.fixture(scope="module")
def dashboard(
    trained: subprocess.CompletedProcess[str],
    recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Run `./run.sh dashboard`, and yield the address that it tells."""
    port, output = free_port(), tmp_path_factory.mktemp("dashboard") / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            shlex.split(f"{things_to_try(trained)[2]} --port {port}"),
            cwd=ROOT,
            stdout=file,
            stderr=file,
        )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}", process, output)
        while not (told := re.findall(r"^dashboard: (http\S+) ", output.read_text(), re.MULTILINE)):
            assert process.poll() is None
            time.sleep(0.1)
        yield told[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def ui(
    dashboard: str, rival: TranslationRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowUi]:
    """Open the dashboard in a browser."""
    browser = MlflowUi(dashboard, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_dashboard_serves_the_run(dashboard: str, recipe: Path) -> None:
    base, experiment_id = re.findall(r"(http\S+)/#/experiments/(\d+)/runs\?", dashboard)[0]
    found = requests.post(
        f"{base}/api/2.0/mlflow/runs/search", json={"experiment_ids": [experiment_id]}, timeout=30
    ).json()
    assert run_id_of(load_recipe(recipe)) in [run["info"]["run_id"] for run in found["runs"]]


@needs_chromium
def test_the_dashboard_shows_bleu_the_loss_curve_and_the_translations(
    ui: MlflowUi, recipe: Path
) -> None:
    loaded = load_recipe(recipe)
    run_id = str(run_id_of(loaded))
    scores = json.loads((loaded.run_dir / "evaluation" / "toy-test" / "scores.json").read_text())
    assert float(ui.overview(run_id, "quality/test_bleu")) == scores["bleu"]
    ui.save("overview")
    assert ui.sections(run_id)[:4] == ["loss", "quality", "speed", "training"]
    ui.save("sections")
    curve = ui.curve(run_id, "train_loss", charts="_loss|bleu")
    ui.save("curves")
    logged = MlflowClient(loaded.tracking_uri).get_metric_history(run_id, "loss/train_loss")
    assert [step for step, _ in curve] == [metric.step for metric in logged]
    assert [loss for _, loss in curve] == pytest.approx([metric.value for metric in logged])
    table = ui.table(run_id, "translations")
    ui.save("table")
    # Where runs are compared, MLflow groups by the first column and shows the second.
    assert table[0][:3] == ["source", "translation", "reference"]
    first = dict(zip(table[0], table[1], strict=True))
    texts = [
        loaded.run_dir / name for name in ("clean/test.de", "evaluation/toy-test/hypotheses.txt")
    ]
    expected = [text.read_text().split("\n")[0] for text in texts]
    assert [first["source"], first["translation"]] == expected
    assert ui.errors() == []


@needs_chromium
def test_a_run_begins_with_its_scores_and_leads_to_all_translations(
    ui: MlflowUi, recipe: Path
) -> None:
    loaded = load_recipe(recipe)
    folder = loaded.run_dir / "evaluation" / "toy-test"
    scores = json.loads((folder / "scores.json").read_text())
    note = ui.note(str(run_id_of(loaded)))
    ui.save("note")
    bleu = f"{scores['bleu']} ± {scores['bleu_ci']}"
    assert note.rows[1][:3] == ["toy-test", "20", bleu]
    assert [row[0] for row in note.rows] == ["test set", "toy-test", "toy-valid"]
    assert note.pictures == 1
    assert f"\n./run.sh --config {recipe}\n" in note.text.replace("\\\n    ", "")  # if it is long
    assert "artifact:" not in note.text
    with (folder / "sentences.tsv").open(newline="") as file:
        worst_first = list(csv.DictReader(file, delimiter="\t"))
    word = worst_first[3]["source"].split()[0].lower()
    found = ui.answers(note.links["toy-test"], f" {word}", "chrf")
    ui.save("translations")
    expected = [row for row in worst_first if any(word in cell.lower() for cell in row.values())]
    assert [dict(zip(worst_first[0], row, strict=True)) for row in found] == expected
    card = ui.card(
        "ringformer-de-en-toy-test", champion_of(MlflowClient(loaded.tracking_uri)).version
    )
    ui.save("card")
    assert card.text.startswith("run: ringformer, de → en\n")  # no YAML header
    assert ["toy-test", "20", bleu] in [row[:3] for row in card.rows]
    assert not re.search(r"^[-#|`]|&\w+;", card.text, re.MULTILINE)
    assert ui.errors() == []


@needs_chromium
def test_the_dashboard_shows_the_bleu_of_two_runs_side_by_side(
    ui: MlflowUi, rival: TranslationRecipe, recipe: Path
) -> None:
    loaded = load_recipe(recipe)
    run_ids = [str(run_id_of(loaded)), str(run_id_of(rival))]
    scores = json.loads((loaded.run_dir / "evaluation" / "toy-test" / "scores.json").read_text())
    listed = ui.listed("quality/test_bleu", runs=2)
    ui.save("runs")
    assert [float(listed[run_id]) for run_id in run_ids] == [scores["bleu"], RIVAL_BLEU]
    compared = ui.compared(run_ids, "quality/test_bleu")
    ui.save("comparison")
    assert [float(value) for value in compared] == [scores["bleu"], RIVAL_BLEU]
    ends = ui.compared(run_ids, "quality/test_bleu_high")
    assert [float(value) for value in ends] == pytest.approx(2 * [scores["bleu_high"]])
    assert ui.errors() == []
