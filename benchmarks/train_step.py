"""Measure a training step (forward, backward, and the fused AdamW that training uses).

RingFormer runs beside its rivals and the published math.

python -m benchmarks.train_step [--parts systems memory] [--tokens 4096 16384] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.published_math import PublishedModel
from benchmarks.rounds import (
    add_device_options,
    create_parser,
    dtype_of,
    measure,
    print_report,
    print_table,
    progress,
    ratios,
)
from data_prep.text import PAD_IDX
from models.config import ActivationCheckpointing, Architecture, ModelConfig
from models.factory import create_model
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel
from pipeline.training.deepspeed_config import deepspeed_config
from pipeline.translation.batches import PairBatch, collate_ids
from pipeline.translation_recipe import TranslationTraining

LONGEST = 32  # tokens a side; the shortest sentence of a batch has 3/4 of it


def not_folded(config: ModelConfig, vocab_sizes: tuple[int, int], pad_idx: int) -> TranslationModel:
    """Build a RingFormer that applies its level signals to every token."""
    model = create_model(config, vocab_sizes, pad_idx)
    for stack in (model.encoder, model.decoder):
        assert isinstance(stack, Ring)
        stack.fold_over = math.inf
    return model


Loss = Callable[[TranslationModel], Tensor]
Build = Callable[[ModelConfig, tuple[int, int], int], TranslationModel]
# A system is an architecture, or RingFormer computed in another way.
SYSTEMS: dict[str, Architecture | Build] = {
    "Transformer": "transformer",
    "RingFormer": "ringformer",
    "RingFormer, signals not folded": not_folded,
    "RingFormer, published math": PublishedModel,
    "Universal Transformer": "universal",
    "One-Wide-FFN": "one_wide_ffn",
}
POLICIES = {
    "none": ActivationCheckpointing(),
    "every level": ActivationCheckpointing(levels=1),
    "every level, attention kept": ActivationCheckpointing(levels=1, keep_attention=True),
    "every level, on the host": ActivationCheckpointing(levels=1, cpu_offload=True),
    "every 2 levels": ActivationCheckpointing(levels=2),
    "every 3 levels": ActivationCheckpointing(levels=3),
}


def build(name: str, config: ModelConfig, vocab_size: int) -> TranslationModel:
    """Return the model of one of `SYSTEMS`."""
    system, vocab_sizes = SYSTEMS[name], (vocab_size, vocab_size)
    if not isinstance(system, str):
        return system(config, vocab_sizes, PAD_IDX)
    changes = {**config.model_dump(), "architecture": system}
    return create_model(ModelConfig.model_validate(changes), vocab_sizes, PAD_IDX)


def config_of(dim: int, **more: Any) -> ModelConfig:
    """Return a model of the base model's proportions.

    :param dim: a multiple of 64.
    :param more: other keys of `model`.
    """
    return ModelConfig(model_dim=dim, num_heads=dim // 64, ffn_inner_dim=4 * dim, **more)


def trainable(name: str, arguments: argparse.Namespace) -> TranslationModel:
    """Return the model of one of `SYSTEMS`, of the size and on the device of the command line."""
    config = config_of(arguments.model_dim, num_levels=arguments.num_levels)
    model = build(name, config, arguments.vocab_size)
    return model.to(arguments.device, dtype_of(arguments.dtype)).train()


def random_batch(tokens: int, vocab_size: int, device: torch.device) -> PairBatch:
    """Make a batch of random tokens.

    :param tokens: positions a side, padding included.
    """
    generator = np.random.default_rng(0)
    lengths = np.linspace(LONGEST * 3 // 4, LONGEST, tokens // LONGEST).astype(int)
    source, target = ([generator.integers(4, vocab_size, n) for n in lengths] for _ in range(2))
    return collate_ids(source, target, device)


def loss_of(batch: PairBatch) -> Loss:
    """Return the mean loss of a batch as a function of the model."""
    target_tokens = int((batch.targets != PAD_IDX).sum())

    def loss(model: TranslationModel) -> Tensor:
        total: Tensor = model(*batch)
        return total / target_tokens

    return loss


def adamw(model: TranslationModel) -> torch.optim.Optimizer:
    """Return the optimizer that training asks DeepSpeed for: torch's AdamW, fused."""
    asked = deepspeed_config(TranslationTraining(), accumulation_steps=1)["optimizer"]["params"]
    options = {key: asked[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
    return torch.optim.AdamW(model.parameters(), **options)


def steps_of(model: TranslationModel, losses: Sequence[Loss]) -> Callable[[], None]:
    """Return a function that makes an optimizer step on each loss.

    :param losses: of batches, each a function of the model.
    """
    optimizer = adamw(model)

    def step() -> None:
        for loss in losses:
            loss(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peak_bytes(
    name: str, policy: ActivationCheckpointing, arguments: argparse.Namespace, tokens: int
) -> int:
    """Return the most bytes that a forward and backward pass takes beside the parameters.

    On a CPU that is the process's resident memory, so it must be called in a new process.
    """
    model = trainable(name, arguments)
    model.checkpoint_activations(policy)
    loss = loss_of(random_batch(tokens, arguments.vocab_size, arguments.device))
    if arguments.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(model).backward()  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(model).backward()  # type: ignore[no-untyped-call]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def size_of(arguments: argparse.Namespace, tokens: int) -> str:
    """Return the sizes of model and batch in words, for captions."""
    return (
        f"width {arguments.model_dim}, vocabulary {arguments.vocab_size:,}, {tokens:,} tokens a "
        f"side, {arguments.dtype}"
    )


def compare_systems(arguments: argparse.Namespace, tokens: int) -> None:
    """Time a training step of each system, and print a table."""
    loss = loss_of(random_batch(tokens, arguments.vocab_size, arguments.device))
    names = [name for name in SYSTEMS if name == "Transformer" or arguments.only in name]
    steps = {name: steps_of(trainable(name, arguments), [loss]) for name in names}
    seconds = measure(steps, arguments.rounds, arguments.device)
    references = ["Transformer", "RingFormer, published math"]
    title = f"Training step, {size_of(arguments, tokens)}"
    print_report(title, seconds, references, tokens)


def compare_checkpointing(arguments: argparse.Namespace, tokens: int) -> None:
    """Time a training step with each policy of activation checkpointing, and print a table."""
    loss = loss_of(random_batch(tokens, arguments.vocab_size, arguments.device))
    model = trainable("RingFormer", arguments)
    step = steps_of(model, [loss])

    def with_policy(policy: ActivationCheckpointing) -> None:
        model.checkpoint_activations(policy)
        step()

    runs = {words: partial(with_policy, policy) for words, policy in POLICIES.items()}
    seconds = measure(runs, arguments.rounds, arguments.device)
    title = f"RingFormer's training step with checkpoints, {size_of(arguments, tokens)}"
    print_report(title, seconds, ["none"], tokens)


def compare_memory(arguments: argparse.Namespace, tokens: int) -> None:
    """Measure the peak memory of each system and each policy, and print a table."""
    cases = [(name, name, POLICIES["none"]) for name in SYSTEMS if arguments.only in name]
    cases += [
        (f"RingFormer, checkpoints {words}", "RingFormer", policy)
        for words, policy in POLICIES.items()
        if policy.levels
    ]
    peaks: dict[str, list[int]] = {title: [] for title, _, _ in cases}
    for _ in range(arguments.rounds):
        for title, name, policy in cases:
            # Threads and CUDA contexts do not survive a fork.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peak = pool.submit(peak_bytes, name, policy, arguments, tokens).result()
            peaks[title].append(max(peak, 1))  # toy sizes take nothing
            progress(f"{title}: {peak / 2**20:,.0f} MiB")
    references = [name for name in ("Transformer", "RingFormer") if name in peaks]
    rows = [
        [title, f"{median(found) / 2**20:,.0f}", *(ratios(found, peaks[o]) for o in references)]
        for title, found in peaks.items()
    ]
    header = ["system", "MiB", *(f"over {name}" for name in references)]
    print_table(f"Peak of a forward and backward pass, {size_of(arguments, tokens)}", header, rows)


def compare_compilation(arguments: argparse.Namespace, tokens: int) -> None:
    """Time a training step with and without torch.compile, and print a table."""
    loss = loss_of(random_batch(tokens, arguments.vocab_size, arguments.device))
    runs = {}
    for name in ("RingFormer", "Transformer"):
        for way in ("eager", "compiled"):
            model = trainable(name, arguments)
            if way == "compiled":
                model.compile_layers()
            runs[f"{name}, {way}"] = steps_of(model, [loss])
    seconds = measure(runs, arguments.rounds, arguments.device)
    title = f"Training step, {size_of(arguments, tokens)}; the first one compiles"
    print_report(title, seconds, ["RingFormer, eager"], tokens, first=True)


def compare_precisions(arguments: argparse.Namespace, tokens: int) -> None:
    """Time a training step in float32 and in bfloat16, and print a table."""
    loss = loss_of(random_batch(tokens, arguments.vocab_size, arguments.device))
    runs: dict[str, Callable[[], None]] = {}
    for name in ("RingFormer", "Transformer"):
        for dtype in ("float32", "bfloat16"):
            own = argparse.Namespace(**{**vars(arguments), "dtype": dtype})
            step = steps_of(trainable(name, own), [loss])
            runs[f"{name}, {dtype}"] = step
    seconds = measure(runs, arguments.rounds, arguments.device)
    title = f"Training step, {size_of(arguments, tokens).rpartition(',')[0]}"
    print_report(title, seconds, ["RingFormer, float32", "Transformer, float32"], tokens)


PARTS: dict[str, Callable[[argparse.Namespace, int], None]] = {
    "systems": compare_systems,
    "checkpoints": compare_checkpointing,
    "memory": compare_memory,
    "compilation": compare_compilation,
    "precision": compare_precisions,
}


def main() -> None:
    """Run the parts that the command line names."""
    parser = create_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="[all]")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="a side, in a step")
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--num_levels", type=int, default=6, help="a side")
    parser.add_argument("--only", default="", help="systems with this in their name")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True  # as training does
    for part in arguments.parts:
        for tokens in arguments.tokens:
            PARTS[part](arguments, tokens)


if __name__ == "__main__":
    main()
