"""`deepspeed pipeline/train.py`: train on prepared shards.

The way of a batch: `BatchPlan[step]` names the sentences of a global batch; this rank takes its
share of micro-batches; each is collated, its summed loss is divided by the target tokens of the
whole global batch, and DeepSpeed accumulates, averages and steps. Which rank works on what changes
nothing in the sum.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from data_prep.shards import ShardReader
from data_prep.stage import only_command_in
from data_prep.vocabulary import PAD_IDX
from models.factory import create_model
from models.seq2seq import core_parameters
from pipeline.batches import Batch, BatchPlan, collate
from pipeline.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_to_resume,
    finish_checkpoint,
    finished_note,
    tag_of,
    training_identity,
)
from pipeline.config import Recipe, TrainingConfig, run_command
from pipeline.deepspeed_config import deepspeed_config
from pipeline.preflight import remove_dead_build_locks
from pipeline.tracking import Tracker

log = logging.getLogger("train")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class TrainingError(Exception):
    """Training cannot go on."""


class Stopped(Exception):
    """A signal has stopped training; a checkpoint was saved."""


def learning_rate_factor(training: TrainingConfig, step: int) -> float:
    """Share of the peak learning rate in step 0, 1, …: linear warm-up, then decay."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.schedule == "inverse_sqrt":
        return math.sqrt(max(1, training.warmup_steps) / (step + 1))
    decay_steps = max(1, training.max_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / decay_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


class StopSignal:
    """SIGTERM or Ctrl-C, agreed on by all ranks."""

    def __init__(self) -> None:
        self._received: str | None = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(signum).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was told to stop. Every rank must call this equally often."""
        flag = torch.tensor(float(self._received is not None), device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


@dataclass
class Progress:
    """Sums since the last progress line, on this rank."""

    loss: torch.Tensor
    target_tokens: int = 0
    steps: int = 0
    since: float = 0.0


class Training:
    """One training run on this rank: engine, data and position."""

    def __init__(self, recipe: Recipe, newest: Checkpoint | None) -> None:
        """:param newest: checkpoint to continue."""
        self.recipe = recipe
        self.config = config = recipe.training
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.reader = ShardReader(recipe.run_dir / "shards", "train")
        self.valid_reader = ShardReader(recipe.run_dir / "shards", "valid")
        self.plan = BatchPlan(
            *self.reader.lengths(),
            max_tokens=config.max_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            seed=config.seed,
            cache=recipe.run_dir / "plan",
        )
        self.accumulation_steps = self.plan.micro_batches_per_rank(self.world_size)
        self.deepspeed_config = deepspeed_config(config, self.accumulation_steps)

        torch.manual_seed(config.seed)
        vocab_sizes = self.reader.manifest["vocabulary"]["sizes"]
        model = create_model(recipe.model, vocab_sizes, PAD_IDX)
        self.core_parameters = core_parameters(model)
        model.checkpoint_levels(config.checkpoint_levels)
        if config.compile:
            model.compile_layers()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=self.deepspeed_config,
            lr_scheduler=self._scheduler,
        )
        self.device: torch.device = self.engine.device
        self.checkpoints = recipe.run_dir / "checkpoints"
        self.step = self._resume(newest)

    def _scheduler(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: learning_rate_factor(self.config, step))

    # ── One step ────────────────────────────────────────────────────────────────────────────────

    def train_step(self, progress: Progress) -> None:
        """Forward, backward and optimizer step on one global batch."""
        # Dropout depends on seed, step and rank only, so a resumed run needs no saved RNG state.
        entropy = np.random.SeedSequence([self.config.seed, self.step, self.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)
        self.engine.train()
        global_batch = self.plan[self.step]
        # DeepSpeed divides by ranks and accumulation steps; we want the sum over the global batch.
        scale = self.world_size * self.accumulation_steps / global_batch.target_tokens
        for indices in global_batch.share(self.rank, self.world_size):
            batch = collate(self.reader, indices, self.device)
            loss = self.loss(batch, label_smoothing=self.config.label_smoothing)
            self.engine.backward(loss * scale)
            self.engine.step()
            progress.loss += loss.detach()
        progress.target_tokens += global_batch.target_tokens
        progress.steps += 1
        self.step += 1

    def loss(self, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross-entropy summed over the target tokens of `batch`."""
        loss: torch.Tensor = self.engine(
            batch.source,
            batch.source_layout,
            batch.target_input,
            batch.target_layout,
            batch.targets,
            label_smoothing=label_smoothing,
        )
        return loss

    def validate(self, stop: StopSignal) -> float | None:
        """Cross-entropy per target token of the validation set, the same on every rank.

        None if a signal came meanwhile.
        """
        lengths = self.valid_reader.lengths()
        budget = self.config.micro_batch_tokens or self.config.max_tokens
        micro_batches = BatchPlan(
            *lengths, max_tokens=budget, micro_batch_tokens=None, seed=0
        ).sorted_micro_batches()
        # Ranks must run equally many forward passes: ZeRO-3 gathers parameters in each.
        while len(micro_batches) % self.world_size:
            micro_batches.append(np.empty(0, dtype=np.int64))
        total = torch.zeros((), device=self.device)
        self.engine.eval()  # until the next step
        with torch.no_grad():
            for indices in micro_batches[self.rank :: self.world_size]:
                if stop.agreed(self.device):
                    break
                total += self.loss(collate(self.valid_reader, indices, self.device))
            else:
                return self.sum_over_ranks(total) / int(lengths[1].sum())
        return None

    def sum_over_ranks(self, value: torch.Tensor) -> float:
        if self.world_size > 1:
            dist.all_reduce(value)
        return float(value)

    # ── Checkpoints ─────────────────────────────────────────────────────────────────────────────

    def save(self, tracker_run_id: str | None) -> None:
        """Every rank calls this: each holds a part of the optimizer."""
        info = {
            **training_identity(self.recipe, self.reader.manifest),
            **self._layout(),
            "training": self.config.model_dump(mode="json"),
            "tracker_run_id": tracker_run_id,
            "saved_at": time.time(),
        }
        self.engine.save_checkpoint(
            str(self.checkpoints),
            tag=tag_of(self.step),
            client_state={
                "step": self.step,
                "recipe": self.recipe.model_dump(mode="json"),
                **info,
                "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
            },
            save_latest=False,
        )
        dist.barrier()
        if self.rank == 0:
            finish_checkpoint(self.checkpoints, self.step, info, self.config.keep_checkpoints)
            log.info("checkpoint %s", self.checkpoints / tag_of(self.step))
        dist.barrier()

    def _layout(self) -> dict[str, Any]:
        """How DeepSpeed has cut the optimizer state."""
        stage = self.engine.zero_optimization_stage()
        return {"zero_stage": stage, "world_size": self.world_size}

    def _resume(self, newest: Checkpoint | None) -> int:
        """Load a checkpoint, if there is one. :returns: the step to go on from."""
        if newest is None:
            return 0
        layout = self._layout()
        cut_differently = {key for key in layout if layout[key] != newest.info[key]}
        if cut_differently and max(layout["zero_stage"], newest.info["zero_stage"]) > 0:
            raise CheckpointError(
                f"{newest.folder} was written by {newest.info['world_size']} rank(s) at ZeRO stage "
                f"{newest.info['zero_stage']}; this run has {layout['world_size']} at stage "
                f"{layout['zero_stage']}. Continue with the same, or choose another run_dir"
            )
        try:
            path, _ = self.engine.load_checkpoint(str(self.checkpoints), tag=newest.tag)
        except Exception as error:
            path, reason = None, f"{type(error).__name__}: {error}"
        else:
            reason = "DeepSpeed found nothing in it"
        if path is None:
            raise CheckpointError(
                f"{newest.folder} cannot be read ({reason}); remove it to go on from the one before"
            )
        self._set_hyperparameters(newest.step)
        log.info("resumed from %s", newest.folder)
        return newest.step

    def _set_hyperparameters(self, step: int) -> None:
        """The recipe's, which may have changed; the checkpoint has brought back its own."""
        config, optimizer = self.config, self.engine.optimizer
        self.engine.lr_scheduler.base_lrs = [config.learning_rate] * len(optimizer.param_groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
            group["lr"] = config.learning_rate * learning_rate_factor(config, step)
            group["betas"], group["eps"] = config.adam_betas, config.adam_eps
            group["weight_decay"] = config.weight_decay
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = config.clip_norm


# ── The loop ────────────────────────────────────────────────────────────────────────────────────


def train(training: Training, tracker: Tracker | None) -> None:
    """Train to `max_steps`, logging, validating and saving on the way.

    :raises Stopped: by a signal, after saving.
    :raises TrainingError: the loss is not finite.
    """
    config = training.config
    stop = StopSignal()
    first_step = training.step
    started = time.monotonic()
    progress = _new_progress(training)
    while training.step < config.max_steps:
        training.train_step(progress)
        step, last = training.step, training.step == config.max_steps
        stopped = stop.agreed(training.device)
        validating = (step % config.validate_every == 0 or last) and not stopped
        saving = step % config.checkpoint_every == 0 or last or stopped
        # Before saving too: what is saved was seen to be finite.
        if step % config.log_every == 0 or validating or saving:
            remaining = (config.max_steps - step) * (time.monotonic() - started)
            eta = timedelta(seconds=round(remaining / (step - first_step)))
            _report(training, tracker, progress, eta)
            progress = _new_progress(training)
        pause = time.monotonic()
        if validating:
            if (loss := training.validate(stop)) is None:
                stopped = saving = True
            else:
                log.info("step %d | valid loss %.4f | ppl %.2f", step, loss, _perplexity(loss))
                if tracker:
                    tracker.log_metrics({"valid_loss": loss, "valid_ppl": _perplexity(loss)}, step)
        if saving:
            training.save(tracker.run_id if tracker else None)
        progress.since += time.monotonic() - pause
        if stopped and not last:
            raise Stopped(
                f"stopped by a signal at step {step}; run the same command again to continue"
            )


def _new_progress(training: Training) -> Progress:
    return Progress(torch.zeros((), device=training.device), since=time.monotonic())


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 50.0))


