"""Measure what the signals of q, k and v cost where they are applied and not folded.

They are applied by one product with zeros, or by one of each (`models/ringformer/level_signal.py`):
in a training step of a ring for images, and while PyTorch translates a sentence in float32.

python -m benchmarks.signals [--widths 128 256 512] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.nn import functional as F

from benchmarks.our_search import (
    model_of,
    random_sentences,
    run_our_search,
    search_to_source_length,
)
from benchmarks.rounds import (
    add_device_options,
    create_parser,
    dtype_of,
    measure,
    print_table,
    ratios,
)
from models.config import VisionConfig
from models.factory import create_classifier
from models.image_classifier import ImageShape
from models.ringformer import level_signal

IMAGE, PATCH, CLASSES = ImageShape(1, 28), 7, 10  # of Fashion-MNIST
VOCAB = 8000
TIMES = 10  # in a round
WAYS = {"a product of each": 0, "one product": sys.maxsize}  # up to so many numbers it is one


def training_step(width: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """Return a function that makes a training step of a ring for images."""
    config = VisionConfig(
        model_dim=width, num_heads=4, ffn_inner_dim=4 * width, patch_size=PATCH, dropout=0.0
    )
    device, count = arguments.device, arguments.images
    model = create_classifier(config, IMAGE, CLASSES).to(device, dtype_of(arguments.dtype))
    optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)
    pixels = (count, IMAGE.channels, IMAGE.size, IMAGE.size)
    images = torch.randint(256, pixels, dtype=torch.uint8, device=device)
    labels = torch.randint(CLASSES, (count,), device=device)

    def step() -> None:
        F.cross_entropy(model(images).float(), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def translation(width: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """Return a function that translates a sentence greedily."""
    model = model_of("ringformer", width, VOCAB).to(arguments.device)
    search, sentences = search_to_source_length(1), random_sentences(1, VOCAB)

    def translate() -> None:
        model.eval()  # forgets the weights that were kept
        run_our_search(model, sentences, search)

    return translate


def repeat(run: Callable[[], None], most: int) -> None:
    """Run something some times, where up to so many numbers are one product."""
    level_signal.SMALL = most
    for _ in range(TIMES):
        run()


def main() -> None:
    """Time both ways at each width, and print a table."""
    parser = create_parser(__doc__)
    add_device_options(parser)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[128, 256, 512], help="multiples of 64"
    )
    parser.add_argument("--images", type=int, default=128, help="of a step")
    arguments = parser.parse_args()
    rows = []
    step, sentence = f"training step, images, {arguments.dtype}", "a sentence, float32"
    for title, work in ((step, training_step), (sentence, translation)):
        for width in arguments.widths:
            run = work(width, arguments)
            runs = {way: partial(repeat, run, most) for way, most in WAYS.items()}
            seconds = measure(runs, arguments.rounds, arguments.device)
            each, one = (times[1:] for times in seconds.values())
            milliseconds = [f"{1000 * median(times) / TIMES:.1f}" for times in (each, one)]
            rows.append([title, str(width), *milliseconds, ratios(one, each)])
    header = ["", "width", *(f"{way}, ms" for way in WAYS), "ratio"]
    print_table("Signals of q, k and v", header, rows)


if __name__ == "__main__":
    main()
