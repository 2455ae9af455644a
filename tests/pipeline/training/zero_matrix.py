"""This script trains with each combination of ZeRO stage, precision, checkpointing and embeddings.

`test_zero_matrix.py` calls `main` on every rank: one process trains all combinations.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from pipeline.ranks import init_distributed
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.training.feed import micro_batch_seed
from pipeline.training.learning_rate import learning_rate_factor
from pipeline.training.progress import Window
from pipeline.training.task import Task
from pipeline.training.trainer import Trainer
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe

STEPS = 2
MICRO_BATCHES = 4  # of a step, on all ranks together
FLOAT32 = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
BFLOAT16 = ["zero1_bf16", "zero2_bf16", "zero3_bf16"]
FLOAT16 = (
    ["zero1_fp16", "zero2_fp16", "zero3_fp16"] if get_accelerator().is_fp16_supported() else []
)
POLICIES: dict[str, dict[str, object]] = {
    "none": {},
    "every level": {"levels": 1},
    "every 2 levels": {"levels": 2},
    "selective": {"levels": 1, "keep_attention": True},
    "offloaded": {"levels": 1, "cpu_offload": True},
}

Case = tuple[str, str, bool]
"""DeepSpeed configuration, checkpointing policy, tied embeddings."""


def cases(ranks: int) -> list[Case]:
    """Return what is trained on so many ranks: most on two, and what is another path through
    DeepSpeed on one, where nothing is cut up, and on four, where more is."""
    if ranks == 1:
        return [*product(["zero1", "zero3", "zero2_bf16"], ["none"], [True])]
    if ranks > 2:
        return [*product(["zero2", "zero3"], ["every level"], [True])]
    return [
        *product(FLOAT32, ["none"], [True]),
        # What is recomputed is more than torch's matter where gradients are sent as they come, and
        # where weights are cut up.
        *product(["zero2", "zero3"], ["every level", "selective"], [True]),
        *product(["zero3"], ["every 2 levels", "offloaded"], [True]),
        ("zero3_offload", "offloaded", True),
        *product(["zero2", "zero3"], ["none"], [False]),
        *product([*BFLOAT16, *FLOAT16], ["every level"], [True]),
    ]


def recipe_of(path: Path, stage: str, policy: str, tied: bool, folder: Path) -> TranslationRecipe:
    """Return the recipe at `path` with the values of a case.

    :param folder: takes DeepSpeed's JSON.
    """
    config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text(encoding="utf-8"))
    # Else DeepSpeed keeps all of so small a model whole.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    json_path = folder / f"{stage}.json"
    json_path.write_text(json.dumps(config), encoding="utf-8")
    overrides = {
        "model.dropout": 0.1,
        "model.tied_embeddings": json.dumps(tied),
        "training.deepspeed_config": json_path,
        "training.max_tokens": 512 * MICRO_BATCHES,
        **{
            f"training.activation_checkpointing.{k}": json.dumps(v)
            for k, v in POLICIES[policy].items()
        },
    }
    return load_recipe(path, [(key, str(value)) for key, value in overrides.items()])


def train(task: Task[Any]) -> dict[str, Any]:
    """Train with DeepSpeed.

    :returns: loss and gradient norm of each step, and the weights after the last.
    """
    trainer = Trainer(task)
    losses, norms = [], []
    for _ in range(STEPS):
        window = Window(torch.zeros(()))
        trainer.train_step(window)
        (loss,) = trainer.mean_over_ranks(window.loss)
        losses.append(loss * trainer.world_size / window.normaliser)
        norms.append(float(trainer.engine.get_global_grad_norm()))
    weights = {name: tensor.float() for name, tensor in trainer.full_weights().items()}
    trainer.engine.destroy()
    task.end.close()
    return {"losses": losses, "norms": norms, "weights": weights}


def reference(task: Task[Any]) -> dict[str, Any]:
    """Train likewise without DeepSpeed: by torch alone, in one process, in float32."""
    config = task.recipe.training
    torch.manual_seed(config.seed)
    model = task.create_model().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.adam_betas, eps=config.adam_eps, weight_decay=0
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch, total = task.plan[step], 0.0
        normaliser = task.normaliser(batch)
        for number, indices in enumerate(batch.micro_batches):
            seed = micro_batch_seed(config.seed, step, number)
            torch.manual_seed(seed)
            loss = task.loss(model, task.collate(indices, seed, torch.device("cpu")))
            (loss / normaliser).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)))
        for group in optimizer.param_groups:
            factor = learning_rate_factor(
                config, step, task.recipe.model.model_dim, config.max_steps
            )
            group["lr"] = config.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / normaliser)
    task.end.close()
    return {"losses": losses, "norms": norms, "weights": model.state_dict()}


def agree(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    """Check that two trainings gave the same.

    :param tolerance: relative.
    """
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=tolerance)
    difference, size = (
        torch.stack([tensor.norm() for tensor in tensors]).norm()
        for tensors in (
            [ours["weights"][name] - tensor for name, tensor in theirs["weights"].items()],
            theirs["weights"].values(),
        )
    )
    assert float(difference / size) <= tolerance


def main(arguments: list[str]) -> None:
    """Train every case.

    :param arguments: the recipe; the file that takes the results, by case.
    """
    recipe_path, results = map(Path, arguments)
    init_distributed()
    found = {}
    for case in cases(dist.get_world_size()):
        folder = results.parent / f"rank-{dist.get_rank()}"
        folder.mkdir(exist_ok=True)
        found[case] = train(TranslationTask(recipe_of(recipe_path, *case, folder)))
    if dist.get_rank() == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