def _report(
    training: Training, tracker: Tracker | None, progress: Progress, eta: timedelta
) -> None:
    """One progress line, and the same numbers to the tracker."""
    seconds = time.monotonic() - progress.since
    loss = training.sum_over_ranks(progress.loss) / progress.target_tokens
    grad_norm = training.engine.get_global_grad_norm()
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            raise TrainingError(
                f"the {name} became {float(value)} before step {training.step}; lower "
                "training.learning_rate or lengthen training.warmup_steps"
            )
    metrics = {
        "train_loss": loss,
        "learning_rate": training.engine.get_lr()[0],
        "target_tokens_per_second": progress.target_tokens / seconds,
        "steps_per_second": progress.steps / seconds,
        "epoch": training.step / training.plan.steps_per_epoch,
    }
    if grad_norm is not None:
        metrics["grad_norm"] = float(grad_norm)
    log.info(
        "step %d/%d | epoch %.2f | loss %.4f | lr %.2e%s | %s target tokens/s | ETA %s",
        training.step,
        training.config.max_steps,
        metrics["epoch"],
        loss,
        metrics["learning_rate"],
        f" | grad norm {metrics['grad_norm']:.2f}" if grad_norm is not None else "",
        f"{metrics['target_tokens_per_second']:,.0f}",
        eta,
    )
    if tracker:
        tracker.log_metrics(metrics, training.step)


