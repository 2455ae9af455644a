"""The card of an image classifier: what it was made from, how well it does, what it is not for.

As that of a translation model it depends on the run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_prep.images.shards import ImagesManifest, read_images_manifest
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.trained_with import as_trained
from pipeline.classification.run_model import parameter_counts
from pipeline.classification_recipe import ClassificationRecipe
from pipeline.evaluation.images import scores_of
from pipeline.evaluation.result import Scores
from pipeline.markdown import markdown_table
from pipeline.publishing.model_card import table, training_rows, yaml_header


def image_card(recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint]) -> str:
    """Return the card of a run.

    :param checkpoints: the model is the average of these.
    """
    recipe = as_trained(recipe, checkpoints[-1])
    scores, data = scores_of(recipe, checkpoints), read_images_manifest(recipe.shards)
    name = recipe.run_dir.absolute().name
    parts = [
        yaml_header(_head(recipe, scores, name)),
        f"# {name}: {recipe.model.architecture}, images of {len(data.classes)} classes",
        _model_section(recipe, data),
        _data_section(data),
        _training_section(recipe, checkpoints),
        _evaluation_section(scores),
        _limits_section(data),
    ]
    return "\n\n".join(parts) + "\n"


def _head(recipe: ClassificationRecipe, scores: Scores, name: str) -> dict[str, Any]:
    """Return tags and scores in the form that model hubs read."""
    head: dict[str, Any] = {
        "tags": ["image-classification", recipe.model.architecture],
        "metrics": ["accuracy"],
    }
    if scores:
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": scores["test_set"], "name": str(scores["test_set"])},
            "metrics": [{"type": "accuracy", "value": scores["accuracy"]}],
        }
        head["model-index"] = [{"name": name, "results": [result]}]
    return head


def _model_section(recipe: ClassificationRecipe, data: ImagesManifest) -> str:
    model = recipe.model
    size, counts = recipe.data.image_size, parameter_counts(recipe, data)
    rows = {
        "architecture": model.architecture,
        "images": f"{size} × {size} pixels, {'grey' if data.channels == 1 else 'RGB'}; others are "
        "scaled, and their middle is cut out",
        "patches": f"{model.patch_size} × {model.patch_size} pixels",
        "width": model.model_dim,
        "attention heads": model.num_heads,
        "feed-forward width": model.ffn_inner_dim,
        "levels": model.num_levels,
        "parameters": f"{counts.total:,}",
        "of them without patches, class token and head": f"{counts.core:,}",
    }
    text = ""
    if model.architecture == "ringformer":
        text = (
            "One encoder layer, run several times in a ring with low-rank level signals "
            "(RingFormer, arXiv 2502.13181).\n\n"
        )
    return f"## Model\n\n{text}{table(rows)}\n\nClasses: {', '.join(data.classes)}."


def _data_section(data: ImagesManifest) -> str:
    rows = []
    for each in data.sets:
        refused, converted = (
            ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
            for counts in (each.refused, each.converted)
        )
        cells = (f"{each.read:,}", f"{each.kept:,}", refused, converted)
        rows.append((each.name, each.split, *cells))
    sets = markdown_table(("images", "split", "read", "kept", "refused", "converted"), rows)
    repeats = data.repeats
    return (
        f"## Training data\n\n{sets}\n\n{data.totals['train'].images:,} "
        f"training images, {data.totals['valid'].images:,} of validation. Of the training images "
        f"{repeats.valid:,} were pixel for pixel one of validation and {repeats.test:,} one of the "
        f"test set; {repeats.dropped:,} were dropped for that."
    )


def _training_section(recipe: ClassificationRecipe, checkpoints: Sequence[Checkpoint]) -> str:
    training = recipe.training
    rows = {
        **training_rows(recipe, checkpoints),
        "images in a batch": f"{training.batch_size:,}",
        "augmentation": ", ".join(each.transform for each in recipe.training.augmentation)
        or "none",
        "dropout, label smoothing": f"{recipe.model.dropout:g}, {training.label_smoothing:g}",
        "seed": training.seed,
    }
    return f"## Training\n\n{table(rows)}"


def _evaluation_section(scores: Scores) -> str:
    if not scores:
        return "## Evaluation\n\nNot evaluated yet: `./run.sh evaluate` does, then export again."
    rows = []
    for name, of_class in scores["by_class"].items():
        shares = (of_class["recall"], of_class["precision"])
        both = ("–" if share is None else f"{share:.1f}%" for share in shares)
        rows.append((name, f"{of_class['images']:,}", *both))
    classes = markdown_table(("class", "images", "recall", "precision"), rows)
    top5 = ""
    if "top5_accuracy" in scores:
        top5 = f"among the first five {scores['top5_accuracy']:.2f}%, "
    return (
        "## Evaluation\n\n"
        f"On {scores['test_set']}, {scores['images']:,} images: accuracy "
        f"**{scores['accuracy']:.2f}%** ({scores['accuracy_low']:.2f} to "
        f"{scores['accuracy_high']:.2f}, Wilson's 95% interval), {top5}cross-entropy "
        f"{scores['loss']:.4f}.\n\n{classes}"
    )


def _limits_section(data: ImagesManifest) -> str:
    return (
        "## Limits\n\n"
        f"- It knows {len(data.classes)} classes, and sees one of them in any image.\n"
        "- It does well on images like those it was trained on; other cameras, backgrounds and "
        "sizes are other images.\n"
        "- Its probabilities are not calibrated. Have a person look at what matters.\n"
        "- What the images hold of bias and error, it has learnt."
    )
