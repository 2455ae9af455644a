"""DeepSpeed's engine around a task's model: one step, saving and resuming.

The way of a batch: `BatchPlan[step]` names the examples of a global batch; this rank's share comes
collated from `feed`; the summed loss of each micro-batch is divided by the normaliser of the whole
global batch (a translation's target tokens), and DeepSpeed accumulates, averages and steps. Which
rank works on what changes nothing in the sum, nor in the dropout masks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Generic

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from models.export_format import digest_of_export
from pipeline.checkpoints.folder import (
    Checkpoint,
    CheckpointError,
    CheckpointInfo,
    Layout,
    ValidationState,
    finish_checkpoint,
    tag_of,
)
from pipeline.checkpoints.relayout import carry_over
from pipeline.checkpoints.resume import last_step
from pipeline.checkpoints.trained_with import OPTIMISATION, changed_keys
from pipeline.checkpoints.weights import tensors_only
from pipeline.ranks import lost_contact, short_message
from pipeline.recipe import UsageError
from pipeline.training.deepspeed_config import (
    deepspeed_config,
    offloads,
    precision,
    reduce_bucket_size,
    zero_stage,
)
from pipeline.training.ema import MovingAverage
from pipeline.training.feed import Share, feed
from pipeline.training.learning_rate import learning_rate_factor
from pipeline.training.nonfinite import dump
from pipeline.training.progress import Window
from pipeline.training.task import Batch, Task

log = logging.getLogger("train")


class TrainingError(Exception):
    """Training cannot go on."""


def freeze(model: nn.Module, prefixes: list[str]) -> None:
    """Leave the parameters whose names begin with one of `prefixes` out of training.

    :raises UsageError: no parameter is called so, or none is left to train.
    """
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


class Trainer(Generic[Batch]):
    """One training on this rank: DeepSpeed's engine, the data, and the position in it, `step`."""

    def __init__(self, task: Task[Batch], *, begins: bool = True) -> None:
        """Create the model and its optimizer.

        :param begins: from the first step, and not from a checkpoint.
        :raises CheckpointError: `training.init_from` does not fit.
        """
        self.task, self.recipe = task, task.recipe
        self.config = config = task.recipe.training
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = 0
        base = config.init_from if begins else None
        self.init_from = base and str(base)
        self.base = digest_of_export(base) if base and self.rank == 0 else None  # who saves it
        self.last_step = last_step(config, task.plan.steps_per_epoch)
        self.accumulation_steps = task.plan.micro_batches_per_rank(self.world_size)
        self.deepspeed_config = deepspeed_config(config, self.accumulation_steps)
        torch.manual_seed(config.seed)
        self.model = task.create_model(begins=begins)
        freeze(self.model, config.freeze)
        self.engine = self._create_engine()
        self.ema = MovingAverage(self.model, config.ema_decay) if config.ema_decay else None
        self.device: torch.device = self.engine.device
        self._shares: Iterator[Share[Batch]] | None = None

    def _create_engine(self) -> deepspeed.DeepSpeedEngine:
        settings = dict(self.deepspeed_config)
        stage = zero_stage(settings)
        if stage == 0:
            settings["gradient_clipping"] = 0.0  # `_clip` does it
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        bucket = reduce_bucket_size(settings, sum(p.numel() for p in trainable))
        zero = settings.get("zero_optimization", {})
        settings["zero_optimization"] = {**zero, "reduce_bucket_size": bucket}
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
        value = norm.item()  # the step's only wait for a GPU; DeepSpeed's own waits too
        optimizer._global_grad_norm = value  # type: ignore[attr-defined]
        optimizer.overflow = not math.isfinite(value)  # type: ignore[attr-defined]
        if not math.isfinite(value):
            optimizer.zero_grad()
        elif self.config.clip_norm:
            clip_grads_with_norm_(parameters, self.config.clip_norm, norm)

    # ── One step ────────────────────────────────────────────────────────────────────────────────

    def train_step(self, window: Window) -> None:
        """Forward, backward and optimizer step on the next global batch.

        :raises TrainingError: a gradient is not finite, and the recipe says to stop then.
        """
        started = time.monotonic()
        if self._shares is None:
            self._shares = self.shares()
        share = next(self._shares)
        window.waited += time.monotonic() - started
        skipped = self.engine.skipped_steps
        losses = self.optimizer_step(share)
        window.steps += 1
        if self.engine.skipped_steps > skipped:
            self._skipped(share, losses)
        else:
            window.loss += torch.stack(losses).sum()
            window.units += share.units
            window.normaliser += share.normaliser
            window.positions += share.positions
            if self.ema:
                self.ema.update()
        self.step += 1

    def shares(self) -> Iterator[Share[Batch]]:
        """Yield what this rank works on, from the step at hand on."""
        return feed(
            self.task, self.device,
            rank=self.rank, world_size=self.world_size, first_step=self.step,
            read_ahead_steps=self.config.read_ahead_steps,
        )  # fmt: skip

    def optimizer_step(self, share: Share[Batch]) -> list[Tensor]:
        """Run one step of the optimizer.

        :returns: the loss of each of this rank's micro-batches, summed over its targets.
        """
        self.engine.train()
        learning_rate = self.learning_rate
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides by ranks and accumulation steps; we want the sum over the global batch.
        scale = self.world_size * self.accumulation_steps / share.normaliser
        losses = []
        for batch, seed in zip(share.micro_batches, share.seeds, strict=True):
            torch.manual_seed(seed)
            loss = self.task.loss(self.engine, batch)
            self.engine.backward(loss * scale)
            self.engine.step()
            losses.append(loss.detach())
        return losses

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step at hand. A function of the step has no state to save."""
        factor = learning_rate_factor(
            self.config, self.step, self.recipe.model.model_dim, self.last_step
        )
        return self.config.learning_rate * factor

    def _skipped(self, share: Share[Batch], losses: list[Tensor]) -> None:
        """Tell of a step that DeepSpeed has left out, on all ranks.

        :raises TrainingError: the recipe says to stop then.
        """
        loss = self.mean_over_ranks(torch.stack(losses).sum())[0]
        loss *= self.world_size / share.normaliser
        if math.isfinite(loss) and precision(self.deepspeed_config) == "fp16":
            return  # the loss scale was too large, and is halved now
        step = self.step + 1  # it would have been
        path = self.recipe.run_dir / "nonfinite" / f"step-{step:08d}-rank-{self.rank}.json"
        dump(
            path, self.full_weights(),
            step=step, learning_rate=self.learning_rate,
            examples=share.examples, losses=losses,
        )  # fmt: skip
        dumps = path if self.world_size == 1 else path.with_stem(f"step-{step:08d}-rank-*")
        what = f"the gradient of step {step} is not finite (loss {loss:.4g}); see {dumps}"
        if self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"{what}. The weights were left as they were. Lower training.learning_rate, "
                "lengthen training.warmup_steps, or go on without such steps: "
                "training.on_nonfinite skip"
            )
        if self.rank == 0:
            log.warning("%s; skipped, %d so far", what, self.engine.skipped_steps)

    def mean_over_ranks(self, *values: Tensor | float) -> list[float]:
        """Return the mean of each value over the ranks. Every rank must call this."""
        together = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        )
        if self.world_size > 1:
            dist.all_reduce(together)
        return [float(value) / self.world_size for value in together.tolist()]

    def full_weights(self) -> dict[str, Tensor]:
        """Return the model's parameters and buffers, whole and on every rank. Every rank must call
        this."""
        stage = self.engine.zero_optimization_stage()
        parameters = list(self.model.parameters())
        whole = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else nullcontext()
        with whole:
            return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    # ── Checkpoints ─────────────────────────────────────────────────────────────────────────────

    def save(
        self, tracker_run_id: str | None, validation: ValidationState, *, scheduled: bool = True
    ) -> None:
        """Save a checkpoint. Every rank calls this: each holds a part of the optimizer.

        :param scheduled: whether the schedule asks for it, and not a signal alone.
        :raises CheckpointError: it cannot be written. Those before are as they were.
        """
        checkpoints = self.recipe.checkpoints
        folder = checkpoints / tag_of(self.step)
        info = CheckpointInfo(
            step=self.step,
            **self.task.identity(),
            **self.layout().model_dump(),
            training={**self.config.model_dump(mode="json"), "init_from": self.init_from},
            base=self.base,
            steps_per_epoch=self.task.plan.steps_per_epoch,
            validation=validation,
            scheduled=scheduled,
            tracker_run_id=tracker_run_id,
            run_dir=str(self.recipe.run_dir.resolve()),
            saved_at=time.time(),
        )
        try:
            self.engine.save_checkpoint(
                str(checkpoints),
                tag=folder.name,
                client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
                save_latest=False,
            )
            if self.ema and self.rank == 0:
                self.ema.save(folder)
            dist.barrier()
            if self.rank == 0:
                finish_checkpoint(checkpoints, info, self.config.keep_checkpoints)
                log.info("checkpoint %s", folder)
        except (OSError, RuntimeError) as error:
            if lost_contact(error):
                raise
            raise CheckpointError(
                f"{folder}: cannot be written: {short_message(error)}. The checkpoints before are "
                "whole: make room, and run the same command again to continue from the newest"
            ) from error
        dist.barrier()

    def layout(self) -> Layout:
        """Return how DeepSpeed has cut the optimizer's state."""
        return Layout(
            zero_stage=self.engine.zero_optimization_stage(),
            world_size=self.world_size,
            precision=precision(self.deepspeed_config),
            offload=offloads(self.deepspeed_config, "optimizer"),
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, whatever ranks and ZeRO stage wrote it.

        :raises CheckpointError: it cannot be read.
        """
        layout, written = self.layout(), checkpoint.info.layout
        note = ""
        if layout != written and max(layout.zero_stage, written.zero_stage) > 0:
            carry_over(self.engine, checkpoint)
            note = f" (written by {written}; now {layout})"
        else:
            self._load(checkpoint)
        if self.ema:
            self.ema.load(checkpoint.folder)
        self._set_hyperparameters()
        self.step = checkpoint.step
        self.init_from, self.base = checkpoint.info.training.get("init_from"), checkpoint.info.base
        if self.rank == 0:
            log.info("resumed from %s%s", checkpoint.folder, note)
            if "init_from" in changed_keys(self.config, checkpoint, ("init_from",)):
                began = self.init_from or "random weights"
                log.warning("training.init_from has no effect: this training began from %s", began)
            others = [key for key in OPTIMISATION if key != "init_from"]
            if changed := changed_keys(self.config, checkpoint, tuple(others)):
                keys = ", ".join(f"training.{key}" for key in changed)
                log.warning("until now it was trained with other values of %s", keys)

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            with tensors_only():
                path, _ = self.engine.load_checkpoint(
                    str(checkpoint.folder.parent), tag=checkpoint.tag
                )
            if path is None:
                raise CheckpointError("DeepSpeed found nothing in it")
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint.folder} cannot be read ({short_message(error)}); remove it "
                "to go on from the one before"
            ) from error

    def _set_hyperparameters(self) -> None:
        """Set the recipe's, which may have changed; the checkpoint has brought back its own."""
        config, optimizer = self.config, self.engine.optimizer
        for group in optimizer.param_groups:
            group["betas"], group["eps"] = config.adam_betas, config.adam_eps
            group["weight_decay"] = config.weight_decay
            if "decoupled_weight_decay" in group:  # torch's way from Adam to AdamW
                group["decoupled_weight_decay"] = config.optimizer == "adamw"
        if hasattr(optimizer, "clip_grad"):
            optimizer.clip_grad = config.clip_norm
