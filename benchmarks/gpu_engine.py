"""Sections of `benchmarks.gpu` that train through the trainer: DeepSpeed's engine, one rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from benchmarks.gpu_speed import ARCHITECTURES, System, allocated, timed, transformer_of
from benchmarks.rounds import Cells, failure, free_memory, free_port
from benchmarks.train_step import POLICIES, config_of, random_batch
from data_prep.batch_plan import BatchPlan, Indices
from data_prep.prepare import prepare
from models.config import ActivationCheckpointing, ModelConfig
from pipeline.ranks import init_distributed, without_greetings
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.training.feed import Share, micro_batch_seed
from pipeline.training.learning_rate import learning_rate_factor
from pipeline.training.progress import Window
from pipeline.training.trainer import Trainer
from pipeline.translation.batches import PairBatch, collate_ids
from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from benchmarks.gpu import Bench
    from benchmarks.gpu_speed import Cases, Rows

RECIPE = ROOT / "recipes" / "quickstart.yaml"
PAIRS = 512  # of random tokens
STEPS = 3  # that must agree
TOLERANCE = 1e-4  # of losses and gradients in float32, relative
NEAR = 0.02  # of the quickstart's loss, likewise


class RandomPairs(TranslationTask):
    """Trains on random tokens; there are no data."""

    vocab_size = 1000

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        return self.vocab_size, self.vocab_size

    @cached_property
    def lengths(self) -> tuple[Indices, Indices]:
        """Tokens of each pair, by side."""
        generator = np.random.default_rng(0)
        source, target = (generator.integers(4, 33, PAIRS) for _ in range(2))
        return source, target

    @cached_property
    def plan(self) -> BatchPlan:
        training = self.recipe.training
        return BatchPlan(
            *self.lengths,
            max_tokens=training.max_tokens,
            micro_batch_tokens=training.micro_batch_tokens,
            seed=training.seed,
        )

    def collate(self, examples: Indices, seed: int, device: torch.device) -> PairBatch:
        generator = np.random.default_rng(examples.astype(np.int64))
        source, target = (
            [generator.integers(4, self.vocab_size, n) for n in side[examples]]
            for side in self.lengths
        )
        return collate_ids(source, target, device)


def meet() -> None:
    """Make this process the only rank, once."""
    if torch.distributed.is_initialized():
        return
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    with without_greetings():
        init_distributed()


def recipe_of(
    folder: Path,
    stage: str,
    policy: ActivationCheckpointing | None = None,
    *,
    model: ModelConfig | None = None,
    **training: Any,
) -> TranslationRecipe:
    """Return the quickstart's recipe with other values.

    :param folder: its run_dir; takes DeepSpeed's JSON too.
    :param stage: a file of ds_configs, without `.json`.
    :param policy: of activation checkpointing.
    """
    config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text(encoding="utf-8"))
    # Else DeepSpeed keeps all of so small a model whole.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stage}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    recipe = load_recipe(RECIPE, [("run_dir", str(folder))])
    changes = {"deepspeed_config": path, **training}
    if policy:
        changes["activation_checkpointing"] = policy
    return recipe.model_copy(
        update={
            "training": recipe.training.model_copy(update=changes),
            "model": model or recipe.model,
        }
    )


@contextmanager
def trainer_of(task: TranslationTask) -> Iterator[Trainer[PairBatch]]:
    """Make a trainer, and take its engine apart in the end."""
    meet()
    with ExitStack() as end:
        # ZeRO 3 puts another one in its place, for all that comes after.
        end.callback(setattr, F, "linear", F.linear)
        trainer = Trainer(task)
        end.callback(trainer.engine.destroy)
        yield trainer


# ── ZeRO ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def random_steps(
    bench: Bench, system: str, stage: str, tokens: int
) -> Iterator[Callable[[], None]]:
    """Yield what makes a step of the optimizer on a batch of random tokens.

    :param stage: a file of ds_configs, without `.json`.
    :param tokens: positions a side.
    """
    sizes = bench.sizes
    model = config_of(sizes.widths[0], architecture=ARCHITECTURES[system], num_levels=sizes.levels)
    task = RandomPairs(recipe_of(bench.scratch, stage, model=model, max_tokens=tokens))
    task.vocab_size = sizes.vocab_size
    batch = random_batch(tokens, task.vocab_size, bench.device)
    share = Share([batch], [0], [], units=2 * tokens, normaliser=tokens)
    with trainer_of(task) as trainer:

        def step() -> None:
            trainer.optimizer_step(share)

        yield step


def zero(bench: Bench, cases: Cases) -> Rows:
    """Time the trainer's step at one ZeRO stage with both models, in turns."""
    with ExitStack() as engines:
        systems = {}
        for name, (system, stage, tokens) in cases.items():
            before = allocated(bench.device)
            steps = random_steps(bench, system, f"zero{stage}_bf16", tokens)
            step = engines.enter_context(steps)
            systems[name] = System(step, work=tokens, held=allocated(bench.device) - before)
        yield from timed(systems, bench, "target tokens", transformer_of(cases), "Transformer")


# ── Agreement ───────────────────────────────────────────────────────────────────────────────────


