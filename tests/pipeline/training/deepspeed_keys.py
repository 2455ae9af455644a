"""What DeepSpeed's own config models say: `python -m tests.pipeline.training.deepspeed_keys` writes
`pipeline/training/deepspeed_keys.json` anew, after an update of DeepSpeed.

Importing DeepSpeed takes many seconds, and a wrong key should be told in one.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Gt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.training.deepspeed_config import KNOWN_KEYS

LIMITS = {"loss_scale": " >= 0", "loss_scale_window": " > 0", "min_loss_scale": " > 0"}
NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "text"}


def keys_of_deepspeed() -> dict[str, Any]:
    """By section: by key, what it may be; nested where DeepSpeed nests."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    sections: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
    }
    return {name: _keys(model) for name, model in sections.items()}


def keys_that_deepspeed_reads() -> set[str]:
    """Those at the top level."""
    from deepspeed.runtime.config import DeepSpeedConfig

    seen: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            seen.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            seen.add(str(key))
            return super().__contains__(key)

    config = DeepSpeedConfig.__new__(DeepSpeedConfig)
    recorder = Recorder(train_micro_batch_size_per_gpu=1)
    config._param_dict, config.world_size, config.global_rank = recorder, 1, 0
    config.mesh_device = None
    config._initialize_params(recorder)
    return seen


def _keys(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in sorted(model.model_fields.items()):
        extra = field.json_schema_extra
        if not (isinstance(extra, dict) and extra.get("deprecated")):
            what = _what(name, field.annotation, field)
            found |= dict.fromkeys(filter(None, (name, field.alias)), what)
    return found


def _what(name: str, annotation: Any, field: FieldInfo) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return _what(name, kinds[0], field) if len(kinds) == 1 else "anything"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _keys(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return sorted({member.value for member in annotation})
    limits = [f" >= {m.ge}" for m in field.metadata if isinstance(m, Ge)]
    limits += [f" > {m.gt}" for m in field.metadata if isinstance(m, Gt)]
    kind = NAMES.get(annotation, "a list" if get_origin(annotation) is list else "anything")
    return kind + (LIMITS.get(name) or "".join(limits))


if __name__ == "__main__":
    text = json.dumps(keys_of_deepspeed(), indent=1)
    KNOWN_KEYS.write_text(f"{text}\n", encoding="utf-8")
