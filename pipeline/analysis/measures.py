"""One pass over the examples takes all measures of a model, or of two that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.recording import StackRecording, record
from models.stack import Layered
from pipeline.analysis.cka import MinibatchCKA
from pipeline.analysis.distance import (
    MeanAttentionDistance,
    uniform_attention,
    without_class_token,
)
from pipeline.analysis.drawings import draw_cka, draw_cosines, draw_distances, draw_signals
from pipeline.analysis.examples import Analysis, Batch, Examples
from pipeline.analysis.signals import Ring, SignalSizes
from pipeline.analysis.similarity import StateCosines

DIGITS = 5  # of numbers in the JSON files; beyond, they depend on the order of additions

Floats = NDArray[np.floating[Any]]


class _ModelMeasures:
    """What is measured of one model, stack by stack."""

    def __init__(self, model: Layered) -> None:
        self.model = model
        self.distances = {stack: MeanAttentionDistance() for stack in model.stacks}
        self.uniform = {stack: MeanAttentionDistance() for stack in model.stacks}
        self.cosines = {stack: StateCosines() for stack in model.stacks}
        self.signals = {stack: SignalSizes() for stack in model.stacks}

    def add(self, batch: Batch, examples: Examples) -> dict[str, Tensor]:
        """Take a batch in.

        :returns: by stack, the mean state of each example behind each level, `[N + 1, B, d]`.
        """
        recorded = record(self.model.stacks, partial(batch.run, self.model))
        pooled = {}
        for name, stack in self.model.stacks.items():
            found = recorded[name]
            real = batch.real.get(name, torch.ones_like(found.states[0, :, :, 0], dtype=torch.bool))
            self._add_distances(name, found, real, examples)
            self.cosines[name].add(found.states, real)
            if isinstance(stack, Ring):
                self.signals[name].add(stack, found, real)
            pooled[name] = _mean_of_positions(found.states, real)
        return pooled

    def _add_distances(
        self, stack: str, found: StackRecording, real: Tensor, examples: Examples
    ) -> None:
        attention = found.self_attention
        if examples.class_token:
            attention, real = without_class_token(attention), real[:, 1:]
        distances = examples.distances(attention.size(-1))
        self.distances[stack].add(attention, distances, real)
        self.uniform[stack].add(uniform_attention(attention), distances, real)

    def distances_of_stacks(self) -> dict[str, tuple[Floats, float]]:
        """Return the distances of each stack's heads, and of uniform attention."""
        return {
            stack: (_array(one.value()), self.uniform[stack].value().item())
            for stack, one in self.distances.items()
        }


def _mean_of_positions(states: Tensor, real: Tensor) -> Tensor:
    """Return the mean over those positions that are no padding: `[L, B, S, d]` → `[L, B, d]`."""
    weights = real / real.sum(1, keepdim=True)
    return torch.einsum("lbsd,bs->lbd", states, weights.to(states))


def measure(
    models: Mapping[str, Layered], examples: Examples, advance: Callable[[], None]
) -> Iterator[Analysis]:
    """Yield the analyses that are means over all examples.

    :param models: by name; one, or two to compare: CKA is then between their levels.
    :param advance: called after each batch.
    """
    measures = {name: _ModelMeasures(model) for name, model in models.items()}
    names = list(models)
    first, last = names[0], names[-1]
    cka = {stack: MinibatchCKA() for stack in models[first].stacks}
    for batch in examples.batches():
        pooled = {name: each.add(batch, examples) for name, each in measures.items()}
        for stack, similarity in cka.items():
            similarity.add(pooled[first][stack], pooled[last][stack])
        advance()

    about = {"examples": len(examples), "example": examples.what}
    matrices = {stack: _array(similarity.value()) for stack, similarity in cka.items()}
    yield Analysis(
        "cka",
        {**about, "rows": first, "columns": last, "stacks": rounded(matrices)},
        partial(draw_cka, (first, last), matrices),
    )
    distances = {name: each.distances_of_stacks() for name, each in measures.items()}
    yield Analysis(
        "attention_distance",
        {
            **about,
            "unit": examples.unit,
            "models": {
                name: {
                    stack: {"levels": rounded(heads), "uniform": rounded(uniform)}
                    for stack, (heads, uniform) in stacks.items()
                }
                for name, stacks in distances.items()
            },
        },
        partial(draw_distances, distances, examples.unit),
    )
    cosines = {
        name: {stack: _array(one.value()) for stack, one in each.cosines.items()}
        for name, each in measures.items()
    }
    yield Analysis(
        "state_similarity",
        {**about, "models": rounded(cosines)},
        partial(draw_cosines, cosines),
    )
    if len(models) == 1:
        yield _signals(measures[first], about)


def _signals(measures: _ModelMeasures, about: Mapping[str, object]) -> Analysis:
    """Return the analysis of a model's level signals."""
    shares = {stack: sizes.value() for stack, sizes in measures.signals.items()}
    arrays = {
        stack: {
            name: (_array(share.of_input), _array(share.of_projection))
            for name, share in projections.items()
        }
        for stack, projections in shares.items()
    }
    content = {
        stack: {
            name: {"of_input": rounded(of_input), "of_projection": rounded(of_projection)}
            for name, (of_input, of_projection) in projections.items()
        }
        or "no level signals"
        for stack, projections in arrays.items()
    }
    return Analysis("signals", {**about, "stacks": content}, partial(draw_signals, arrays))


def _array(values: Tensor) -> Floats:
    array: Floats = values.cpu().numpy()
    return array


def rounded(value: Any) -> Any:
    """Return nested mappings of arrays as JSON values; what is not a number as null."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [rounded(item) for item in value]
    return round(float(value), DIGITS) if np.isfinite(value) else None
