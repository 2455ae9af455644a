"""Sections of `benchmarks.gpu` that need no engine: what the GPU can do, steps, loss, decoding.

A model's FLOPs are those of the matrix products of a step, a multiplication and an addition being
two, with everything that a position passes through counted as often as it does: a ring's layer N
times. `models/count.py` counts a forward pass; the backward pass takes twice as many. With S tokens
a side, a plain Transformer's forward pass of a pair takes

    N (24 d² S + 4 d S²)  encoder: 8 d² of projections, 16 d² of an FFN 4d wide, and attention
  + N (32 d² S + 8 d S²)  decoder: the same, and encoder-decoder attention with 8 d²
  + 2 d V S               logits

and a ring's N - 1 times 4 d² S less: it projects the encoder's output once. Causal attention counts
whole and padding as tokens; neither the folding of level signals counts nor what is recomputed.
MFU is these FLOPs ÷ seconds ÷ what NVIDIA says of the GPU's dense bfloat16 products.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.rounds import Cells, failure, free_memory, measure, ratios, seconds_of
from benchmarks.train_step import LONGEST, POLICIES, loss_of, random_batch, steps_of, trainable
from data_prep.text import PAD_IDX
from models import output
from models.attention import attention
from models.config import Architecture
from models.count import Lengths, count_translation
from models.output import OutputProjection
from models.padding import PaddedLayout, padding_bias
from models.seq2seq import TranslationModel

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

    Rows = Iterator[tuple[str, Cells]]
    Cases = Mapping[str, tuple[Any, ...]]

PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # by a part of the GPU's name
ARCHITECTURES: dict[str, Architecture] = {"RingFormer": "ringformer", "Transformer": "transformer"}
TOP = 12  # kernels that a table shows
GIB = 2**30
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
"""Operators whose results, or their sizes, go to the host."""


@dataclass(frozen=True)
class System:
    """Something to time."""

    run: Callable[[], object]
    times: int = 1
    """How often a run does what is timed."""

    work: float = 0
    """What one time works through, in the unit of the table."""

    held: int = 0
    """Bytes on the device that it holds before its first run."""

    flops: float = 0
    """Of one time."""


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors take on a GPU; of a CPU nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def timed(
    systems: Mapping[str, System], bench: Bench, unit: str, reference: str = "", label: str = ""
) -> Rows:
    """Run systems in turns, and yield a row for each.

    One that fails (out of memory, say) does so in its first run, and is left out of the turns.

    :param unit: of `System.work`.
    :param reference: the system that the others' times are divided by.
    :param label: what the head of that column calls it; nothing: by its name.
    """
    device = bench.device
    first, held, peaks = dict[str, float](), dict[str, int](), dict[str, int]()
    for name, system in systems.items():
        try:
            before = allocated(device)
            first[name] = seconds_of(system.run, device)  # compiles; makes the optimizer's state
            held[name] = system.held + allocated(device) - before
            before = allocated(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            system.run()
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:
            first.pop(name, None)
            yield name, failure(error)
        free_memory()
    seconds = measure(
        {n: s.run for n, s in systems.items() if n in first}, bench.sizes.rounds, device
    )
    for name, (_, *times) in seconds.items():
        system = systems[name]
        middle = median(times) / system.times
        cells: Cells = {"ms": 1000 * middle, f"{unit}/s": system.work / middle}
        if system.flops:
            cells |= {"TFLOP/s": system.flops / middle / 1e12, **mfu(system.flops / middle, device)}
        if name in peaks:
            cells["GiB"] = (held[name] + peaks[name]) / GIB
            cells["of it held between runs"] = held[name] / GIB
        cells |= {"first, s": first[name], "seconds": times, "times in a run": [system.times]}
        if reference in seconds:
            cells[f"time over {label or reference}"] = ratios(times, seconds[reference][1:])
        yield name, cells


def mfu(flops: float, device: torch.device) -> Cells:
    """Return how much of the GPU's peak so many FLOP/s are, if its peak is known."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
    return {"MFU": f"{flops / peak:.1%}"} if peak else {}


def transformer_of(cases: Cases) -> str:
    """Return the name of the row of the Transformer, which comes first in its case; "": none."""
    return next((name for name, case in cases.items() if case[0] == "Transformer"), "")


def settings(bench: Bench, width: int) -> Namespace:
    """Return the size and place of a model as `train_step.trainable` takes them."""
    return Namespace(
        model_dim=width, num_levels=bench.sizes.levels, vocab_size=bench.sizes.vocab_size,
        device=bench.device, dtype="bfloat16",
    )  # fmt: skip


def pair_flops(model: TranslationModel, bench: Bench) -> float:
    """Return the FLOPs that a training step has for each pair; see this file's docstring."""
    sizes = (bench.sizes.vocab_size, bench.sizes.vocab_size)
    return 3.0 * count_translation(model.config, sizes, Lengths(LONGEST, LONGEST)).flops


