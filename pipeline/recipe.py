"""The keys that a recipe has whatever its task.

A recipe is the YAML file that describes a run from data to scores. `translation_recipe.py` and
`classification_recipe.py` have each task's own keys; `recipe_file.py` reads them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import quote

from pydantic import Field as Limit
from pydantic import PositiveInt, field_validator, model_validator
from pydantic.main import IncEx
from typing_extensions import Self

from data_prep.config import Preparation
from data_prep.section import Section
from data_prep.stage import SHARDS
from models.config import ActivationCheckpointing, LayersConfig

ROOT = Path(__file__).resolve().parent.parent

LONGEST_NAME = 120  # bytes of a folder's: file systems take 255, and an export's may come behind it

VALIDATION = "validation"  # the folder of its scores, and the name of its metrics

Decay = Annotated[float, Limit(ge=0, lt=1)]


class UsageError(Exception):
    """The command line or the recipe is wrong; commands exit with code 2."""


def slug_of(name: str) -> str:
    """Return `name` as file systems and MLflow take it for a name, not for a path."""
    return re.sub(r"^\.+|[^\w.-]", "-", name)


class TrainingConfig(Section):
    """Optimisation and the training loop."""

    batch_key: ClassVar[str]
    """The key for the size of a global batch."""

    micro_batch_key: ClassVar[str]
    """That for the size of a micro-batch; null: that of a global batch."""

    seed: int = Limit(default=1, ge=0)
    """Seed of initial weights, batch order, dropout and augmentation."""

    max_steps: PositiveInt = 100_000
    """Optimizer steps to train for; the cosine schedule ends with training."""

    max_epochs: float | None = Limit(default=None, gt=0)
    """End after this many passes over the data, unless max_steps ends training before."""

    read_ahead_steps: PositiveInt = 8
    """Steps whose examples are read ahead, each by a thread of its own; raise it where `data wait`
    is more than nothing because the file system is slow to answer."""

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
    """Do not train parameters whose names begin with one of these; what is not one names all. In
    bf16 and fp16 they are rounded so."""

    ema_decay: float = Limit(default=0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights, for evaluation.use_ema; 0: none. In bf16
    and fp16 it is one of weights that are rounded so. Validation, and so the best checkpoint and
    early stopping, look at the weights themselves."""

    compile: bool = False
    """Compile the layers with torch.compile, which takes up to a minute at the start, and on a CPU
    gains nothing."""

    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()

    deepspeed_config: Path | None = None
    """DeepSpeed's own JSON: ZeRO stage, precision, offload. `--deepspeed_config` sets it too. null:
    `ds_configs/zero2_bf16.json` on GPUs that have bf16, `ds_configs/zero1.json` elsewhere."""

    log_every: PositiveInt = 50
    """Steps between progress lines and logged metrics."""

    validate_every: PositiveInt = 1000
    """Steps between validations; one that finds the best model so far also saves a checkpoint."""

    early_stopping: int = Limit(default=0, ge=0)
    """End after this many validations in a row that found no better model; 0: never. Those that do
    not judge the model do not count, where bleu_every is set."""

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

    @property
    def micro_batch(self) -> int:
        """Return the size of a micro-batch."""
        return int(getattr(self, self.micro_batch_key) or getattr(self, self.batch_key))

    @model_validator(mode="after")
    def _micro_batches_fill_a_batch(self) -> Self:
        batch = getattr(self, self.batch_key)
        if batch % self.micro_batch:
            raise ValueError(
                f"{self.batch_key} ({batch}) must be a multiple of {self.micro_batch_key} "
                f"({self.micro_batch})"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.schedule == "noam" and not self.warmup_steps:
            raise ValueError("schedule noam needs warmup_steps")
        return self


class EvaluationConfig(Section):
    """Which of the checkpoints are evaluated and exported."""

    checkpoint: int | str = "newest"
    """`newest`: the average of average_checkpoints; `best`: the one that validation found best; or
    the step of one that is kept."""

    average_checkpoints: PositiveInt = 1
    """Average the weights of that many newest checkpoints."""

    use_ema: bool = False
    """Take the moving average that training.ema_decay keeps instead of the weights."""

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _names_a_checkpoint(cls, value: object) -> object:
        if value in ("newest", "best"):
            return value
        if not (text := str(value)).isdigit():
            raise ValueError(f"expected newest, best, or a step, not {value!r}")
        return int(text)


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server or store; null is an sqlite file beside run_dir, `RUN_DIR/../mlflow.db`."""

    experiment: str = "ringformer"
    """MLflow experiment."""

    parent: Path | None = None
    """The run_dir of the run that this one is shown below in MLflow, as trials are below their
    sweep."""

    registered_model: str | None = Limit(default=None, pattern="^[^/:]+$")
    """Name in MLflow's model registry; null: EXPERIMENT-TEST_SET, of translation
    EXPERIMENT-SOURCE_LANG-TARGET_LANG-TEST_SET, because champions are only compared on the same
    test set."""


class Recipe(Section):
    """A run from data to scores, whatever its task."""

    page: ClassVar[str]
    """The page of docs/ that explains the keys."""

    task: str
    """What is learnt."""

    run_dir: Path
    """Folder of everything that this run produces; the commands of a run find each other here."""

    data: Preparation
    model: LayersConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    tracking: TrackingConfig = TrackingConfig()

    @property
    def test_set_names(self) -> tuple[str, ...]:
        """Return what the test sets are called, that of `data.test` first."""
        raise NotImplementedError

    @property
    def unused(self) -> IncEx:
        """Return the keys that others put out of use: beside those a recipe cannot have them."""
        return {}

    @property
    def chosen_weights(self) -> list[object]:
        """Return what says which weights of checkpoints are evaluated."""
        return [self.evaluation.use_ema]

    @property
    def shards(self) -> Path:
        """Return the folder of binarized examples."""
        return self.run_dir / SHARDS

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Return the folder with a folder for each test set."""
        return self.run_dir / "evaluation"

    @property
    def store(self) -> Path:
        """Return the file of MLflow's store, where `tracking.uri` names no other."""
        return self.run_dir.absolute().with_name("mlflow.db")

    @property
    def tracking_uri(self) -> str:
        """Return the URI of MLflow's tracking server or store."""
        if self.tracking.uri:
            return self.tracking.uri
        store = str(self.store)
        if any(special in store for special in "%?#"):
            # MLflow takes the path in a `sqlite:` URI literally, and makes its folders so.
            return f"sqlite+pysqlite:///{quote(store, safe='/ ')}"
        return f"sqlite:///{store}"

    @model_validator(mode="after")
    def _test_sets_have_names_of_their_own(self) -> Self:
        taken = {VALIDATION: "the validation set is"}
        for name in self.test_set_names:
            slug = slug_of(name)
            if len(slug.encode()) > LONGEST_NAME:
                raise ValueError(f"the name of test set {name} is too long for that of a folder")
            if slug in taken:
                raise ValueError(f"the test set {name} must not be called {slug}: {taken[slug]}")
            taken |= {
                slug: "another test set is",
                "test": "data.test is, in MLflow",
                "valid": "the validation set is, in MLflow",
            }
        return self

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
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
        return self
