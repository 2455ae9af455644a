"""A classifier is trained as a translation model is: every way gives the same, resumed or not."""

from __future__ import annotations

import multiprocessing
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from data_prep.files import DataError
from data_prep.images.prepare import prepare_images
from models.image_classifier import ImageClassifier
from pipeline.checkpoints.folder import CheckpointError, list_checkpoints
from pipeline.classification.run_model import checkpoints_of_run, model_of_run
from pipeline.classification.task import ClassificationTask
from pipeline.classification_recipe import ClassificationRecipe, Flip
from pipeline.publishing.image_exports import export_classifier
from pipeline.recipe_file import load_recipe
from tests.pipeline.classification.zero_matrix import CASES, main, task_of
from tests.pipeline.ranks import finish, options, start, start_ranks, tracked, wait_for, weights
from tests.pipeline.training.zero_matrix import agree, reference


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_way_to_train_gives_what_torch_alone_gives(
    bars: Path, prepared_bars: ClassificationRecipe, tmp_path: Path, ranks: int
) -> None:
    """With dropout, and random crops of the images."""
    log, results = tmp_path / "log", tmp_path / "results.pt"
    processes = start_ranks(main, [str(bars), str(results)], log, ranks)
    assert finish(processes, 300) == [0] * ranks, log.read_text()
    theirs = reference(task_of(bars, "zero0", "none", tmp_path))
    for case, ours in torch.load(results).items():
        agree(ours, theirs, 2e-2 if "bf16" in case[0] else 1e-5)
    assert len(torch.load(results)) == len(CASES[ranks])


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_with_the_same_bits(
    bars: Path, trained_bars: ClassificationRecipe, tmp_path: Path
) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "run"
    shutil.copytree(trained_bars.shards, run_dir / "shards")
    shutil.copytree(trained_bars.run_dir / "fetch", run_dir / "fetch")
    again = options(bars, run_dir, log_every=1, read_ahead_steps=1)
    processes = start(again, log, ranks=1)
    wait_for(log, "step 5/30")
    rank = psutil.Process(processes[0].pid)
    augmenting = [each for each in rank.children() if "spawn_main" in " ".join(each.cmdline())]
    assert augmenting
    for process in augmenting:  # first, as by launchers, who end a tree from its leaves
        process.terminate()
    wait_for(log, "step 9/30")
    rank.terminate()
    assert finish(processes) == [75], log.read_text()
    assert not any(process.is_running() for process in augmenting)
    (stopped,) = list_checkpoints(run_dir / "checkpoints")
    assert 7 <= stopped.step < 30
    assert finish(start(again, log, ranks=1)) == [0], log.read_text()
    theirs = weights(trained_bars.run_dir)
    for name, tensor in weights(run_dir).items():
        assert torch.equal(tensor, theirs[name]), name
    assert tracked(run_dir, "valid_accuracy") == tracked(trained_bars.run_dir, "valid_accuracy")


@pytest.mark.slow
def test_another_validation_set_looks_for_the_best_anew(bars: Path, tmp_path: Path) -> None:
    """What a model was worth on the old one is nothing to compare with."""
    data, run_dir, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    shutil.copytree(bars.parent / "data", data)
    shutil.copytree(data / "test", data / "valid")
    keys = {"root": str(data), "valid.folder": "valid", "valid.name": "v", "valid_images": "0"}
    pairs = [(f"data.{key}", value) for key, value in keys.items()]
    words = [word for key, value in pairs for word in (f"--{key}", value)]
    overrides = [("run_dir", str(run_dir)), ("evaluation.checkpoint", "best"), *pairs]
    recipe = load_recipe(bars, overrides, kind=ClassificationRecipe)

    def train(steps: int) -> None:
        training = {"max_steps": steps, "early_stopping": 1}
        processes = start([*options(bars, run_dir, **training), *words], log, ranks=1)
        assert finish(processes) == [0], log.read_text()

    prepare_images(recipe.data, run_dir)
    train(20)
    assert checkpoints_of_run(recipe)[0].tag == (recipe.checkpoints / "best").read_text()
    for name, other in (
        ("across", "x"),
        ("down", "across"),
        ("slanting", "down"),
        ("x", "slanting"),
    ):
        (data / "valid" / name).rename(data / "valid" / other)
    prepare_images(recipe.data, run_dir)
    with pytest.raises(CheckpointError, match="was found best by another validation set than"):
        checkpoints_of_run(recipe)
    train(30)
    newest = list_checkpoints(recipe.checkpoints)[-1].info.validation
    assert newest.best_step == 30
    assert newest.best == tracked(run_dir, "valid_accuracy")[30] < 60
    assert log.read_text().count("looked for anew: the validation set has changed") == 1


