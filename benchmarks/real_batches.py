"""Measure training on real sentences: our batches and RingFormer, against the published way.

Both train on the pairs of the first steps of an epoch. The published implementation pads them to 50
tokens (it cuts longer ones; here both leave them out). The program needs prepared shards:

    ./run.sh prepare --config recipes/multi30k_de_en.yaml --run_dir runs/m30k
    python -m benchmarks.real_batches --run_dir runs/m30k [--rounds 5] [--steps 3]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.published_math import PublishedModel
from benchmarks.rounds import add_device_options, create_parser, dtype_of, measure, print_report
from benchmarks.train_step import config_of, loss_of, steps_of
from data_prep.batch_plan import BatchPlan, Indices
from data_prep.shards import ShardReader
from data_prep.text import PAD_IDX
from models.factory import create_model
from models.seq2seq import TranslationModel
from pipeline.translation.batches import PairBatch, collate

PADDED_LENGTH = 50


def padded(reader: ShardReader, indices: Indices, model: TranslationModel) -> PairBatch:
    """Collate pairs, and pad them further to the published implementation's length."""
    batch = collate(reader, indices, next(model.parameters()).device)
    source, target_input, targets = (
        torch.nn.functional.pad(ids, (0, PADDED_LENGTH - ids.size(1)), value=PAD_IDX)
        for ids in (batch.source_seqs, batch.target_seqs, batch.targets)
    )
    return PairBatch(
        source, model.layout(source), target_input, model.layout(target_input), targets
    )


def main() -> None:
    """Measure three ways to train on the same pairs, and print a table."""
    parser = create_parser(__doc__)
    add_device_options(parser)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=1024, help="a side, in a step")
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    arguments = parser.parse_args()
    device, dim = arguments.device, arguments.model_dim
    reader = ShardReader(arguments.run_dir / "shards", "train")
    lengths = np.stack(reader.lengths())
    plan = BatchPlan(*lengths, max_tokens=arguments.max_tokens, micro_batch_tokens=None, seed=0)
    batches = [plan[step].micro_batches[0] for step in range(arguments.steps)]
    batches = [pairs[lengths[:, pairs].max(0) <= PADDED_LENGTH] for pairs in batches]
    batches = [pairs for pairs in batches if len(pairs)]
    chosen = np.random.default_rng(0).permutation(np.concatenate(batches))
    vocab_sizes = reader.data.vocabulary.sizes
    config = config_of(dim)
    dtype = dtype_of(arguments.dtype)

    ours = create_model(config, vocab_sizes, PAD_IDX).to(device, dtype).train()
    theirs = PublishedModel(config, vocab_sizes, PAD_IDX).to(device, dtype).train()
    bucketed = [collate(reader, pairs, device) for pairs in batches]
    size = max(1, arguments.max_tokens // PADDED_LENGTH)
    fixed = [padded(reader, chosen[i : i + size], theirs) for i in range(0, len(chosen), size)]

    def epoch(model: TranslationModel, batches: list[PairBatch]) -> Callable[[], None]:
        return steps_of(model, [loss_of(batch) for batch in batches])

    reference = "RingFormer, batches by length"
    runs = {
        reference: epoch(ours, bucketed),
        f"RingFormer, padded to {PADDED_LENGTH}": epoch(ours, fixed),
        f"published math, padded to {PADDED_LENGTH}": epoch(theirs, fixed),
    }
    seconds = measure(runs, arguments.rounds, device)
    caption = (
        f"{len(chosen):,} real pairs, width {dim}, vocabulary {vocab_sizes[1]:,}, at most "
        f"{arguments.max_tokens:,} tokens a side in a step, {arguments.dtype}"
    )
    print_report(caption, seconds, [reference], int(lengths[1, chosen].sum()))


if __name__ == "__main__":
    main()
