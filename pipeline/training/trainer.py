"""DeepSpeed's engine around our model: one step, its loss, saving and resuming.

The way of a batch: `BatchPlan[step]` names the sentences of a global batch; this rank's share comes
collated from `feed`; the summed loss of each micro-batch is divided by the target tokens of the
whole global batch, and DeepSpeed accumulates, averages and steps. Which rank works on what changes
nothing in the sum, nor in the dropout masks while the ranks divide the micro-batches.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from data_prep.batch_plan import BatchPlan, fractions_of_each
from data_prep.shards import ShardReader
from data_prep.vocabulary import PAD_IDX, vocabulary_digest
from models.factory import create_model
from models.seq2seq import TranslationModel, core_parameters
from pipeline.checkpoints.folder import Checkpoint, CheckpointError, finish_checkpoint, tag_of
from pipeline.checkpoints.relayout import carry_over
from pipeline.checkpoints.resume import last_step, training_identity
from pipeline.ranks import first_line, lost_contact
from pipeline.recipe import Recipe, TrainingConfig, UsageError
from pipeline.training.deepspeed_config import (
    activation_checkpointing,
    deepspeed_config,
    offloads,
    precision,
    zero_stage,
)
from pipeline.training.ema import MovingAverage
from pipeline.training.feed import StepBatches, feed
from pipeline.training.nonfinite import dump
from pipeline.training.progress import Window
from pipeline.translation.batches import Batch, collate

log = logging.getLogger("train")


class TrainingError(Exception):
    """Training cannot go on."""


def learning_rate_factor(training: TrainingConfig, step: int, model_dim: int) -> float:
    """What the learning rate is multiplied with in step 0, 1, …: linear warm-up, then decay."""
    warmup_steps = training.warmup_steps
    if training.schedule == "noam":
        return float(model_dim**-0.5 * min((step + 1) ** -0.5, (step + 1) * warmup_steps**-1.5))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if training.schedule == "inverse_sqrt":
        return math.sqrt(max(1, warmup_steps) / (step + 1))
    decay_steps = max(1, training.max_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout masks of a micro-batch, numbered within its global batch."""
    entropy = np.random.SeedSequence([seed, step, micro_batch])
    return int(entropy.generate_state(1, np.uint64)[0]) >> 1


def load_initial_weights(model: TranslationModel, folder: Path, shards: Path) -> None:
    """:param folder: written by `./run.sh export`.
    :raises CheckpointError: it has another vocabulary than the shards, or another shape.
    """
    try:
        same = vocabulary_digest(folder) == vocabulary_digest(shards)
        if same:
            load_model(model, folder / "model.safetensors")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"training.init_from: {folder} does not fit the recipe's model: {first_line(error)}"
        ) from error
    if not same:
        raise CheckpointError(
            f"training.init_from: {folder} has another vocabulary than {shards}; prepare the data "
            "with its SentencePiece model"
        )


