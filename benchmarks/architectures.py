"""Measure what architectures and level signals are worth: BLEU on Multi30k by core parameters.

    python -m benchmarks.architectures --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every run is `./run.sh --config recipes/multi30k_de_en.yaml` with a seed and the overrides of
`SYSTEMS`, and any others that are given with a `--run_dir` (`--training.max_steps 100`). What has
been trained is not trained again. Then all systems train and translate in turns, on one thread and
in one process, to be timed. The program prints the tables of docs/results.md and draws its picture.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.real_batches import loss_of
from benchmarks.rounds import create_parser, measure, print_table, progress, ratios, three_digits
from benchmarks.train_step import steps_of
from data_prep.batch_plan import BatchPlan
from data_prep.files import read_json
from data_prep.shards import ShardReader
from data_prep.vocabulary import PAD_IDX
from models.factory import abstract_model, create_model
from models.seq2seq import core_parameters
from pipeline.checkpoints.weights import checkpoints_to_average
from pipeline.command_line import load_recipe
from pipeline.recipe import ROOT
from pipeline.translation.batches import collate
from pipeline.translation.translator import Translator
from pipeline.translation_recipe import TranslationRecipe

RECIPE = ROOT / "recipes" / "multi30k_de_en.yaml"
SYSTEMS = {
    "RingFormer": {},
    "Transformer": {"model.architecture": "transformer"},
    "Universal Transformer": {"model.architecture": "universal"},
    "One-Wide-FFN": {  # at the recipe's 2e-3 one seed of two learned nothing
        "model.architecture": "one_wide_ffn",
        "training.learning_rate": "1e-3",
    },
    "RingFormer, signals on attention only": {"model.level_signals": "attention"},
    "RingFormer, signals on the FFN only": {"model.level_signals": "ffn"},
    "RingFormer, static signals": {"model.level_signals": "static"},
    "RingFormer, no signals": {"model.level_signals": "none"},
}
REFERENCE = "Transformer"
TIMED_STEPS, TIMED_SENTENCES = 10, 200


@dataclass(frozen=True)
class Run:
    """One system with one seed."""

    system: str
    seed: int
    run_dir: Path
    overrides: Mapping[str, str]

    @property
    def recipe(self) -> TranslationRecipe:
        """Read the recipe with the overrides of this run."""
        return load_recipe(RECIPE, [*self.overrides.items(), ("run_dir", str(self.run_dir))])

    @property
    def scores(self) -> dict[str, float]:
        """Read its scores; they are empty until it has been evaluated."""
        recipe = self.recipe
        path = recipe.run_dir / "evaluation" / recipe.data.test.name / "scores.json"
        scores: dict[str, float] = read_json(path)
        return scores

    def train(self) -> None:
        """Train and evaluate with one thread; the output goes to RUN_DIR.log.

        :raises subprocess.CalledProcessError: the command failed.
        """
        options = [word for key, value in self.overrides.items() for word in (f"--{key}", value)]
        command = [str(ROOT / "run.sh"), "--config", str(RECIPE), "--run_dir", str(self.run_dir)]
        log = self.run_dir.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        progress(f"{self.system}, seed {self.seed}: {log}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as output:
            subprocess.run(
                [*command, *options], check=True, env=environment, stdout=output, stderr=output
            )
        progress(f"{self.system}, seed {self.seed}: BLEU {self.scores['bleu']}")


def runs_of(arguments: argparse.Namespace, given: Mapping[str, str]) -> list[Run]:
    """Return the runs of all systems with the first seed, then with the next.

    :param given: overrides from the command line.
    """
    runs = []
    for seed in arguments.seeds:
        for system in arguments.only or SYSTEMS:
            name = system.lower().replace(",", "").replace(" ", "-")
            overrides = {
                "data.root": str(arguments.data.absolute()),
                "training.seed": str(seed),
                **SYSTEMS[system],
                **given,
            }
            run_dir = arguments.run_dir.absolute() / f"{name}-{seed}"
            runs.append(Run(system, seed, run_dir, overrides))
    return runs


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────


def _mean(values: Sequence[float]) -> str:
    """Return the mean and, of two or more values, the sample's standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def core_parameters_of(recipe: TranslationRecipe) -> int:
    """Return the number of parameters without embeddings and output projection."""
    size = recipe.data.vocabulary.size
    return core_parameters(abstract_model(recipe.model, (size, size)))


