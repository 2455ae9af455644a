"""Training step (forward, backward, AdamW) of RingFormer, its rivals and the published math.

python -m benchmarks.train_step [--tokens 4096 16384] [--rounds 5] [--dtype bfloat16] [--compile]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.published_math import PublishedModel
from benchmarks.rounds import describe, device_of, measure, report
from models.config import ModelConfig
from models.factory import create_model
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel, core_parameters

PAD, BOS, EOS = 0, 2, 3
LONGEST = 32  # tokens a side; the shortest sentence of a batch has 3/4 of it


def form(config: ModelConfig, vocab_size: int, fold_qkv: bool, fold_ffn: bool) -> TranslationModel:
    model = create_model(config, vocab_size, PAD)
    for ring in (model.encoder, model.decoder):
        assert isinstance(ring, Ring)
        ring.fold_qkv, ring.fold_ffn = fold_qkv, fold_ffn
    return model


def systems(config: ModelConfig, vocab_size: int) -> dict[str, TranslationModel]:
    def rival(architecture: str) -> TranslationModel:
        return create_model(
            ModelConfig.model_validate({**config.model_dump(), "architecture": architecture}),
            vocab_size,
            PAD,
        )

    return {
        "Transformer": rival("transformer"),
        "RingFormer: q/k/v folded, FFN factored": form(config, vocab_size, True, False),
        "RingFormer: all folded": form(config, vocab_size, True, True),
        "RingFormer: all factored": form(config, vocab_size, False, False),
        "RingFormer: published math": PublishedModel(config, vocab_size, PAD),
        "Universal Transformer": rival("universal"),
        "One-Wide-FFN": rival("one_wide_ffn"),
    }


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


def activation_bytes(model: TranslationModel, loss: Callable[[TranslationModel], Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model)
    del total
    return sum(kept.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def compare_forms(arguments: argparse.Namespace, config: ModelConfig, tokens: int) -> None:
    device, dtype = arguments.device, arguments.dtype
    loss = batch(tokens, arguments.vocab_size, device)
    models = systems(config, arguments.vocab_size)
    if arguments.only:
        models = {n: m for n, m in models.items() if n == "Transformer" or arguments.only in n}
    steps = {}
    for name, model in models.items():
        model.to(device=device, dtype=dtype).train()
        if arguments.compile and "published" not in name:
            model.compile_layers()
        steps[name] = step_of(model, loss)
    seconds = measure(steps, arguments.rounds, device)
    title = f"Training step, {tokens} tokens a side, vocabulary {arguments.vocab_size}, {dtype}"
    report(title, seconds, "Transformer", tokens, "target tokens")
    if "RingFormer: published math" in seconds:
        report(
            f"{title}: over the published math",
            seconds,
            "RingFormer: published math",
            tokens,
            "target tokens",
        )
    core = core_parameters(models["Transformer"])
    print("\n| system | core parameters | over Transformer |\n|---|---|---|")
    for name, model in models.items():
        print(f"| {name} | {core_parameters(model):,} | {core_parameters(model) / core:.3f} |")
    if device.type == "cuda":
        print("\n| system | peak memory of a step, MiB |\n|---|---|")
        for name, step in steps.items():
            print(f"| {name} | {peak_bytes(step, device) / 2**20:,.0f} |")


def compare_checkpointing(arguments: argparse.Namespace, config: ModelConfig, tokens: int) -> None:
    device = arguments.device
    loss = batch(tokens, arguments.vocab_size, device)
    model = create_model(config, arguments.vocab_size, PAD).to(device, arguments.dtype).train()
    step = step_of(model, loss)
    segments = {0: "none", 1: "every level", 2: "every 2 levels", 3: "every 3 levels"}

    def with_segments(length: int) -> Callable[[], None]:
        def run() -> None:
            model.checkpoint_levels(length)
            step()

        return run

    runs = {name: with_segments(length) for length, name in segments.items()}
    seconds = measure(runs, arguments.rounds, device)
    report(
        f"Activation checkpointing, {tokens} tokens a side",
        seconds,
        "none",
        tokens,
        "target tokens",
    )
    print("\n| checkpoints | kept by the stacks for backward, MiB | over none |\n|---|---|---|")

    def stacks_only(model: TranslationModel) -> Tensor:
        projection = model.final_proj.forward
        model.final_proj.forward = lambda seqs, *_: seqs.sum()  # type: ignore[method-assign]
        try:
            return loss(model)
        finally:
            model.final_proj.forward = projection  # type: ignore[method-assign]

    none = 0
    for length, name in segments.items():
        model.checkpoint_levels(length)
        kept = activation_bytes(model, stacks_only)
        none = none or kept
        print(f"| {name} | {kept / 2**20:,.0f} | {kept / none:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--model_dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--device", help="cpu or cuda [cuda if there is one]")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--only", help="systems whose name has this, and the Transformer")
    parser.add_argument("--skip_checkpointing", action="store_true")
    arguments = parser.parse_args()
    arguments.device, arguments.dtype = device_of(arguments.device), getattr(torch, arguments.dtype)
    dim = arguments.model_dim
    config = ModelConfig(model_dim=dim, num_heads=dim // 64, ffn_inner_dim=4 * dim)
    print(f"## {describe(arguments.device)}")
    for tokens in arguments.tokens:
        compare_forms(arguments, config, tokens)
    if not arguments.skip_checkpointing:
        compare_checkpointing(arguments, config, arguments.tokens[0])


if __name__ == "__main__":
    main()
