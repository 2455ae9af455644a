"""Measure what a shortlist is worth: CTranslate2, int8, one thread, a RingFormer of base depth.

Sentences have 25 random tokens, and translations as many. A sentence alone and a batch as large as
`evaluation.batch_tokens` makes it are each translated with the whole vocabulary and with a
shortlist of some of it. Times are CPU time, which other programs on the machine disturb less.

python -m benchmarks.shortlist [--model_dim 512] [--shortlist 2600] [--rounds 5]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.decode import export_to_ctranslate2
from benchmarks.our_search import VOCAB, model_of
from benchmarks.rounds import create_parser, print_table
from models.search_config import SearchConfig

LENGTH = 25
ALONE = 10  # sentences that are translated one by one


def cpu_ms(translate: Callable[[], object]) -> float:
    """Return the milliseconds of CPU time that a call takes, in all threads."""
    before = time.process_time()
    translate()
    return 1000 * (time.process_time() - before)


def main() -> None:
    """Time all four ways with greedy search and with a beam of 4, and print a table."""
    parser = create_parser(__doc__)
    parser.add_argument("--model_dim", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--shortlist", type=int, default=2600, help="tokens that it allows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = model_of("ringformer", arguments.model_dim)
    engine = export_to_ctranslate2(model, "int8", 1, arguments.shortlist)
    tokens = np.random.default_rng(0).integers(4, VOCAB, (SearchConfig().batch_tokens, LENGTH))
    rows = []
    for beam in (1, 4):
        size = SearchConfig().batch_tokens // ((LENGTH + 1) * beam)
        batch = [list(map(str, sentence)) for sentence in tokens[:size]]
        for label, batches in (
            ("alone", [[sentence] for sentence in batch[:ALONE]]),
            (f"in a batch of {size}", [batch]),
        ):
            row = [f"beam {beam}, {label}"]
            for shortlisted in (False, True):
                translate = partial(
                    engine.translate_batch, beam_size=beam, use_vmap=shortlisted,
                    min_decoding_length=LENGTH, max_decoding_length=LENGTH,
                )  # fmt: skip
                run = partial(lambda run, all_of_them: [*map(run, all_of_them)], translate, batches)
                run()  # warms up
                times = [cpu_ms(run) / sum(map(len, batches)) for _ in range(arguments.rounds)]
                row.append(f"{median(times):.1f} ({min(times):.1f}–{max(times):.1f})")
            rows.append(row)
    caption = f"Width {arguments.model_dim}, vocabulary {VOCAB:,}; CPU ms for a sentence"
    print_table(caption, ["", "whole vocabulary", f"{arguments.shortlist:,} tokens"], rows)


if __name__ == "__main__":
    main()