def report_scores(systems: Mapping[str, Sequence[Run]]) -> None:
    """Print the table of scores.

    :param systems: the runs of each system.
    """
    reference = core_parameters_of(systems[REFERENCE][0].recipe)
    rows = []
    for system, runs in systems.items():
        parameters = core_parameters_of(runs[0].recipe)
        share = f"{parameters / reference:.3f}"
        scores = [run.scores for run in runs]
        bleu, chrf = ([each[key] for each in scores] for key in ("bleu", "chrf"))
        seeds = ", ".join(f"{value:.2f}" for value in bleu)
        rate = f"{runs[0].recipe.training.learning_rate:g}"
        rows.append((system, f"{parameters:,}", share, rate, _mean(bleu), _mean(chrf), seeds))
    sizes = "core parameters", f"over {REFERENCE}"
    header = ("system", *sizes, "learning rate", "BLEU", "chrF2", "BLEU by seed")
    print_table("Mean ± standard deviation over seeds, beam 4", header, rows)


def draw(systems: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw BLEU by core parameters: a dot for each seed, a diamond for their mean."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (system, runs) in enumerate(systems.items()):
        parameters = core_parameters_of(runs[0].recipe)
        bleu = [run.scores["bleu"] for run in runs]
        color = f"C{number}"
        axes.scatter([parameters] * len(bleu), bleu, color=color, alpha=0.4, s=20)
        axes.scatter(parameters, statistics.mean(bleu), color=color, marker="D", s=60, label=system)
    axes.set(
        xscale="log",
        xlabel="core parameters (without embeddings)",
        ylabel="BLEU",
        title="Multi30k De→En, test_2016_flickr: each seed, and the mean",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


# ── Speed ───────────────────────────────────────────────────────────────────────────────────────


def training_steps(run: Run) -> tuple[Callable[[], None], int]:
    """Return a function that trains on the first batches of an epoch, and their target tokens."""
    recipe = run.recipe
    reader = ShardReader(recipe.run_dir / "shards", "train")
    plan = BatchPlan(
        *reader.lengths(), max_tokens=recipe.training.max_tokens, micro_batch_tokens=None, seed=0
    )
    model = create_model(recipe.model, reader.data.vocabulary.sizes, PAD_IDX).train()
    batches = [plan[step] for step in range(TIMED_STEPS)]
    collated = [collate(reader, b.micro_batches[0], torch.device("cpu")) for b in batches]
    return steps_of(model, list(map(loss_of, collated))), sum(b.target_tokens for b in batches)


def translations(run: Run) -> tuple[Callable[[], object], int]:
    """Return a function that translates the first test sentences, and the output's tokens."""
    recipe = run.recipe
    translator = Translator.of_run(recipe, checkpoints_to_average(recipe))
    text = (recipe.run_dir / "clean" / f"test.{recipe.data.source_lang}").read_text("utf-8")
    sentences = text.split("\n")[:TIMED_SENTENCES]
    token_ids = translator.target_vocabulary.encode(translator.translate(sentences))
    return lambda: translator.translate(sentences), sum(map(len, token_ids))


def report_speed(systems: Mapping[str, Sequence[Run]], rounds: int) -> None:
    """Time the first run of each system, and print the table of speeds."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    steps = {system: training_steps(runs[0]) for system, runs in systems.items()}
    training = measure({name: step for name, (step, _) in steps.items()}, rounds, device)
    texts = {system: translations(runs[0]) for system, runs in systems.items()}
    decoding = measure({name: translate for name, (translate, _) in texts.items()}, rounds, device)
    rows = []
    for system in systems:
        row = [system]
        for seconds, work in ((training, steps), (decoding, texts)):
            # Models end their translations after different numbers of tokens.
            own, reference = (
                [each / work[name][1] for each in seconds[name][1:]] for name in (system, REFERENCE)
            )
            row += [three_digits(1 / statistics.median(own)), ratios(own, reference)]
        sentences = TIMED_SENTENCES / statistics.median(decoding[system][1:])
        rows.append([*row, three_digits(sentences)])
    over = f"time over {REFERENCE}'s"
    rates = "training, target tokens/s", "decoding, output tokens/s"
    header = ("system", rates[0], over, rates[1], over, "decoding, sentences/s")
    print_table("On one thread", header, rows)


def main() -> None:
    """Train what is not trained yet, and print the tables."""
    parser = create_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="data.root")
    parser.add_argument("--run_dir", type=Path, help="[runs/architectures]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--jobs", type=int, default=1, help="trained at the same time")
    parser.add_argument("--picture", type=Path, help="[RUN_DIR/results.png]")
    arguments, rest = parser.parse_known_args()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    overrides = {key.removeprefix("--"): value for key, value in pairs}
    if overrides and not arguments.run_dir:
        parser.error("other recipes need a --run_dir of their own")
    arguments.run_dir = arguments.run_dir or Path("runs/architectures")
    if arguments.only and REFERENCE not in arguments.only:
        arguments.only.append(REFERENCE)
    runs = runs_of(arguments, overrides)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(Run.train, runs))
    systems = {run.system: [r for r in runs if r.system == run.system] for run in runs}
    report_scores(systems)
    draw(systems, arguments.picture or arguments.run_dir / "results.png")
    if arguments.rounds:
        report_speed(systems, arguments.rounds)


if __name__ == "__main__":
    main()
