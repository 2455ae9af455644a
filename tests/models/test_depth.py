"""Each stack has its own number of levels, and a decoder may run fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from safetensors.torch import load_file

from models.config import ActivationCheckpointing, Architecture, ModelConfig
from models.factory import create_model
from models.ringformer import RingDecoder
from models.ringformer.reference import from_reference
from models.seq2seq import TranslationModel
from tests.models.test_models import PAD, VOCAB, loss, sequences, tiny

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@pytest.mark.parametrize(("encoder_levels", "decoder_levels"), [(6, 6), (12, 2), (3, 6)])
def test_core_parameters_at_base_size(encoder_levels: int, decoder_levels: int) -> None:
    """Matrices are those of one layer a stack; a level adds its signals, 8 matrices of 32 × 512,
    and its LayerNorms."""
    layers = 3 * 4 * 512**2 + 2 * 2 * 512 * 2048
    signals, norm = 8 * 32 * 512, 2 * 512
    expected = layers + encoder_levels * (signals + 2 * norm)
    expected += decoder_levels * (signals + 3 * norm)
    config = ModelConfig(encoder_levels=encoder_levels, decoder_levels=decoder_levels)
    with torch.device("meta"):
        assert create_model(config, (VOCAB, VOCAB), PAD).parameter_counts.core == expected


def test_one_number_is_both() -> None:
    config = ModelConfig(num_levels=4)
    assert (config.encoder_levels, config.decoder_levels) == (4, 4)
    config = ModelConfig(num_levels=4, decoder_levels=2)
    assert (config.encoder_levels, config.decoder_levels) == (4, 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("encoder_levels", "decoder_levels"), [(4, 1), (1, 3)])
def test_every_architecture(
    architecture: Architecture, encoder_levels: int, decoder_levels: int
) -> None:
    """Both depths count, every parameter learns, and decoding step by step is the same."""
    model = tiny(architecture, encoder_levels=encoder_levels, decoder_levels=decoder_levels)
    for stack, levels in ((model.encoder, encoder_levels), (model.decoder, decoder_levels)):
        layers = getattr(stack, "layers", None)
        assert (stack.num_levels if layers is None else len(layers)) == levels
    source, target = sequences(6, 4), sequences(5, 5)
    loss(model, source, target).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    model.eval()
    state, layout = IncrementalStateBag(max_num_steps=10), model.layout(source)
    steps = []
    for position in range(target.size(1)):
        token = target[:, position : position + 1]
        steps.append(model(source, layout, token, BatchLayout.of(token), state_bag=state))
        state.increment_step_nr()
    torch.testing.assert_close(
        torch.cat(steps, dim=1), model.logits(source, target), rtol=0, atol=1e-11
    )


def first_levels(model: TranslationModel, levels: int) -> TranslationModel:
    """Return a model whose decoder is the first levels of another's."""
    config = ModelConfig.model_validate({**model.config.model_dump(), "decoder_levels": levels})
    smaller = create_model(config, (VOCAB, VOCAB), PAD).double()
    shapes = smaller.state_dict()
    weights = {name: each[: len(shapes[name])] for name, each in model.state_dict().items()}
    smaller.load_state_dict(weights)
    return smaller


def test_fewer_levels_are_the_first_ones() -> None:
    model = tiny(decoder_levels=3)
    source, target = sequences(6, 4), sequences(5, 5)
    layouts = model.layout(source), model.layout(target)
    for levels in (1, 2, 3):
        found = model.forward(source, layouts[0], target, layouts[1], decoder_levels=levels)
        torch.testing.assert_close(found, first_levels(model, levels).logits(source, target))


def test_fewer_levels_with_checkpoints() -> None:
    """What is recomputed are the levels that ran; the others get no gradient."""
    gradients = []
    for policy in (ActivationCheckpointing(), ActivationCheckpointing(levels=2)):
        model = tiny(dropout=0.2, decoder_levels=4)
        model.checkpoint_activations(policy)
        source, target = sequences(6, 4), sequences(5, 5)
        layouts = model.layout(source), model.layout(target)
        torch.manual_seed(1)
        total = model.forward(source, layouts[0], target, layouts[1], target, decoder_levels=3)
        total.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    norms = gradients[0]["decoder.ffn_layer_norm"]
    assert norms is not None
    assert norms[:3].abs().sum(dim=(1, 2)).all()
    assert not norms[3].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_stream_is_scaled(architecture: Architecture) -> None:
    """LN(α x + y) is LN(x + y/α) with ε/α²: so a scale is that of the matrices that make y, but for
    their gradients."""
    plain, scaled = (tiny(architecture, residual_scale=scale).eval() for scale in (1.0, 3.0))
    names = ("output_proj.weight", "self_attn_output", "cross_attn_output", "ffn_down")
    ours, theirs = plain.state_dict(), scaled.state_dict()
    for name, weight in ours.items():
        factor = 3 if name.endswith(names) else 1
        torch.testing.assert_close(theirs[name], factor * weight)
    source, target = sequences(6, 4), sequences(5, 5)
    found, expected = scaled.logits(source, target), plain.logits(source, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # of ε


def test_a_published_checkpoint_may_have_a_shallow_decoder(shared: Path) -> None:
    golden = load_file(shared / "reference" / "ring_d32.safetensors")
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    cut = {
        name: weight[:2] if name.startswith("decoder.lev_param") else weight
        for name, weight in weights.items()
    }
    whole, model = (from_reference(each, num_heads=4, pad_idx=0) for each in (weights, cut))
    assert isinstance(model.decoder, RingDecoder)
    assert (model.config.encoder_levels, model.config.decoder_levels) == (
        whole.config.encoder_levels, 2,
    )  # fmt: skip
    source, target = golden["input.source"], golden["input.target"]
    layouts = whole.layout(source), whole.layout(target)
    expected = whole.forward(source, layouts[0], target, layouts[1], decoder_levels=2)
    torch.testing.assert_close(model.logits(source, target), expected)
