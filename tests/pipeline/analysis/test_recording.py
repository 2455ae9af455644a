"""A recording has what the model computes, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.config import ModelConfig
from models.padding import padding_mask
from models.recording import StackRecording, record
from models.ringformer import RingDecoder, RingEncoder
from models.seq2seq import TranslationModel
from pipeline.analysis.signals import SignalSizes
from tests.models.test_models import ARCHITECTURES, PAD, sequences, tiny

SIGNALS = ("attention", "ffn", "static", "none")
MODELS: list[Any] = [
    *({"architecture": each} for each in ARCHITECTURES),
    *({"level_signals": each} for each in SIGNALS),
]
every_model = pytest.mark.parametrize("changes", MODELS, ids=lambda changes: str(*changes.values()))


class KernelCalls(TorchFunctionMode):
    """Keeps what attention was computed of, and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.made.append((args[2], result))
        return result


def batch() -> tuple[Tensor, Tensor]:
    """Return source and target ids with padding."""
    torch.manual_seed(1)
    return sequences(9, 5, 7), sequences(4, 8, 6)


def recorded(model: TranslationModel) -> dict[str, StackRecording]:
    return record(model.stacks, partial(model.logits, *batch()))


@every_model
def test_attention_is_what_the_kernel_multiplies_with_v(changes: dict[str, object]) -> None:
    with KernelCalls() as calls:
        found = recorded(tiny(**changes).eval())  # type: ignore[arg-type]
    encoder, decoder = found["encoder"], found["decoder"]
    assert encoder.cross_attention is None
    assert decoder.cross_attention is not None
    pairs = zip(decoder.self_attention, decoder.cross_attention, strict=True)
    matrices = [*encoder.self_attention, *(matrix for pair in pairs for matrix in pair)]
    for matrix, (v, result) in zip(matrices, calls.made, strict=True):
        torch.testing.assert_close(matrix @ v, result)
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    source, target = batch()
    padding = (source == PAD)[:, None, None]
    for matrices_of_levels in (encoder.self_attention, decoder.cross_attention):
        assert not (matrices_of_levels * padding).any()
    assert not decoder.self_attention.triu(1).any()
    assert decoder.self_attention.shape == (3, 3, 2, target.size(1), target.size(1))


@every_model
def test_states_are_those_of_a_run_level_by_level(changes: dict[str, object]) -> None:
    model = tiny(**changes).eval()  # type: ignore[arg-type]
    source, target = batch()
    found = recorded(model)
    with torch.no_grad():
        x, layout = model.encoder_frontend(source, model.layout(source))
        y, y_layout = model.decoder_frontend(target, model.layout(target))
        states = [x, *encoder_states(model, x, layout)]
        memory = states[-1]
        decoded = [y]
        for levels in range(1, 4):
            some: Any = {"num_levels": levels} if isinstance(model.decoder, RingDecoder) else {}
            decoded.append(model.decoder(y, y_layout, memory, layout, **some))
        logits = model.logits(source, target)
    torch.testing.assert_close(found["encoder"].states, torch.stack(states))
    if isinstance(model.decoder, RingDecoder):
        torch.testing.assert_close(found["decoder"].states, torch.stack(decoded))
    torch.testing.assert_close(found["decoder"].states[-1], decoded[-1])
    torch.testing.assert_close(model.final_proj(found["decoder"].states[-1], None), logits)


def encoder_states(model: TranslationModel, x: Tensor, layout: Any) -> list[Tensor]:
    """Return what leaves each level of the encoder."""
    encoder, states = model.encoder, []
    for i in range(3):
        if isinstance(encoder, RingEncoder):
            x = encoder.add_encodings(x, i, range(x.size(1)))
            x = encoder.layer(x, encoder.levels(x)[i], padding_mask(layout), None)
        else:
            x = encoder.layers[i](x, layout, None)
        states.append(x)
    return states


@every_model
def test_the_model_stays_as_it_was(changes: dict[str, object]) -> None:
    model = tiny(**changes).eval()  # type: ignore[arg-type]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    prepared = getattr(model.encoder, "prepared_layer", None)
    with torch.no_grad():
        expected = model.logits(*batch())
    recorded(model)
    with pytest.raises(ZeroDivisionError):
        record(model.stacks, lambda: 1 / 0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert getattr(model.encoder, "prepared_layer", None) == prepared
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model.logits(*batch()), expected, rtol=0, atol=0)


# ── Signals ─────────────────────────────────────────────────────────────────────────────────────


def sizes(model: TranslationModel, stack: str = "encoder") -> Mapping[str, Any]:
    """Return the sizes of the signals in a batch, each rounded `[N]`."""
    source, target = batch()
    measure = SignalSizes()
    real = {"encoder": source != PAD, "decoder": target != PAD}[stack]
    ring = model.stacks[stack]
    assert isinstance(ring, RingEncoder | RingDecoder)
    measure.add(ring, recorded(model)[stack], real)
    return measure.value()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_signals_of_known_size(stack: str) -> None:
    """With M = s I everywhere, M x is s times as large as x, and W M x as W x."""
    model = tiny(signal_rank=16).eval()
    for ring in (model.encoder, model.decoder):
        assert isinstance(ring, RingEncoder | RingDecoder)
        with torch.no_grad():
            for i in range(3):
                for projection, a in enumerate([*ring.qkv_signal_a[i], ring.ffn_signal_a[i]]):  # type: ignore[index]
                    a.copy_(torch.eye(16) * (i + 1) * 10.0**-projection)
            for b in (ring.qkv_signal_b, ring.ffn_signal_b):
                b.copy_(torch.eye(16))  # type: ignore[union-attr]
            ring.self_attn_qkv.copy_(2 * torch.eye(16))  # W
    found = sizes(model, stack)
    levels = torch.arange(1, 4, dtype=torch.float64)
    for projection, name in enumerate(("q", "k", "v", "ffn")):
        expected = levels * 10.0**-projection
        torch.testing.assert_close(found[name].of_input, expected)
        shared = expected if name == "ffn" else expected / 2
        torch.testing.assert_close(found[name].of_projection, shared)


def test_static_signals() -> None:
    model = tiny(level_signals="static").eval()
    found = sizes(model)
    assert list(found) == ["q", "k", "v", "ffn"]
    encoder, states = model.encoder, recorded(model)["encoder"].states
    assert isinstance(encoder, RingEncoder)
    assert encoder.qkv_signal is not None
    x = states[0][batch()[0] != PAD]
    q = encoder.qkv_signal[0, :16]
    torch.testing.assert_close(found["q"].of_input[0], (q.norm() / x.norm(dim=1)).mean())
    projected = (x @ encoder.self_attn_qkv[0].T).norm(dim=1)
    torch.testing.assert_close(found["q"].of_projection[0], (q.norm() / projected).mean())


def test_which_signals_there_are() -> None:
    assert list(sizes(tiny(level_signals="attention").eval())) == ["q", "k", "v"]
    assert list(sizes(tiny(level_signals="ffn").eval())) == ["ffn"]
    assert not sizes(tiny(level_signals="none").eval())
    assert not sizes(tiny("one_wide_ffn").eval(), "decoder")
    assert ModelConfig().level_signals == "all"
