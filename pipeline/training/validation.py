"""Validation while training: loss, BLEU, which step was the best, and whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data_prep.batch_plan import BatchPlan
from data_prep.corpora import read_lines
from data_prep.shards import ShardReader
from data_prep.vocabulary import PAD_IDX, load_vocabularies
from models.factory import create_model
from pipeline.checkpoints.resume import criterion
from pipeline.evaluation.metrics import bleu
from pipeline.ranks import gather_shares, share_of
from pipeline.recipe import TrainingConfig
from pipeline.training.progress import perplexity
from pipeline.training.trainer import Training
from pipeline.translation.batches import collate
from pipeline.translation.translator import Translator


class Stopped(Exception):
    """A signal has come."""


def not_validated(training: TrainingConfig) -> dict[str, Any]:
    """The state of a validation that has not been."""
    return {
        "criterion": criterion(training),
        "best": None,
        "best_step": None,
        "stale": 0,
        "due": False,
    }


class Validation:
    """Every rank has one, and they agree in everything."""

    def __init__(self, training: Training, check: Callable[[], bool]) -> None:
        """:param check: called often; whether a signal has come to this rank."""
        self.training, self.check = training, check
        self.reader = ShardReader(training.recipe.run_dir / "shards", "valid")
        self.state = not_validated(training.config)
        """What a resumed run goes on with. `stale`: validations since the best one; `due`: one at
        this step has not been done."""

    def resume(self, state: dict[str, Any]) -> None:
        if state["criterion"] == self.state["criterion"]:
            self.state = dict(state)
        else:  # the best so far is begun anew
            self.state["due"] = state["due"]

    def run(self) -> dict[str, float]:
        """:returns: metrics, the same on every rank.
        :raises Stopped: on every rank, when a signal has come to one.
        """
        loss = self.loss()
        metrics = {"valid_loss": loss, "valid_ppl": perplexity(loss)}
        every = self.training.config.bleu_every
        if every and (
            self.training.step % every == 0 or self.training.step == self.training.last_step
        ):
            metrics["valid_bleu"] = self.bleu()
        if (value := metrics.get(self.state["criterion"])) is not None:
            self._compare(value)
        self.state["due"] = False
        return metrics

    def _compare(self, value: float) -> None:
        sign = 1 if self.state["criterion"] == "valid_bleu" else -1
        best = self.state["best"]
        if math.isfinite(value) and (best is None or sign * value > sign * best):
            self.state |= {"best": value, "best_step": self.training.step, "stale": 0}
        else:
            self.state["stale"] += 1

    @property
    def improved(self) -> bool:
        """Whether the newest validation was the best."""
        return bool(self.state["best_step"] == self.training.step)

    @property
    def gave_up(self) -> bool:
        """Whether early stopping ends training."""
        return bool(0 < self.training.config.early_stopping <= self.state["stale"])

    def loss(self) -> float:
        """Cross-entropy per target token."""
        training, config = self.training, self.training.config
        lengths = self.reader.lengths()
        budget = config.micro_batch_tokens or config.max_tokens
        plan = BatchPlan(*lengths, max_tokens=budget, micro_batch_tokens=None, seed=0)
        micro_batches = plan.sorted_micro_batches()
        # Ranks must run equally many forward passes: ZeRO-3 gathers parameters in each.
        while len(micro_batches) % training.world_size:
            micro_batches.append(np.empty(0, dtype=np.int64))
        total = torch.zeros((), device=training.device)
        training.engine.eval()  # until the next step
        with torch.no_grad():
            for indices in micro_batches[training.rank :: training.world_size]:
                total += training.loss(collate(self.reader, indices, training.device))
                self._agree_to_go_on()
        (mean,) = training.mean_over_ranks(total)
        return mean * float(training.world_size) / int(lengths[1].sum())

    def bleu(self) -> float:
        """BLEU of the validation set, which the ranks share among them."""
        training, recipe = self.training, self.training.recipe
        clean = recipe.run_dir / "clean"
        sources, references = (
            list(read_lines(clean / f"valid.{language}")) for language in recipe.data.languages
        )
        vocabularies = load_vocabularies(recipe.run_dir / "shards")
        sizes = training.reader.manifest["vocabulary"]["sizes"]
        # A model of its own: decoding while ZeRO-3 has the weights cut up would deadlock.
        model = create_model(recipe.model, sizes, PAD_IDX)
        model.load_state_dict(training.full_weights())
        translator = Translator(model, vocabularies, recipe.evaluation)
        share = share_of(sources, training.rank, training.world_size)
        try:
            translations = translator.translate(sources[share], self._go_on_alone)
        except Stopped:
            translations = []
        self._agree_to_go_on()
        hypotheses = gather_shares(translations)
        return round(bleu(hypotheses, [references], recipe.data.target_lang).score, 2)

    def _go_on_alone(self, count: int) -> None:
        if self.check():
            raise Stopped

    def _agree_to_go_on(self) -> None:
        if any_rank(self.training, self.check()):
            raise Stopped(f"stopped by a signal at step {self.training.step}")


def any_rank(training: Training, flag: bool) -> bool:
    """Whether it is set on any rank. Every rank must call this equally often."""
    return training.mean_over_ranks(float(flag))[0] > 0
