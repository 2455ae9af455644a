"""A step before training: the largest micro-batch must fit into memory."""

from __future__ import annotations

import gc
import time

import torch
from deepspeed import comm as dist

from pipeline.training.feed import Share
from pipeline.training.task import Batch, Task
from pipeline.training.trainer import Trainer, TrainingError


def rehearse(task: Task[Batch]) -> str:
    """Train one step on the largest micro-batch, with a trainer that is thrown away. Every rank
    must call this.

    :returns: what fits, and the seconds that it took, in words.
    :raises TrainingError: it does not fit into the GPU's memory.
    """
    what = "the model with its optimizer"
    advice = "shard them (ds_configs/zero3.json on several GPUs) or offload (zero3_offload.json)"
    try:
        trainer = Trainer(task.dearest(), begins=False)
        batch = task.collate(task.plan.largest_micro_batch(), 0, trainer.device)
        what = f"the largest micro-batch ({batch})"
        checkpointing = "training.activation_checkpointing.levels"
        advice = f"lower training.{trainer.config.micro_batch_key}, or set {checkpointing} to 1"
        started = time.monotonic()
        times, positions = trainer.accumulation_steps, batch.positions
        trainer.optimizer_step(
            Share([batch] * times, [0] * times, [], units=positions, normaliser=positions)
        )
        if trainer.device.type == "cuda":  # the host's memory is not rehearsed
            step_fits, what = what, "what validation needs beside the training"
            advice = "lower evaluation.batch_tokens or beam_size, or set training.bleu_every to 0"
            task.rehearse_validation(trainer)
            what = step_fits
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {dist.get_rank()}: {what} does not fit into the GPU's memory; {advice}"
        ) from error
    seconds = time.monotonic() - started
    trainer.engine.destroy()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"{what} fits, {seconds:.1f} s"
