"""How a translation model is validated while it trains: loss and BLEU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from data_prep.batch_plan import BatchPlan, Indices
from data_prep.corpora import read_lines
from data_prep.vocabulary import load_vocabularies
from pipeline.ranks import gather_shares, share_of
from pipeline.training.trainer import Trainer
from pipeline.training.validation import Interruption, Stopped, sum_over
from pipeline.translation.batches import PairBatch, collate
from pipeline.translation.run_model import load_first_levels, model_for
from pipeline.translation.scores import bleu
from pipeline.translation.serving import batches_by_length
from pipeline.translation.translator import Translator
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    from pipeline.translation.task import TranslationTask


def perplexity(loss: float) -> float:
    """Return e to the cross-entropy (nats), with an end to how large it gets."""
    return math.exp(min(loss, 50.0)) if loss == loss else loss


def valid_metrics(
    task: TranslationTask, trainer: Trainer[PairBatch], interruption: Interruption
) -> dict[str, float]:
    """Return `valid_loss`, the cross-entropy per target token (nats), and its perplexity.

    :raises Stopped: on every rank, when a signal has come to one.
    """
    budget, lengths = task.recipe.training.micro_batch, task.valid_pairs.lengths()
    plan = BatchPlan(*lengths, max_tokens=budget, micro_batch_tokens=None, seed=0)

    def measure(pairs: Indices) -> Tensor:
        batch = collate(task.valid_pairs, pairs, trainer.device)
        loss: Tensor = trainer.engine(*batch)
        return loss[None]

    (total,) = sum_over(plan, trainer, interruption, measure)
    loss = total / int(lengths[1].sum())
    return {"valid_loss": loss, "valid_ppl": perplexity(loss)}


def valid_bleu(
    task: TranslationTask, trainer: Trainer[PairBatch], interruption: Interruption
) -> dict[str, float]:
    """Return `valid_bleu`, the BLEU of the validation set, which the ranks translate together.

    :raises Stopped: on every rank, when a signal has come to one.
    """
    sources, references = _valid_lines(task.recipe)
    translator = _translator(task, trainer)
    share = share_of(sources, trainer.rank, trainer.world_size)
    try:
        translations = translator.translate(
            sources[share], lambda count: interruption.here(), first_line=share.start + 1
        )
    except Stopped:
        translations = []
    interruption.agree()
    hypotheses = gather_shares(translations)
    score = bleu(hypotheses, [references], task.recipe.data.target_lang).score
    return {"valid_bleu": round(score, 2)}


def rehearse_bleu(task: TranslationTask, trainer: Trainer[PairBatch]) -> None:
    """Translate the longest validation sentences that go together in a batch."""
    sources, _ = _valid_lines(task.recipe)
    translator = _translator(task, trainer)
    encoded = translator.source_vocabulary.encode(sources)
    lengths = {number: len(ids) for number, ids in enumerate(encoded)}
    longest = next(batches_by_length(lengths, translator.search))
    translator.translate([sources[number] for number in longest])


def _valid_lines(recipe: TranslationRecipe) -> tuple[list[str], list[str]]:
    source, target = (
        list(read_lines(recipe.clean_text / f"valid.{language}"))
        for language in recipe.data.languages
    )
    return source, target


def _translator(task: TranslationTask, trainer: Trainer[PairBatch]) -> Translator:
    """Return a translator with a whole copy of the model that is trained: with ZeRO-3's weights,
    which are partitioned, ranks that decode different numbers of steps would deadlock."""
    recipe, vocabularies = task.recipe, load_vocabularies(task.recipe.shards)
    model = model_for(recipe.evaluated_model, vocabularies)  # which is what `evaluate` scores
    load_first_levels(model, trainer.full_weights())
    return Translator([model], vocabularies, recipe.evaluation, recipe.data.max_tokens_per_side)
