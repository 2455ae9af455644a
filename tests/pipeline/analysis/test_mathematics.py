"""The measures of the analyses have the values that are known of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.analysis.cka import MinibatchCKA
from pipeline.analysis.distance import (
    MeanAttentionDistance,
    patch_distances,
    token_distances,
    uniform_attention,
    without_class_token,
)
from pipeline.analysis.similarity import StateCosines


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ── CKA ─────────────────────────────────────────────────────────────────────────────────────────


def cka(left: Tensor, right: Tensor, minibatch: int | None = None) -> float:
    """Return CKA of two representations, `[n, d]` and `[n, e]`."""
    measure = MinibatchCKA()
    size = minibatch or len(left)
    for first in range(0, len(left), size):
        a, b = (side[first : first + size] for side in (left, right))
        measure.add(a[None], b[None])
    return measure.value().item()


def test_cka_knows_what_is_the_same() -> None:
    x, other = normal(40, 8) + 3, normal(40, 8, seed=1)
    rotation, _ = torch.linalg.qr(normal(8, 8, seed=2))
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, x @ rotation) == pytest.approx(1)
    assert cka(x, -5 * x + 7) == pytest.approx(1)
    assert cka(x, x * torch.arange(1, 9)) < 0.9  # not invariant to other linear maps
    assert cka(x, other) == pytest.approx(cka(other @ rotation, 3 * x))


def test_cka_of_independent_noise_is_0_in_the_mean() -> None:
    measured = [cka(normal(8, 64, seed=2 * i), normal(8, 64, seed=2 * i + 1)) for i in range(400)]
    mean = sum(measured) / len(measured)
    assert abs(mean) < 3 * torch.tensor(measured).std().item() / 400**0.5
    assert min(measured) < -0.1  # nothing is cut off


def test_cka_agrees_with_the_definition_where_bias_does_not_matter() -> None:
    x, noise = normal(2000, 6), normal(2000, 6, seed=1)
    y = x[:, :4] + noise[:, :4]
    a, b = x - x.mean(0), y - y.mean(0)
    defined = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(x, y) == pytest.approx(defined.item(), abs=5e-3)
    assert cka(x, y, minibatch=8) == pytest.approx(cka(x, y), abs=0.02)


def test_cka_compares_all_with_all() -> None:
    left, right = normal(3, 12, 5), normal(2, 12, 7, seed=1)
    measure = MinibatchCKA()
    measure.add(left, right)
    expected = [[cka(a, b) for b in right] for a in left]
    torch.testing.assert_close(measure.value(), torch.tensor(expected, dtype=torch.float64))


def test_cka_with_a_constant_is_not_a_number() -> None:
    assert math.isnan(cka(normal(9, 4), torch.ones(9, 4)))


# ── Mean attention distance ─────────────────────────────────────────────────────────────────────


def mean_distance(attention: Tensor, distances: Tensor, real: Tensor | None = None) -> float:
    """Return the mean distance of one level and head that attends so, `[S, S]`."""
    measure = MeanAttentionDistance()
    every = torch.ones(1, len(attention), dtype=torch.bool)
    measure.add(attention[None, None, None], distances, every if real is None else real[None])
    return measure.value().item()


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_attention_that_is_shifted_by_patches_looks_that_far(shift: int) -> None:
    """Patches whose neighbour is beyond the edge look as far to the other side."""
    rows, columns, size = 2, 6, 16
    attention = torch.zeros(rows * columns, rows * columns)
    for row in range(rows):
        for column in range(columns):
            to = column + shift if column + shift < columns else column - shift
            attention[row * columns + column, row * columns + to] = 1
    assert mean_distance(attention, patch_distances(rows, columns, size)) == shift * size


def test_uniform_attention_looks_as_far_as_the_places_are_apart() -> None:
    uniform = torch.full((4, 4), 0.25)
    assert mean_distance(uniform, patch_distances(2, 2, 8)) == pytest.approx(8 * (2 + 2**0.5) / 4)
    n = 9
    uniform = torch.full((n, n), 1 / n)
    assert mean_distance(uniform, token_distances(n)) == pytest.approx((n * n - 1) / (3 * n))


def test_uniform_attention_is_over_what_is_looked_at() -> None:
    attention = torch.rand(2, 1, 3, 4, 4).tril().softmax(-1).tril()  # causal
    attention[0, 0, 0, 2, 1] = 0  # but other heads look there
    expected = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(uniform_attention(attention)[0, 0, 0], expected)


def test_queries_that_are_padding_do_not_count() -> None:
    attention = torch.zeros(5, 5)
    attention[:3] = torch.eye(5)[[1, 2, 0]]  # 1, 1 and 2 tokens away
    attention[3:, 0] = 1
    real = torch.tensor([True, True, True, False, False])
    assert mean_distance(attention, token_distances(5), real) == pytest.approx(4 / 3)


def test_the_class_token_is_left_out() -> None:
    attention = torch.tensor([[0.2, 0.4, 0.4], [0.6, 0.1, 0.3], [0.5, 0.25, 0.25]])
    expected = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    torch.testing.assert_close(without_class_token(attention), expected)


# ── Cosines of states ───────────────────────────────────────────────────────────────────────────


def test_cosines_between_levels() -> None:
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2])  # of the states behind three levels
    states = torch.stack([angles.cos(), angles.sin()], 1)[:, None, None].repeat(1, 2, 3, 1)
    states = states * torch.arange(1, 4)[:, None]  # lengths do not count
    real = torch.tensor([[True, True, True], [True, False, False]])
    states[:, ~real] = 100.0  # padding
    measure = StateCosines()
    measure.add(states, real)
    measure.add(states[:, :1], real[:1])
    expected = (angles[:, None] - angles).cos().double()
    torch.testing.assert_close(measure.value(), expected, atol=1e-6, rtol=0)
