"""Every way to train against torch alone: ZeRO, precision, activation checkpointing, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.recipe import Recipe
from tests.conftest import launch
from tests.pipeline.zero_matrix import cases, recipe_of, reference

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("zero_matrix.py"))
ROUNDING = {"bf16": 2e-2, "fp16": 5e-3}


RANKS = [1, 2, 4]


@pytest.fixture(scope="module")
def found(prepared: Recipe, tiny_recipe: Path, tmp_path_factory: Any) -> dict[int, dict[Any, Any]]:
    """What all cases gave on so many ranks."""
    folder = tmp_path_factory.mktemp("matrix")
    for ranks in RANKS:
        done = launch([SCRIPT, str(tiny_recipe), str(folder / f"{ranks}.pt")], ranks)
        assert done.returncode == 0, done.stderr
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in RANKS}


@pytest.fixture(scope="module")
def expected(
    prepared: Recipe, tiny_recipe: Path, tmp_path_factory: Any
) -> dict[tuple[int, bool], dict[str, Any]]:
    """By micro-batches in a step, and whether embeddings are tied."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        case: reference(recipe_of(tiny_recipe, "zero0", "none", case[1], folder, case[0]))
        for case in ((2, True), (2, False), (4, True))
    }


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks in RANKS for case in cases(ranks)],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_every_way_to_train_gives_what_torch_alone_gives(
    found: dict[int, dict[Any, Any]],
    expected: dict[tuple[int, bool], dict[str, Any]],
    ranks: int,
    case: tuple[str, str, bool],
) -> None:
    """2 micro-batches a step on 1 and 2 ranks, 4 on 4 ranks, with dropout."""
    ours, theirs = found[ranks][case], expected[max(2, ranks), case[2]]
    tolerance = next((t for kind, t in ROUNDING.items() if kind in case[0]), 1e-5)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=tolerance)
    difference, size = (
        torch.stack([tensor.norm() for tensor in tensors]).norm()
        for tensors in (
            [ours["weights"][name] - tensor for name, tensor in theirs["weights"].items()],
            theirs["weights"].values(),
        )
    )
    assert float(difference / size) <= tolerance
