"""The keys of a recipe, the YAML file that describes a run from corpora to BLEU.

`command_line.py` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import Discriminator, PositiveInt, Tag, field_validator, model_validator
from pydantic import Field as Limit

from data_prep.config import DataConfig
from data_prep.section import Section
from data_prep.stage import CLEAN, SHARDS
from models.config import ActivationCheckpointing, ModelConfig

ROOT = Path(__file__).resolve().parent.parent

Decay = Annotated[float, Limit(ge=0, lt=1)]


class UsageError(Exception):
    """The command line or the recipe is wrong; commands exit with code 2."""


class TrainingConfig(Section):
    """Optimisation and the training loop."""

    seed: int = Limit(default=1, ge=0)
    """Seed of initial weights, batch order and dropout."""

    max_steps: PositiveInt = 100_000
    """Optimizer steps to train for; the cosine schedule ends there."""

    max_epochs: float | None = Limit(default=None, gt=0)
    """End after this many passes over the data, unless max_steps ends training before."""

    max_tokens: PositiveInt = 32768
    """Tokens in a global batch: pairs × longest side, padding included, summed over its
    micro-batches. The batch is the same however many ranks share it."""

    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass; a global batch of more is accumulated, or shared by ranks:
    more ranks than micro-batches are of no use. null: max_tokens."""

    read_ahead_steps: PositiveInt = 8
    """Steps whose pairs are read ahead, each by a thread of its own; raise it where `data wait` is
    more than nothing, which is where the file system is slow to answer."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """The two differ in what weight_decay does. Torch's fused kernels compute them, or DeepSpeed's
    where the optimizer is offloaded to the CPU."""

    learning_rate: float = Limit(default=7e-4, gt=0)
    """Peak learning rate; with the schedule `noam` the factor before its formula, about 1."""

    schedule: Literal["cosine", "inverse_sqrt", "noam"] = "cosine"
    """After warm-up: `cosine` to zero at max_steps; `inverse_sqrt` of the step; `noam` is the same
    with the peak model_dim^-0.5 · warmup_steps^-0.5 (arXiv 1706.03762)."""

    warmup_steps: int = Limit(default=4000, ge=0)
    """Steps of linear warm-up."""

    adam_betas: tuple[Decay, Decay] = (0.9, 0.98)
    """Adam's moment decays."""

    adam_eps: float = Limit(default=1e-9, gt=0)
    """Adam's epsilon."""

    weight_decay: float = Limit(default=0.0, ge=0)
    """Weight decay: decoupled with adamw, added to the gradient with adam."""

    clip_norm: float = Limit(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 does not clip."""

    label_smoothing: float = Limit(default=0.0, ge=0, lt=1)
    """Label smoothing of the training loss."""

    init_from: Path | None = None
    """Warm start: take the initial weights from a folder written by `./run.sh export --format
    safetensors`."""

    freeze: list[str] = Limit(default=[])
    """Do not train parameters whose names begin with one of these: `[encoder_frontend.embed]`."""

    ema_decay: float = Limit(default=0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights, for evaluation.use_ema; 0: none."""

    random_depth: bool = False
    """Run each micro-batch through a random number of the decoder's levels, 1 to N, so that
    evaluation.decoder_levels can be any of them; for architecture ringformer only."""

    compile: bool = False
    """Compile the layers with torch.compile, which takes some minutes at the start."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()

    deepspeed_config: Path = ROOT / "ds_configs" / "zero1.json"
    """DeepSpeed's own JSON: ZeRO stage, precision, offload. `--deepspeed_config` sets it too."""

    log_every: PositiveInt = 50
    """Steps between progress lines and logged metrics."""

    validate_every: PositiveInt = 1000
    """Steps between validations; one that finds the best model so far also saves a checkpoint."""

    bleu_every: int = Limit(default=0, ge=0)
    """Steps between validations that also translate the validation set with evaluation's beam, a
    multiple of validate_every. BLEU then says which model is best; 0: the validation loss does."""

    early_stopping: int = Limit(default=0, ge=0)
    """End after this many validations in a row that found no better model (only those with BLEU
    count when bleu_every is set); 0: never."""

    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints (there is always one at the end)."""

    keep_checkpoints: PositiveInt = 5
    """Newest checkpoints to keep on disk; the best one is kept too."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a gradient is not finite: end training, or skip the step. RUN_DIR/nonfinite records
    the step's examples and losses. (Steps that adjust fp16's loss scale are always skipped.)"""

    collective_timeout: PositiveInt = 1800
    """Seconds without progress after which a rank stops waiting for the others, says so, and ends.
    It must be longer than compiling and saving take."""

    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest checkpoint of run_dir; `never` refuses to touch one."""

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        if self.micro_batch_tokens and self.max_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be a multiple of micro_batch_tokens "
                f"({self.micro_batch_tokens})"
            )
        if self.bleu_every % self.validate_every:
            raise ValueError(
                f"bleu_every ({self.bleu_every}) must be a multiple of validate_every "
                f"({self.validate_every})"
            )
        if self.schedule == "noam" and not self.warmup_steps:
            raise ValueError("schedule noam needs warmup_steps")
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


