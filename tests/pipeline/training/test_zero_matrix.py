"""Every way to train gives what torch alone gives: ZeRO, precision, checkpointing, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.translation.task import TranslationTask
from pipeline.translation_recipe import TranslationRecipe
from tests.pipeline.ranks import finish, start_ranks
from tests.pipeline.training.zero_matrix import Case, agree, cases, main, recipe_of, reference

pytestmark = pytest.mark.slow

ROUNDING = {"bf16": 2e-2, "fp16": 5e-3}
RANKS = [1, 2, 4]


@pytest.fixture(scope="module")
def found(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[Case, Any]]:
    """Return what all cases gave, by the number of ranks."""
    folder = tmp_path_factory.mktemp("matrix")
    log = folder / "log"
    for ranks in RANKS:
        arguments = [str(tiny_recipe), str(folder / f"{ranks}.pt")]
        assert finish(start_ranks(main, arguments, log, ranks), 500) == [0] * ranks, log.read_text()
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in RANKS}


@pytest.fixture(scope="module")
def expected(
    prepared: TranslationRecipe, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, dict[str, Any]]:
    """Return what torch gives, by whether embeddings are tied."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        tied: reference(TranslationTask(recipe_of(tiny_recipe, "zero0", "none", tied, folder)))
        for tied in (True, False)
    }


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks in RANKS for case in cases(ranks)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_every_way_to_train_gives_what_torch_alone_gives(
    found: dict[int, dict[Case, Any]],
    expected: dict[bool, dict[str, Any]],
    ranks: int,
    case: Case,
) -> None:
    """There is dropout; a step has 4 micro-batches: 4, 2 or 1 for each rank."""
    ours, theirs = found[ranks][case], expected[case[2]]
    tolerance = next((t for kind, t in ROUNDING.items() if kind in case[0]), 1e-5)
    agree(ours, theirs, tolerance)
