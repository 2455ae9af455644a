"""The model card: what a model was made from, how well it translates, and what it is not for.

It is Markdown with the YAML header that model hubs read. It depends on the run alone: the same run
gives the same card.
"""

# What needs torch is imported where the model is described: `evaluate` uses this file in any case.

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML

from data_prep.stage import read_manifest
from data_prep.vocabulary import load_vocabularies
from pipeline.checkpoints.folder import Checkpoint
from pipeline.checkpoints.trained_with import as_trained
from pipeline.evaluation.result import Scores
from pipeline.evaluation.translations import scores_of, table_of
from pipeline.markdown import markdown_table
from pipeline.publishing.shortlist import has_large_vocabulary
from pipeline.recipe import Recipe
from pipeline.tracking.note import spaced
from pipeline.translation_recipe import TranslationRecipe


def model_card(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> str:
    """Return the model card of a run.

    :param checkpoints: the model is the average of these.
    """
    recipe = as_trained(recipe, checkpoints[-1])
    scores = scores_of(recipe, checkpoints)
    languages = f"{recipe.data.source_lang} → {recipe.data.target_lang}"
    parts = [
        yaml_header(_head(recipe, scores)),
        f"# {recipe.run_dir.absolute().name}: {recipe.model.architecture}, {languages}",
        _model_section(recipe),
        _data_section(recipe),
        _training_section(recipe, checkpoints),
        _evaluation_section(scores),
        _limits_section(recipe),
    ]
    return "\n\n".join(parts) + "\n"


def as_text(card: str) -> str:
    """Return a model card as MLflow's registry shows it: without the YAML header, which would be
    text, and with a title that reads well in a list of models, where Markdown is text."""
    header, end, text = card.partition("\n---\n")
    text = text.lstrip() if end and header.startswith("---\n") else card
    return spaced(text.removeprefix("# "))


def _head(recipe: TranslationRecipe, scores: Sequence[Scores]) -> dict[str, Any]:
    """Return languages, tags and scores in the form that model hubs read."""
    head: dict[str, Any] = {
        "language": list(recipe.data.languages),
        "tags": ["translation", recipe.model.architecture],
        "metrics": ["bleu", "chrf", "ter"],
    }
    if scores:
        found = [
            {  # no object twice, or YAML would have anchors
                "task": {"type": "translation", "name": "Translation"},
                "dataset": {"type": each["test_set"], "name": each["test_set"]},
                "metrics": [{"type": key, "value": each[key]} for key in ("bleu", "chrf", "ter")],
            }
            for each in scores
        ]
        head["model-index"] = [{"name": recipe.run_dir.absolute().name, "results": found}]
    return head


def yaml_header(head: dict[str, Any]) -> str:
    """Return the header of a card."""
    text = io.StringIO()
    YAML().dump(head, text)
    return f"---\n{text.getvalue()}---"


def _model_section(recipe: TranslationRecipe) -> str:
    from models.factory import abstract_model

    model = recipe.evaluated_model
    source, target = load_vocabularies(recipe.shards)
    sizes = (source.get_piece_size(), target.get_piece_size())
    counts = abstract_model(model, sizes).parameter_counts
    settings = recipe.data.vocabulary
    kind = settings.type if settings.taken_from is None else "of another model"
    vocabulary_sizes = [f"{size:,}" for size in (sizes if source is not target else sizes[:1])]
    rows = {
        "architecture": model.architecture,
        "width": model.model_dim,
        "attention heads": model.num_heads,
        "feed-forward width": model.ffn_inner_dim,
        "levels in encoder and decoder": f"{model.encoder_levels} and {model.decoder_levels}",
        "parameters": f"{counts.total:,}",
        "of them without embeddings and output projection": f"{counts.core:,}",
        "vocabulary": f"SentencePiece {kind}, {' + '.join(vocabulary_sizes)} tokens",
        "longest input": f"{recipe.data.max_tokens_per_side} tokens; longer ones are split",
    }
    text = ""
    if model.architecture == "ringformer":
        text = (
            "One encoder layer and one decoder layer, each run several times in a ring with "
            "low-rank level signals (RingFormer, arXiv 2502.13181). A CTranslate2 export has the "
            "signals folded into the weights of each level: more numbers, the same output. So has "
            "one for Hugging Face, a MarianMTModel. An ONNX export has the layer once.\n\n"
        )
    if recipe.evaluation.shortlist is not False and has_large_vocabulary(recipe.shards):
        text += (
            "An export with a lexical shortlist translates with those target tokens "
            "only that the training pairs associate with the sentence's own, which is faster and "
            "changes few translations.\n\n"
        )
    return f"## Model\n\n{text}{table(rows)}"


def _data_section(recipe: TranslationRecipe) -> str:
    manifest = read_manifest(recipe.shards)
    if manifest is None:
        return "## Training data\n\nNot recorded in this run's folder."
    rows = []
    for corpus in manifest["corpora"]:
        why = ", ".join(f"{name} {count:,}" for name, count in corpus["dropped"].items() if count)
        numbers = (f"{corpus['read']:,}", f"{corpus['kept']:,}", f"{corpus['weight']:g}")
        rows.append((corpus["corpus"], *numbers, why or "none"))
    corpora = markdown_table(("corpus", "pairs read", "kept", "weight", "dropped by"), rows)
    by_model = [
        f"the {corpus.made_side}s of {corpus.name} (by "
        f"{' and '.join(f'`{path.name}`' for path in corpus.translate_with.models)})"
        for corpus in recipe.data.train
        if corpus.translate_with
    ]
    made = f" A model has made {', '.join(by_model)}." if by_model else ""
    train = manifest["totals"]["train"]
    return (
        f"## Training data\n\n{corpora}\n\n{train['pairs']:,} pairs, "
        f"{train['source_tokens']:,} source and {train['target_tokens']:,} target tokens in "
        f"an epoch; validated on {recipe.data.valid.name}.{made}"
    )


def _training_section(recipe: TranslationRecipe, checkpoints: Sequence[Checkpoint]) -> str:
    training = recipe.training
    rows = {
        **training_rows(recipe, checkpoints),
        "tokens in a batch": f"{training.max_tokens:,}, padding included",
        "dropout, label smoothing": f"{recipe.model.dropout:g}, {training.label_smoothing:g}",
        "seed": training.seed,
    }
    return f"## Training\n\n{table(rows)}"


def training_rows(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return what to say of a training whatever its task: the weights, steps, the optimizer."""
    training, newest = recipe.training, checkpoints[-1]
    weights = ", ".join(checkpoint.tag for checkpoint in checkpoints)
    if len(checkpoints) > 1:
        weights = f"average of {weights}"
    if recipe.evaluation.use_ema:
        weights = f"moving average of {weights}"
    rows = {"weights": weights}
    if base := training.init_from:
        rows["begun from"] = f"the weights of `{base.name}`, whose card says what those have learnt"
    if training.freeze:
        rows["not trained"] = ", ".join(training.freeze)
    return {
        **rows,
        "steps": f"{newest.step:,}",
        "optimizer": f"{training.optimizer}, learning rate {training.learning_rate:g}, "
        f"{training.schedule}, {training.warmup_steps:,} steps of warm-up",
    }


def _evaluation_section(scores: Sequence[Scores]) -> str:
    if not scores:
        return "## Evaluation\n\nNot evaluated yet: `./run.sh evaluate` does, then export again."
    first = scores[0]
    signatures = "\n".join(
        f"- {label}: `{first[f'{name}_signature']}`"
        for name, label in (("bleu", "BLEU"), ("chrf", "chrF2"), ("ter", "TER"))
    )
    return (
        f"## Evaluation\n\n{table_of(scores)}\n\n± is half of the 95% bootstrap interval; "
        f"length penalty {first['length_penalty']:g}. The checkpoints were scored in "
        f"{first['search']['dtype']}; a quantized export, or one with a shortlist, can differ a "
        "little: `./run.sh evaluate --model` scores it. By sacreBLEU, on detokenised text and raw "
        f"references:\n\n{signatures}"
    )


def _limits_section(recipe: TranslationRecipe) -> str:
    source, target = recipe.data.languages
    return (
        "## Limits\n\n"
        f"- It translates {source} to {target} only, a sentence at a time: no context, no markup, "
        "no glossary.\n"
        "- It does well on text like its training data and worse on any other; scores on one test "
        "set say little of another domain.\n"
        "- Names, numbers and negation can come out wrong in fluent text. Have a person read what "
        "matters.\n"
        "- What the corpora hold of bias and error, it has learnt."
    )


def table(rows: dict[str, Any]) -> str:
    """Return a Markdown table of keys and values."""
    return markdown_table(("", ""), rows.items())
