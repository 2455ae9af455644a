"""Measure what a model of a given size, file or speed is worth: BLEU by family.

    python -m benchmarks.frontier --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every model is `./run.sh --config recipes/multi30k_de_en.yaml`, or another `--recipe` with one
corpus to train on, with a seed, the overrides of `SYSTEMS` and `COMMON`, and any others that are
given with a `--run_dir`. The learning rate is that of `RATES` with the lowest validation loss after
a third of the steps: they are tried in turn until one is worse than the last.
Students learn from the translations of `TEACHER`. What carries one of `CLAIMS` is trained with all
seeds, the rest with the first. Then every model is exported in int8, in each format that takes it,
and the exports translate in turns, a sentence at a time on one thread; not so with `--rounds 0`.
What has been trained is not trained again. The program prints tables and draws a picture.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.architectures import translation_of
from benchmarks.frontier_report import Claim, draw, exported, measure_all, report, report_claims
from benchmarks.rounds import create_parser, progress
from benchmarks.runs import Run, in_parallel, read_arguments, slug
from data_prep.corpora import read_lines
from data_prep.files import write_atomically
from pipeline.command_line import load_recipe
from pipeline.recipe import ROOT

RECIPE = ROOT / "recipes" / "multi30k_de_en.yaml"
COMMON = {
    "training.max_steps": "9000",
    "training.warmup_steps": "1000",  # with 400 a rate that is good for 1,500 steps can fail later
    "training.deepspeed_config": "ds_configs/zero1_bf16.json",  # BLEU is as in float32, sooner
}
RATES = "1e-3", "2e-3", "4e-3", "8e-3"


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
    Claim("RingFormer 96, 6-2", "RingFormer 96"),
    Claim("RingFormer 96, 12-2", "RingFormer 96, 6-2"),
)
CLAIMED = {system for claim in CLAIMS for system in claim}
REFERENCE = "Transformer 96"


class Trainings:
    """The trainings of systems in one folder, each with the learning rate that suits it."""

    def __init__(
        self, recipe_file: Path, folder: Path, seeds: Sequence[int], given: Mapping[str, str]
    ) -> None:
        """
        :param given: overrides for all.
        """
        self.recipe_file, self.folder, self.seeds = recipe_file, folder, seeds
        self.common = {**COMMON, **given}
        data = load_recipe(recipe_file, list(self.common.items())).data
        if len(data.train) > 1:
            raise SystemExit(f"{recipe_file}: data.train must be one corpus, which is taught anew")
        self.source = data.train[0].files["source"]
        self.lesson = folder / f"taught.{data.target_lang}"  # the teacher's translations

    def trials(self, system: str) -> list[Run]:
        """Return the short trainings that a system's learning rate is chosen by."""
        steps = str(int(self.common["training.max_steps"]) // 3)
        shorter = {"training.max_steps": steps}
        return [self._run(system, self.seeds[0], rate, "rates", shorter) for rate in RATES]

    def runs(self, system: str) -> list[Run]:
        """Return a system's trainings, once its learning rate has been looked for."""
        trials = self.trials(SYSTEMS[system].rate_of or system)
        tried = (trial for trial in trials if trial.valid_losses)
        best = min(tried, key=lambda trial: trial.valid_loss)
        rate = best.overrides["training.learning_rate"]
        data = {}
        if SYSTEMS[system].student:
            data["data.train"] = f"[{{name: taught, source: {self.source}, target: {self.lesson}}}]"
        seeds = self.seeds if system in CLAIMED else self.seeds[:1]
        return [self._run(system, seed, rate, "", data) for seed in seeds]

    def teach(self) -> None:
        """Translate the training text by the first teacher, unless that is done."""
        if self.lesson.exists():
            return
        teacher = self.runs(TEACHER)[0]
        model = exported(teacher, "ctranslate2")
        progress(f"{TEACHER} translates the training text")
        command = [str(ROOT / "run.sh"), "translate", "--model", str(model)]
        source = translation_of(teacher).data.root / self.source
        text = "".join(f"{line}\n" for line in read_lines(source)).encode()
        done = subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True)
        write_atomically(self.lesson, done.stdout)

    def _run(self, system: str, seed: int, rate: str, place: str, others: Mapping[str, str]) -> Run:
        overrides = {
            **self.common,
            "training.seed": str(seed),
            "training.learning_rate": rate,
            **SYSTEMS[system].keys,
            **others,
        }
        run_dir = self.folder / place / "-".join([slug(system), rate, str(seed)])
        return Run(system, seed, self.recipe_file, run_dir, overrides, "bleu")


def try_rates(trials: Iterable[Run]) -> None:
    """Prepare and train, without an evaluation, until one is worse than the last."""
    last = math.inf
    for trial in trials:
        trial.execute("prepare")
        trial.execute("train")
        loss = trial.valid_loss
        progress(f"{trial.run_dir.name}: validation loss {loss:.3f}")
        if loss > last:
            return
        last = loss


def main() -> None:
    """Train what is not trained yet, and print the tables."""
    parser = create_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help=f"[{RECIPE.name}]")
    arguments, given = read_arguments(parser, SYSTEMS)
    trainings = Trainings(arguments.recipe, arguments.run_dir, arguments.seeds, given)
    chosen = list(dict.fromkeys([REFERENCE, *(arguments.only or SYSTEMS)]))
    students = [system for system in chosen if SYSTEMS[system].student]
    if students and TEACHER not in chosen:
        chosen.append(TEACHER)
    tried = dict.fromkeys(SYSTEMS[system].rate_of or system for system in chosen)
    in_parallel(try_rates, map(trainings.trials, tried), arguments.jobs)

    def train(systems: Sequence[str]) -> dict[str, list[Run]]:
        runs = {system: trainings.runs(system) for system in systems}
        in_order = sorted((run for each in runs.values() for run in each), key=seed_of)
        in_parallel(Run.train, in_order, arguments.jobs)
        return runs

    runs = train([system for system in chosen if system not in students])
    if students:
        trainings.teach()
        runs |= train(students)
    points = measure_all(runs, arguments.rounds)
    report(points, REFERENCE)
    report_claims(points, CLAIMS)
    families = {system: SYSTEMS[system].family for system in points}
    draw(points, families, arguments.picture)


def seed_of(run: Run) -> int:
    """Return the seed: all systems are trained with the first one, then with the next."""
    return run.seed


if __name__ == "__main__":
    main()
