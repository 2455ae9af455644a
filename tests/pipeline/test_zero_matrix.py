"""Every way to train against torch alone: ZeRO, precision, activation checkpointing, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Recipe
from tests.conftest import launch
from tests.pipeline.zero_matrix import cases, recipe_of, reference

pytestmark = pytest.mark.slow

SCRIPT = str(Path(__file__).with_name("zero_matrix.py"))
ROUNDING = {"bf16": 2e-2, "fp16": 5e-3}


@pytest.fixture(scope="module", params=[1, 2, 4], ids=["1 rank", "2 ranks", "4 ranks"])
def found(
    request: pytest.FixtureRequest, prepared: Recipe, tiny_recipe: Path, tmp_path_factory: Any
) -> dict[Any, Any]:
    """What all cases gave on that many ranks."""
    results = tmp_path_factory.mktemp("matrix") / "results.pt"
    done = launch([SCRIPT, str(tiny_recipe), str(results)], ranks=request.param)
    assert done.returncode == 0, done.stderr
    loaded: dict[Any, Any] = torch.load(results)
    return loaded


@pytest.fixture(scope="module")
def expected(
    prepared: Recipe, tiny_recipe: Path, tmp_path_factory: Any
) -> dict[bool, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reference")
    return {
        tied: reference(recipe_of(tiny_recipe, "zero0", "none", tied, folder))
        for tied in (True, False)
    }


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_every_way_to_train_gives_what_torch_alone_gives(
    found: dict[Any, Any], expected: dict[bool, dict[str, Any]], case: tuple[str, str, bool]
) -> None:
    ours, theirs = found[case], expected[case[2]]
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
