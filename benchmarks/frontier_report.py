"""What `benchmarks/frontier.py` says of trained models: what they are worth, and what they cost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from benchmarks.architectures import core_parameters_of, translation_of
from benchmarks.rounds import measure, print_table, ratios, three_digits
from benchmarks.runs import Run
from benchmarks.runs import mean as mean_and_deviation
from data_prep.corpora import read_text
from models.factory import abstract_model
from pipeline import load
from pipeline.evaluation.result import slug_of
from pipeline.tracking.tracker import history_of
from pipeline.translation.scores import paired_bootstrap

FORMATS = "onnx", "ctranslate2"
TIMED_SENTENCES = 100


class Claim(NamedTuple):
    """A system, and what it is compared with."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Export:
    """A run's int8 export."""

    folder: Path
    bleu: float
    milliseconds: Sequence[float]
    """Of a sentence, round by round."""

    @property
    def megabytes(self) -> float:
        """Return the size of all of its files but the model card."""
        files = (path for path in self.folder.iterdir() if path.name != "README.md")
        return sum(path.stat().st_size for path in files) / 1e6


@dataclass(frozen=True)
class Point:
    """A system, measured."""

    runs: Sequence[Run]
    exports: Mapping[str, Export]
    """Of the first run, by format."""

    @property
    def bleu(self) -> list[float]:
        return [run.scores["bleu"] for run in self.runs]

    @property
    def core(self) -> int:
        """Return the number of parameters but for embeddings."""
        return core_parameters_of(translation_of(self.runs[0]))

    @property
    def parameters(self) -> int:
        """Return the number of all parameters."""
        recipe = translation_of(self.runs[0])
        sizes = (recipe.data.vocabulary.size,) * 2
        return sum(each.numel() for each in abstract_model(recipe.model, sizes).parameters())

    @property
    def training(self) -> tuple[float, float]:
        """Return how long a training takes at its median speed, in minutes, and its memory in GiB:
        of the fastest of the seeds, as others shared the machine with something else."""
        return min(map(_time_and_memory, self.runs))


def _time_and_memory(run: Run) -> tuple[float, float]:
    history, steps = history_of(run.recipe), run.recipe.training.max_steps
    speed, memory = (history[f"speed/{key}"] for key in ("steps_per_second", "memory_gib"))
    return steps / median(speed.values()) / 60, max(memory.values())


# ── Exports ─────────────────────────────────────────────────────────────────────────────────────


def exported(run: Run, format: str) -> Path:
    """Return the folder of a run's int8 export, which is made and scored if that is not done.

    :raises subprocess.CalledProcessError: with exit code 2: this format does not take the model.
    """
    folder = run.run_dir / f"int8-{format}"
    chosen = "--output", str(folder), "--format", format, "--quantization", "int8"
    run.execute("export", *chosen)
    run.execute("evaluate", "--model", str(folder))
    return folder


def exports_of(run: Run) -> dict[str, Path]:
    """Return the folders of a run's exports by format; only of those that take the model."""
    found = {}
    for format in FORMATS:
        try:
            found[format] = exported(run, format)
        except subprocess.CalledProcessError as error:
            if error.returncode != 2:
                raise
    return found


def measure_all(systems: Mapping[str, Sequence[Run]], rounds: int) -> dict[str, Point]:
    """Export the first run of each system, and time the exports in turns.

    :param rounds: 0: there are no exports.
    """
    runs = {system: runs[0] for system, runs in systems.items()}
    folders = {system: exports_of(run) if rounds else {} for system, run in runs.items()}
    recipe = translation_of(next(iter(runs.values())))
    sentences = read_text(recipe.run_dir / "clean" / f"test.{recipe.data.source_lang}")
    every = list(chain.from_iterable(each.values() for each in folders.values()))
    translate = {str(folder): one_by_one(folder, sentences[:TIMED_SENTENCES]) for folder in every}
    seconds = measure(translate, rounds, torch.device("cpu")) if rounds else {}

    def export(run: Run, folder: Path) -> Export:
        bleu = replace(run, variant=f"--{folder.name}").scores["bleu"]
        times = [1000 * each / TIMED_SENTENCES for each in seconds[str(folder)][1:]]
        return Export(folder, bleu, times)

    return {
        system: Point(
            systems[system],
            {format: export(run, folder) for format, folder in folders[system].items()},
        )
        for system, run in runs.items()
    }


def one_by_one(folder: Path, sentences: Sequence[str]) -> Callable[[], object]:
    """Return a function that translates sentences with an export, each by itself."""
    translator = load(folder, threads=1)
    return lambda: [translator.translate([sentence]) for sentence in sentences]


# ── Tables and pictures ─────────────────────────────────────────────────────────────────────────


