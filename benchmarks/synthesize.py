"""Measure how fast a corpus is translated by an export, beside CTranslate2 by itself.

The stage reads pieces of text, translates each in a worker process, and writes files and records.
CTranslate2 by itself gets the same lines at once, in its own batches of as many tokens, and has a
thread for each core; SentencePiece is in its time too. Workers and model of both are there before
a round begins.

python -m benchmarks.synthesize --model EXPORT --text FILE [--lines 20000] [--beam_size 4]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import ctranslate2
import torch

from benchmarks.rounds import CORES, create_parser, measure, print_table, ratios, spread
from data_prep.config import DataConfig
from data_prep.corpora import Fetched, fetch, read_lines
from data_prep.pieces import open_executor
from data_prep.stage import FETCH
from data_prep.synthesize import Teacher, synthesize
from data_prep.text import normalise
from data_prep.vocabulary import load_vocabularies
from models.export_format import read_settings
from pipeline.translation.teacher import open_teacher

ALONE = "CTranslate2 by itself"


def write_corpus(folder: Path, text: Path, lines: int) -> None:
    """Write the first lines of a file, as a corpus and as what a recipe needs besides."""
    folder.mkdir()
    for name, count in (("text", lines), ("other", 1)):
        content = "".join(f"{line}\n" for line in islice(read_lines(text), count))
        (folder / name).write_text(content, encoding="utf-8")


def config_of(folder: Path, model: Path, beam_size: int, lines_per_piece: int) -> DataConfig:
    """Return a recipe's section that has the corpus in `folder` translated."""
    settings, other = read_settings(model), {"name": "other", "source": "other", "target": "other"}
    way = {"source_lang": settings.source_lang, "target_lang": settings.target_lang}
    teacher = {"model": model, "beam_size": beam_size, "lines_per_piece": lines_per_piece}
    train = [{"name": "text", "source": "text", "translate_with": teacher}]
    return DataConfig.model_validate(
        {"root": folder, "train": train, "valid": other, "test": other, **way, "workers": CORES}
    )


def run_ctranslate2(
    model: ctranslate2.Translator, export: Path, teacher: Teacher, text: Path, output: Path
) -> None:
    """Translate a file with CTranslate2 and SentencePiece alone."""
    source, target = load_vocabularies(export)
    lines = [normalise(line) for line in read_lines(text)]
    search = teacher.search
    found = model.translate_batch(
        source.encode(lines, out_type=str),
        beam_size=search["beam_size"],
        length_penalty=search["length_penalty"],
        max_batch_size=search["batch_tokens"] // search["beam_size"],
        batch_type="tokens",
    )
    translations = target.decode([result.hypotheses[0] for result in found])
    output.write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")


def main() -> None:
    """Measure both, and print the table."""
    parser = create_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="in format ctranslate2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--lines_per_piece", type=int, default=4000)
    parser.add_argument("--beam_size", type=int, default=4)
    arguments = parser.parse_args()
    with TemporaryDirectory() as place:
        folder = Path(place)
        write_corpus(folder / "data", arguments.text, arguments.lines)
        config = config_of(
            folder / "data", arguments.model, arguments.beam_size, arguments.lines_per_piece
        )
        teacher = open_teacher(config.train[0], config.languages)
        model = ctranslate2.Translator(str(arguments.model), inter_threads=CORES, intra_threads=1)
        with open_executor(config) as executor:
            fetched: Fetched = fetch(config, folder / FETCH, executor)
            runs = iter(range(arguments.rounds + 1))

            def run_stage() -> None:
                run_dir = folder / f"run-{next(runs)}"
                run_dir.mkdir()
                (run_dir / FETCH).symlink_to(folder / FETCH)
                synthesize(config, fetched, {"text": teacher}, run_dir, executor)

            text = folder / "data" / "text"
            alone = partial(
                run_ctranslate2, model, arguments.model, teacher, text, folder / "translations"
            )
            systems: dict[str, Callable[[], object]] = {
                "synthesize": run_stage,
                ALONE: alone,
            }
            seconds = measure(systems, arguments.rounds, torch.device("cpu"))
        lines = sum(1 for _ in read_lines(text))
    theirs = seconds[ALONE][1:]
    rows = [
        (name, spread([lines / each for each in times[1:]], 0), ratios(theirs, times[1:]))
        for name, times in seconds.items()
    ]
    caption = f"Of {arguments.rounds} rounds with {lines:,} lines on {CORES} cores"
    print_table(caption, ("system", "sentences/s", "rate over CTranslate2's"), rows)


if __name__ == "__main__":
    main()
