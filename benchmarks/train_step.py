"""Training step (forward, backward, AdamW) of RingFormer, its rivals and the published math.

python -m benchmarks.train_step [--tokens 4096 16384] [--rounds 5] [--dtype bfloat16] [--compile]
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.published_math import PublishedModel
from benchmarks.rounds import describe, device_of, measure, report
from models.config import ActivationCheckpointing, ModelConfig
from models.factory import create_model
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel, core_parameters

PAD, BOS, EOS = 0, 2, 3
LONGEST = 32  # tokens a side; the shortest sentence of a batch has 3/4 of it

# Architecture, and whether level signals of q/k/v and of the FFN are folded.
SYSTEMS: dict[str, tuple[str, tuple[bool, bool] | None]] = {
    "Transformer": ("transformer", None),
    "RingFormer: all folded": ("ringformer", (True, True)),
    "RingFormer: q/k/v folded": ("ringformer", (True, False)),
    "RingFormer: all factored": ("ringformer", (False, False)),
    "RingFormer: published math": ("published", None),
    "Universal Transformer": ("universal", None),
    "One-Wide-FFN": ("one_wide_ffn", None),
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
    """One of `SYSTEMS`."""
    architecture, forms = SYSTEMS[name]
    vocab_sizes = vocab_size, vocab_size
    if architecture == "published":
        return PublishedModel(config, vocab_sizes, PAD)
    changes = {**config.model_dump(), "architecture": architecture}
    model = create_model(ModelConfig.model_validate(changes), vocab_sizes, PAD)
    for ring in (model.encoder, model.decoder):
        if forms and isinstance(ring, Ring):
            ring.fold_qkv, ring.fold_ffn = forms
    return model


def batch(
    tokens: int, vocab_size: int, device: torch.device
) -> Callable[[TranslationModel], Tensor]:
    """A batch of `tokens` positions a side. :returns: its loss as a function of the model."""
    torch.manual_seed(0)
    sentences = tokens // LONGEST
    lengths = torch.linspace(LONGEST * 3 // 4, LONGEST, sentences).long()
    real = torch.arange(LONGEST) < lengths[:, None]

    def side() -> Tensor:
        return torch.randint(4, vocab_size, (sentences, LONGEST)).where(real, PAD).to(device)

    source, target = side(), side()
    target_input = target.roll(1, dims=1)
    target_input[:, 0] = BOS

    def loss(model: TranslationModel) -> Tensor:
        layouts = model.layout(source), model.layout(target)
        total: Tensor = model(source, layouts[0], target_input, layouts[1], target)
        return total / int(real.sum())

    return loss


def step_of(
    model: TranslationModel, loss: Callable[[TranslationModel], Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98))

    def step() -> None:
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_bytes(
    name: str, policy: ActivationCheckpointing, arguments: argparse.Namespace, tokens: int
) -> int:
    """Most memory that a forward and backward pass takes beside the parameters.

    On CPU in a process of its own, to see its resident memory.
    """
    model = build(name, config_of(arguments), arguments.vocab_size)
    model.to(arguments.device, arguments.dtype).train()
    model.checkpoint_activations(policy)
    loss = batch(tokens, arguments.vocab_size, arguments.device)
    if arguments.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(model).backward()  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(model).backward()  # type: ignore[no-untyped-call]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def compare_memory(arguments: argparse.Namespace, tokens: int) -> None:
    ring = "RingFormer: all folded"
    cases = [(name, name, POLICIES["none"]) for name in SYSTEMS]
    cases += [
        (f"{ring}, checkpoints {words}", ring, n) for words, n in POLICIES.items() if n.levels
    ]
    peaks = {}
    for title, name, policy in cases:
        # Threads and CUDA contexts do not survive a fork.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[title] = pool.submit(peak_bytes, name, policy, arguments, tokens).result()
    print(f"\n### Memory beside the parameters, forward and backward, {tokens} tokens a side\n")
    print(f"| system | MiB | over Transformer | over {ring} |\n|---|---|---|---|")
    for title, peak in peaks.items():
        over = [f"{peak / peaks[reference]:.3f}" for reference in ("Transformer", ring)]
        print(f"| {title} | {peak / 2**20:,.0f} | {over[0]} | {over[1]} |")


def compare_systems(arguments: argparse.Namespace, tokens: int) -> None:
    device, dtype = arguments.device, arguments.dtype
    loss = batch(tokens, arguments.vocab_size, device)
    steps, core = {}, {}
    for name in SYSTEMS:
        if name != "Transformer" and arguments.only not in name:
            continue
        model = build(name, config_of(arguments), arguments.vocab_size).to(device, dtype).train()
        core[name] = core_parameters(model)
        if arguments.compile and "published" not in name:
            model.compile_layers()
        steps[name] = step_of(model, loss)
    seconds = measure(steps, arguments.rounds, device)
    title = f"Training step, {tokens} tokens a side, vocabulary {arguments.vocab_size}, {dtype}"
    if arguments.compile:
        title += ", torch.compile (but the published math)"
    for reference in ("Transformer", "RingFormer: published math"):
        if reference in seconds:
            report(title, seconds, reference, tokens, "target tokens")
    print("\n| system | core parameters | over Transformer |\n|---|---|---|")
    for name, count in core.items():
        print(f"| {name} | {count:,} | {count / core['Transformer']:.3f} |")


def compare_checkpointing(arguments: argparse.Namespace, tokens: int) -> None:
    loss = batch(tokens, arguments.vocab_size, arguments.device)
    model = build("RingFormer: all folded", config_of(arguments), arguments.vocab_size)
    model.to(arguments.device, arguments.dtype).train()
    step = step_of(model, loss)

    def with_policy(policy: ActivationCheckpointing) -> None:
        model.checkpoint_activations(policy)
        step()

    runs = {words: partial(with_policy, policy) for words, policy in POLICIES.items()}
    seconds = measure(runs, arguments.rounds, arguments.device)
    title = f"RingFormer with activation checkpoints, {tokens} tokens a side"
    report(title, seconds, "none", tokens, "target tokens")


def compare_compilation(arguments: argparse.Namespace, tokens: int) -> None:
    loss = batch(tokens, arguments.vocab_size, arguments.device)
    runs = {}
    for name in ("RingFormer: all folded", "Transformer"):
        for way in ("eager", "compiled"):
            model = build(name, config_of(arguments), arguments.vocab_size)
            model.to(arguments.device, arguments.dtype).train()
            if way == "compiled":
                model.compile_layers()
            runs[f"{name}, {way}"] = step_of(model, loss)
    seconds = measure(runs, arguments.rounds, arguments.device)
    title = f"torch.compile (the first step compiles), {tokens} tokens a side"
    report(title, seconds, "RingFormer: all folded, eager", tokens, "target tokens")


def config_of(arguments: argparse.Namespace) -> ModelConfig:
    dim = arguments.model_dim
    return ModelConfig(model_dim=dim, num_heads=dim // 64, ffn_inner_dim=4 * dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--model_dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--device", help="cpu or cuda [cuda if there is one]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--only", default="", help="systems with this in their name")
    parts = ["systems", "checkpoints", "memory", "compilation"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    arguments = parser.parse_args()
    arguments.device, arguments.dtype = device_of(arguments.device), getattr(torch, arguments.dtype)
    print(f"## {describe(arguments.device)}")
    if "systems" in arguments.parts:
        for tokens in arguments.tokens:
            compare_systems(arguments, tokens)
    if "checkpoints" in arguments.parts:
        compare_checkpointing(arguments, arguments.tokens[0])
    if "memory" in arguments.parts:
        compare_memory(arguments, arguments.tokens[0])
    if "compilation" in arguments.parts:
        compare_compilation(arguments, arguments.tokens[0])


if __name__ == "__main__":
    main()
