"""Training many systems with many seeds, each as users do: what has been trained is not again."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from benchmarks.rounds import progress
from data_prep.files import read_json
from pipeline.checkpoints.trained_with import LEARNT_WITH, changed_keys, newest_checkpoint
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import ROOT, Recipe, slug_of
from pipeline.recipe_file import load_recipe
from pipeline.tracking.tracker import history_of
from pipeline.translation_recipe import TranslationRecipe

T = TypeVar("T")
ASK_EVERY = 20  # seconds between two questions whether to give a training up

Systems = Mapping[str, Mapping[str, str]]
"""Overrides of a recipe, by the name of the system that they make of it."""


def never() -> bool:
    """Return False."""
    return False


@dataclass(frozen=True)
class Run:
    """One system with one seed."""

    system: str
    seed: int
    recipe_file: Path
    run_dir: Path
    overrides: Mapping[str, str]
    score: str
    """Key of scores.json that counts."""

    variant: str = ""
    """Whose scores: those of the run's checkpoints, or `--FOLDER` of an export."""

    @property
    def log(self) -> Path:
        """Return the file that the output of its commands goes to."""
        return self.run_dir.with_suffix(".log")

    @property
    def recipe(self) -> Recipe:
        """Read the recipe with the overrides of this run."""
        overrides = [*self.overrides.items(), ("run_dir", str(self.run_dir))]
        return load_recipe(self.recipe_file, overrides, kind=Recipe)

    @property
    def scores(self) -> dict[str, Any]:
        """Read its scores on the recipe's test set; they are empty until it has been evaluated."""
        recipe = self.recipe
        assert isinstance(recipe, TranslationRecipe | ClassificationRecipe)
        name = f"{slug_of(recipe.data.test.name)}{self.variant}"
        return read_json(recipe.run_dir / "evaluation" / name / "scores.json")

    @property
    def valid_losses(self) -> Mapping[int, float]:
        """Return the validation losses of its training by step; none until it has trained."""
        return history_of(self.recipe).get("valid_loss", {})

    def command(self, command: str, *more: str) -> list[str]:
        """Return the words of a command of run.sh on this run."""
        options = [word for key, value in self.overrides.items() for word in (f"--{key}", value)]
        start = [str(ROOT / "run.sh"), command, "--config", str(self.recipe_file)]
        return [*start, "--run_dir", str(self.run_dir), *options, *more]

    def execute(self, command: str, *more: str, give_up: Callable[[], bool] = never) -> bool:
        """Run a command of run.sh with one thread; the output goes to `log`.

        :param give_up: is asked now and then whether to stop.
        :returns: whether it came to its end.
        :raises subprocess.CalledProcessError: it failed.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words = self.command(command, *more)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        stopped = False
        with (
            self.log.open("a") as output,
            subprocess.Popen(words, env=environment, stdout=output, stderr=output) as process,
        ):
            while process.returncode is None:
                try:
                    process.wait(ASK_EVERY)
                except subprocess.TimeoutExpired:
                    if not stopped and give_up():
                        process.terminate()
                        stopped = True
        if process.returncode and not stopped:
            raise subprocess.CalledProcessError(process.returncode, words)
        return not stopped

    def train(self, give_up: Callable[[], bool] = never) -> bool:
        """Prepare, train and evaluate; what has been done is not done again.

        :param give_up: is asked now and then whether to stop.
        :returns: whether it came to its end.
        :raises SystemExit: the command failed, or has trained with other keys before.
        """
        progress(f"{self.system}, seed {self.seed}: {self.log}")
        self.refuse_other_keys()
        try:
            finished = self.execute("all", give_up=give_up)
        except subprocess.CalledProcessError as error:
            said = f"{self.system}, seed {self.seed}: exit code {error.returncode}"
            raise SystemExit(f"{said}; {self.log} says why at its end") from error
        said = f"{self.score} {self.scores[self.score]}" if finished else "given up"
        progress(f"{self.system}, seed {self.seed}: {said}")
        return finished

    def refuse_other_keys(self) -> None:
        """Check that what there is of its training is of its recipe's keys.

        :raises SystemExit: it is not.
        """
        newest = newest_checkpoint(self.recipe)
        if newest and (changed := changed_keys(self.recipe.training, newest, LEARNT_WITH)):
            raise SystemExit(
                f"{self.run_dir} was trained with other values of {', '.join(changed)}; move it "
                "away, or choose another --run_dir"
            )


def read_arguments(
    parser: argparse.ArgumentParser, systems: Iterable[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Read the command line of a benchmark that trains systems.

    :param parser: has a `recipe`.
    :returns: the arguments, and the recipe's keys that were given, `data.root` among them.
    """
    parser.add_argument("--data", type=Path, default=Path("data"), help="data.root")
    parser.add_argument("--run_dir", type=Path, help="[runs/RECIPE-systems]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=systems, metavar="SYSTEM")
    parser.add_argument("--jobs", type=int, default=1, help="trained at the same time")
    parser.add_argument("--picture", type=Path, help="[RUN_DIR/results.png]")
    arguments, rest = parser.parse_known_args()
    words = [part for word in rest for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        parser.error(f"expected --SECTION.KEY VALUE, again and again, not {' '.join(rest)}")
    given = {
        key.removeprefix("--"): text for key, text in zip(words[::2], words[1::2], strict=True)
    }
    if given and not arguments.run_dir:
        parser.error("other recipes need a --run_dir of their own")
    folder = arguments.run_dir or Path("runs", f"{arguments.recipe.stem}-systems")
    arguments.run_dir = folder.absolute()
    arguments.picture = arguments.picture or folder / "results.png"
    return arguments, {"data.root": str(arguments.data.absolute()), **given}


def slug(system: str) -> str:
    """Return a system's name as one for a folder."""
    return system.lower().replace(",", "").replace(" ", "-")


def plan_runs(
    parser: argparse.ArgumentParser,
    recipe_file: Path,
    systems: Systems,
    reference: str,
    score: str,
) -> tuple[argparse.Namespace, dict[str, str], list[Run]]:
    """Read the command line of a benchmark that trains systems with seeds.

    :param reference: the system that is always among them.
    :returns: the arguments, the recipe's keys that were given, and the runs: all with the first
        seed, then with the next.
    """
    parser.set_defaults(recipe=recipe_file)
    arguments, given = read_arguments(parser, systems)
    chosen = list(arguments.only or systems)
    if reference not in chosen:
        chosen.append(reference)
    runs = []
    for seed in arguments.seeds:
        for system in chosen:
            overrides = {"training.seed": str(seed), **systems[system], **given}
            run_dir = arguments.run_dir / f"{slug(system)}-{seed}"
            runs.append(Run(system, seed, recipe_file, run_dir, overrides, score))
    return arguments, given, runs


def in_parallel(do: Callable[[T], object], things: Iterable[T], jobs: int) -> None:
    """Do something with runs, or other things, so many at a time, in their order."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(do, things))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean and, of two or more values, the sample's standard deviation."""
    middle = f"{statistics.mean(values):.2f}"
    return middle if len(values) < 2 else f"{middle} ± {statistics.stdev(values):.2f}"


def p_over_seeds(ours: Sequence[float], theirs: Sequence[float], digits: int) -> str:
    """Return how likely chance alone makes two systems differ so, by Welch's t-test; with a single
    seed nothing."""
    if len(ours) < 2:
        return ""
    return f"{ttest_ind(ours, theirs, equal_var=False).pvalue:.{digits}f}"


def draw(
    scores: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    title: str,
    label: str,
    path: Path,
) -> None:
    """Draw the score by core parameters: a dot for each seed, a diamond for their mean.

    :param scores: of each system, seed by seed.
    :param sizes: the core parameters of each system.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (system, found) in enumerate(scores.items()):
        color = f"C{number}"
        axes.scatter([sizes[system]] * len(found), found, color=color, alpha=0.4, s=20)
        middle = statistics.mean(found)
        axes.scatter(sizes[system], middle, color=color, marker="D", s=60, label=system)
    axes.set(xscale="log", xlabel="core parameters", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
