"""Our training loop beside DeepSpeed's bare engine, and two ranks beside one.

    ./run.sh prepare --config recipes/multi30k_de_en.yaml
    python -m benchmarks.train_loop --config recipes/multi30k_de_en.yaml [--rounds 5] [--steps 20]
        [--SECTION.KEY VALUE]...

Bare is `engine(...)`, `backward`, `step` over batches collated before; the loop adds feeding,
learning rate, seeds, agreement on signals, progress lines and MLflow. A rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from benchmarks.rounds import describe, spread
from pipeline.command_line import load_recipe
from pipeline.engine import Training
from pipeline.ranks import init_distributed
from pipeline.recipe import Recipe
from pipeline.tracking import Tracker
from pipeline.train import Loop
from pipeline.validation import not_validated


def bare(training: Training, batches: list[Any]) -> None:
    scale = training.world_size * training.accumulation_steps
    for step in batches:
        for batch in step.micro_batches:
            loss = training.loss(batch, label_smoothing=training.config.label_smoothing)
            training.engine.backward(loss * (scale / step.target_tokens))
            training.engine.step()


def measure(recipe: Recipe, rounds: int, steps: int) -> dict[str, Any]:
    """On this rank: seconds of both ways in each round over the same steps, and of a checkpoint."""
    training = Training(recipe)
    tracker = Tracker(recipe) if training.rank == 0 else None
    loop = Loop(training, None, tracker)
    found: dict[str, Any] = {"bare": [], "loop": [], "tokens": [], "wait": [], "save": []}
    ahead = training.batches()
    for number in range(rounds + 1):
        batches = [next(ahead) for _ in range(steps)]
        training.engine.train()
        started = time.perf_counter()
        bare(training, batches)
        middle = time.perf_counter()
        waited = 0.0
        for _ in range(steps):
            before = loop.window.waited
            loop.step()
            waited += max(0.0, loop.window.waited - before)
        end = time.perf_counter()
        if number:  # the first warms up
            found["bare"].append(middle - started)
            found["loop"].append(end - middle)
            found["wait"].append(waited / (end - middle))
            found["tokens"].append(sum(s.source_tokens + s.target_tokens for s in batches))
    for _ in range(3):
        started = time.perf_counter()
        training.save(None, not_validated(recipe.training))
        found["save"].append(time.perf_counter() - started)
    if tracker:
        tracker.close()
    return found


def endless(config: Path, arguments: Sequence[str]) -> Recipe:
    """A recipe whose training does nothing but steps.

    :param arguments: `--SECTION.KEY VALUE`, one after the other.
    """
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    overrides = [(key.removeprefix("--"), value) for key, value in pairs]
    for key in ("max_steps", "validate_every", "checkpoint_every"):
        overrides.append((f"training.{key}", "1000000"))
    return load_recipe(config, overrides)


def worker(arguments: argparse.Namespace, scratch: Path) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    init_distributed()
    recipe = endless(arguments.config, arguments.overrides)
    link = scratch / "run" / "shards"
    if dist.get_rank() == 0:
        link.parent.mkdir()
        link.symlink_to((recipe.run_dir / "shards").absolute())
    dist.barrier()
    recipe = recipe.model_copy(update={"run_dir": link.parent})
    found = measure(recipe, arguments.rounds, arguments.steps)
    if dist.get_rank() == 0:
        (scratch / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators"]
        command += [str(ranks), "--module", "benchmarks.train_loop", *sys.argv[1:]]
        done = subprocess.run([*command, "--worker", scratch], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found: dict[str, Any] = json.loads((Path(scratch) / "found.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    arguments.overrides = overrides
    if arguments.worker:
        worker(arguments, arguments.worker)
        return
    torch.set_num_threads(1)
    print(f"{describe(torch.device('cpu'))}, {arguments.config.name}, {arguments.steps} steps\n")
    rates = {}
    print("| ranks | tokens/s | loop over bare engine | data wait | checkpoint, s |")
    print("|---|---|---|---|---|")
    for ranks in (1, 2):
        found = launch(arguments, ranks)
        ratios = [ours / bare for ours, bare in zip(found["loop"], found["bare"], strict=True)]
        rates[ranks] = [n / s for n, s in zip(found["tokens"], found["loop"], strict=True)]
        wait = f"{100 * max(found['wait']):.2f}% at most"
        row = (spread(rates[ranks], 0), spread(ratios), wait, spread(found["save"], 2))
        print(f"| {ranks} | {' | '.join(row)} |", flush=True)
    gain = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"\nTwo ranks over one: {spread(gain, 2)}")


if __name__ == "__main__":
    main()
