"""Measure what a model of a given size, file or speed is worth: BLEU by family.

    python -m benchmarks.frontier --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every model is `./run.sh --config recipes/multi30k_de_en.yaml`, or another `--recipe` with one
corpus to train on, with a seed, the overrides of `SYSTEMS` and `COMMON`, and any others that are
given with a `--run_dir`. Learning rates are tried with the first seed, uphill from `RATE`. That
with the lowest validation loss is taken; one that does much worse than another is given up early.
Students learn from the translations of `TEACHER`. What carries one of `CLAIMS` is trained with all
seeds, the rest with the first. Then first models are exported in int8, in each format that takes
them, and the exports translate in turns, a sentence at a time on one thread; not so with
`--rounds 0`. What has been measured is in the file `--record` and is not measured again:
`--record docs/frontier.jsonl` goes on with what docs/results.md shows. The program prints tables
and draws a picture.

Another text, by the learning rates that were taken on this one:

    python -m benchmarks.frontier --data data --run_dir runs/mine --jobs 2 --rounds 0 \
        --rates_of docs/frontier.jsonl --only "RingFormer 96" "Transformer 56" \
        --data.train "[{name: mine, source: mine/train.de, target: mine/train.en}]" ...
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from benchmarks.architectures import translation_of
from benchmarks.frontier_export import exported, measure_exports
from benchmarks.frontier_report import Claim, draw, report, report_claims, report_rates
from benchmarks.record import Record, Settings, Training, compared, given_up, measured
from benchmarks.rounds import create_parser, progress
from benchmarks.runs import Run, in_parallel, read_arguments, slug
from data_prep.corpora import read_lines
from data_prep.files import write_atomically
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe

RECIPE = ROOT / "recipes" / "multi30k_de_en.yaml"
COMMON = {
    "training.max_steps": "9000",
    "training.warmup_steps": "1000",  # with 400 a rate that is good for 1,500 steps can fail later
}
RATE, HIGHER, LOWER = "2e-3", ("4e-3", "8e-3"), ("1e-3", "5e-4")
HOPELESS = 0.5  # validation loss above another rate's at the same step, after the warm-up


class System(NamedTuple):
    """A model, and how it is trained."""

    family: str
    """What it is drawn as."""

    keys: Mapping[str, str]
    """Overrides of the recipe."""

    rate_of: str = ""
    """The system whose learning rate it takes; empty: it has its own looked for."""

    student: bool = False
    """Whether it learns from the teacher's translations."""


def sized(dim: int, ffn: int = 4, /, **model: str | int) -> dict[str, str]:
    """Return the overrides for a width and other keys of the section `model`.

    :param ffn: how many times as wide the FFN is.
    """
    keys = {"model_dim": dim, "ffn_inner_dim": ffn * dim, **model}
    return {f"model.{key}": str(value) for key, value in keys.items()}


def family(
    name: str, dims: Sequence[int], shape: str = "", ffn: int = 4, **model: str
) -> dict[str, System]:
    """Return the six-level models of an architecture at some widths.

    :param shape: ends their names.
    """
    return {
        f"{name} {dim}{shape}": System(f"{name}{shape}", sized(dim, ffn, **model)) for dim in dims
    }


def shallow(name: str, dim: int, rate_of: str, **model: str) -> dict[str, System]:
    """Return a model with two decoder levels, at the learning rate of one with six."""
    keys = sized(dim, decoder_levels=2, **model)
    return {f"{name} {dim}, 6-2": System(f"{name} 6-2", keys, rate_of)}


