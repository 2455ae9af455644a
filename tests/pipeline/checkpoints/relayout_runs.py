"""This script does several short trainings in one process per rank, for `test_relayout.py`.

A job trains a run_dir to step 6, from a checkpoint if it has one or names one, and saves at steps 3
and 6. Its result.pt holds the losses and the optimizer's state as DeepSpeed's own accessors read
it. A refused checkpoint leaves a file refused-RANK.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from pipeline.checkpoints.folder import CheckpointError, ValidationState
from pipeline.checkpoints.resume import checkpoint_to_resume
from pipeline.ranks import RankZeroFailed, init_distributed
from pipeline.recipe_file import load_recipe
from pipeline.training.progress import Window
from pipeline.training.trainer import Trainer
from pipeline.translation.batches import PairBatch
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe


def run(recipe: TranslationRecipe) -> dict[str, Any]:
    """Train to the end.

    :returns: what to compare: losses by step, and states of the optimizer.
    """
    task = TranslationTask(recipe)
    newest = checkpoint_to_resume(recipe, task.identity(), task.criterion)
    trainer = Trainer(task)
    if newest:
        trainer.resume(newest)
    losses: dict[int, float] = {}
    states = {"start": optimizer_state(trainer)} if newest else {}
    while trainer.step < recipe.training.max_steps:
        window = Window(torch.zeros(()))
        trainer.train_step(window)
        (loss,) = trainer.mean_over_ranks(window.loss)
        losses[trainer.step] = loss * trainer.world_size / window.normaliser
        if trainer.step % recipe.training.checkpoint_every == 0:
            trainer.save(None, ValidationState(criterion=task.criterion.metric))
            states[f"step {trainer.step}"] = optimizer_state(trainer)
    trainer.engine.destroy()
    return {"losses": losses, **states}


def optimizer_state(trainer: Trainer[PairBatch]) -> dict[str, Tensor]:
    """Return weights in fp32 under their names, moments under NAME/MOMENT, the step under /step."""
    engine = trainer.engine
    moments = engine.basic_optimizer.state
    (step,) = {float(state["step"]) for state in moments.values()}
    whole = {"/step": torch.tensor(step)}
    for name, parameter in engine.module.named_parameters():
        cut = engine.zero_optimization_stage() > 0
        whole[name] = safe_get_full_fp32_param(parameter) if cut else parameter
        for key in ("exp_avg", "exp_avg_sq"):
            whole[f"{name}/{key}"] = (
                safe_get_full_optimizer_state(parameter, key) if cut else moments[parameter][key]
            )
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def main(arguments: list[str]) -> None:
    """Do all jobs, one after the other.

    :param arguments: a JSON file with the list of jobs.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    init_distributed()
    for job in json.loads(Path(arguments[0]).read_text()):
        recipe = load_recipe(Path(job["recipe"]), job["options"])
        if dist.get_rank() == 0 and job["checkpoint"]:
            source = Path(job["checkpoint"])
            shutil.copytree(source, recipe.run_dir / "checkpoints" / source.name)
        dist.barrier()
        try:
            result = run(recipe)
        except (CheckpointError, RankZeroFailed) as error:
            (recipe.run_dir / f"refused-{dist.get_rank()}").write_text(str(error))
        else:
            if dist.get_rank() == 0:
                torch.save(result, recipe.run_dir / "result.pt")
    dist.destroy_process_group()
