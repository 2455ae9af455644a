"""Learning-rate schedules have the values of their formulas."""

from __future__ import annotations

import pytest

from pipeline.training.learning_rate import learning_rate_factor
from pipeline.translation_recipe import TranslationTraining


def test_learning_rate_schedules() -> None:
    config = TranslationTraining(max_steps=110, warmup_steps=10)
    factors = [learning_rate_factor(config, step, 512, 110) for step in range(111)]
    assert factors[0] == 0.1
    assert max(factors) == factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    rooted = config.model_copy(update={"schedule": "inverse_sqrt"})
    assert learning_rate_factor(rooted, 39, 512, 110) == pytest.approx(0.5)
    noam = config.model_copy(update={"schedule": "noam"})
    peak = 512**-0.5 * 10**-0.5
    assert learning_rate_factor(noam, 9, 512, 110) == pytest.approx(peak)
    assert learning_rate_factor(noam, 4, 512, 110) == pytest.approx(peak / 2)
    assert learning_rate_factor(noam, 39, 512, 110) == pytest.approx(peak / 2)