def report(points: Mapping[str, Point], reference: str) -> None:
    """Print what each system is worth and what it costs."""
    rows, costs = [], []
    for system, point in points.items():
        minutes, memory = point.training
        chrf, loss = [run.scores["chrf"] for run in point.runs], [r.valid_loss for r in point.runs]
        rate = f"{point.runs[0].recipe.training.learning_rate:g}"
        quality = [mean_and_deviation(values) for values in (loss, point.bleu, chrf)]
        seeds = ", ".join(f"{value:.2f}" for value in point.bleu)
        sizes = f"{point.core:,}", f"{point.parameters:,}"
        rows.append([system, *sizes, rate, *quality, seeds, f"{minutes:.0f}", f"{memory:.2f}"])
        for format, export in point.exports.items():
            bleus = f"{point.bleu[0]:.2f}", f"{export.bleu:.2f}"
            middle = three_digits(median(export.milliseconds))
            over = ratios(
                export.milliseconds, points[reference].exports["ctranslate2"].milliseconds
            )
            costs.append([system, format, f"{export.megabytes:.2f}", *bleus, middle, over])
    header = [
        "system", "core parameters", "parameters", "learning rate", "validation loss", "BLEU",
        "chrF2", "BLEU by seed", "training, min", "memory, GiB",
    ]  # fmt: skip
    print_table("Mean ± standard deviation over seeds, beam 4", header, rows)
    header = ["system", "format", "files, MB", "BLEU", "in int8", "a sentence, ms"]
    over = f"over {reference} in CTranslate2"
    caption = "The first seed's exports in int8, one thread, a sentence at a time"
    print_table(caption, [*header, over], costs)


def report_claims(points: Mapping[str, Point], claims: Sequence[Claim]) -> None:
    """Print the differences that claims are made of, and whether they are more than chance."""
    rows = []
    for claim in claims:
        if not all(system in points for system in claim):
            continue
        ours, theirs = (points[system] for system in claim)
        sizes = f"{ours.core / theirs.core:.2f}", f"{ours.parameters / theirs.parameters:.2f}"
        tests = [paired(*runs) for runs in zip(ours.runs, theirs.runs, strict=True)]
        by_seed = ", ".join(f"{test['difference']:+.2f}" for test in tests)
        chances = ", ".join(f"{test['p']:.3f}" for test in tests)
        over_seeds = f"{ttest_ind(ours.bleu, theirs.bleu).pvalue:.3f}" if len(tests) > 1 else ""
        difference = f"{mean(ours.bleu) - mean(theirs.bleu):+.2f}"
        rows.append([*claim, *sizes, difference, by_seed, chances, over_seeds])
    header = [
        "system", "against", "of its core parameters", "of all", "BLEU", "by seed",
        "p by seed (paired bootstrap)", "p over seeds (t-test)",
    ]  # fmt: skip
    print_table("Differences", header, rows)


def paired(ours: Run, theirs: Run) -> Mapping[str, float]:
    """Compare the translations of two models with the same seed."""
    data = translation_of(ours).data
    references = read_text(ours.run_dir / "clean" / f"test.{data.target_lang}")
    hypotheses = Path("evaluation", slug_of(data.test.name), "hypotheses.txt")
    found, other = (read_text(run.run_dir / hypotheses) for run in (ours, theirs))
    return paired_bootstrap(other, found, [references], data.target_lang)["bleu"]


def draw(points: Mapping[str, Point], families: Mapping[str, str], path: Path) -> None:
    """Draw BLEU by parameters, by the smallest file, and by the fastest export's time.

    :param families: of the systems; those of one are joined by a line.
    """
    panels: dict[str, Callable[[Point], list[float]]] = {
        "parameters with embeddings": lambda point: [point.parameters],
        "smallest int8 export, MB": lambda point: [e.megabytes for e in point.exports.values()],
        "one sentence on one thread, ms": lambda point: [
            median(export.milliseconds) for export in point.exports.values()
        ],
    }
    figure = Figure(figsize=(16, 6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (label, costs) in zip(all_axes, panels.items(), strict=True):
        for number, family in enumerate(dict.fromkeys(families.values())):
            own = [point for system, point in points.items() if families[system] == family]
            placed = sorted((min(costs(each)), mean(each.bleu)) for each in own if costs(each))
            marker = "os^vDPX"[number % 7]  # colours come again after ten
            style = "--" if "taught" in family else "-"
            axes.plot(
                [x for x, _ in placed],
                [y for _, y in placed],
                label=family,
                marker=marker,
                linestyle=style,
            )
        axes.set(xscale="log", xlabel=label)
        axes.grid(alpha=0.3, which="both")
    test = translation_of(next(iter(points.values())).runs[0]).data.test
    all_axes[0].set(ylabel=f"BLEU, {test.name}")
    all_axes[0].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})
