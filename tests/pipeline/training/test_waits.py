"""A step makes the host wait for the GPU only where it looks at gradients before using them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import finish, start_ranks
from tests.pipeline.training.waits import STAGES, STEPS, main


@pytest.mark.slow
def test_between_reports_nobody_reads_but_who_skips_gradients_that_are_not_finite(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path: Path
) -> None:
    results, log = tmp_path / "reads.json", tmp_path / "log"
    ranks = start_ranks(main, [str(tiny_recipe), str(results)], log, 1)
    assert finish(ranks, 300) == [0], log.read_text()
    found = json.loads(results.read_text())
    assert list(found) == STAGES
    assert [stage for stage in STAGES if not found[stage]["fused"]] == ["zero1_bf16"]
    for stage, reads in ((stage, each["reads"]) for stage, each in found.items()):
        ours = {reader: n for reader, n in reads.items() if "/deepspeed/" not in reader}
        if stage == "zero0":  # DeepSpeed's optimizers do it themselves
            assert [reader.rpartition(":")[2] for reader in ours] == ["_clip"]
            assert sum(ours.values()) == STEPS
        else:
            assert ours == {}
            assert sum(reads.values()) <= 3 * STEPS