def main(recipe: Recipe, arguments: argparse.Namespace) -> None:
    # Until training listens for it itself: an end with `finally`, which removes build locks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(name)s: %(message)s"
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_SIZE", "1"))))
    manifest = ShardReader(recipe.run_dir / "shards", "train").manifest
    newest = checkpoint_to_resume(recipe, manifest)
    if newest is not None and newest.step >= recipe.training.max_steps:
        log.info("%s", finished_note(recipe, newest))
        return
    with only_command_in(recipe.run_dir) if rank == 0 else nullcontext():
        for lock in remove_dead_build_locks():
            log.warning("%s: removed; a build that was killed left it", lock)
        if rank == 0:
            _verify_shards(recipe)
        deepspeed.init_distributed(timeout=COLLECTIVE_TIMEOUT, verbose=False)
        try:
            training = Training(recipe, newest)
            if rank != 0:
                train(training, tracker=None)
            else:
                _train_tracked(training, newest)
        finally:
            dist.destroy_process_group()


def _verify_shards(recipe: Recipe) -> None:
    """:raises DataError: a shard is not what the manifest says."""
    started = time.monotonic()
    for split in ("train", "valid"):
        ShardReader(recipe.run_dir / "shards", split, verify=True)
    if (seconds := time.monotonic() - started) > 1:
        log.info("verified the checksums of the shards in %.1f s", seconds)


def _train_tracked(training: Training, newest: Checkpoint | None) -> None:
    """Train as rank 0, which tells everybody about it."""
    log.info(
        "%s, %s core parameters; %s; %d rank(s) × %d micro-batch(es) a step, ZeRO stage %d; "
        "padding %.1f%%",
        training.recipe.model.architecture,
        f"{training.core_parameters:,}",
        training.device,
        training.world_size,
        training.accumulation_steps,
        training.engine.zero_optimization_stage(),
        100 * training.plan.padding_share(),
    )
    tracker = Tracker(training.recipe, newest.info["tracker_run_id"] if newest else None)
    tracker.start_training(training.deepspeed_config, training.reader.manifest)
    status = "FAILED"
    try:
        train(training, tracker)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


if __name__ == "__main__":
    run_command("train", "Train a translation model with DeepSpeed.", main)
