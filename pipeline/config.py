"""Recipes: one YAML file describes a run from corpora to BLEU.

Every command is called as `COMMAND --config RECIPE [--SECTION.KEY VALUE]...`; `run_command` is the
one door through which they all parse it and report errors.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import (
    BaseModel,
    Discriminator,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import Field as Limit
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from data_prep.config import DataConfig
from data_prep.section import Section
from models.config import ActivationCheckpointing, ModelConfig

OUR_MODULES = {"data_prep", "models", "pipeline", "__main__"}
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = ROOT / "recipes" / "quickstart.yaml"


Decay = Annotated[float, Limit(ge=0, lt=1)]


class UsageError(Exception):
    """Bad command line or recipe: exit code 2."""


class TrainingConfig(Section):
    """Optimisation and the training loop."""

    seed: int = Limit(default=1, ge=0)
    """Seed of initial weights, batch order and dropout."""

    max_steps: PositiveInt = 100_000
    """Optimizer steps to train for; the cosine schedule ends there."""

    max_epochs: float | None = Limit(default=None, gt=0)
    """End after so many passes over the data if max_steps does not end training before."""

    max_tokens: PositiveInt = 32768
    """Tokens in a global batch: sentences × longest side, padding included, summed over its
    micro-batches. The batch is the same however many ranks share it."""

    micro_batch_tokens: PositiveInt | None = None
    """Most tokens in one forward pass; a global batch of more is accumulated. null: max_tokens."""

    optimizer: Literal["adamw", "adam"] = "adamw"
    """They differ in what weight_decay does. Torch's fused kernels; DeepSpeed's for an optimizer
    that is offloaded to the CPU."""

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
    """Warm start: take the initial weights from a folder written by `./run.sh export`."""

    freeze: list[str] = Limit(default=[])
    """Do not train parameters whose names begin so: `[encoder_frontend.embed]`."""

    ema_decay: float = Limit(default=0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights, for evaluation.use_ema; 0: none."""

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
    """End after so many validations in a row that found no better model (those with BLEU, when
    bleu_every is set); 0 never."""

    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints (there is always one at the end)."""

    keep_checkpoints: PositiveInt = 5
    """Newest checkpoints kept on disk; the best one is kept besides."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a gradient is not finite: end training, or leave out the step. RUN_DIR/nonfinite tells
    what it worked on. (Steps that adjust the loss scale of fp16 are always left out.)"""

    collective_timeout: PositiveInt = 1800
    """Seconds without progress after which a rank no longer waits for the others: it says so, and
    ends. Longer than a compilation and a save take."""

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
    source: str
    references: tuple[str, ...] = Limit(min_length=1)
    """One file for each translator."""


TestSet = Annotated[
    Annotated[str, Tag("a name")] | Annotated[TestSetFiles, Tag("some files")],
    Discriminator(lambda value: "a name" if isinstance(value, str) else "some files"),
]


class EvaluationConfig(Section):
    """Beam search and scoring."""

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

    checkpoint: int | str = "newest"
    """`newest`: the average of average_checkpoints; `best`: the one that validation found best; or
    the step of one that is kept."""

    average_checkpoints: PositiveInt = 1
    """Average the weights of that many newest checkpoints."""

    use_ema: bool = False
    """Take the moving average that training.ema_decay has kept instead of the weights."""

    test_sets: tuple[TestSet, ...] = ()
    """Test sets besides data.test: names that sacreBLEU knows (`wmt14/full`, fetched or from its
    cache), or `{name: NAME, source: FILE, references: [FILE, …]}` with files below data.root."""

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


SEARCH = {
    "beam_size",
    "length_penalty",
    "no_repeat_ngram_size",
    "max_length_ratio",
    "max_length_offset",
    "batch_tokens",
    "dtype",
}
"""Keys of `evaluation` that say how a model translates."""


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server or store; null is an sqlite file beside run_dir, `RUN_DIR/../mlflow.db`."""

    experiment: str = "ringformer"
    """MLflow experiment."""

    registered_model: str | None = None
    """Name in MLflow's model registry; null: EXPERIMENT-SOURCE_LANG-TARGET_LANG."""


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
    def tracking_uri(self) -> str:
        neighbourhood = self.run_dir.absolute().parent
        return self.tracking.uri or f"sqlite:///{neighbourhood / 'mlflow.db'}"

    @property
    def registered_model(self) -> str:
        languages = f"{self.data.source_lang}-{self.data.target_lang}"
        return self.tracking.registered_model or f"{self.tracking.experiment}-{languages}"

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


# ── Reading a recipe ────────────────────────────────────────────────────────────────────────────


