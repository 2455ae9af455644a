"""The buffer that DeepSpeed collects gradients in: as large as the model needs, and no larger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.training.deepspeed_config import DEFAULT_BUCKET_SIZE, reduce_bucket_size
from pipeline.translation_recipe import TranslationRecipe
from tests.conftest import run_process

ENGINE = """
import os, sys, torch
from pathlib import Path
from pipeline.recipe_file import load_recipe
from pipeline.ranks import init_distributed
from pipeline.training.trainer import Trainer
from pipeline.translation.task import TranslationTask
recipe = load_recipe(Path(sys.argv[1]), [("training.deepspeed_config", sys.argv[2])])
init_distributed()
sizes, empty = [], torch.empty
def counted(*shape, **options):
    made = empty(*shape, **options)
    sizes.append(made.nbytes)
    return made
torch.empty = counted
trainer = Trainer(TranslationTask(recipe))
trainer.optimizer_step(next(trainer.shares()))
numbers = [getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()]
print("largest", max(sizes), "parameters", sum(numbers))
"""


@pytest.mark.parametrize(
    ("zero", "parameters", "expected"),
    [
        ({}, 25_000, 25_000),
        ({"stage": 3}, 60_000_000, 60_000_000),
        ({"stage": 1}, 7 * DEFAULT_BUCKET_SIZE, DEFAULT_BUCKET_SIZE),
        ({"stage": 1, "reduce_bucket_size": 1000}, 25_000, 1000),
        ({"stage": 1, "reduce_bucket_size": 2e8}, 25_000, 200_000_000),
    ],
)
def test_all_gradients_fit_unless_the_json_says_otherwise(
    zero: dict[str, object], parameters: int, expected: int
) -> None:
    assert reduce_bucket_size({"zero_optimization": zero}, parameters) == expected
    assert reduce_bucket_size({}, parameters) == min(parameters, DEFAULT_BUCKET_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_allocates_what_the_model_has(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path, stage: int
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    done = run_process(
        ["env", "RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1",
         "MASTER_PORT=0", "python", "-c", ENGINE, str(tiny_recipe), str(path)]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, largest, _, parameters = done.stdout.splitlines()[-1].split()
    assert int(largest) <= 4 * int(parameters)
