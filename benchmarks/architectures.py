"""Measure what architectures and level signals are worth: BLEU on Multi30k by core parameters.

    python -m benchmarks.architectures --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every run is `./run.sh --config recipes/multi30k_de_en.yaml` with a seed and the overrides of
`SYSTEMS`, and any others that are given with a `--run_dir` (`--training.max_steps 100`). What has
been trained is not trained again. Then all systems train and translate in turns, on one thread and
in one process, to be timed. The program prints the tables of docs/results.md and draws its picture.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.rounds import create_parser, measure, print_table, ratios, three_digits
from benchmarks.runs import Run, draw, in_parallel, mean_and_deviation, plan_runs
from benchmarks.train_step import loss_of, steps_of
from data_prep.batch_plan import BatchPlan
from data_prep.shards import ShardReader
from data_prep.text import PAD_IDX
from models.factory import abstract_model, create_model
from models.stack import ParameterCounts
from pipeline.checkpoints.weights import checkpoints_to_average
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


# ── Scores ──────────────────────────────────────────────────────────────────────────────────────


def translation_of(run: Run) -> TranslationRecipe:
    """Return the recipe of a run."""
    recipe = run.recipe
    assert isinstance(recipe, TranslationRecipe)
    return recipe


def counts_of(recipe: TranslationRecipe) -> ParameterCounts:
    """Return how many parameters the model has."""
    size = recipe.data.vocabulary.size
    return abstract_model(recipe.model, (size, size)).parameter_counts


def report_scores(systems: Mapping[str, Sequence[Run]]) -> None:
    """Print the table of scores.

    :param systems: the runs of each system.
    """
    reference = counts_of(translation_of(systems[REFERENCE][0])).core
    rows = []
    for system, runs in systems.items():
        parameters = counts_of(translation_of(runs[0])).core
        share = f"{parameters / reference:.3f}"
        scores = [run.scores for run in runs]
        bleu, chrf = ([each[key] for each in scores] for key in ("bleu", "chrf"))
        seeds = ", ".join(f"{value:.2f}" for value in bleu)
        rate = f"{translation_of(runs[0]).training.learning_rate:g}"
        rows.append(
            (
                system,
                f"{parameters:,}",
                share,
                rate,
                mean_and_deviation(bleu),
                mean_and_deviation(chrf),
                seeds,
            )
        )
    sizes = "core parameters", f"over {REFERENCE}"
    header = ("system", *sizes, "learning rate", "BLEU", "chrF2", "BLEU by seed")
    print_table("Mean ± standard deviation over seeds, beam 4", header, rows)


# ── Speed ───────────────────────────────────────────────────────────────────────────────────────


def training_steps(run: Run) -> tuple[Callable[[], None], int]:
    """Return a function that trains on the first batches of an epoch, and their target tokens."""
    recipe = translation_of(run)
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
    recipe = translation_of(run)
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
    arguments, _, runs = plan_runs(parser, RECIPE, SYSTEMS, REFERENCE, "bleu")
    in_parallel(Run.train, runs, arguments.jobs)
    systems = {run.system: [r for r in runs if r.system == run.system] for run in runs}
    report_scores(systems)
    sizes = {system: counts_of(translation_of(runs[0])).core for system, runs in systems.items()}
    title = "Multi30k De→En, test_2016_flickr: each seed, and the mean"
    scores = {system: [run.scores["bleu"] for run in own] for system, own in systems.items()}
    draw(scores, sizes, title, "BLEU", arguments.picture)
    if arguments.rounds:
        report_speed(systems, arguments.rounds)


if __name__ == "__main__":
    main()
