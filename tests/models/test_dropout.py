"""Our dropout is `F.dropout`, with other random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.config import ModelConfig
from models.dropout import Dropout, dropout
from models.factory import create_model

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_wherever_they_are(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = 40_000
    y = dropout(torch.ones(size, 8, dtype=dtype), p, training=True)
    dropped = (y == 0).double()
    spread = (p * (1 - p) / size) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 5 * spread  # in each column: a number's 16 bits
    # Neighbours are independent: both are dropped with probability p².
    both = (dropped[:, 1:] * dropped[:, :-1]).mean(0)
    assert (both - p * p).abs().max() < 5 * (p * p * (1 - p * p) / size) ** 0.5
    kept = y[y != 0]
    assert (kept == kept[0]).all()
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=max(2e-4, torch.finfo(dtype).eps))


def test_gradients_are_those_of_what_was_kept() -> None:
    x = torch.randn(5, 7, 3, requires_grad=True)
    y = dropout(x.transpose(0, 1), 0.3, training=True)  # its elements are not one after the other
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x.transpose(0, 1) * grad.transpose(0, 1))
    assert 0 < (grad == 0).sum() < grad.numel()


def test_a_seed_repeats_it() -> None:
    x = torch.ones(1000, dtype=torch.bfloat16)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append([dropout(x, 0.5, training=True) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[2][0])


@pytest.mark.parametrize("size", [0, 1, 3, 6])
def test_any_number_of_elements(size: int) -> None:
    assert dropout(torch.ones(size), 0.2, training=True).shape == (size,)


def test_nothing_is_dropped_but_in_training() -> None:
    x = torch.randn(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("architecture", ["ringformer", "transformer"])
def test_models_have_no_other(architecture: str) -> None:
    sizes = {"model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 2}
    config = ModelConfig.model_validate({"architecture": architecture, **sizes})
    kinds = [type(m) for m in create_model(config, (9, 9), 0).modules()]
    assert Dropout in kinds
    assert nn.Dropout not in kinds
