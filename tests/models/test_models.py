"""Every architecture through the factory."""

from __future__ import annotations

import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor

from models.config import Architecture, ModelConfig
from models.factory import create_model
from models.ringformer.level_signal import LevelFeedForward, LevelProjection
from models.seq2seq import TranslationModel, core_parameters

PAD, VOCAB = 0, 40
ARCHITECTURES: list[Architecture] = ["ringformer", "transformer"]


def tiny(architecture: Architecture = "ringformer", **changes: object) -> TranslationModel:
    """A float64 model with random weights everywhere, level signals included."""
    sizes = {
        "model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 3, "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"architecture": architecture, **sizes, **changes})
    model = create_model(config, VOCAB, PAD).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3)
    return model


def sequences(*lengths: int) -> Tensor:
    """Random ids padded on the right, `[len(lengths), max]`."""
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    return ids


@pytest.mark.parametrize(
    ("architecture", "expected"), [("ringformer", 8_943_616), ("transformer", 44_070_912)]
)
def test_core_parameters_of_the_base_model(architecture: Architecture, expected: int) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig(architecture=architecture), VOCAB, PAD)
    assert core_parameters(model) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_nothing(architecture: Architecture, tied: bool) -> None:
    model = tiny(architecture, tied_embeddings=tied).eval()
    source, target = sequences(7, 3), sequences(4, 6)
    together = model.logits(source, target)
    for row, (s, t) in enumerate([(7, 4), (3, 6)]):
        alone = model.logits(source[row : row + 1, :s], target[row : row + 1, :t])
        torch.testing.assert_close(together[row, :t], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_does_not_see_the_future(architecture: Architecture) -> None:
    model = tiny(architecture).eval()
    source, target = sequences(5), sequences(6)
    changed = target.clone()
    changed[0, 3] = (target[0, 3] + 1) % VOCAB
    before, after = model.logits(source, target), model.logits(source, changed)
    torch.testing.assert_close(before[0, :3], after[0, :3])
    assert not torch.allclose(before[0, 3:], after[0, 3:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_incremental_decoding_equals_a_full_pass(architecture: Architecture) -> None:
    """Past the cache's growth step, and with two hypotheses of a source changing places."""
    model = tiny(architecture).eval()
    source, target = sequences(6, 4)[[0, 0, 1]], sequences(21, 21, 21)
    order = torch.tensor([1, 0, 2])
    source_layout = model.layout(source)
    state = IncrementalStateBag(max_num_steps=30)
    steps: list[Tensor] = []
    for position in range(target.size(1)):
        if position == 9:
            state.reorder(order)
            target = target[order]
            steps = [step[order] for step in steps]
        token = target[:, position : position + 1]
        steps.append(model(source, source_layout, token, BatchLayout.of(token), state_bag=state))
        state.increment_step_nr()
    expected = model.logits(source[order], target)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("segment_length", [1, 2, 3])
def test_checkpointing_changes_no_gradient_under_dropout(segment_length: int) -> None:
    model = tiny(dropout=0.2)
    source, target = sequences(7, 3), sequences(4, 6)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        layouts = model.layout(source), model.layout(target)
        model(source, layouts[0], target, layouts[1], target).backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    kept = gradients()
    model.checkpoint_levels(segment_length)
    for ours, expected in zip(gradients(), kept, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_checkpointing_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="checkpoint_levels"):
        tiny("transformer").checkpoint_levels(1)


def test_level_signals_are_the_papers_equations() -> None:
    """q = W x + Aᵀ(B x), and FFN(x) = W_down gelu(W_up (x + Aᵀ(B x))), level by level."""
    torch.manual_seed(0)
    projection = LevelProjection(8, num_projections=3, num_levels=2, rank=2).double()
    ffn = LevelFeedForward(8, 16, num_levels=2, rank=2, dropout=0.0).double()
    for module in (projection, ffn):
        torch.nn.init.normal_(module.signal_a)
        torch.nn.init.normal_(module.signal_b)
    x = torch.randn(8, dtype=torch.float64)
    for level in range(2):
        folded = projection()[level] @ x
        for index, weight in enumerate(projection.weight):
            a, b = projection.signal_a[level, index], projection.signal_b[level, index]
            expected = weight @ x + a.T @ (b @ x)
            torch.testing.assert_close(folded[8 * index : 8 * index + 8], expected)
        a, b = ffn.signal_a[level], ffn.signal_b[level]
        hidden = torch.nn.functional.gelu(ffn.up @ (x + a.T @ (b @ x)))
        torch.testing.assert_close(ffn(x, level), ffn.down @ hidden)


def test_a_fresh_ring_is_a_plain_weight_tied_transformer() -> None:
    model = create_model(ModelConfig(model_dim=16, num_heads=2), VOCAB, PAD)
    projection = model.encoder.self_attn_qkv
    assert isinstance(projection, LevelProjection)
    for level in projection():
        assert torch.equal(level, projection.weight.flatten(0, 1))


def test_a_sequence_over_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_seq_len"):
        tiny(max_seq_len=8).logits(sequences(9), sequences(3))
