"""COMET (Rei et al. 2020) scores translations by a neural model, where a machine has one.

Its package needs older versions of others than ours does, so its command `comet-score` runs in an
environment of its own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from os import environ
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from data_prep.files import DataError, read_json
from pipeline.recipe import UsageError

PROGRAM = "comet-score"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUTF8": "1",  # it reads files as the locale says
}


def check_comet(model: Path) -> None:
    """Find out whether COMET can run.

    :param model: file of a checkpoint.
    :raises UsageError: the program or the file is not there, or the program takes the file's name
        for that of a model to download.
    """
    if not (model.is_file() and model.suffix == ".ckpt"):
        raise UsageError(
            f"evaluation.comet: {model} is no file that ends in .ckpt; name a COMET model's "
            "checkpoint (checkpoints/model.ckpt in what you have downloaded)"
        )
    if shutil.which(PROGRAM) is None:
        raise UsageError(
            f"evaluation.comet: the program {PROGRAM} is not on PATH; install the package "
            "unbabel-comet in an environment of its own (`uv tool install unbabel-comet`)"
        )


def comet_score(
    model: Path, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]
) -> float:
    """Return the mean score of translations, about 0 to 1.

    Nothing is downloaded.

    :param model: file of a checkpoint.
    :raises DataError: the program failed.
    """
    columns = {"source": sources, "translation": hypotheses, "reference": references}
    with TemporaryDirectory() as place:
        files = {name: Path(place, name) for name in (*columns, "scores")}
        for name, lines in columns.items():
            # Each sentence is a line, whatever ends one for the program.
            text = "".join(f"{' '.join(line.split())}\n" for line in lines)
            files[name].write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                PROGRAM, "--quiet", "--model", model, "-s", files["source"],
                "-t", files["translation"], "-r", files["reference"], "--to_json", files["scores"],
            ],
            capture_output=True, text=True, errors="replace", env={**environ, **ENVIRONMENT},
        )  # fmt: skip
        rows = read_json(files["scores"]).get(str(files["translation"]), [])
    if done.returncode or len(rows) != len(hypotheses):
        last = next(reversed(done.stderr.strip().splitlines()), "it said nothing")
        raise DataError(f"{PROGRAM} with the model {model} failed: {last}")
    scores: list[float] = [row["COMET"] for row in rows]
    return mean(scores)