SYSTEMS = {
    **family("RingFormer", (48, 96, 208)),
    **family("Transformer", (32, 56, 96, 108, 208), architecture="transformer"),
    **family("Universal Transformer", (96, 208), architecture="universal"),
    **family("RingFormer", (56, 108, 232), ", thin FFN", ffn=2),
    **family("Transformer", (36, 64, 124), ", thin FFN", ffn=2, architecture="transformer"),
    **shallow("RingFormer", 48, "RingFormer 48"),
    **shallow("RingFormer", 96, "RingFormer 96"),
    **shallow("RingFormer", 208, "RingFormer 208"),
    # Of the size of the rings with two decoder levels, and of their width.
    **shallow("Transformer", 36, "Transformer 32", architecture="transformer"),
    **shallow("Transformer", 64, "Transformer 56", architecture="transformer"),
    **shallow("Transformer", 96, "Transformer 96", architecture="transformer"),
    **shallow("Transformer", 128, "Transformer 108", architecture="transformer"),
    "RingFormer 96, 6-1": System("RingFormer 6-1", sized(96, decoder_levels=1), "RingFormer 96"),
    "RingFormer 96, 12-2": System(
        "RingFormer 12-2",
        sized(96, encoder_levels=12, decoder_levels=2, residual_scale=2),
        "RingFormer 96",
    ),
    "RingFormer 96, static signals": System(
        "RingFormer, static signals", sized(96, level_signals="static"), "RingFormer 96"
    ),
    "RingFormer 96, no signals": System(
        "RingFormer, no signals", sized(96, level_signals="none"), "RingFormer 96"
    ),
}
TEACHER = "RingFormer 208"
TAUGHT = (
    "RingFormer 48", "RingFormer 96", "RingFormer 96, 6-2", "RingFormer 96, 6-1",
    "Transformer 56", "Transformer 64, 6-2", "Transformer 96",
)  # fmt: skip
SYSTEMS |= {
    f"{name}, taught": System(
        f"{SYSTEMS[name].family}, taught",
        SYSTEMS[name].keys,
        SYSTEMS[name].rate_of or name,
        student=True,
    )
    for name in TAUGHT
}
CLAIMS = (
    Claim("RingFormer 96", "Transformer 56"),
    Claim("RingFormer 208", "Transformer 108"),
    Claim("RingFormer 48", "Transformer 32"),
    Claim("RingFormer 108, thin FFN", "Transformer 64, thin FFN"),
    Claim("RingFormer 232, thin FFN", "Transformer 124, thin FFN"),
    Claim("RingFormer 96", "Transformer 96"),
    Claim("RingFormer 96, taught", "Transformer 96, taught"),
    Claim("RingFormer 96, taught", "Transformer 96"),
    Claim("RingFormer 96, taught", "Transformer 56, taught"),
    Claim("RingFormer 96, 6-2", "Transformer 64, 6-2"),
    Claim("RingFormer 96, 6-2", "RingFormer 96"),
    Claim("RingFormer 96, 12-2", "RingFormer 96, 6-2"),
    Claim("RingFormer 96, static signals", "RingFormer 96"),
    Claim("RingFormer 96, static signals", "Transformer 56"),
)
CLAIMED = {system for claim in CLAIMS for system in claim}
REFERENCE = "Transformer 96"


class Trainings:
    """The trainings of systems in one folder, each with the learning rate that suits it."""

    def __init__(
        self,
        recipe_file: Path,
        folder: Path,
        seeds: Sequence[int],
        given: Mapping[str, str],
        record_file: Path,
        rates_of: Record | None = None,
    ) -> None:
        """
        :param given: overrides for all.
        :param rates_of: where learning rates were found; None: they are looked for.
        """
        self.recipe_file, self.folder, self.seeds = recipe_file, folder, seeds
        self.rates_of = rates_of
        self.common = {**COMMON, **given}
        data = load_recipe(recipe_file, list(self.common.items())).data
        if len(data.train) > 1:
            raise SystemExit(f"{recipe_file}: data.train must be one corpus, which is taught anew")
        self.source = data.train[0].files["source"]
        self.lesson = folder / f"taught.{data.target_lang}"  # the teacher's translations
        shown = {key: value for key, value in self.common.items() if key != "data.root"}
        self.record = Record(record_file, Settings(recipe=recipe_file.name, overrides=shown))

    def find_rate(self, system: str) -> None:
        """Train with the first seed at one learning rate after the other, while they get better.

        :raises SystemExit: it is to be found on a record that does not have it.
        """
        if self.rates_of:
            found = self.rates_of.trainings(system)
            if not found:
                raise SystemExit(f"{self.rates_of.path}: no training of {system}")
            self._loss_at(system, found[0].learning_rate)
            return
        best = self._loss_at(system, RATE)
        for rates in HIGHER, LOWER:
            begun = best
            for rate in rates:
                loss = self._loss_at(system, rate)
                if loss >= best:
                    break
                best = loss
            if best < begun:
                return

    def runs(self, system: str) -> list[Run]:
        """Return a system's trainings, once its learning rate has been looked for."""
        rate = self.record.trainings(SYSTEMS[system].rate_of or system)[0].learning_rate
        seeds = self.seeds if system in CLAIMED else self.seeds[:1]
        return [self._run(system, seed, rate) for seed in seeds]

    def train(self, run: Run) -> None:
        """Train and evaluate, unless that is on record."""
        if self.record.find(run) is None:
            run.train()
            self.record.add(measured(run))

    def compare(self, claim: Claim) -> None:
        """Compare two systems seed by seed, as far as their translations are here."""
        known = {each.seed for each in self.record.comparisons(*claim)}
        for ours, theirs in zip(*map(self.runs, claim), strict=True):
            if ours.seed not in known and ours.scores and theirs.scores:
                self.record.add(compared(ours, theirs))

    def teach(self) -> None:
        """Translate the training text by the first teacher, unless that is done."""
        if self.lesson.exists():
            return
        teacher = self.runs(TEACHER)[0]
        teacher.train()  # it may have been measured elsewhere
        model = exported(teacher, "ctranslate2")
        progress(f"{TEACHER} translates the training text")
        command = [str(ROOT / "run.sh"), "translate", "--model", str(model)]
        source = translation_of(teacher).data.root / self.source
        text = "".join(f"{line}\n" for line in read_lines(source)).encode()
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True)
        write_atomically(self.lesson, done.stdout)

    def _run(self, system: str, seed: int, rate: str) -> Run:
        overrides = {
            **self.common,
            "training.seed": str(seed),
            "training.learning_rate": rate,
            **SYSTEMS[system].keys,
        }
        if SYSTEMS[system].student:
            corpus = f"{{name: taught, source: {self.source}, target: {self.lesson}}}"
            overrides["data.train"] = f"[{corpus}]"
        run_dir = self.folder / "-".join([slug(system), rate, str(seed)])
        return Run(system, seed, self.recipe_file, run_dir, overrides, "bleu")

    def _loss_at(self, system: str, rate: str) -> float:
        """Return the validation loss with the first seed; infinity: it was given up."""
        run = self._run(system, self.seeds[0], rate)
        attempt = self.record.find(run)
        if attempt is None:
            best = self.record.trainings(system)
            finished = run.train(lambda: bool(best) and self._is_hopeless(run, best[0]))
            attempt = measured(run) if finished else given_up(run)
            self.record.add(attempt)
        return attempt.valid_loss if isinstance(attempt, Training) else math.inf

    def _is_hopeless(self, run: Run, best: Training) -> bool:
        warmup = int(self.common["training.warmup_steps"])
        return any(
            step > warmup and loss > best.valid_losses.get(step, math.inf) + HOPELESS
            for step, loss in run.valid_losses.items()
        )


