"""`./run.sh sweep` finds what is best, says what is wrong, and goes on after it was killed."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from data_prep.files import DataError
from pipeline.checkpoints.folder import Criterion, list_checkpoints
from pipeline.recipe import ROOT, UsageError
from pipeline.recipe_file import Draft, load_recipe
from pipeline.sweeping.config import SweepConfig, read_sweep
from pipeline.sweeping.run import Sweep, share_of_machine
from pipeline.sweeping.study import Study
from pipeline.sweeping.trial import folder_of, home_of
from pipeline.tracking.tracker import Tracker, run_id_of
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import TINY_RECIPE, Command
from tests.pipeline.ranks import new_run, tracked

RUN = str(ROOT / "run.sh")
SPACE = """
space:
  training.learning_rate: {choices: [5e-3, 1e-6, 1e30]}  # good, too small, too large
  model.dropout: {low: 0, high: 0.3}
"""

# ── The file ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rat: {low: 1, high: 2}", ":2: `space.training.learning_rat`: the "
         "recipe has no such key; did you mean `training.learning_rate`?"),
        ("training: {low: 1, high: 2}", ":2: `space.training`: the recipe has no such key"),
        ("data.vocabulary.size: {low: 300, high: 400}", ":2: `space.data.vocabulary.size`: trials "
         "share their shards"),
        ("evaluation.beam_size: {low: 1, high: 4}", "only keys of model and training"),
        ("training.bleu_every: {choices: [0, 3]}", ":2: `space.training.bleu_every`: with 3 "
         "another metric says which model is best"),
        ("training.learning_rate: {low: 2, high: 1}", ":2: `space.training.learning_rate`: low "
         "(2) must be less than high (1)"),
        ("training.learning_rate: {low: 0, high: 1, log: true}", "log needs a low above 0"),
        ("training.learning_rate: {low: 0, high: 1}", "0.0 does not fit: `training.learning_rate`: "
         "input should be greater than 0"),
        ("training.learning_rate: {low: 1}", ":2: key `space.training.learning_rate.high` is "
         "required"),
        ("training.learning_rate: {low: x, high: 1}", ":2: `space.training.learning_rate.low`: "),
        ("training.learning_rate: {low: 1, high: 2, lg: true}", ":2: unknown key "
         "`space.training.learning_rate.lg`"),
        ("model.dropout: {choices: [0.1, 3.0]}", "3.0 does not fit: `model.dropout`: input should "
         "be less than 1"),
        ("model.dropout: {choices: [0.1, 0.1]}", "each value can be named once"),
        ("training.compile: {choices: [1, true]}", "each value can be named once"),
        ("model.num_heads: {low: 2, high: 4}", ":2: `space.model.num_heads`: 3 does not fit: "
         "`model`: model_dim (32)"),
        ("model.num_levels: {low: 1, high: 2.5}", "low, high and step must be whole numbers"),
        ("model.num_levels: {low: 1, high: 4, step: 2}", "high must be low and a multiple of step"),
        ("model.architecture: {low: 1, high: 4}", "is no number; give it choices"),
        ("model.dropout: {choices: [2024-01-01]}", ":2: `space.model.dropout`: choices: expected "
         "numbers, text, lists or mappings"),
        ("model.dropout: {choices: [0.1]}\ntrials: 0", ":3: `trials`: input should be greater"),
        ("model.dropout: {choices: [0.1]}\nmetric: bleu", ":3: `metric`: expected valid_loss, not"),
        ("model.dropout: {choices: [0.1]}\npruner: x", ":3: `pruner`: input should be 'median', "),
        ("{}", "`space`: dictionary should have at least 1 item"),
        ("model.dropout: {", "not valid YAML"),
    ],
)  # fmt: skip
def test_bad_sweep_is_one_line_with_file_and_key(
    tiny_recipe: Path, tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"space:\n  {text}\n")
    with pytest.raises(UsageError) as caught:
        read_sweep(path, Draft(tiny_recipe))
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert expected in message
    assert "\n" not in message


def test_shipped_sweep_is_valid() -> None:
    for path in (ROOT / "sweeps").glob("*.yaml"):
        config, criterion = read_sweep(path, Draft(ROOT / "recipes" / path.name))
        assert config.trials > 1
        assert criterion.metric == "valid_loss"


def test_a_classifier_is_judged_by_accuracy_unless_told_otherwise(tmp_path: Path) -> None:
    path, draft = tmp_path / "sweep.yaml", Draft(ROOT / "recipes" / "fashion_mnist.yaml")
    space = "space:\n  training.augmentation: {choices: [[], [{transform: flip}]]}\n"
    path.write_text(space)
    assert read_sweep(path, draft)[1] == Criterion("valid_accuracy", larger_is_better=True)
    path.write_text(f"{space}metric: valid_loss\n")
    assert read_sweep(path, draft)[1] == Criterion("valid_loss", larger_is_better=False)


# ── Parameters ──────────────────────────────────────────────────────────────────────────────────


def drawn(folder: Path, sampler: str, *, reopened: bool) -> list[Mapping[str, Any]]:
    """Return the parameters of 13 trials, three of them after the random ones.

    :param reopened: open the study anew before and after each, as after a kill.
    """
    config = SweepConfig.model_validate(
        {
            "sampler": sampler,
            "space": {
                "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
                "training.adam_betas": {"choices": [[0.9, 0.98], [0.9, 0.999]]},
                "model.num_levels": {"low": 2, "high": 8, "step": 2},
            },
        }
    )
    draft = Draft(ROOT / "recipes" / "quickstart.yaml")
    path = folder / f"{sampler} {reopened} 100 %?#.db"

    recipe, criterion = draft.recipe(), Criterion("valid_loss", larger_is_better=False)

    def opened() -> Study:
        return Study(path, config, criterion, recipe)

    study, found = opened(), []
    for number in range(13):
        asked = study.ask()
        assert asked is not None
        if reopened:
            study = opened()
            (again,) = study.unfinished()
            assert again == asked
        assert asked.number == number
        found.append(asked.parameters)
        study.complete(number, abs(asked.parameters["training.learning_rate"] - 1e-3))
    assert path.exists()
    assert study.best is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_parameters_depend_on_the_seed_and_results_alone(tmp_path: Path, sampler: str) -> None:
    once, again = (drawn(tmp_path, sampler, reopened=reopened) for reopened in (False, True))
    assert once == again
    assert len({str(parameters) for parameters in once}) > 10
    for parameters in once:
        assert 1e-4 <= parameters["training.learning_rate"] <= 1e-2
        assert parameters["training.adam_betas"] in ([0.9, 0.98], [0.9, 0.999])
        assert parameters["model.num_levels"] in (2, 4, 6, 8)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_no_values_are_tried_twice(tmp_path: Path, tiny_recipe: Path, sampler: str) -> None:
    space = {"model.dropout": {"choices": [0, 0.1, 0.2]}, "model.num_levels": {"low": 2, "high": 3}}
    config = SweepConfig.model_validate({"sampler": sampler, "space": space})
    recipe, criterion = Draft(tiny_recipe).recipe(), Criterion("valid_loss", False)
    study, found = Study(tmp_path / "sweep.db", config, criterion, recipe), list[str]()
    while (asked := study.ask()) is not None:
        found.append(str(asked.parameters))
        study.complete(asked.number, 1.0)
    assert len(found) == len({*found}) == 6


def test_a_sweep_that_was_changed_is_refused_by_name(tmp_path: Path, tiny_recipe: Path) -> None:
    draft = Draft(tiny_recipe)
    path = tmp_path / "sweep.yaml"
    path.write_text(SPACE)
    config, criterion = read_sweep(path, draft)
    study = Study(tmp_path / "sweep.db", config, criterion, draft.recipe())
    began_with = {"sweep": config.model_dump(mode="json"), "recipe": {"model": {"num_levels": 3}}}
    study.refuse_other(began_with)
    study.refuse_other({**began_with, "sweep": {**began_with["sweep"], "trials": 30}})
    changes: list[tuple[str, dict[str, Any], str]] = [
        ("sweep", {"trials": 29}, "sweep.trials 30, now it is 29"),
        ("sweep", {"trials": 30, "seed": 2}, "sweep.seed 1, now it is 2"),
        ("recipe", {"model": {"num_levels": 4}}, "recipe.model.num_levels 3, now it is 4"),
    ]
    for section, changed, expected in changes:
        content = {**began_with, "sweep": {**began_with["sweep"], "trials": 30}}
        with pytest.raises(DataError, match=expected):
            study.refuse_other({**content, section: {**content[section], **changed}})


def test_trials_of_a_study_that_is_gone_are_no_results(tmp_path: Path, tiny_recipe: Path) -> None:
    """They were trained with other parameters than a new study gives them."""
    (tmp_path / "sweep.yaml").write_text(SPACE)
    draft = Draft(tiny_recipe, [("run_dir", str(tmp_path / "run"))])
    config, criterion = read_sweep(tmp_path / "sweep.yaml", draft)
    home = tmp_path / "run-sweep"
    home.mkdir()
    sweep = Sweep(draft, config, criterion, jobs=1)
    folder_of(home_of(sweep.recipe), 0).mkdir(parents=True)
    Sweep(draft, config, criterion, jobs=1)  # which goes on
    (home / "sweep.db").unlink()
    with pytest.raises(DataError, match=r"whose sweep\.db is gone; move that folder away"):
        Sweep(draft, config, criterion, jobs=1)


def test_another_file_behind_a_key_is_another_sweep(tmp_path: Path, tiny_recipe: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SPACE)
    settings = tmp_path / "ds.json"
    settings.write_text("{}")
    keys = [("run_dir", str(tmp_path / "run")), ("training.deepspeed_config", str(settings))]
    draft = Draft(tiny_recipe, keys)
    config, criterion = read_sweep(tmp_path / "sweep.yaml", draft)
    (tmp_path / "run-sweep").mkdir()
    for _ in range(2):
        Sweep(draft, config, criterion, jobs=1)
    settings.write_text('{"bf16": {"enabled": true}}')
    with pytest.raises(DataError, match=r"began with content of training\.deepspeed_config"):
        Sweep(draft, config, criterion, jobs=1)


def test_another_file_behind_a_choice_is_another_sweep(tmp_path: Path, tiny_recipe: Path) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text("{}")
    choices = f"space:\n  training.deepspeed_config: {{choices: [null, {settings}]}}\n"
    (tmp_path / "sweep.yaml").write_text(choices)
    draft = Draft(tiny_recipe, [("run_dir", str(tmp_path / "run"))])
    config, criterion = read_sweep(tmp_path / "sweep.yaml", draft)
    (tmp_path / "run-sweep").mkdir()
    for _ in range(2):
        Sweep(draft, config, criterion, jobs=1)
    settings.write_text('{"bf16": {"enabled": true}}')
    with pytest.raises(DataError, match=rf"content of training\.deepspeed_config {settings}"):
        Sweep(draft, config, criterion, jobs=1)


@pytest.mark.parametrize(
    ("run_dir", "expected"), [("runs/a", "a-sweep"), (".", "here-sweep"), ("..", "above-sweep")]
)
def test_a_sweep_is_beside_its_run(
    run_dir: str, expected: str, tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Draft(tiny_recipe).recipe({"run_dir": run_dir})
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    home = home_of(recipe).run_dir
    assert home.name == expected
    assert home.parent.resolve() == recipe.run_dir.resolve().parent


@pytest.mark.parametrize("dimension", [{"low": 0, "high": 4}, {"choices": [4, 1]}])
def test_nothing_is_pruned_in_the_longest_warm_up(
    tmp_path: Path, tiny_recipe: Path, dimension: dict[str, Any]
) -> None:
    space = {"training.warmup_steps": dimension, "model.dropout": {"low": 0, "high": 0.5}}
    config = SweepConfig.model_validate({"space": space})
    recipe, criterion = Draft(tiny_recipe).recipe(), Criterion("valid_loss", False)
    study = Study(tmp_path / "sweep.db", config, criterion, recipe)
    for number in range(7):
        study.ask()
        for step in (3, 5):
            study.report(number, step, 2.0 if number == 6 else 1.0)
            early = study.pruned_at(number)
            assert early == (5 if (number, step) == (6, 5) else None)
        if number < 6:
            study.complete(number, 1.0)


@pytest.mark.parametrize("pruner", ["median", "successive_halving", "none"])
def test_a_trial_that_is_pruned_stays_so(tmp_path: Path, tiny_recipe: Path, pruner: str) -> None:
    config = SweepConfig.model_validate(
        {"pruner": pruner, "space": {"model.dropout": {"low": 0, "high": 0.5}}}
    )
    recipe, criterion = Draft(tiny_recipe).recipe(), Criterion("valid_loss", False)
    study = Study(tmp_path / "sweep.db", config, criterion, recipe)
    for number in range(7):
        study.ask()
        study.report(number, 3, 2.0 if number == 6 else 1.0)
        if number < 6:
            assert study.pruned_at(number) is None
            study.complete(number, 1.0)
    expected = None if pruner == "none" else 3
    assert study.pruned_at(6) == expected
    reopened = Study(tmp_path / "sweep.db", config, criterion, recipe)
    assert reopened.pruned_at(6) == expected


def test_trainings_at_once_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,5")
    cores = len(os.sched_getaffinity(0))
    assert share_of_machine(0, 1) == {}
    assert share_of_machine(0, 2) == {
        "OMP_NUM_THREADS": str(max(1, cores // 2)), "CUDA_VISIBLE_DEVICES": "0,5",
    }  # fmt: skip
    assert share_of_machine(4, 5)["CUDA_VISIBLE_DEVICES"] == "1"
    assert share_of_machine(4, 10 * cores)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none of them
    monkeypatch.setattr("pipeline.sweeping.run.gpu_names", lambda: ["one", "another"])
    assert "CUDA_VISIBLE_DEVICES" not in share_of_machine(0, 2)


@pytest.mark.slow
def test_a_best_recipe_that_was_edited_is_not_called_the_best(
    prepared: TranslationRecipe, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sweeping.run.on_signals", lambda handler: None)
    run_dir = new_run(prepared, "edited")
    draft = Draft(tiny_recipe, [("run_dir", str(run_dir))])
    home, criterion = home_of(draft.recipe()), Criterion("valid_loss", larger_is_better=False)
    best = home.run_dir / "best.yaml"

    def swept(trials: int, value: float) -> Path:
        space = {"model.dropout": {"low": 0, "high": 0.5}}
        config = SweepConfig.model_validate({"trials": trials, "space": space})
        sweep = Sweep(draft, config, criterion, jobs=1)
        asked = sweep.study.ask()
        assert asked is not None
        sweep.study.complete(asked.number, value)
        return sweep.run().recipe

    home.run_dir.mkdir()
    assert swept(1, 3.0) == swept(2, 2.0) == best
    best.write_text(f"# Mine.\n{best.read_text()}")
    assert swept(3, 1.0) == folder_of(home, 2) / "recipe.yaml"
    best.unlink()
    assert swept(4, 4.0) == best
    assert str(folder_of(home, 2)) in best.read_text()


# ── Trainings ───────────────────────────────────────────────────────────────────────────────────


def run_until(command: list[str], log: Path, seen: Callable[[], bool], signum: Signals) -> int:
    """Send `signum` to a command when `seen`; return its exit code."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while not seen():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signum)
    return process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_is_killed_and_goes_on(
    prepared: TranslationRecipe, tmp_path: Path, command: Command
) -> None:
    """Of three trials the first is stopped and killed, the second fails, the third is pruned."""
    run_dir = new_run(prepared, "swept", "clean", "fetch", "vocabulary")
    text = TINY_RECIPE.format(run_dir=run_dir, root=prepared.data.root).replace(
        "_every: 3", "_every: 20"
    )
    config, sweep, log = tmp_path / "recipe.yaml", tmp_path / "sweep.yaml", tmp_path / "log"
    config.write_text(f"# Mine.\n{text}".replace("max_steps: 6", "max_steps: 60  # few"))
    sweep.write_text(f"trials: 3\nseed: 3\npruner: successive_halving{SPACE}")
    sweeping = [RUN, "sweep", "--config", str(config), "--sweep", str(sweep)]
    made = run_dir.with_name("swept-sweep")
    trials = made / "trials"
    first = trials / "000"

    # Stopped before the first step, and killed after a validation.
    log.touch()
    assert run_until(sweeping, log, lambda: "trial 0 begins" in log.read_text(), SIGTERM) == 75
    assert "run the same command again to continue" in log.read_text()
    recipe_before = (first / "recipe.yaml").read_bytes()
    journal = first / "tracking" / "journal.jsonl"
    code = run_until(
        sweeping, log, lambda: journal.exists() and bool(tracked(first, "valid_loss")), SIGKILL
    )
    assert code == -SIGKILL
    said = ""
    while "stopped by a signal at step" not in said:  # its training saves and ends with it
        said = (first / "train.log").read_text()
        time.sleep(0.1)
    stopped_at = int(re.findall(r"stopped by a signal at step (\d+)", said)[-1])
    assert 20 <= stopped_at < 60

    done = subprocess.run([*sweeping, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (first / "recipe.yaml").read_bytes() == recipe_before
    checkpoint = first / "checkpoints" / f"step-{stopped_at:08d}"
    assert f"resumed from {checkpoint}" in (first / "train.log").read_text()
    assert len(list_checkpoints(trials / "002" / "checkpoints")) >= 1
    assert max(tracked(trials / "002", "train_loss")) < 60
    assert re.search(r"trial 1 failed: the gradient of step \d is not finite", done.stderr)
    assert re.search(r"trial 2 pruned at step 20: valid_loss \d", done.stderr)
    assert "3 of 3 trials done, 1 pruned, 1 failed | best so far" in done.stderr
    best = min(tracked(first, "valid_loss").values())
    assert f"best: trial 0, valid_loss {best:.4f} | {made / 'best.yaml'} | MLflow" in done.stdout

    check_best_recipe(made, config)
    check_mlflow(load_recipe(config, [("run_dir", str(made))]))
    assert not (run_dir / "tracking").exists()  # a training there has its own run
    again = subprocess.run(sweeping, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert "begins" not in again.stderr
    best_command = command("pipeline.train", "--config", made / "best.yaml", "--steps_left")
    assert best_command.returncode == 0, best_command.stderr  # it is trained


def check_best_recipe(run_dir: Path, config: Path) -> None:
    """Look at what the sweep has written out."""
    assert (run_dir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    text = (run_dir / "best.yaml").read_text()
    assert text.startswith("# Mine.\n")
    assert "max_steps: 60  # few" in text
    mine, best = YAML(typ="safe").load(config), YAML(typ="safe").load(text)
    assert 0 <= best["model"].pop("dropout") <= 0.3
    assert best["training"]["learning_rate"] == 5e-3
    assert best.pop("tracking").keys() == {"uri"}  # what is trained with it is no trial
    assert best.pop("run_dir") == str(run_dir / "trials" / "000")
    del mine["run_dir"]
    assert best == mine


def check_mlflow(recipe: TranslationRecipe) -> None:
    """Look for the sweep's run in MLflow, and for its trials below it."""
    client, parent = MlflowClient(recipe.tracking_uri), str(run_id_of(recipe))
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.params["sweep.trials"] == "3"
    artifacts = {artifact.path for artifact in client.list_artifacts(parent)}
    assert {"sweep.png", "best.yaml"} <= artifacts
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    found = {child.info.run_name: child for child in children}
    assert sorted(found) == ["000", "001", "002"]
    states = [found[name].data.tags["sweep.state"] for name in sorted(found)]
    assert states == ["complete", "fail", "pruned"]
    assert found["001"].info.status == "FAILED"
    assert "is not finite" in found["001"].data.tags["sweep.reason"]
    assert found["000"].data.params["training.learning_rate"] == "0.005"
    (told,) = client.get_metric_history(parent, "sweep/valid_loss")
    losses = client.get_metric_history(found["000"].info.run_id, "loss/valid_loss")
    best = min(loss.value for loss in losses)
    assert (told.step, told.value) == (0, best)


@pytest.mark.slow
def test_when_all_trials_fail_the_last_reason_is_told(
    prepared: TranslationRecipe, tmp_path: Path, tiny_recipe: Path, command: Command
) -> None:
    """Each value fits the recipe, but they do not fit together."""
    run_dir, sweep = new_run(prepared, "all_fail", "clean"), tmp_path / "sweep.yaml"
    space = "{model.model_dim: {choices: [36, 44]}, model.num_heads: {choices: [8]}}"
    sweep.write_text(f"trials: 2\nspace: {space}\n")
    done = command(
        "pipeline.sweep", "--config", tiny_recipe, "--run_dir", run_dir, "--sweep", sweep
    )
    assert done.returncode == 1
    assert done.stderr.count("failed: ") == 2
    assert "error: none of 2 trials came to its end; the last one: " in done.stderr
    assert "model_dim (36) must be even and a multiple of num_heads (8)" in done.stderr
    assert "Traceback" not in done.stderr


# ── MLflow ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_run_is_nested_below_its_parent_as_soon_as_that_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow may have been away when the parent began."""
    draft = Draft(ROOT / "recipes" / "quickstart.yaml")
    parent = draft.recipe({"run_dir": str(tmp_path / "parent")})
    values = {"tracking.uri": parent.tracking_uri, "tracking.parent": str(parent.run_dir)}
    child = draft.recipe({"run_dir": str(tmp_path / "parent" / "child"), **values})
    client = MlflowClient(parent.tracking_uri)
    nested = []
    for recipe in (child, parent, child):
        tracker = Tracker(recipe)
        tracker.log_status("RUNNING")
        tracker.close()
        nested.append(client.get_run(str(run_id_of(child))).data.tags.get("mlflow.parentRunId"))
    assert nested == [None, None, run_id_of(parent)]
    (warning,) = (each for each in caplog.messages if "tracking.parent" in each)  # at first only
    assert f"{parent.run_dir} has logged nothing" in warning