class Found(NamedTuple):
    """What a training gave."""

    losses: list[float]
    """Of each step, a target token's."""

    gradients: dict[str, Tensor]
    """Of the step that comes next, before it is clipped."""


def plain_training(task: TranslationTask, device: torch.device, steps: int) -> Found:
    """Train with torch alone, in float32."""
    config = task.recipe.training
    torch.manual_seed(config.seed)
    model = task.create_model().to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=config.adam_betas, eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    losses = []
    for step in range(steps + 1):
        batch, total = task.plan[step], torch.zeros((), device=device)
        optimizer.zero_grad()
        for number, indices in enumerate(batch.micro_batches):
            seed = micro_batch_seed(config.seed, step, number)
            torch.manual_seed(seed)
            loss = task.loss(model, task.collate(indices, seed, device)) / task.normaliser(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if step == steps:
            break
        losses.append(float(total))
        if config.clip_norm:
            clip_grad_norm_(model.parameters(), config.clip_norm)
        factor = learning_rate_factor(config, step, task.recipe.model.model_dim, config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        optimizer.step()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Found(losses, gradients)


def engine_training(task: TranslationTask, steps: int, *, gradients: bool = True) -> Found:
    """Train through the trainer.

    :param gradients: whether those of the step that comes next are wanted.
    """
    with trainer_of(task) as trainer:
        losses = []
        for _ in range(steps):
            window = Window(torch.zeros((), device=trainer.device))
            trainer.train_step(window)
            losses.append(float(window.loss) / max(1, window.normaliser))
        if not gradients:
            return Found(losses, {})
        assert trainer._shares is not None
        share, engine = next(trainer._shares), trainer.engine
        for batch, seed in zip(share.micro_batches, share.seeds, strict=True):
            torch.manual_seed(seed)
            scale = trainer.accumulation_steps / share.normaliser
            engine.backward(task.loss(engine, batch) * scale)
            if batch is not share.micro_batches[-1]:
                engine.step()
        found = {n: safe_get_full_grad(p) for n, p in trainer.model.named_parameters()}
        return Found(losses, {n: g.clone() for n, g in found.items() if g is not None})


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return ‖ours − theirs‖ ÷ ‖theirs‖ of all gradients together."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of other parameters: {sorted(ours.keys() ^ theirs.keys())}")
    norms = [
        torch.stack([tensor.float().norm() for tensor in tensors]).norm()
        for tensors in ([ours[n].float() - g for n, g in theirs.items()], theirs.values())
    ]
    return float(norms[0] / norms[1])


def equality(bench: Bench, cases: Cases) -> Rows:
    """Hold training at every ZeRO stage with every policy against torch alone, on the device.

    There is dropout, a step has two micro-batches, and nothing is in TF32.
    """

    def task_of(stage: str, policy: str) -> TranslationTask:
        recipe = recipe_of(
            bench.scratch, stage, POLICIES[policy],
            max_tokens=2 * tokens, micro_batch_tokens=tokens,
        )  # fmt: skip
        model = recipe.model.model_copy(update={"dropout": 0.1})
        return RandomPairs(recipe.model_copy(update={"model": model}))

    tokens = min(1024, bench.sizes.tokens[1])
    theirs = plain_training(task_of("zero0", "none"), bench.device, STEPS)
    for name, (stage, policy) in cases.items():
        try:
            ours = engine_training(task_of(f"zero{stage}", policy), STEPS)
            pairs = zip(ours.losses, theirs.losses, strict=True)
            loss = max(abs(our / their - 1) for our, their in pairs)
            gradient = difference(ours.gradients, theirs.gradients)
            cells = {"losses": f"{loss:.1e}", "gradients": f"{gradient:.1e}"}
            if not max(loss, gradient) <= TOLERANCE:
                cells["note"] = f"failed: differs by more than {TOLERANCE:g}"
            yield name, cells
        except Exception as error:
            yield name, failure(error)
        free_memory()


def quickstart(bench: Bench, cases: Cases) -> Rows:
    """Train as the quickstart does, for fewer steps, and compare with float32 on the CPU."""
    steps, folder = bench.sizes.steps, bench.scratch / "quickstart"
    last = max(1, steps // 10)
    corpus = {
        "data.root": folder / "data",
        "data.toy_corpus.train": max(2000, 40 * steps),
        "data.workers": 2,
    }
    data = load_recipe(RECIPE, [(key, str(value)) for key, value in corpus.items()]).data
    prepare(data, folder)
    reference = None
    for name, (place, stage) in cases.items():
        task = TranslationTask(recipe_of(folder, stage).model_copy(update={"data": data}))
        started = time.monotonic()
        if place == "cpu":
            losses = plain_training(task, torch.device("cpu"), steps).losses
        else:
            losses = engine_training(task, steps, gradients=False).losses
        seconds = time.monotonic() - started
        loss = sum(losses[-last:]) / last
        reference = reference or loss
        cells: Cells = {"steps": steps, "s": seconds, "loss": f"{loss:.4f}"}
        cells |= {"over the first": f"{loss / reference:.4f}", "losses": losses}
        if not abs(loss / reference - 1) <= NEAR:
            cells["note"] = f"failed: differs by more than {NEAR:.0%}"
        yield name, cells
