"""This script finds what makes the host wait for a GPU in a step of training, at each ZeRO stage,
and which kernels attend.

`test_waits.py` calls `main`.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.ranks import init_distributed
from pipeline.recipe import ROOT
from pipeline.recipe_file import load_recipe
from pipeline.training.loop import Loop
from pipeline.training.trainer import Trainer
from pipeline.translation.task import TranslationTask

STAGES = ["zero0", "zero1", "zero3", "zero1_bf16"]
STEPS = 2
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
"""Operators whose results, or their sizes, go to the host: `item`, `tolist`, `bool`, `float` and
indexing by a mask end in these."""
FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


class Reads(TorchDispatchMode):
    """Counts reads by the line of Python that reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()
        self.fused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.name in READS:
            stack = traceback.extract_stack()[:-1]
            reader = next(f for f in reversed(stack) if "/torch/" not in f.filename)
            self.found[f"{reader.filename}:{reader.name}"] += 1
        self.fused |= func._schema.name == FUSED
        return func(*args, **(kwargs or {}))


def main(arguments: list[str]) -> None:
    """Count at every stage, in steps after which nothing is due.

    :param arguments: the recipe; the file that takes what was found, by stage.
    """
    recipe_path, results = map(Path, arguments)
    init_distributed()
    found = {}
    for stage in STAGES:
        overrides = {
            "training.deepspeed_config": str(ROOT / "ds_configs" / f"{stage}.json"),
            **{f"training.{key}": "100" for key in ("max_steps", "log_every")},
            **{f"training.{kind}_every": "100" for kind in ("validate", "checkpoint")},
        }
        trainer = Trainer(TranslationTask(load_recipe(recipe_path, list(overrides.items()))))
        loop = Loop(trainer, None, None)
        loop.step()
        with Reads() as reads:
            for _ in range(STEPS):
                loop.step()
        loop.watchdog.stop()
        trainer.engine.destroy()
        found[stage] = {"reads": reads.found, "fused": reads.fused}
    results.write_text(json.dumps(found))
    dist.destroy_process_group()