@pytest.mark.slow
def test_it_learns(trained_bars: ClassificationRecipe) -> None:
    accuracies = tracked(trained_bars.run_dir, "valid_accuracy")
    assert list(accuracies) == [10, 20, 30]
    assert max(accuracies.values()) > 60  # of three classes, by chance 33


def test_augmentation_depends_on_the_seed_alone(
    prepared_bars: ClassificationRecipe,
) -> None:
    transforms = """[{transform: crop, padding: 2}, {transform: flip},
        {transform: rand_augment, magnitude: 5}, {transform: erase, probability: 0.5}]"""
    recipe = load_recipe(
        prepared_bars.run_dir.parent / "bars.yaml",
        [("training.augmentation", transforms)],
        kind=ClassificationRecipe,
    )
    task, cpu = ClassificationTask(recipe), torch.device("cpu")
    stored, labels = task.images.read(np.arange(8))

    def draw(seed: int) -> Tensor:
        batch = task.collate(np.arange(8), seed, cpu)
        assert batch.labels.tolist() == labels.tolist()
        return batch.images

    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as threads:  # as the feed does
        drawn = [*threads.map(draw, (1, 1, 2))]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0].shape == (8, 1, 12, 12)
    assert drawn[0].dtype == torch.uint8
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0][0], stored[0][:, 1:13, 1:13])
    task.end.close()


@pytest.mark.slow
def test_a_killed_process_that_augments_ends_training_with_a_reason(
    prepared_bars: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.classification.augmentation.cores_of_rank", lambda: 3)
    training = prepared_bars.training.model_copy(update={"augmentation": (Flip(),)})
    task = ClassificationTask(prepared_bars.model_copy(update={"training": training}))
    examples, cpu = np.arange(8), torch.device("cpu")
    with ThreadPoolExecutor(4) as threads:
        [*threads.map(lambda seed: task.collate(examples, seed, cpu), range(4))]
    processes = multiprocessing.active_children()
    first, *others = (each for each in processes if isinstance(each, SpawnProcess))
    assert others
    first.kill()
    with pytest.raises(DataError, match="a process that augments images has ended"):
        # The others may answer before it is missed.
        deque((task.collate(examples, seed, cpu) for seed in count()), maxlen=0)
    task.end.close()  # waits for the others
    assert not any(process.is_alive() for process in others)


@pytest.mark.slow
def test_a_training_starts_from_an_export(
    bars: Path, trained_bars: ClassificationRecipe, tmp_path: Path
) -> None:
    export_classifier(trained_bars, tmp_path / "export", "safetensors")
    export_classifier(trained_bars, tmp_path / "onnx", "onnx")

    def model(folder: Path, **keys: str) -> ImageClassifier:
        overrides = {"training.init_from": str(folder), **keys}
        recipe = load_recipe(bars, list(overrides.items()), kind=ClassificationRecipe)
        return ClassificationTask(recipe).create_model()

    theirs = model_of_run(trained_bars, list_checkpoints(trained_bars.checkpoints)[-1:])
    started = model(tmp_path / "export").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(started[name], tensor), name
    with pytest.raises(CheckpointError, match=r"init_from: .*onnx, and cannot be trained on"):
        model(tmp_path / "onnx")
    with pytest.raises(CheckpointError, match=r"has model.num_heads 4, the recipe says 2"):
        model(tmp_path / "export", **{"model.num_heads": "2"})
    with pytest.raises(CheckpointError, match=r"1 channels of 12 × 12 pixels, .* 1 of 8 × 8"):
        model(tmp_path / "export", **{"data.image_size": "8"})
    with pytest.raises(CheckpointError, match=r"has model.model_dim 32, the recipe says 16"):
        model(tmp_path / "export", **{"model.model_dim": "16"})
