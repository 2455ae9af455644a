"""These tests build every architecture through the factory."""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy

from data_prep.batch_plan import BatchPlan
from models.activation_checkpointing import ATTENTION
from models.config import ActivationCheckpointing, Architecture, LevelSignals, ModelConfig
from models.factory import create_model
from models.output import OutputProjection
from models.ringformer import RingEncoder
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel
from pipeline.translation.batches import PairBatch, collate_ids
from tests.conftest import run_process
from tests.models.gradient_order import names_as_ready

PAD, VOCAB = 0, 40
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


def tiny(architecture: Architecture = "ringformer", **changes: object) -> TranslationModel:
    """Build a small float64 model with random weights everywhere, level signals included."""
    sizes = {
        "model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 3, "dropout": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"architecture": architecture, **sizes, **changes})
    model = create_model(config, (VOCAB, VOCAB), PAD).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name:
                parameter.normal_(std=0.3)
    return model


def sequences(*lengths: int) -> Tensor:
    """Return random ids padded on the right, `[len(lengths), max]`."""
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length:] = PAD
    return ids


def loss(model: TranslationModel, source: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return the loss of predicting `target` after itself: everything in the model takes part."""
    layouts = model.layout(source), model.layout(target)
    total: Tensor = model(source, layouts[0], target, layouts[1], target, **options)
    return total


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8_943_616),
        ({"architecture": "transformer"}, 44_070_912),
        ({"architecture": "universal"}, 7_345_152),
        ({"architecture": "one_wide_ffn"}, 20_996_096),
        ({"level_signals": "attention"}, 8_550_400),
        ({"level_signals": "ffn"}, 7_763_968),
        ({"level_signals": "static"}, 7_395_328),
        ({"level_signals": "none"}, 7_370_752),
        ({"signal_rank": 64}, 10_516_480),
    ],
)
def test_core_parameters_at_base_size(changes: dict[str, object], expected: int) -> None:
    with torch.device("meta"):
        model = create_model(ModelConfig.model_validate(changes), (VOCAB, VOCAB), PAD)
    assert model.parameter_counts.core == expected


# Checkpoints and exports depend on these names, and optimizer states on their order.
SELF_ATTN = ["self_attn_qkv", "self_attn_output", "self_attn_layer_norm"]
FFN = ["ffn_up", "ffn_down", "ffn_layer_norm"]
CROSS_ATTN = ["cross_attn_q", "cross_attn_kv", "cross_attn_output", "cross_attn_layer_norm"]
QKV_SIGNAL = ["qkv_signal_a", "qkv_signal_b"]
FFN_SIGNAL = ["ffn_signal_a", "ffn_signal_b"]
PROJECTIONS = [f"{name}_proj.weight" for name in ("q", "k", "v", "output")]
NORM = ["weight", "bias"]
TRANSFORMER_SELF_ATTN = [
    *(f"self_attn.{name}" for name in PROJECTIONS),
    *(f"self_attn_layer_norm.{name}" for name in NORM),
]
TRANSFORMER_CROSS_ATTN = [
    *(f"encoder_decoder_attn.{name}" for name in PROJECTIONS),
    *(f"encoder_decoder_attn_layer_norm.{name}" for name in NORM),
]
TRANSFORMER_FFN = [
    "ffn.inner_proj.weight",
    "ffn.output_proj.weight",
    *(f"ffn_layer_norm.{name}" for name in NORM),
]


def layers(*names: str) -> list[str]:
    return [f"layers.{index}.{name}" for index in range(2) for name in names]


RING = [*SELF_ATTN, *FFN]
ALL = [*RING, *QKV_SIGNAL, *FFN_SIGNAL]
STATIC = [*RING, "qkv_signal", "ffn_signal"]
NAMES: list[tuple[Architecture, LevelSignals, list[str], list[str]]] = [
    ("ringformer", "all", ALL, [*ALL, *CROSS_ATTN]),
    ("ringformer", "attention", [*RING, *QKV_SIGNAL], [*RING, *QKV_SIGNAL, *CROSS_ATTN]),
    ("ringformer", "ffn", [*RING, *FFN_SIGNAL], [*RING, *FFN_SIGNAL, *CROSS_ATTN]),
    ("ringformer", "static", STATIC, [*STATIC, *CROSS_ATTN]),
    ("ringformer", "none", RING, [*RING, *CROSS_ATTN]),
    ("universal", "all", RING, [*RING, *CROSS_ATTN]),
    ("one_wide_ffn", "all", RING, [*SELF_ATTN, *CROSS_ATTN]),
    (
        "transformer",
        "all",
        layers(*TRANSFORMER_SELF_ATTN, *TRANSFORMER_FFN),
        layers(*TRANSFORMER_SELF_ATTN, *TRANSFORMER_CROSS_ATTN, *TRANSFORMER_FFN),
    ),
]


@pytest.mark.parametrize(("architecture", "signals", "encoder", "decoder"), NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_in_state_dicts(
    architecture: Architecture,
    signals: LevelSignals,
    encoder: list[str],
    decoder: list[str],
    tied: bool,
) -> None:
    table = [] if architecture == "universal" else ["pos_encoder.table"]
    model = tiny(architecture, level_signals=signals, num_levels=2, tied_embeddings=tied)
    assert list(model.state_dict()) == [
        *(f"encoder_frontend.{name}" for name in ["embed.weight", *table]),
        *(f"encoder.{name}" for name in encoder),
        *(f"decoder_frontend.{name}" for name in ["embed.weight", *table]),
        *(f"decoder.{name}" for name in decoder),
        *(f"final_proj.{name}" for name in (["weight"] if tied else ["weight", "bias"])),
    ]


@pytest.mark.parametrize("signals", get_args(LevelSignals))
def test_every_parameter_of_every_ablation_learns(signals: LevelSignals) -> None:
    model = tiny(level_signals=signals)
    loss(model, sequences(7, 3), sequences(4, 6)).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert any("signal" in name for name, _ in model.named_parameters()) == (signals != "none")


def test_signals_of_a_rival_are_refused() -> None:
    with pytest.raises(ValueError, match="for architecture ringformer only"):
        ModelConfig(architecture="universal", level_signals="static")


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "most"), [("ringformer", 2), ("transformer", 4)])
def test_an_epoch_compiles_in_its_first_steps(architecture: Architecture, most: int) -> None:
    """There are batches with padding and without, of few positions, and as long on both sides."""
    generator = np.random.default_rng(1)
    lengths = [generator.integers(2, 14, 80) for _ in range(2)]
    plan = BatchPlan(*lengths, max_tokens=108, micro_batch_tokens=36, seed=0)
    batches = []
    for step in range(plan.steps_per_epoch):
        for pairs in plan[step].micro_batches:
            sides = [[generator.integers(4, VOCAB, n) for n in own[pairs]] for own in lengths]
            batches.append(collate_ids(sides[0], sides[1], torch.device("cpu")))
    several = [batch for batch in batches if len(batch.targets) > 1]
    assert len(several) == len(batches) - 1
    kinds = set()
    for batch in several:
        source, padded = batch.source_seqs, batch.source_seqs_layout.padded
        kinds.add((padded, source.numel() < 24, source.size(1) == batch.targets.size(1)))
    assert len(kinds) == 6

    def train(model: TranslationModel, batches: list[PairBatch]) -> None:
        for batch in batches:
            model(*batch).backward()  # type: ignore[no-untyped-call]

    expected, model = (tiny(architecture, num_levels=4) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = CompileCounterWithBackend("eager")
    model.compile_layers(graphs)  # type: ignore[arg-type]
    train(model, several[:4])
    assert graphs.frame_count <= most  # not one for each of 4 + 4 levels
    once = graphs.frame_count
    train(model, several[4:])
    assert graphs.frame_count == once
    assert not torch._dynamo.utils.counters["graph_break"]
    train(expected, several)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)
    train(model, [batch for batch in batches if len(batch.targets) == 1])
    assert graphs.frame_count == once + 2  # torch has others for 1


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
    """Decoding goes past the cache's growth step, and two hypotheses of a source change places."""
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


POLICIES = {
    "every level": ActivationCheckpointing(levels=1),
    "every 2 levels": ActivationCheckpointing(levels=2),
    "all levels at once": ActivationCheckpointing(levels=3),
    "selective": ActivationCheckpointing(levels=1, keep_attention=True),
    "offloaded": ActivationCheckpointing(levels=2, cpu_offload=True),
    "selective, offloaded": ActivationCheckpointing(
        levels=1, keep_attention=True, cpu_offload=True
    ),
}


@pytest.mark.parametrize(
    ("policy", "compiler"),
    [
        *((policy, None) for policy in POLICIES.values()),
        pytest.param(POLICIES["every 2 levels"], "aot_eager", marks=pytest.mark.slow),
        pytest.param(POLICIES["selective"], "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_checkpointing_changes_no_gradient_under_dropout(
    policy: ActivationCheckpointing, compiler: str | None
) -> None:
    source, target = sequences(7, 3), sequences(4, 6)
    counters = torch._dynamo.utils.counters

    def gradients(policy: ActivationCheckpointing) -> list[Tensor]:
        model = tiny(dropout=0.2, residual_scale=1.5)
        model.checkpoint_activations(policy)
        torch._dynamo.reset()
        counters.clear()
        if compiler:
            model.compile_layers(compiler)
        torch.manual_seed(3)
        loss(model, source, target).backward()  # type: ignore[no-untyped-call]
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == (2 if compiler else 0)  # encoder, decoder
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept = gradients(ActivationCheckpointing())
    for ours, expected in zip(gradients(policy), kept, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_what_the_compiler_recomputes_has_the_same_dropout() -> None:
    """Its random numbers are its own, and others for every policy: gradients are compared with the
    loss a little further on."""
    model = tiny(dropout=0.2).float()  # it fails with float64 attention
    model.checkpoint_activations(POLICIES["selective"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_layers()
    torch.manual_seed(1)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def loss_at(distance: float) -> Tensor:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(direction[name], alpha=distance)
        torch.manual_seed(3)
        return loss(model, sequences(7, 3), sequences(4, 6))

    loss_at(0).backward()  # type: ignore[no-untyped-call]
    slope = sum(
        float((p.grad * direction[name]).sum())
        for name, p in model.named_parameters()
        if p.grad is not None
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    step = 1e-3
    further, before = float(loss_at(step)), float(loss_at(-2 * step))
    assert (further - before) / (2 * step) == pytest.approx(slope, rel=1e-2)


def attentions(model: TranslationModel) -> int:
    """Count how often a forward and backward pass computes attention."""
    with torch.profiler.profile() as profile:
        loss(model, sequences(7, 3), sequences(4, 6)).backward()  # type: ignore[no-untyped-call]
    names = {f"aten::{operator.overloadpacket.__name__}" for operator in ATTENTION}
    calls = [event for event in profile.events() or [] if event.name in names]
    # A call that is answered with what was kept computes nothing in it.
    return sum(any("empty" in part.name for part in call.cpu_children) for call in calls)


def test_selective_checkpointing_recomputes_no_attention() -> None:
    model = tiny(dropout=0.2, num_levels=3)
    once = attentions(model)
    assert once == 3 * 3  # encoder, decoder, and cross-attention at 3 levels
    model.checkpoint_activations(POLICIES["every level"])
    assert attentions(model) == 2 * once
    model.checkpoint_activations(POLICIES["selective"])
    assert attentions(model) == once


@pytest.mark.parametrize(
    "arguments", [{"levels": 2, "keep_attention": True}, {"cpu_offload": True}]
)
def test_checkpointing_policies_that_cannot_be(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs levels"):
        ActivationCheckpointing(**arguments)


def test_checkpointing_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing\.levels to 0"):
        tiny("transformer").checkpoint_activations(ActivationCheckpointing(levels=1))


WIDE = 352  # too wide for the signals of q, k and v to be one product


def with_signals(fold: bool, **changes: object) -> TranslationModel:
    """Build `tiny()` with level signals folded into the weights, or applied to the tokens."""
    model = tiny("ringformer", **changes)
    for ring in (model.encoder, model.decoder):
        assert isinstance(ring, Ring)
        ring.fold_over = 0 if fold else math.inf
    return model


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        *(({"architecture": each}, None) for each in ARCHITECTURES),
        *(({"architecture": each, "tied_embeddings": False}, None) for each in ARCHITECTURES),
        *(({"level_signals": each}, None) for each in get_args(LevelSignals)),
        ({"model_dim": WIDE}, None),
        *(({"dropout": 0.1}, each) for each in POLICIES.values()),
    ],
)
def test_gradients_are_ready_in_one_order(
    changes: dict[str, Any], policy: ActivationCheckpointing | None
) -> None:
    """DeepSpeed adds up those of all ranks in that order, whatever each of them works on."""
    model = tiny(**changes)
    if policy:
        model.checkpoint_activations(policy)
    ready, orders = names_as_ready(model), set()
    of_all = changes.get("architecture") in ("transformer", "one_wide_ffn")
    depths = [None] if of_all else [None, 1, 2]  # as training.random_depth draws them
    for lengths, depth in product(((9, 30, 2), (2,), (20,)), depths):
        ready.clear()
        value = loss(model, sequences(*lengths), sequences(*lengths), decoder_levels=depth)
        value.backward()  # type: ignore[no-untyped-call]
        orders.add(tuple(ready))
    assert len(orders) == 1


@pytest.mark.parametrize("width", [16, WIDE])
@pytest.mark.parametrize("fold", [True, False])
def test_level_signals_are_the_papers_equations(fold: bool, width: int) -> None:
    """At each level q = W x + Aᵀ(B x), and FFN(x) = W_down gelu(W_up (x + Aᵀ(B x)))."""
    ring = with_signals(fold, model_dim=width).eval().encoder
    assert isinstance(ring, RingEncoder)
    x = torch.randn(2, 5, width, dtype=torch.float64)
    weights = dict(ring.named_parameters())
    for i, level in enumerate(ring.levels(x)):
        assert (level.self_attn.signal is None) == fold
        for index, heads in enumerate(ring.qkv(x, level.self_attn)):
            a, b = weights["qkv_signal_a"][i, index], weights["qkv_signal_b"][i, index]
            expected = x @ weights["self_attn_qkv"][index].T + (x @ b.T) @ a
            torch.testing.assert_close(heads.transpose(1, 2).flatten(2), expected)
        a, b = weights["ffn_signal_a"][i], weights["ffn_signal_b"][i]
        hidden = torch.nn.functional.gelu((x + (x @ b.T) @ a) @ weights["ffn_up"].T)
        assert level.ffn is not None
        torch.testing.assert_close(ring.feed_forward(x, level.ffn), hidden @ weights["ffn_down"].T)


def test_static_signals_are_added_to_projections_and_to_the_ffn_input() -> None:
    ring = tiny(level_signals="static").eval().encoder
    assert isinstance(ring, RingEncoder)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    weights = dict(ring.named_parameters())
    for i, level in enumerate(ring.levels(x)):
        projected = torch.cat([x @ weight.T for weight in weights["self_attn_qkv"]], dim=2)
        found = torch.cat(
            [h.transpose(1, 2).flatten(2) for h in ring.qkv(x, level.self_attn)], dim=2
        )
        torch.testing.assert_close(found, projected + weights["qkv_signal"][i])
        hidden = torch.nn.functional.gelu((x + weights["ffn_signal"][i]) @ weights["ffn_up"].T)
        assert level.ffn is not None
        torch.testing.assert_close(ring.feed_forward(x, level.ffn), hidden @ weights["ffn_down"].T)


@pytest.mark.parametrize("signals", ["all", "attention", "ffn"])
def test_folded_and_applied_signals_agree(signals: LevelSignals) -> None:
    source, target = sequences(7, 3), sequences(4, 6)

    def gradients(model: TranslationModel) -> dict[str, Tensor]:
        loss(model, source, target).backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = with_signals(False, level_signals=signals)
    found, expected = gradients(model), gradients(with_signals(True, level_signals=signals))
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10)


def test_folded_weights_are_kept_until_a_parameter_changes() -> None:
    model = tiny().eval()
    source, target = sequences(7, 3), sequences(4, 6)
    ring, x = model.encoder, torch.zeros(8, 8, 16)
    assert isinstance(ring, RingEncoder)
    with torch.no_grad():
        before = model.logits(source, target)
        kept = ring.levels(x)
        assert ring.levels(x) is kept
        assert ring.levels(x[:1]) is not kept  # and few positions change nothing
        assert ring.levels(x) is kept
        ring.self_attn_qkv.mul_(1.5)
        after = model.logits(source, target)
        assert ring.levels(x) is not kept
        assert not torch.allclose(before, after)
        model.load_state_dict(tiny().state_dict())
        torch.testing.assert_close(model.logits(source, target), before)
    torch.testing.assert_close(model.train().logits(source, target), before)


def test_a_fresh_ring_is_a_plain_weight_tied_transformer() -> None:
    model = create_model(ModelConfig(model_dim=16, num_heads=2), (VOCAB, VOCAB), PAD)
    ring = model.encoder
    assert isinstance(ring, RingEncoder)
    for level in ring.make_levels(fold=True):
        assert torch.equal(level.self_attn.qkv, ring.self_attn_qkv.flatten(0, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_levels", [2, 8])
def test_initial_weights(architecture: Architecture, num_levels: int) -> None:
    """They are as fairseq2's; what is added to the residual stream starts at 1/N of that."""
    dim, inner_dim = 64, 256
    model = tiny(architecture, model_dim=dim, ffn_inner_dim=inner_dim, num_levels=num_levels)
    for names, expected in (
        (("self_attn.v_proj.weight", "self_attn_qkv"), (3 / (2 * dim)) ** 0.5),
        (("self_attn.output_proj.weight", "self_attn_output"), (3 / dim) ** 0.5 / num_levels),
        (("decoder_attn.output_proj.weight", "cross_attn_output"), (3 / dim) ** 0.5 / num_levels),
        (("ffn.inner_proj.weight", "ffn_up"), dim**-0.5),
        (("ffn.output_proj.weight", "ffn_down"), inner_dim**-0.5 / num_levels),
    ):
        weights = [p for name, p in model.named_parameters() if name.endswith(names)]
        assert max(weight.abs().max().item() for weight in weights) == pytest.approx(expected, 0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_levels", [1, 6, 12])
def test_initially_two_sentences_differ(architecture: Architecture, num_levels: int) -> None:
    """Encodings of full size before each of 6 levels would make the cosine 0.999."""
    torch.manual_seed(0)
    config = ModelConfig(
        architecture=architecture, model_dim=64, num_heads=4, ffn_inner_dim=256,
        num_levels=num_levels,
    )  # fmt: skip
    model = create_model(config, (VOCAB, VOCAB), PAD).eval()
    source = sequences(12, 12)
    with torch.no_grad():
        first, second = model.encoder(*model.encoder_frontend(source, model.layout(source)))
    assert torch.cosine_similarity(first, second, dim=-1).mean() < 0.8


def test_universal_transformer_has_one_of_everything() -> None:
    with torch.device("meta"):
        sizes = [
            create_model(config, (VOCAB, VOCAB), PAD).parameter_counts.core
            for config in (
                ModelConfig(architecture="universal", num_levels=1),
                ModelConfig(architecture="universal", num_levels=6),
            )
        ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("architecture", ["ringformer", "universal", "one_wide_ffn"])
@pytest.mark.parametrize("levels", [1, 2])
def test_recomputed_levels_are_the_same(architecture: Architecture, levels: int) -> None:
    model = tiny(architecture).train()
    source, target = sequences(7, 3), sequences(4, 6)
    expected = loss(model, source, target)
    model.checkpoint_activations(ActivationCheckpointing(levels=levels))
    torch.testing.assert_close(loss(model, source, target), expected, rtol=0, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_logits", [40, 200, 10_000])
def test_the_chunked_loss_is_cross_entropy(
    label_smoothing: float, tied: bool, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is one token, five tokens, or all tokens."""
    monkeypatch.setattr("models.output.MAX_LOGITS", max_logits)
    source, target = sequences(7, 3), sequences(4, 6)

    def gradients(chunked: bool) -> tuple[Tensor, list[Tensor]]:
        model = tiny(tied_embeddings=tied)
        if chunked:
            total = loss(model, source, target, label_smoothing=label_smoothing)
        else:
            logits = model.logits(source, target)
            total = cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum",
                label_smoothing=label_smoothing,
            )  # fmt: skip
        (total / 3).backward()  # type: ignore[no-untyped-call]
        return total, [p.grad for p in model.parameters() if p.grad is not None]

    for found, expected in zip(*(gradients(chunked) for chunked in (True, False)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_in_16_bits_keeps_their_digits(
    dtype: torch.dtype, label_smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens are predicted with confidence, where 1 - p would have no digits left."""
    monkeypatch.setattr("models.output.MAX_LOGITS", 40_000)  # 80 tokens in a chunk
    torch.manual_seed(0)
    weight, bias = torch.randn(2000, 64) / 8, torch.randn(2000) / 8
    targets = torch.randint(1, 2000, (200,))
    x = torch.randn(200, 64) / 4
    x[::2] += weight[targets[::2]] * torch.linspace(4, 24, 100)[:, None]
    targets[-20:] = PAD

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        inputs = [each.to(narrow).to(dtype).requires_grad_() for each in (x, weight, bias)]
        if dtype == narrow:
            projection = OutputProjection(inputs[1], inputs[2], PAD)
            total = projection(inputs[0][None], targets[None], label_smoothing)
        else:
            total = cross_entropy(
                torch.nn.functional.linear(*inputs), targets, ignore_index=PAD, reduction="sum",
                label_smoothing=label_smoothing,
            )  # fmt: skip
        total.backward()
        return [total.detach(), *(each.grad for each in inputs if each.grad is not None)]

    narrow, digits = dtype, torch.finfo(dtype).eps
    found, expected = gradients(dtype), gradients(torch.float64)
    assert found[0].dtype == torch.float32
    for ours, exact, errors in zip(found, expected, (0.1, 1, 1, 1), strict=True):
        assert (ours.double() - exact).norm() < errors * digits * exact.norm()


def test_bf16_autocast_and_positions() -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(model_dim=64, num_heads=4, dropout=0.0), (VOCAB, VOCAB), PAD)
    source, target = sequences(7, 3), sequences(4, 6)
    expected = loss(model, source, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(model, source, target)
    found.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    cast = model.bfloat16()
    torch.testing.assert_close(loss(cast, source, target), expected, rtol=2e-2, atol=0)
    universal = tiny("universal").bfloat16().encoder
    assert isinstance(universal, Ring)
    for positions in (cast.encoder_frontend.pos_encoder, universal.encodings):
        assert positions is not None
        assert positions.table.dtype == torch.float32  # bf16 cannot tell neighbours apart


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_side_may_have_its_own_vocabulary(architecture: Architecture) -> None:
    source_size, target_size = 50, 30
    config = ModelConfig(
        architecture=architecture, model_dim=16, num_heads=2, ffn_inner_dim=32, num_levels=2,
        dropout=0.0, tied_embeddings=False,
    )  # fmt: skip
    model = create_model(config, (source_size, target_size), PAD)
    source = torch.randint(4, source_size, (2, 7))
    target = torch.randint(4, target_size, (2, 5))
    source[0, 0], target[0, 0] = source_size - 1, target_size - 1
    assert model.logits(source, target).shape == (2, 5, target_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = loss(model, source, target)
    before.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert loss(model, source, target) < before


def test_tied_embeddings_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="not 50 and 30 tokens"):
        create_model(ModelConfig(model_dim=16, num_heads=2), (50, 30), PAD)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sequence_over_the_limit_is_refused(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="max_seq_len"):
        tiny(architecture, max_seq_len=8).logits(sequences(9), sequences(3))


def test_two_threads_may_build_the_first_models_of_a_process() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
from models.config import ModelConfig
from models.factory import abstract_model
config = ModelConfig(architecture="transformer", model_dim=32, num_heads=4, ffn_inner_dim=64)
with ThreadPoolExecutor(4) as threads:
    list(threads.map(lambda _: abstract_model(config, (50, 50)), range(4)))
"""
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
