"""Measure what architectures and level signals are worth: accuracy on Fashion-MNIST by parameters.

    python -m benchmarks.image_architectures --data ../shared/data [--seeds 1 2 3] [--jobs 2]

Every run is `./run.sh --config recipes/fashion_mnist.yaml` with a seed and the overrides of
`SYSTEMS`, and any others that are given with a `--run_dir` (`--training.max_steps 100`). What has
been trained is not trained again. The program prints the table of docs/results.md and draws its
picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rounds import print_table
from benchmarks.runs import Run, draw, mean, train_all
from models.count import Counts, count_classifier
from models.image_classifier import ImageShape
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.recipe import ROOT

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
REFERENCE = "ViT"


def counts_of(run: Run) -> Counts:
    """Return the parameters and operations of a run's model."""
    recipe = run.recipe
    assert isinstance(recipe, ClassificationRecipe)
    shape = ImageShape(recipe.data.channels, recipe.data.image_size)
    assert recipe.data.classes is not None
    return count_classifier(recipe.model, shape, len(recipe.data.classes))


def report_scores(systems: Mapping[str, Sequence[Run]], counts: Mapping[str, Counts]) -> None:
    """Print the table of scores.

    :param systems: the runs of each system.
    """
    reference = counts[REFERENCE]
    rows = []
    for system, runs in systems.items():
        scores = [run.scores for run in runs]
        accuracy, loss = ([each[key] for each in scores] for key in ("accuracy", "loss"))
        own = counts[system]
        sizes = f"{own.core:,}", f"{own.core / reference.core:.3f}", f"{own.parameters:,}"
        work = f"{own.flops / 1e6:.1f}", f"{runs[0].recipe.training.learning_rate:g}"
        seeds = ", ".join(f"{value:.2f}" for value in accuracy)
        rows.append((system, *sizes, *work, mean(accuracy), mean(loss), seeds))
    header = (
        "system", "core parameters", f"over {REFERENCE}", "parameters", "MFLOPs an image",
        "learning rate", "accuracy, %", "cross-entropy", "accuracy by seed",
    )  # fmt: skip
    print_table("Mean ± standard deviation over seeds", header, rows)


def main() -> None:
    """Train what is not trained yet, and print the table."""
    arguments, systems = train_all(__doc__, RECIPE, SYSTEMS, REFERENCE, "accuracy")
    counts = {system: counts_of(runs[0]) for system, runs in systems.items()}
    report_scores(systems, counts)
    sizes = {system: own.core for system, own in counts.items()}
    title = "Fashion-MNIST, 10,000 test images: each seed, and the mean"
    draw(systems, sizes, title, "accuracy, %", arguments.picture)


if __name__ == "__main__":
    main()