def recipe_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that holds a value, with its pydantic field."""
    for name, field in section.model_fields.items():
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if is_section(t)]
        if nested and not is_sequence(field.annotation):
            yield from recipe_keys(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def is_sequence(annotation: object) -> bool:
    return get_origin(annotation) in (tuple, list)


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def load_recipe(path: Path, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe and apply `(dotted key, text)` overrides.

    :raises UsageError: one line naming file, line, key, what was expected and the nearest key.
    """
    try:
        content = YAML().load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the recipe: {error}") from error
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = " ".join(str(error.problem).split())
        raise UsageError(f"{path}:{line}: not valid YAML: {problem}") from error
    except YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a YAML mapping with a key `run_dir`")
    fields = dict(recipe_keys())
    for key, text in overrides:
        annotation = fields[key].annotation
        raw = (
            {str, Path} & {annotation, *get_args(annotation)} if not is_sequence(annotation) else ()
        )
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[last] = text if raw and text != "null" else _value(key, text)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        overridden = {key for key, _ in overrides}
        raise UsageError(_describe(error, path, content, overridden)) from error


def _value(key: str, text: str) -> Any:
    """The value that `text` would be in a recipe."""
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        raise UsageError(f"command line: `{key}`: cannot read {text!r} as YAML") from error


def _describe(error: ValidationError, path: Path, content: Any, overridden: set[str]) -> str:
    """One line for the first of the errors."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not str(part).startswith(("function-", "some "))]
    key = ".".join(map(str, location))
    line = ""
    for part in location:
        try:
            position = content.lc.item(part) if isinstance(part, int) else content.lc.key(part)
            line = f":{position[0] + 1}"
            content = content[part]
        except (AttributeError, KeyError, TypeError):
            break
    on_command_line = any(f"{key}.".startswith(f"{one}.") for one in overridden)
    where = "command line" if on_command_line else f"{path}{line}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_suggestion(key)}{more}"
    if first["type"] == "missing":
        return f"{where}: key `{key}` is required{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{where}: `{key or 'recipe'}`: {message[:1].lower() + message[1:]}{given}{more}"


def _suggestion(key: str, prefix: str = "") -> str:
    keys = {name: name for name, _ in recipe_keys()}
    keys |= {name.rsplit(".", 1)[-1]: name for name in keys}
    for wanted in (key, key.rsplit(".", 1)[-1]):
        if near := difflib.get_close_matches(wanted, keys, n=1, cutoff=0.5):
            return f"; did you mean `{prefix}{keys[near[0]]}`?"
    return ""


# ── Command lines ───────────────────────────────────────────────────────────────────────────────


def given_evaluation(recipe: Recipe, arguments: argparse.Namespace) -> list[tuple[str, object]]:
    """Keys of `evaluation` that are on the command line, with their values."""
    return [
        (name, getattr(recipe.evaluation, name))
        for section, _, name in (key.partition(".") for key in vars(arguments))
        if section == "evaluation"
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def default_of(field: Any) -> str:
    """The default of a pydantic field as a recipe would say it."""
    value = to_jsonable_python(field.default)
    text = value if value and isinstance(value, str) else json.dumps(value)
    return text.removeprefix(f"{ROOT}/")


def _parser(program: str, description: str) -> _Parser:
    parser = _Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=DEFAULT_RECIPE, help="recipe (YAML)")
    parser.add_argument("--deepspeed_config", help="short for --training.deepspeed_config")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    groups: dict[str, Any] = {}
    for key, field in recipe_keys():
        section = key.split(".")[0] if "." in key else "recipe"
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section} keys")
        text = " ".join((field.description or "").split())
        default = "required" if field.is_required() else f"default {default_of(field)}"
        text = f"{text} [{default}]".replace("%", "%%")
        groups[section].add_argument(
            f"--{key}", dest=key, default=argparse.SUPPRESS, metavar="VALUE", help=text
        )
    return parser


def run_command(
    program: str,
    description: str,
    command: Callable[[Recipe, argparse.Namespace], None],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> NoReturn:
    """Parse `sys.argv`, call `command(recipe, arguments)`, and exit.

    Exit codes: 0 done, 2 bad usage or recipe, 1 anything else. Errors are one message on stderr; a
    traceback only with `--debug` or RINGFORMER_DEBUG=1.
    """
    debug = "--debug" in sys.argv or os.environ.get("RINGFORMER_DEBUG") == "1"
    try:
        parser = _parser(program, description)
        add_arguments(parser)
        arguments, unknown = parser.parse_known_args()
        if unknown:
            wanted = unknown[0].split("=")[0]
            hint = _suggestion(wanted.lstrip("-"), "--") if wanted.startswith("--") else ""
            raise UsageError(f"unknown argument `{unknown[0]}`{hint} (see --help)")
        values = vars(arguments)
        overrides = [(key, values[key]) for key, _ in recipe_keys() if key in values]
        if arguments.deepspeed_config:
            overrides.append(("training.deepspeed_config", arguments.deepspeed_config))
        command(load_recipe(arguments.config, overrides), arguments)
    except UsageError as error:
        _fail(program, str(error), debug, exit_code=2)
    except KeyboardInterrupt:
        _fail(program, "interrupted", debug, exit_code=1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # Our own errors carry their whole message; of a foreign one the type is half the message.
        ours = type(error).__module__.split(".")[0] in OUR_MODULES
        name = "" if ours or isinstance(error, OSError) else f"{type(error).__name__}: "
        _fail(program, f"{name}{error}", debug, exit_code=1)
    sys.exit(0)


def _fail(program: str, message: str, debug: bool, *, exit_code: int) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
