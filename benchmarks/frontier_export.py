"""The int8 exports of `benchmarks/frontier.py`: how large, how good and how fast they are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.architectures import translation_of
from benchmarks.record import Export, Record
from benchmarks.rounds import measure, progress
from benchmarks.runs import Run
from data_prep.corpora import read_text
from pipeline import load

FORMATS = "onnx", "ctranslate2"
REFERENCE_FORMAT = "ctranslate2"
TIMED_SENTENCES = 100


def exported(run: Run, format: str) -> Path:
    """Return the folder of a run's int8 export, which is made and scored if that is not done.

    :raises subprocess.CalledProcessError: with exit code 2: this format does not take the model.
    """
    folder = run.run_dir / f"int8-{format}"
    chosen = "--output", str(folder), "--format", format, "--quantization", "int8"
    run.execute("export", *chosen)
    run.execute("evaluate", "--model", str(folder))
    return folder


def exports_of(run: Run, formats: Iterable[str]) -> dict[str, Path]:
    """Return the folders of a run's exports by format; only of those that take the model."""
    found = {}
    for format in formats:
        try:
            found[format] = exported(run, format)
        except subprocess.CalledProcessError as error:
            if error.returncode != 2:
                raise
    return found


def measure_exports(record: Record, runs: Mapping[str, Run], reference: str, rounds: int) -> None:
    """Put on record what the exports of systems cost, beside the reference's in CTranslate2.

    Of systems that are on record already, or were trained elsewhere, there are none.

    :param runs: one of each system, the reference's among them, which is trained if need be.
    """
    new = {}
    for system, run in runs.items():
        missing = set(FORMATS) - {export.format for export in record.exports(system)}
        if not missing:
            continue
        if not run.scores:
            progress(f"{system}: its model is not in {run.run_dir}; there is no export of it")
            continue
        new[system] = exports_of(run, sorted(missing))
    if not new:
        return
    runs[reference].train()
    base = exported(runs[reference], REFERENCE_FORMAT)
    folders = {str(folder) for each in new.values() for folder in each.values()} | {str(base)}
    recipe = translation_of(runs[reference])
    text = recipe.run_dir / "clean" / f"test.{recipe.data.source_lang}"
    sentences = read_text(text)[:TIMED_SENTENCES]
    translate = {folder: one_by_one(Path(folder), sentences) for folder in sorted(folders)}
    seconds = measure(translate, rounds, torch.device("cpu"))
    milliseconds = {
        folder: [round(1000 * each / len(sentences), 3) for each in times[1:]]
        for folder, times in seconds.items()
    }
    for system, by_format in new.items():
        for format, folder in by_format.items():
            files = (path for path in folder.iterdir() if path.name != "README.md")
            export = Export(
                system=system,
                format=format,
                megabytes=round(sum(path.stat().st_size for path in files) / 1e6, 3),
                bleu=replace(runs[system], variant=f"--{folder.name}").scores["bleu"],
                milliseconds=milliseconds[str(folder)],
                reference_milliseconds=milliseconds[str(base)],
            )
            record.add(export)


def one_by_one(folder: Path, sentences: Sequence[str]) -> Callable[[], object]:
    """Return a function that translates sentences with an export, each by itself."""
    translator = load(folder, threads=1)
    return lambda: [translator.translate([sentence]) for sentence in sentences]
