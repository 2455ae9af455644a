"""This script trains a classifier with some combinations of ZeRO stage, precision, checkpointing.

`test_training.py` calls `main` on every rank: one process trains all combinations.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from deepspeed import comm as dist

from pipeline.classification.augmentation import AugmentedImages
from pipeline.classification.task import ClassificationTask
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.ranks import init_distributed
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from tests.pipeline.training.zero_matrix import POLICIES, train

CASES = {  # by the number of ranks
    1: [("zero0", "none"), ("zero3", "none")],
    2: [
        ("zero0", "none"),
        ("zero1", "selective"),
        ("zero2", "every level"),
        ("zero3", "none"),
        ("zero3", "every 2 levels"),
        ("zero3_offload", "offloaded"),
        ("zero1_bf16", "every level"),
    ],
}


def task_of(path: Path, stage: str, policy: str, folder: Path) -> ClassificationTask:
    """Return the task of a case.

    :param folder: takes DeepSpeed's JSON.
    """
    config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text(encoding="utf-8"))
    # Else DeepSpeed keeps all of so small a model whole.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    json_path = folder / f"{stage}.json"
    json_path.write_text(json.dumps(config), encoding="utf-8")
    # The gradient of key biases is nothing but rounding, which Adam would make steps of.
    overrides = {"training.deepspeed_config": str(json_path), "training.adam_eps": "1e-5"}
    for key, value in POLICIES[policy].items():
        overrides[f"training.activation_checkpointing.{key}"] = json.dumps(value)
    keys = list(overrides.items())
    return ClassificationTask(load_recipe(path, keys, kind=ClassificationRecipe))


def main(arguments: list[str]) -> None:
    """Train every case.

    :param arguments: the recipe; the file that takes the results, by case.
    """
    path, results = map(Path, arguments)
    init_distributed()
    folder = results.parent / f"rank-{dist.get_rank()}"
    folder.mkdir(exist_ok=True)
    found, augmented = {}, None
    for case in CASES[dist.get_world_size()]:
        task = task_of(path, *case, folder)
        recipe = task.recipe
        augmented = augmented or AugmentedImages(
            recipe.shards, recipe.training.augmentation, recipe.data.image_size
        )
        task.__dict__["_augmented"] = augmented  # its processes take seconds to start
        found[case] = train(task)
    assert augmented is not None
    augmented.close()
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