def weights_of(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


# ── Sections ────────────────────────────────────────────────────────────────────────────────────


def device(bench: Bench, cases: Cases) -> Rows:
    """Time a large matrix product, and a copy, in bfloat16."""
    side = bench.sizes.matrix
    a, b, c = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(3))
    runs = {"product": partial(torch.mm, a, b, out=c), "copy": partial(c.copy_, a)}
    for name, (what,) in cases.items():

        def run(function: Callable[[], object] = runs[what]) -> None:
            for _ in range(20):
                function()

        work, flops, unit = {
            "product": (2 * side**3 / 1e12, 2.0 * side**3, "TFLOP"),
            "copy": (2 * c.nbytes / 1e9, 0.0, "GB read and written"),
        }[what]
        yield from timed({name: System(run, 20, work, flops=flops)}, bench, unit)


def training_steps(bench: Bench, cases: Cases) -> Rows:
    """Time steps of models of one width with batches of several sizes, the models in turns."""
    torch._dynamo.reset()
    first = next(iter(cases.values()))
    width, way = first[1], first[3]
    models = {}
    for system in dict.fromkeys(case[0] for case in cases.values()):
        torch.manual_seed(0)
        models[system] = trainable(system, settings(bench, width))
        if way == "compiled":
            models[system].compile_layers(bench.sizes.compiler)
    flops = {system: pair_flops(model, bench) for system, model in models.items()}
    for tokens in dict.fromkeys(case[2] for case in cases.values()):
        loss = loss_of(random_batch(tokens, bench.sizes.vocab_size, bench.device))
        times = max(1, bench.sizes.tokens[-1] // tokens)
        alike = {name: case for name, case in cases.items() if case[2] == tokens}
        systems = {
            name: System(
                steps_of(models[system], [loss] * times),
                times,
                work=tokens,
                held=weights_of(models[system]),
                flops=flops[system] * (tokens // LONGEST),
            )
            for name, (system, *_) in alike.items()
        }
        yield from timed(systems, bench, "target tokens", transformer_of(alike), "Transformer")


def checkpointing(bench: Bench, cases: Cases) -> Rows:
    """Time a RingFormer's step with each policy, in turns."""
    tokens = bench.sizes.tokens[1]
    loss = loss_of(random_batch(tokens, bench.sizes.vocab_size, bench.device))
    model = trainable("RingFormer", settings(bench, bench.sizes.widths[0]))

    def with_policy(policy: str, step: Callable[[], None]) -> None:
        model.checkpoint_activations(POLICIES[policy])
        step()

    systems = {
        name: System(partial(with_policy, policy, steps_of(model, [loss])), 1, tokens)
        for name, (policy,) in cases.items()
    }
    yield from timed(systems, bench, "target tokens", next(iter(systems)))


def losses(bench: Bench, cases: Cases) -> Rows:
    """Time ways to compute the loss and its gradients of the same decoder output, in turns."""
    width, vocab_size = bench.sizes.widths[0], bench.sizes.vocab_size
    usual = output.MAX_LOGITS
    for tokens in dict.fromkeys(case[1] for case in cases.values()):
        torch.manual_seed(0)
        x = torch.randn(1, tokens, width, device=bench.device).bfloat16().requires_grad_()
        weight = torch.randn(vocab_size, width, device=bench.device) * width**-0.5
        weight = weight.bfloat16().requires_grad_()
        targets = torch.randint(4, vocab_size, (1, tokens), device=bench.device)
        projection = OutputProjection(weight, None, PAD_IDX)

        def chunked(
            larger: int, of: OutputProjection = projection, x: Tensor = x, targets: Tensor = targets
        ) -> Tensor:
            output.MAX_LOGITS = usual * larger
            loss: Tensor = of(x, targets)
            output.MAX_LOGITS = usual
            return loss

        def plain(
            of: OutputProjection = projection, x: Tensor = x, targets: Tensor = targets
        ) -> Tensor:
            logits = of(x).flatten(0, 1).float()
            return F.cross_entropy(logits, targets.flatten(), reduction="sum")

        def run(way: Callable[[], Tensor], x: Tensor = x, weight: Tensor = weight) -> None:
            x.grad = weight.grad = None
            way().backward()  # type: ignore[no-untyped-call]

        ways: dict[str, Callable[[], Tensor]] = {
            "ours": partial(chunked, 1),
            "ours, chunks 8 times as large": partial(chunked, 8),
            "logits and F.cross_entropy": plain,
        }
        systems = {
            name: System(partial(run, ways[way]), work=tokens)
            for name, (way, size) in cases.items()
            if size == tokens
        }
        yield from timed(systems, bench, "tokens", [*systems][-1], "the last")


def attentions(bench: Bench, cases: Cases) -> Rows:
    """Time attention by what the models call and by two kernels, in turns, all on as many
    tokens."""
    width, tokens = bench.sizes.widths[0], bench.sizes.tokens[1]
    kernels: dict[str, Callable[..., Tensor]] = {
        "ours": attention,
        "cuDNN": partial(attend_by, SDPBackend.CUDNN_ATTENTION),
        "memory-efficient": partial(attend_by, SDPBackend.EFFICIENT_ATTENTION),
    }
    for length in dict.fromkeys(case[1] for case in cases.values()):
        shape = (max(1, tokens // length), length, 3, width // 64, 64)
        qkv = torch.randn(shape, device=bench.device).bfloat16().requires_grad_()
        lengths = np.linspace(length * 3 // 4, length, shape[0]).astype(int)
        layout = PaddedLayout(lengths, length, bench.device)
        mask = padding_bias(layout, qkv.dtype, always=True)

        def run(
            kernel: Callable[..., Tensor], qkv: Tensor = qkv, mask: Tensor | None = mask
        ) -> None:
            qkv.grad = None
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
            kernel(q, k, v, mask).sum().backward()  # type: ignore[no-untyped-call]

        systems = {
            name: System(partial(run, kernels[kernel]), work=tokens)
            for name, (kernel, size) in cases.items()
            if size == length
        }
        yield from timed(systems, bench, "tokens", next(iter(systems)), "ours")


def attend_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by one of CUDA's kernels; on a CPU there is a single one."""
    with sdpa_kernel(kernel) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def decoding(bench: Bench, cases: Cases) -> Rows:
    """Time our beam search with both models, in turns."""
    from benchmarks.our_search import (
        model_of,
        random_sentences,
        run_our_search,
        search_to_source_length,
    )

    search = search_to_source_length(4, batch_tokens=1 << 30)  # all sentences are one batch
    sizes, systems = bench.sizes, {}
    for name, (system, dtype, batch) in cases.items():
        torch.manual_seed(0)
        architecture = ARCHITECTURES[system]
        model = model_of(architecture, sizes.widths[0], sizes.vocab_size, sizes.levels)
        model.to(bench.device, getattr(torch, dtype))
        sentences = random_sentences(batch, sizes.vocab_size)
        run = partial(run_our_search, model, sentences, search)
        tokens = sum(map(len, sentences))
        systems[name] = System(run, work=tokens, held=weights_of(model))
    fewer = bench._replace(sizes=sizes._replace(rounds=-(-sizes.rounds // 2)))  # they take long
    yield from timed(systems, fewer, "output tokens", transformer_of(cases), "Transformer")


def profiles(bench: Bench, cases: Cases) -> Rows:
    """Count what a step makes the host do, and list what takes the GPU's time."""
    tokens = bench.sizes.tokens[0]
    for name, (system, way) in cases.items():
        if way == "torch alone":
            loss = loss_of(random_batch(tokens, bench.sizes.vocab_size, bench.device))
            step = steps_of(trainable(system, settings(bench, bench.sizes.widths[0])), [loss])
            yield name, profiled(step, bench)
            continue
        from benchmarks.gpu_engine import random_steps

        with random_steps(bench, system, way, tokens) as step:
            yield name, profiled(step, bench)


def profiled(step: Callable[[], None], bench: Bench) -> Cells:
    """Profile a step.

    :returns: `ms` without a profiler; kernels, launches and waits of the host; reads, which are
        operators of torch that end in one; and the kernels (on a CPU the operators) that take most.
    """
    on_gpu = bench.device.type == "cuda"
    for _ in range(3):
        seconds = seconds_of(step, bench.device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize(bench.device)
            time.sleep(0.1)  # the last records arrive late
    events = found.key_averages()
    kernels = [e for e in events if (e.device_type.name == "CUDA") == on_gpu]
    taken = {id(e): e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in kernels}
    kernels.sort(key=lambda event: -taken[id(event)])
    total = sum(taken.values())

    def count(*beginnings: str) -> int:
        return sum(event.count for event in events if event.key.startswith(beginnings))

    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    top = [
        {
            "kernel": event.key[:90],
            "calls": event.count,
            "ms": taken[id(event)] / 1000,
            "share": f"{taken[id(event)] / total:.1%}",
        }
        for event in kernels[:TOP]
    ]
    return {
        "ms": 1000 * seconds,
        "kernels, ms": total / 1000,
        "kernels": sum(event.count for event in kernels),
        "launches": count("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
        "copies": count("cudaMemcpyAsync"),
        "waits of the host": max(0, count(*waits) - on_gpu),  # the last is ours
        "reads": count(*READS),
        "operators": count("aten::"),
        "what takes most": top,
    }
