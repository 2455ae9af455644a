"""The keys of a recipe for translation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, PositiveInt, Tag, model_validator
from pydantic import Field as Limit
from pydantic.main import IncEx

from data_prep.config import DataConfig
from data_prep.section import Section
from data_prep.stage import CLEAN
from models.config import ModelConfig
from models.search_config import SearchConfig
from pipeline.recipe import EvaluationConfig, Recipe, TrainingConfig


class TranslationTraining(TrainingConfig):
    """Optimisation and the training loop."""

    batch_key: ClassVar[str] = "max_tokens"
    micro_batch_key: ClassVar[str] = "micro_batch_tokens"

    max_tokens: PositiveInt = 32768
    """Tokens in a global batch: pairs × longest side, padding included, summed over its
    micro-batches. The batch is the same however many ranks share it."""

    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass; a global batch of more is accumulated, or shared by ranks:
    more ranks than micro-batches are of no use. null: max_tokens."""

    random_depth: bool = False
    """Run each micro-batch through a random number of the decoder's levels, 1 to N, so that
    evaluation.decoder_levels can be any of them; for architecture ringformer only."""

    bleu_every: int = Limit(default=0, ge=0)
    """Steps between validations that also translate the validation set with evaluation's beam, a
    multiple of validate_every. BLEU then says which model is best; 0: the validation loss does."""

    @model_validator(mode="after")
    def _fits_together(self) -> TranslationTraining:
        if self.bleu_every % self.validate_every:
            raise ValueError(
                f"bleu_every ({self.bleu_every}) must be a multiple of validate_every "
                f"({self.validate_every})"
            )
        return self


class TestSetFiles(Section):
    """A test set in line-aligned files below `data.root`: plain text, `.gz` or `.sgm`."""

    name: str
    """Name of the test set in scores."""

    source: str
    """Source side, one sentence a line."""

    references: tuple[str, ...] = Limit(min_length=1)
    """One file for each translator."""


TestSetEntry = Annotated[
    Annotated[str, Tag("a name")] | Annotated[TestSetFiles, Tag("some files")],
    Discriminator(lambda value: "a name" if isinstance(value, str) else "some files"),
]


class TranslationEvaluation(EvaluationConfig, SearchConfig):
    """Beam search and scoring."""

    decoder_levels: PositiveInt | None = None
    """Run only the first so many levels of the decoder, which takes a model that was trained with
    training.random_depth. null: all of model.decoder_levels."""

    test_sets: tuple[TestSetEntry, ...] = ()
    """Test sets besides data.test: names of sacreBLEU's (`wmt14/full`, fetched or from its cache),
    or `{name: NAME, source: FILE, references: [FILE, …]}` with files below data.root. The filter
    test_overlap takes those that are at hand out of the training text."""

    comet: Path | None = None
    """Also score test sets by COMET: the file of a model's checkpoint. Needs the program
    `comet-score`."""

    untrained_baseline: bool = False
    """Also score the model as it is at step 0, to show what training was worth."""

    @property
    def search(self) -> SearchConfig:
        """Return the keys that say how a model translates."""
        return SearchConfig.model_validate(self.model_dump(include=set(SearchConfig.model_fields)))

    @property
    def search_of_checkpoints(self) -> dict[str, Any]:
        """Return the keys that say how checkpoints translate, as JSON values: only exports have
        shortlists."""
        return self.search.model_dump(mode="json", exclude={"shortlist"})


class TranslationRecipe(Recipe):
    """A run from corpora to BLEU."""

    page = "recipe.md"

    task: Literal["translation"] = "translation"
    """What is learnt."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    training: TranslationTraining = TranslationTraining()
    evaluation: TranslationEvaluation = TranslationEvaluation()

    @property
    def evaluated_model(self) -> ModelConfig:
        """Return the model that translates: the trained one, or fewer levels of it."""
        levels = self.evaluation.decoder_levels or self.model.decoder_levels
        return self.model.model_copy(update={"decoder_levels": levels})

    @property
    def unused(self) -> IncEx:
        return {"data": {"vocabulary": self.data.vocabulary.unused}}

    @property
    def chosen_weights(self) -> list[object]:
        return [*super().chosen_weights, self.evaluated_model.decoder_levels]

    @property
    def test_set_names(self) -> tuple[str, ...]:
        others = self.evaluation.test_sets
        names = (each if isinstance(each, str) else each.name for each in others)
        return (self.data.test.name, *names)

    @property
    def clean_text(self) -> Path:
        """Return the folder of cleaned text."""
        return self.run_dir / CLEAN

    @model_validator(mode="after")
    def _fits_together(self) -> TranslationRecipe:
        self.model.check_ranks()
        longest = self.data.max_tokens_per_side
        if longest > self.model.max_seq_len:
            raise ValueError(
                f"data.max_tokens_per_side ({longest}) exceeds model.max_seq_len "
                f"({self.model.max_seq_len})"
            )
        if longest > (micro_batch := self.training.micro_batch):
            raise ValueError(
                f"data.max_tokens_per_side ({longest}) exceeds a micro-batch ({micro_batch} tokens)"
            )
        if self.model.tied_embeddings and not self.data.vocabulary.joint:
            raise ValueError(
                "model.tied_embeddings must be false: data.vocabulary.joint is, and so each side "
                "has its own vocabulary"
            )
        wanted = self.evaluation.decoder_levels
        if wanted and wanted > self.model.decoder_levels:
            raise ValueError(
                f"evaluation.decoder_levels ({wanted}) exceeds model.decoder_levels "
                f"({self.model.decoder_levels})"
            )
        if self.training.random_depth and self.model.architecture != "ringformer":
            raise ValueError(
                "training.random_depth is for model.architecture ringformer only, not "
                f"{self.model.architecture}"
            )
        trained = self.data.vocabulary.taken_from is None
        if trained and 2 * self.evaluation.beam_size > self.data.vocabulary.size:
            raise ValueError(
                f"evaluation.beam_size ({self.evaluation.beam_size}) exceeds half of "
                f"data.vocabulary.size ({self.data.vocabulary.size})"
            )
        return self
