"""Training on real sentences: our batches and RingFormer, against the published way.

The first steps of an epoch, and the same sentences as the published implementation batches them:
padded to 50 tokens (it cuts longer ones; both sides leave them out here). Needs prepared shards:

    ./run.sh prepare --config recipes/multi30k_de_en.yaml --run_dir runs/m30k
    python -m benchmarks.real_batches --run_dir runs/m30k [--rounds 5] [--steps 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.published_math import PublishedModel
from benchmarks.rounds import describe, device_of, measure, report
from benchmarks.train_step import step_of
from data_prep.shards import ShardReader
from data_prep.vocabulary import PAD_IDX
from models.config import ModelConfig
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.batches import Batch, BatchPlan, Indices, collate

PADDED_LENGTH = 50


def loss_of(batch: Batch) -> Callable[[TranslationModel], Tensor]:
    def loss(model: TranslationModel) -> Tensor:
        total: Tensor = model(
            batch.source,
            batch.source_layout,
            batch.target_input,
            batch.target_layout,
            batch.targets,
        )
        return total / int((batch.targets != PAD_IDX).sum())

    return loss


def padded(reader: ShardReader, indices: Indices, model: TranslationModel) -> Batch:
    batch = collate(reader, indices, torch.device("cpu"))
    source, target_input, targets = (
        torch.nn.functional.pad(ids, (0, PADDED_LENGTH - ids.size(1)), value=PAD_IDX)
        for ids in (batch.source, batch.target_input, batch.targets)
    )
    return Batch(source, model.layout(source), target_input, model.layout(target_input), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = device_of("cpu")
    reader = ShardReader(arguments.run_dir / "shards", "train")
    lengths = np.stack(reader.lengths())
    plan = BatchPlan(*lengths, max_tokens=arguments.max_tokens, micro_batch_tokens=None, seed=0)
    parts = [plan[step].micro_batches[0] for step in range(arguments.steps)]
    parts = [part[lengths[:, part].max(0) <= PADDED_LENGTH] for part in parts]
    parts = [part for part in parts if len(part)]
    chosen = np.random.default_rng(0).permutation(np.concatenate(parts))
    vocab_sizes = reader.manifest["vocabulary"]["sizes"]
    config = ModelConfig()

    ours = create_model(config, vocab_sizes, PAD_IDX).train()
    theirs = PublishedModel(config, vocab_sizes, PAD_IDX).train()
    bucketed = [collate(reader, part, device) for part in parts]
    size = arguments.max_tokens // PADDED_LENGTH
    fixed = [padded(reader, chosen[i : i + size], theirs) for i in range(0, len(chosen), size)]

    def epoch(model: TranslationModel, batches: list[Batch]) -> Callable[[], None]:
        steps = [step_of(model, loss_of(batch)) for batch in batches]

        def run() -> None:
            for step in steps:
                step()

        return run

    runs = {
        "RingFormer, batches by length": epoch(ours, bucketed),
        "published math, padded to 50": epoch(theirs, fixed),
        "RingFormer, padded to 50": epoch(ours, fixed),
    }
    seconds = measure(runs, arguments.rounds, device)
    print(f"## {describe(device)}")
    title = f"{len(chosen)} real sentence pairs, {arguments.max_tokens} tokens a step"
    tokens = int(lengths[1, chosen].sum())
    report(title, seconds, "RingFormer, batches by length", tokens, "target tokens")


if __name__ == "__main__":
    main()