def measure(trainings: Trainings, systems: Sequence[str], jobs: int, rounds: int) -> None:
    """Train what is not on record, compare it and export it.

    :param jobs: trained at the same time.
    :param rounds: of timing the exports; 0: there are none.
    """
    students = [system for system in systems if SYSTEMS[system].student]
    needed = [*([REFERENCE] if rounds else []), *([TEACHER] if students else []), *systems]
    systems = list(dict.fromkeys(needed))
    searched = dict.fromkeys(SYSTEMS[system].rate_of or system for system in systems)
    in_parallel(trainings.find_rate, searched, jobs)

    def train(some: Sequence[str]) -> None:
        runs = [run for system in some for run in trainings.runs(system)]
        # All systems with one seed, then with the next.
        in_parallel(trainings.train, sorted(runs, key=attrgetter("seed")), jobs)

    train([system for system in systems if system not in students])
    if students:
        trainings.teach()
        train(students)
    for claim in CLAIMS:
        if {*claim} <= {*systems}:
            trainings.compare(claim)
    if rounds:
        first = {system: trainings.runs(system)[0] for system in systems}
        measure_exports(trainings.record, first, REFERENCE, rounds)


def main() -> None:
    """Measure what is not on record, and print the tables."""
    parser = create_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"[{RECIPE.name}]")
    parser.add_argument("--record", type=Path, help="[RUN_DIR/frontier.jsonl]")
    parser.add_argument("--rates_of", type=Path, metavar="RECORD", help="with learning rates")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the record")
    arguments, given = read_arguments(parser, SYSTEMS)
    record_file = arguments.record or arguments.run_dir / "frontier.jsonl"
    if arguments.report:
        record = Record(record_file)
    else:
        rates_of = Record(arguments.rates_of) if arguments.rates_of else None
        trainings = Trainings(
            arguments.recipe, arguments.run_dir, arguments.seeds, given, record_file, rates_of
        )
        measure(trainings, arguments.only or list(SYSTEMS), arguments.jobs, arguments.rounds)
        record = trainings.record
    families = {system: each.family for system, each in SYSTEMS.items()}
    report(record, SYSTEMS, REFERENCE)
    report_rates(record, SYSTEMS)
    report_claims(record, CLAIMS)
    draw(record, families, REFERENCE, arguments.picture)


if __name__ == "__main__":
    main()