class SearchConfig(Section):
    """How a model translates: beam search."""

    beam_size: PositiveInt = 4
    """Hypotheses kept at each step; 1 is greedy search."""

    length_penalty: float = 1.0
    """Scores are divided by length to this power."""

    no_repeat_ngram_size: int = Limit(default=0, ge=0)
    """No n-gram of that many tokens occurs twice in a translation; 0 allows it."""

    max_length_ratio: float = Limit(default=1.5, gt=0)
    """Longest translation in tokens: this × source tokens + max_length_offset."""

    max_length_offset: int = Limit(default=20, ge=0)
    """See max_length_ratio."""

    batch_tokens: PositiveInt = 4096
    """Source tokens decoded together, padding included, times beam_size."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the model while it translates; bfloat16 is faster where the processor has it."""

    shortlist: bool | None = None
    """Let translations have those target tokens only that are likely, given the sentence's own:
    of an export that holds such a shortlist, which `export` makes for 16,000 target tokens or more.
    null: in format onnx. true: in format ctranslate2 too, which then translates sentences one by
    one, soon for a single one, slowly for many."""


class EvaluationConfig(SearchConfig):
    """Beam search and scoring."""

    checkpoint: int | str = "newest"
    """`newest`: the average of average_checkpoints; `best`: the one that validation found best; or
    the step of one that is kept."""

    average_checkpoints: PositiveInt = 1
    """Average the weights of that many newest checkpoints."""

    decoder_levels: PositiveInt | None = None
    """Run only the first so many levels of the decoder, which takes a model that was trained with
    training.random_depth. null: all of model.decoder_levels."""

    use_ema: bool = False
    """Take the moving average that training.ema_decay keeps instead of the weights."""

    test_sets: tuple[TestSetEntry, ...] = ()
    """Test sets besides data.test: names of sacreBLEU's (`wmt14/full`, fetched or from its cache),
    or `{name: NAME, source: FILE, references: [FILE, …]}` with files below data.root. The filter
    test_overlap takes those that are at hand out of the training text."""

    untrained_baseline: bool = False
    """Also score the model as it is at step 0, to show what training was worth."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _names_a_checkpoint(cls, value: object) -> object:
        if value in ("newest", "best"):
            return value
        if not (text := str(value)).isdigit():
            raise ValueError(f"expected newest, best, or a step, not {value!r}")
        return int(text)

    @property
    def search(self) -> SearchConfig:
        """Return the keys that say how a model translates."""
        return SearchConfig.model_validate(self.model_dump(include=set(SearchConfig.model_fields)))


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server or store; null is an sqlite file beside run_dir, `RUN_DIR/../mlflow.db`."""

    experiment: str = "ringformer"
    """MLflow experiment."""

    registered_model: str | None = None
    """Name in MLflow's model registry; null: EXPERIMENT-SOURCE_LANG-TARGET_LANG-TEST_SET,
    because champions are only compared on the same test set."""


class Recipe(Section):
    """A run from corpora to BLEU."""

    run_dir: Path
    """Folder of everything that this run produces; the commands of a run find each other here."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def evaluated_model(self) -> ModelConfig:
        """Return the model that translates: the trained one, or fewer levels of it."""
        levels = self.evaluation.decoder_levels or self.model.decoder_levels
        return self.model.model_copy(update={"decoder_levels": levels})

    @property
    def shards(self) -> Path:
        """Return the folder of binarized pairs, and of the vocabulary beside them."""
        return self.run_dir / SHARDS

    @property
    def clean_text(self) -> Path:
        """Return the folder of cleaned text."""
        return self.run_dir / CLEAN

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def tracking_uri(self) -> str:
        """Return the URI of MLflow's tracking server or store."""
        if self.tracking.uri:
            return self.tracking.uri
        store = str(self.run_dir.absolute().parent / "mlflow.db")
        if any(special in store for special in "%?#"):
            # MLflow takes the path in a `sqlite:` URI literally, and makes its folders so.
            return f"sqlite+pysqlite:///{quote(store, safe='/ ')}"
        return f"sqlite:///{store}"

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        longest = self.data.max_tokens_per_side
        if longest > self.model.max_seq_len:
            raise ValueError(
                f"data.max_tokens_per_side ({longest}) exceeds model.max_seq_len "
                f"({self.model.max_seq_len})"
            )
        micro_batch = self.training.micro_batch_tokens or self.training.max_tokens
        if longest > micro_batch:
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
        levels = self.training.activation_checkpointing.levels
        if levels and self.model.architecture == "transformer":
            raise ValueError(
                "training.activation_checkpointing.levels must be 0: model.architecture "
                f"{self.model.architecture} has no activation checkpointing"
            )
        if self.evaluation.use_ema and not self.training.ema_decay:
            raise ValueError("evaluation.use_ema needs training.ema_decay")
        if self.evaluation.average_checkpoints > self.training.keep_checkpoints:
            raise ValueError(
                f"evaluation.average_checkpoints ({self.evaluation.average_checkpoints}) exceeds "
                f"training.keep_checkpoints ({self.training.keep_checkpoints})"
            )
        if 2 * self.evaluation.beam_size > self.data.vocabulary.size:
            raise ValueError(
                f"evaluation.beam_size ({self.evaluation.beam_size}) exceeds half of "
                f"data.vocabulary.size ({self.data.vocabulary.size})"
            )
        return self
