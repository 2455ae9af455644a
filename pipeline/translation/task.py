"""Translation as a task for the trainer: pairs in, cross-entropy of the target out."""

# Methods import torch and what needs it themselves: that takes seconds, and a command that asks
# whether there are steps left to train needs none of it.

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_prep.batch_plan import BatchPlan, GlobalBatch, Indices, map_lengths
from data_prep.files import DataError, digest_of
from data_prep.identity import check_corpora
from data_prep.shards import ShardReader
from data_prep.stage import read_manifest
from data_prep.taken_vocabulary import check_taken_vocabulary
from data_prep.text import PAD_IDX, vocabulary_files
from pipeline.checkpoints.folder import Criterion
from pipeline.tracking.provenance import DataFacts
from pipeline.training.deepspeed_config import activation_checkpointing
from pipeline.training.initial_weights import load_initial_weights
from pipeline.training.task import Task
from pipeline.translation.run_model import check_base, check_decoder_levels, model_identity
from pipeline.translation.teacher import check_teachers
from pipeline.translation_recipe import TranslationRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.seq2seq import TranslationModel
    from models.stack import ParameterCounts
    from pipeline.training.task import Model
    from pipeline.training.trainer import Trainer
    from pipeline.training.validation import Interruption
    from pipeline.translation.batches import PairBatch

log = logging.getLogger("train")


