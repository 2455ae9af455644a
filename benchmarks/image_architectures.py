"""Measure what architectures and level signals are worth: accuracy on Fashion-MNIST by parameters.

    python -m benchmarks.image_architectures --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every run is `./run.sh --config recipes/fashion_mnist.yaml` with a seed and the overrides of
`SYSTEMS`, and any others that are given with a `--run_dir` (`--training.max_steps 100`). What has
been measured is in the file `--record` and is not measured again. The program prints the table of
docs/results.md, of all that is on record, and draws its picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from benchmarks.record import ImageTraining, Record, Settings
from benchmarks.rounds import create_parser, print_table
from benchmarks.runs import (
    Run,
    draw,
    in_parallel,
    mean_and_deviation,
    p_over_seeds,
    plan_runs,
)
from models.count import Counts, count_classifier
from models.image_classifier import ImageShape
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe

RECIPE = ROOT / "recipes" / "fashion_mnist.yaml"
VIT = {"model.architecture": "transformer"}
SMALL = {"model.model_dim": "72", "model.ffn_inner_dim": "144"}
SYSTEMS = {  # each at the learning rate that suits it, by validation
    "RingFormer": {},
    "ViT": {**VIT, "training.learning_rate": "7.5e-4"},
    "ViT of the ring's size": {**VIT, **SMALL, "training.learning_rate": "3e-3"},
    "Universal Transformer": {"model.architecture": "universal"},
    "One-Wide-FFN": {"model.architecture": "one_wide_ffn"},
    "RingFormer, signals on attention only": {"model.level_signals": "attention"},
    "RingFormer, signals on the FFN only": {"model.level_signals": "ffn"},
    "RingFormer, static signals": {"model.level_signals": "static"},
    "RingFormer, no signals": {"model.level_signals": "none"},
}
RING, REFERENCE = "RingFormer", "ViT"


def recipe_of(record: Record, system: str) -> ClassificationRecipe:
    """Return the recipe of a system on record."""
    (settings,) = record.all(Settings)
    keys = {**SYSTEMS[system], **settings.overrides}
    return load_recipe(RECIPE, list(keys.items()), kind=ClassificationRecipe)


def counts_of(recipe: ClassificationRecipe) -> Counts:
    """Return the parameters and operations of a recipe's model."""
    shape = ImageShape(recipe.data.channels, recipe.data.image_size)
    assert recipe.data.classes is not None
    return count_classifier(recipe.model, shape, len(recipe.data.classes))


def trainings_of(record: Record, system: str) -> list[ImageTraining]:
    """Return what is on record of a system, in the order of seeds.

    :raises SystemExit: a system of that name was another.
    """
    found = [each for each in record.all(ImageTraining) if each.system == system]
    for each in found:
        if each.keys != SYSTEMS[system]:
            raise SystemExit(f"{record.path}: {system} was {each.keys}, now {SYSTEMS[system]}")
    return sorted(found, key=lambda each: each.seed)


def train(run: Run, record: Record) -> None:
    """Train and evaluate, unless that is on record."""
    if run.seed in {each.seed for each in trainings_of(record, run.system)}:
        return
    run.train()
    keys, accuracy = SYSTEMS[run.system], run.scores["accuracy"]
    record.add(ImageTraining(system=run.system, seed=run.seed, keys=keys, accuracy=accuracy))


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[str, str]:
    """Return how far scores are above others with the same seeds, and how likely by chance."""
    seeds = ours.keys() & theirs.keys()
    mine, other = ([scores[seed] for seed in seeds] for scores in (ours, theirs))
    if not seeds:
        return "", ""
    return f"{mean(mine) - mean(other):+.2f}", p_over_seeds(mine, other, digits=2)


def report(record: Record, picture: Path | None = None) -> None:
    """Print the table of what is on record.

    :param picture: where it is drawn.
    """
    found = {system: trainings_of(record, system) for system in SYSTEMS}
    scores = {system: {t.seed: t.accuracy for t in own} for system, own in found.items() if own}
    recipes = {system: recipe_of(record, system) for system in scores}
    counts = {system: counts_of(recipe) for system, recipe in recipes.items()}
    rows = []
    for system, by_seed in scores.items():
        own = counts[system]
        share = f"{own.core / counts[REFERENCE].core:.3f}" if REFERENCE in counts else ""
        rate = f"{recipes[system].training.learning_rate:g}"
        sizes = f"{own.core:,}", share, f"{own.flops / 1e6:.1f}", rate
        accuracy = list(by_seed.values())
        said = mean_and_deviation(accuracy), ", ".join(f"{value:.2f}" for value in accuracy)
        beside = ("", "") if system == RING else compare(by_seed, scores.get(RING, {}))
        rows.append((system, *sizes, *said, *beside))
    header = (
        "system", "core parameters", f"over {REFERENCE}", "MFLOPs an image", "learning rate",
        "accuracy, %", "by seed", f"over {RING}", "p (Welch, over seeds)",
    )  # fmt: skip
    print_table("Mean ± standard deviation over seeds", header, rows)
    if picture:
        sizes_of = {system: own.core for system, own in counts.items()}
        title = "Fashion-MNIST, 10,000 test images: each seed, and the mean"
        accuracies = {system: list(by_seed.values()) for system, by_seed in scores.items()}
        draw(accuracies, sizes_of, title, "accuracy, %", picture)


def main() -> None:
    """Train what is not on record, and print the table."""
    parser = create_parser(__doc__)
    parser.add_argument("--record", type=Path, help="[RUN_DIR/images.jsonl]")
    arguments, given, runs = plan_runs(parser, RECIPE, SYSTEMS, REFERENCE, "accuracy")
    shown = {key: value for key, value in given.items() if key != "data.root"}
    record_file = arguments.record or arguments.run_dir / "images.jsonl"
    record = Record(record_file, Settings(recipe=RECIPE.name, overrides=shown))
    in_parallel(lambda run: train(run, record), runs, arguments.jobs)
    report(record, arguments.picture)


if __name__ == "__main__":
    main()