def freeze(model: TranslationModel, prefixes: list[str]) -> None:
    """:raises UsageError: no parameter is called so, or none is left to train."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UsageError(
                f"training.freeze: no parameter's name begins with {prefix!r}; they are "
                f"{', '.join(names)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(prefixes)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("training.freeze leaves no parameter to train")


class Training:
    """One training on this rank: engine, data, and the position in it, `step`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.config = config = recipe.training
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.reader = ShardReader(recipe.run_dir / "shards", "train")
        self.plan = BatchPlan(
            *self.reader.lengths(),
            max_tokens=config.max_tokens,
            micro_batch_tokens=config.micro_batch_tokens,
            seed=config.seed,
            cache=recipe.run_dir / "plan",
        )
        self.step = 0
        self.last_step = last_step(config, self.plan.steps_per_epoch)
        self.accumulation_steps = self.plan.micro_batches_per_rank(self.world_size)
        self.deepspeed_config = deepspeed_config(config, self.accumulation_steps)
        self.checkpoints = recipe.run_dir / "checkpoints"
        self.model = self._create_model()
        self.core_parameters = core_parameters(self.model)
        self.engine = self._create_engine()
        self.ema = MovingAverage(self.model, config.ema_decay) if config.ema_decay else None
        self.device: torch.device = self.engine.device
        self._batches: Iterator[StepBatches] | None = None

    def _create_model(self) -> TranslationModel:
        torch.manual_seed(self.config.seed)
        vocab_sizes = self.reader.manifest["vocabulary"]["sizes"]
        model = create_model(self.recipe.model, vocab_sizes, PAD_IDX)
        if self.config.init_from:
            load_initial_weights(model, self.config.init_from, self.recipe.run_dir / "shards")
        freeze(model, self.config.freeze)
        model.checkpoint_activations(activation_checkpointing(self.config, self.recipe.model))
        if self.config.compile:
            model.compile_layers()
        return model

    def _create_engine(self) -> deepspeed.DeepSpeedEngine:
        settings = dict(self.deepspeed_config)
        stage = zero_stage(settings)
        if stage == 0:
            settings["gradient_clipping"] = 0.0  # `_clip` does it
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=self.model, model_parameters=trainable, config=settings
        )
        if stage == 0:
            engine.optimizer.register_step_pre_hook(self._clip)
        return engine

    def _clip(self, optimizer: Optimizer, *_: object) -> None:
        """Clip, and leave out what is not finite, as DeepSpeed's ZeRO optimizers do themselves.

        DeepSpeed reads what this sets.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(p.grad for p in parameters if p.grad is not None)
        optimizer._global_grad_norm = norm.item()  # type: ignore[attr-defined]
        optimizer.overflow = not math.isfinite(norm)  # type: ignore[attr-defined]
        if not math.isfinite(norm):
            optimizer.zero_grad()
        elif self.config.clip_norm:
            clip_grads_with_norm_(parameters, self.config.clip_norm, norm)

    # ── One step ────────────────────────────────────────────────────────────────────────────────

    def train_step(self, window: Window) -> None:
        """Forward, backward and optimizer step on the next global batch.

        :raises TrainingError: a gradient is not finite, and the recipe says to stop then.
        """
        started = time.monotonic()
        if self._batches is None:
            self._batches = self.batches()
        batches = next(self._batches)
        window.waited += time.monotonic() - started
        skipped = self.engine.skipped_steps
        losses = self.optimizer_step(batches)
        window.steps += 1
        if self.engine.skipped_steps > skipped:
            self._skipped(batches, losses)
        else:
            window.loss += torch.stack(losses).sum()
            window.source_tokens += batches.source_tokens
            window.target_tokens += batches.target_tokens
            window.positions += batches.positions
            if self.ema:
                self.ema.update()
        self.step += 1

    def batches(self) -> Iterator[StepBatches]:
        """What this rank works on, from the step at hand on."""
        return feed(
            self.plan, self.reader, self.device,
            rank=self.rank, world_size=self.world_size, first_step=self.step,
        )  # fmt: skip

    def optimizer_step(self, batches: StepBatches) -> list[torch.Tensor]:
        """:returns: the loss of each of this rank's micro-batches, summed over target tokens."""
        self.engine.train()
        learning_rate = self.learning_rate
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides by ranks and accumulation steps; we want the sum over the global batch.
        scale = self.world_size * self.accumulation_steps / batches.target_tokens
        losses = []
        for number, batch in enumerate(batches.micro_batches):
            # Dropout depends on the place of a micro-batch in training alone: whoever works on it,
            # and however often training was resumed.
            place = self.rank + number * self.world_size
            torch.manual_seed(micro_batch_seed(self.config.seed, self.step, place))
            loss = self.loss(batch, label_smoothing=self.config.label_smoothing)
            self.engine.backward(loss * scale)
            self.engine.step()
            losses.append(loss.detach())
        return losses

    @property
    def learning_rate(self) -> float:
        """Of the step at hand. A function of the step has no state to save."""
        factor = learning_rate_factor(self.config, self.step, self.recipe.model.model_dim)
        return self.config.learning_rate * factor

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

    def _skipped(self, batches: StepBatches, losses: list[torch.Tensor]) -> None:
        """DeepSpeed has left out a step, on all ranks."""
        loss = self.mean_over_ranks(torch.stack(losses).sum())[0]
        if math.isfinite(loss) and precision(self.deepspeed_config) == "fp16":
            return  # the loss scale was too large, and is halved now
        step = self.step + 1  # it would have been
        path = self.recipe.run_dir / "nonfinite" / f"step-{step:08d}-rank-{self.rank}.json"
        dump(
            path, self.full_weights(),
            step=step, learning_rate=self.learning_rate,
            sentences=batches.sentences, losses=losses,
        )  # fmt: skip
        what = f"the gradient of step {step} is not finite (loss {loss:.4g}); see {path}"
        if self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"{what}. The weights were left as they were. Lower training.learning_rate, "
                "lengthen training.warmup_steps, or go on without such steps: "
                "training.on_nonfinite skip"
            )
        if self.rank == 0:
            log.warning("%s; skipped, %d so far", what, self.engine.skipped_steps)

    def mean_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        """Every rank must call this."""
        together = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        )
        if self.world_size > 1:
            dist.all_reduce(together)
        return [float(value) / self.world_size for value in together.tolist()]

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The model's parameters and buffers, whole and on every rank, which all must call this."""
        stage = self.engine.zero_optimization_stage()
        parameters = list(self.model.parameters())
        whole = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else nullcontext()
        with whole:
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    # ── Checkpoints ─────────────────────────────────────────────────────────────────────────────

    def save(self, tracker_run_id: str | None, validation: dict[str, Any]) -> None:
        """Every rank calls this: each holds a part of the optimizer.

        :param validation: what a resumed run must know of it.
        :raises CheckpointError: it cannot be written. Those before are as they were.
        """
        folder = self.checkpoints / tag_of(self.step)
        info = {
            **training_identity(self.recipe, self.reader.manifest),
            **self.layout(),
            "training": self.config.model_dump(mode="json"),
            "steps_per_epoch": self.plan.steps_per_epoch,
            "validation": validation,
            "tracker_run_id": tracker_run_id,
            "saved_at": time.time(),
        }
        try:
            self.engine.save_checkpoint(
                str(self.checkpoints),
                tag=folder.name,
                client_state={
                    "step": self.step,
                    "recipe": self.recipe.model_dump(mode="json"),
                    **info,
                    "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
                },
                save_latest=False,
            )
            if self.ema and self.rank == 0:
                self.ema.save(folder)
            dist.barrier()
            if self.rank == 0:
                keep, best = self.config.keep_checkpoints, validation["best_step"]
                finish_checkpoint(self.checkpoints, self.step, info, keep, best)
                log.info("checkpoint %s", folder)
        except (OSError, RuntimeError) as error:
            if lost_contact(error):
                raise
            raise CheckpointError(
                f"{folder}: cannot be written: {first_line(error)}. The checkpoints before are "
                "whole: make room, and run the same command again to continue from the newest"
            ) from error
        dist.barrier()

    def layout(self) -> dict[str, Any]:
        """How DeepSpeed has cut the optimizer state, and what it is made of."""
        return {
            "zero_stage": self.engine.zero_optimization_stage(),
            "world_size": self.world_size,
            "precision": precision(self.deepspeed_config),
            "offload": offloads(self.deepspeed_config, "optimizer"),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it.

        :raises CheckpointError: it cannot be read.
        """
        layout, written = self.layout(), checkpoint.info
        cut_differently = any(written[key] != layout[key] for key in layout)
        note = ""
        if cut_differently and max(layout["zero_stage"], written["zero_stage"]) > 0:
            carry_over(self.engine, checkpoint)
            note = f" (written by {_in_words(written)}; now {_in_words(layout)})"
        else:
            self._load(checkpoint)
        if self.ema:
            self.ema.load(checkpoint.folder)
        self._set_hyperparameters()
        self.step = checkpoint.step
        if self.rank == 0:
            log.info("resumed from %s%s", checkpoint.folder, note)

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            path, _ = self.engine.load_checkpoint(str(self.checkpoints), tag=checkpoint.tag)
            if path is None:
                raise CheckpointError("DeepSpeed found nothing in it")
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.folder} cannot be read ({type(error).__name__}: {error}); remove it "
                "to go on from the one before"
            ) from error

    def _set_hyperparameters(self) -> None:
        """The recipe's, which may have changed; the checkpoint has brought back its own."""
        config, optimizer = self.config, self.engine.optimizer
        for group in optimizer.param_groups:
            group["betas"], group["eps"] = config.adam_betas, config.adam_eps
            group["weight_decay"] = config.weight_decay
            if "decoupled_weight_decay" in group:  # torch's way from Adam to AdamW
                group["decoupled_weight_decay"] = config.optimizer == "adamw"
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = config.clip_norm


def _in_words(layout: dict[str, Any]) -> str:
    ranks = "1 rank" if layout["world_size"] == 1 else f"{layout['world_size']} ranks"
    words = [f"{ranks} at ZeRO stage {layout['zero_stage']}", layout["precision"]]
    return ", ".join([*words, "offload"] if layout["offload"] else words)


def rehearse(recipe: Recipe) -> str:
    """One step on the largest micro-batch, which then never was. Every rank must call this.

    :returns: what it took.
    :raises TrainingError: it does not fit into the GPU's memory.
    """
    what = "the model with its optimizer"
    advice = "shard them (ds_configs/zero3.json on several GPUs) or offload (zero3_offload.json)"
    try:
        training = Training(recipe)
        largest = training.plan.largest_micro_batch()
        pieces = fractions_of_each(training.plan.micro_batches_per_step, training.world_size)
        batch = collate(training.reader, largest[::pieces], training.device)
        size = f"{batch.source.size(0)} × {batch.source.size(1)} + {batch.targets.size(1)} tokens"
        what = f"the largest micro-batch ({size})"
        checkpointing = "training.activation_checkpointing.levels"
        advice = f"lower training.micro_batch_tokens, or set {checkpointing} to 1"
        started = time.monotonic()
        tokens = int(batch.targets.numel())
        step = StepBatches([batch] * training.accumulation_steps, [], tokens, tokens)
        training.optimizer_step(step)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {dist.get_rank()}: {what} does not fit into the GPU's memory; {advice}"
        ) from error
    seconds = time.monotonic() - started
    training.engine.destroy()
    del training
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"{what} fits, {seconds:.1f} s"