class TranslationTask(Task["PairBatch"]):
    """Trains a sequence-to-sequence model on the shards of `run_dir`."""

    unit = "tokens"
    target_unit = "target_tokens"
    words: ClassVar[Mapping[str, str]] = {
        **Task.words, "train_ppl": "ppl %.2f", "valid_ppl": "ppl %.2f", "valid_bleu": "BLEU %.2f",
    }  # fmt: skip
    recipe: TranslationRecipe

    @property
    def criterion(self) -> Criterion:
        if self.recipe.training.bleu_every:
            evaluation = self.recipe.evaluation
            search = {**evaluation.search_of_checkpoints, "batch_tokens": None}  # changes nothing
            found_by = digest_of([search, evaluation.decoder_levels])
            return Criterion("valid_bleu", larger_is_better=True, found_by=found_by)
        return Criterion("valid_loss", larger_is_better=False)

    # ── Data ────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def pairs(self) -> ShardReader:
        """Open the training pairs."""
        return ShardReader(self.recipe.shards, "train")

    @cached_property
    def valid_pairs(self) -> ShardReader:
        """Open the validation pairs."""
        return ShardReader(self.recipe.shards, "valid")

    @cached_property
    def plan(self) -> BatchPlan:
        training, folder = self.recipe.training, self.recipe.run_dir / "batch_plan"
        *lengths, digest = map_lengths(self.pairs, folder)
        return BatchPlan(
            *lengths,
            max_tokens=training.max_tokens,
            micro_batch_tokens=training.micro_batch_tokens,
            seed=training.seed,
            cache=(folder, digest),
        )

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        return model_identity(self.recipe)

    def check_recipe(self) -> None:
        check_decoder_levels(self.recipe, self.recipe.training.model_dump())
        check_corpora(self.recipe.data, self.recipe.run_dir)
        check_taken_vocabulary(self.recipe.data, self.recipe.shards)
        check_teachers(self.recipe.data, self.recipe.run_dir)

    def check_base(self, folder: Path) -> None:
        check_base(self.recipe, folder)

    def check_data(self) -> str:
        recipe = self.recipe
        train = ShardReader(recipe.shards, "train", verify=True)
        ShardReader(recipe.shards, "valid", verify=True)
        clean = recipe.clean_text
        if recipe.training.bleu_every and not (clean / f"valid.{recipe.data.source_lang}").exists():
            raise DataError(f"training.bleu_every needs the text in {clean}: run ./run.sh prepare")
        batch, epoch = self.plan.micro_batches_per_step, self.plan.micro_batches_per_epoch
        if batch > epoch:
            log.warning(
                "a global batch has %d micro-batches, and the training text %d: a step sees each "
                "pair %.0f times; with training.max_tokens %d it would see each once",
                batch, epoch, batch / epoch, epoch * recipe.training.micro_batch,
            )  # fmt: skip
        return f"{len(train):,} training pairs"

    def collate(self, examples: Indices, seed: int, device: torch.device) -> PairBatch:
        from pipeline.translation.batches import collate

        return collate(self.pairs, examples, device)

    def units(self, batch: GlobalBatch) -> int:
        return batch.source_tokens + batch.target_tokens

    def data_facts(self) -> DataFacts:
        recipe, data = self.recipe, self.recipe.data
        shards, clean = recipe.shards, recipe.clean_text
        train = "+".join(corpus.name for corpus in data.train)
        manifest = read_manifest(shards)
        files: tuple[Path, ...] = ()
        shape: dict[str, Any] = {}
        if manifest is not None:
            files = (clean / "report.json", clean / "report.png", *vocabulary_files(shards))
            sizes = manifest["vocabulary"]["sizes"]
            shape = {"train": manifest["totals"]["train"], "vocabulary": sizes}
        return DataFacts(
            names={
                "data.train": train,
                "data.valid": data.valid.name,
                "data.test": data.test.name,
                "data.cleaning.filters": ", ".join(each.filter for each in data.cleaning.filters),
            },
            manifest=manifest,
            shape=shape,
            files=files,
            sets=(("training", "train", train), ("validation", "valid", data.valid.name)),
        )

    # ── Model and loss ──────────────────────────────────────────────────────────────────────────

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """Return the sizes of the source and the target vocabulary."""
        return self.pairs.data.vocabulary.sizes

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        from models.factory import abstract_model

        return abstract_model(self.recipe.model, self.vocab_sizes).parameter_counts

    def create_model(self, *, begins: bool = True) -> TranslationModel:
        from models.factory import create_model

        recipe, training = self.recipe, self.recipe.training
        model = create_model(recipe.model, self.vocab_sizes, PAD_IDX)
        if training.init_from and begins:
            self.check_base(training.init_from)
            load_initial_weights(model, training.init_from)
        model.checkpoint_activations(activation_checkpointing(training, recipe.model))
        if training.compile:
            model.compile_layers()
        return model

    def loss(self, model: Model, batch: PairBatch) -> Tensor:
        training, levels = self.recipe.training, None
        if training.random_depth:  # drawn as dropout is: by the micro-batch's place alone
            import torch

            levels = int(torch.randint(self.recipe.model.decoder_levels, ())) + 1
        smoothing = training.label_smoothing
        return model(*batch, label_smoothing=smoothing, decoder_levels=levels)

    def loss_metrics(self, loss: float) -> dict[str, float]:
        from pipeline.translation.validation import perplexity

        return {"train_loss": loss, "train_ppl": perplexity(loss)}

    def dearest(self) -> TranslationTask:
        training = self.recipe.training.model_copy(update={"random_depth": False})
        task = copy(self)  # what it has read of the data is read
        task.recipe = self.recipe.model_copy(update={"training": training})
        return task

    # ── Validation ──────────────────────────────────────────────────────────────────────────────

    def rehearse_validation(self, trainer: Trainer[PairBatch]) -> None:
        from pipeline.translation.validation import rehearse_bleu

        if self.recipe.training.bleu_every:
            rehearse_bleu(self, trainer)

    def validate(self, trainer: Trainer[PairBatch], interruption: Interruption) -> dict[str, float]:
        from pipeline.translation.validation import valid_bleu, valid_metrics

        metrics = valid_metrics(self, trainer, interruption)
        every, step = self.recipe.training.bleu_every, trainer.step
        if every and (step % every == 0 or step == trainer.last_step):
            metrics |= valid_bleu(self, trainer, interruption)
        return metrics
