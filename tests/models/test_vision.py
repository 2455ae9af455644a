"""These tests build image classifiers of every architecture through the factory."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import ActivationCheckpointing, Architecture, LevelSignals, VisionConfig
from models.factory import create_classifier
from models.image_classifier import ImageClassifier, ImageShape
from models.ringformer import VisionRing
from models.vision_transformer import VisionTransformer
from tests.models.gradient_order import names_as_ready

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
CLASSES, IMAGE = 10, ImageShape(3, 12)
MODELS: list[tuple[Architecture, LevelSignals]] = [
    *(("ringformer", signals) for signals in get_args(LevelSignals)),
    *((architecture, "all") for architecture in ARCHITECTURES[1:]),
]  # fmt: skip


def tiny(architecture: Architecture = "ringformer", **changes: object) -> ImageClassifier:
    """Build a small float64 classifier with random weights everywhere, level signals included."""
    sizes = {
        "model_dim": 16, "num_heads": 2, "ffn_inner_dim": 32, "num_levels": 3, "dropout": 0.0,
        "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = VisionConfig.model_validate({"architecture": architecture, **sizes, **changes})
    return randomised(create_classifier(config, IMAGE, CLASSES).double())


def randomised(model: ImageClassifier) -> ImageClassifier:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "signal" in name or "bias" in name:
                parameter.normal_(std=0.3)
    return model


def images(count: int = 4) -> Tensor:
    """Return random images, `[B, C, H, W]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=generator)


def gradients(model: ImageClassifier) -> dict[str, Tensor]:
    """Return the gradients of every parameter, of the loss on some images."""
    model.zero_grad()
    torch.manual_seed(3)
    F.cross_entropy(model(images()), torch.tensor([1, 0, 9, 4])).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ── What is in a model ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # ViT S: six layers of four d × d projections and two d × 2048, with biases and LayerNorms.
        (
            {"architecture": "transformer"},
            6 * (4 * (512**2 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512) + 2 * 512,
        ),
        # One such layer; a level owns two LayerNorms, and 2 · (3 + 1) matrices of 32 × 512.
        (
            {},
            4 * (512**2 + 512) + 2 * 512 * 2048 + 2048 + 512
            + 6 * (4 * 512 + 8 * 32 * 512) + 2 * 512,
        ),
        (
            {"attention_signal_rank": 5, "ffn_signal_rank": 7},
            4 * (512**2 + 512) + 2 * 512 * 2048 + 2048 + 512
            + 6 * (4 * 512 + (6 * 5 + 2 * 7) * 512) + 2 * 512,
        ),
        # A level's static signals: of q, k and v, and of the FFN's input.
        (
            {"level_signals": "static"},
            4 * (512**2 + 512) + 2 * 512 * 2048 + 2048 + 512 + 6 * (4 + 4) * 512 + 2 * 512,
        ),
        (
            {"architecture": "universal"},
            4 * (512**2 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512 + 2 * 512,
        ),
        (
            {"architecture": "one_wide_ffn"},
            6 * (4 * (512**2 + 512) + 4 * 512) + 2 * 512 * 2048 + 2048 + 512 + 2 * 512,
        ),
    ],
)  # fmt: skip
def test_parameters_at_the_size_of_vit_s(changes: dict[str, object], expected: int) -> None:
    with torch.device("meta"):
        model = create_classifier(VisionConfig.model_validate(changes), ImageShape(3, 224), 1000)
    assert model.parameter_counts.core == expected
    around = 512 * 3 * 16**2 + 512 + 512 + 1000 * 512 + 1000  # patches, class token, head
    assert model.parameter_counts.total == expected + around


# Checkpoints and exports depend on these names, and optimizer states on their order.
RING = [
    "self_attn_layer_norm", "self_attn_qkv", "self_attn_qkv_bias", "self_attn_output",
    "self_attn_output_bias", "ffn_layer_norm", "ffn_up", "ffn_up_bias", "ffn_down", "ffn_down_bias",
]  # fmt: skip
QKV_SIGNAL, FFN_SIGNAL = ["qkv_signal_a", "qkv_signal_b"], ["ffn_signal_a", "ffn_signal_b"]
KINDS = ["weight", "bias"]
VIT_LAYER = [
    *(f"self_attn_layer_norm.{kind}" for kind in KINDS),
    *(f"self_attn.{p}_proj.{kind}" for p in ("q", "k", "v", "output") for kind in KINDS),
    *(f"ffn_layer_norm.{kind}" for kind in KINDS),
    *(f"ffn.{p}_proj.{kind}" for p in ("inner", "output") for kind in KINDS),
]
NAMES: dict[tuple[Architecture, LevelSignals], list[str]] = {
    ("ringformer", "all"): [*RING, *QKV_SIGNAL, *FFN_SIGNAL],
    ("ringformer", "attention"): [*RING, *QKV_SIGNAL],
    ("ringformer", "ffn"): [*RING, *FFN_SIGNAL],
    ("ringformer", "static"): [*RING, "qkv_signal", "ffn_signal"],
    ("ringformer", "none"): RING,
    ("transformer", "all"): [f"layers.{i}.{name}" for i in range(2) for name in VIT_LAYER],
    ("universal", "all"): RING,
    ("one_wide_ffn", "all"): RING,
}


@pytest.mark.parametrize(("architecture", "signals"), MODELS)
def test_names_in_state_dicts(architecture: Architecture, signals: LevelSignals) -> None:
    model = tiny(architecture, level_signals=signals, num_levels=2)
    table = [] if architecture == "universal" else ["pos_encoder.table"]
    assert list(model.state_dict()) == [
        "class_token", "mean", "std", "patches.weight", "patches.bias", *table,
        *(f"encoder.{name}" for name in NAMES[architecture, signals]),
        *(f"{place}.{kind}" for place in ("final_layer_norm", "head") for kind in KINDS),
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_levels", [2, 8])
def test_initial_weights(architecture: Architecture, num_levels: int) -> None:
    """All architectures start alike; what is added to the residual stream, at 1/N of the usual."""
    dim, inner_dim = 64, 256
    config = VisionConfig(
        architecture=architecture, model_dim=dim, num_heads=2, ffn_inner_dim=inner_dim,
        num_levels=num_levels, patch_size=4,
    )  # fmt: skip
    model = create_classifier(config, IMAGE, CLASSES)
    ffn = (6 / (dim + inner_dim)) ** 0.5
    for names, expected in (
        (("self_attn.v_proj.weight", "self_attn_qkv"), (3 / (2 * dim)) ** 0.5),
        (("self_attn.output_proj.weight", "self_attn_output"), (3 / dim) ** 0.5 / num_levels),
        (("ffn.inner_proj.weight", "ffn_up"), ffn),
        (("ffn.output_proj.weight", "ffn_down"), ffn / num_levels),
    ):
        weights = [p for name, p in model.named_parameters() if name.endswith(names)]
        assert max(weight.abs().max().item() for weight in weights) == pytest.approx(expected, 0.02)
    ffn_biases = ("ffn.inner_proj.bias", "ffn_up_bias", "ffn.output_proj.bias", "ffn_down_bias")
    for name, parameter in model.named_parameters():
        if name.endswith(ffn_biases):
            assert 1e-7 < parameter.abs().max() < 1e-5
        elif "attn" in name and "bias" in name:
            assert not parameter.any(), name


# ── What it computes ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("signals", get_args(LevelSignals))
def test_level_signals_are_the_papers_equations(signals: LevelSignals) -> None:
    """q = W LN(x) + b + M x, and FFN(x) = W_down gelu(W_up LN(x + M x) + b_up) + b_down; a static
    signal is a vector in place of M x."""
    ring = tiny(level_signals=signals).encoder
    assert isinstance(ring, VisionRing)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    weights = dict(ring.named_parameters())

    def signal(kind: str, level: int, *index: int) -> Tensor | float:
        if f"{kind}_signal" in weights:
            return weights[f"{kind}_signal"][level].view(-1, 16)[index or (0,)]
        if f"{kind}_signal_a" not in weights:
            return 0.0
        place = level, *index
        a, b = (weights[f"{kind}_signal_{which}"][place] for which in "ab")
        return x @ (a.T @ b).T

    for i, level in enumerate(ring.levels()):
        weight, bias = weights["self_attn_layer_norm"][i]
        normed = F.layer_norm(x, (16,), weight, bias, 1e-5)
        for index, heads in enumerate(ring.qkv(x, level.self_attn)):
            expected = normed @ weights["self_attn_qkv"][index].T
            expected = expected + weights["self_attn_qkv_bias"].view(3, 16)[index]
            expected = expected + signal("qkv", i, index)
            torch.testing.assert_close(heads.transpose(1, 2).flatten(2), expected)
        weight, bias = weights["ffn_layer_norm"][i]
        normed = F.layer_norm(x + signal("ffn", i), (16,), weight, bias, 1e-5)
        hidden = F.gelu(normed @ weights["ffn_up"].T + weights["ffn_up_bias"])
        expected = hidden @ weights["ffn_down"].T + weights["ffn_down_bias"]
        torch.testing.assert_close(ring.feed_forward(x, level.ffn), expected)


def test_a_fresh_ring_is_a_weight_tied_vit() -> None:
    """At step 0 A is 0: a ViT with the ring's weights in every layer computes the same."""
    torch.manual_seed(0)
    ring = create_classifier(tiny().config, IMAGE, CLASSES).double()
    vit = tiny("transformer")
    assert isinstance(ring.encoder, VisionRing)
    assert isinstance(vit.encoder, VisionTransformer)
    around = {name: p for name, p in ring.state_dict().items() if not name.startswith("encoder.")}
    vit.load_state_dict(around, strict=False)
    with torch.no_grad():
        for ours, theirs in zip(vit.encoder.layers, ring.encoder.levels(), strict=True):
            attention, ffn = theirs.self_attn, theirs.ffn
            qkv = zip("qkv", attention.qkv.chunk(3), attention.qkv_bias.chunk(3), strict=True)
            parts: list[tuple[str, Tensor, Tensor]] = [
                *((f"self_attn.{letter}_proj", weight, bias) for letter, weight, bias in qkv),
                ("self_attn.output_proj", attention.output, attention.output_bias),
                ("ffn.inner_proj", ffn.up, ffn.up_bias),
                ("ffn.output_proj", ffn.down, ffn.down_bias),
                ("self_attn_layer_norm", attention.layer_norm.weight, attention.layer_norm.bias),
                ("ffn_layer_norm", ffn.layer_norm.weight, ffn.layer_norm.bias),
            ]
            for name, weight, bias in parts:
                ours.get_parameter(f"{name}.weight").copy_(weight)
                ours.get_parameter(f"{name}.bias").copy_(bias)
    torch.testing.assert_close(vit(images()), ring(images()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_place_of_a_patch_counts(architecture: Architecture) -> None:
    model, pixels = tiny(architecture), images()
    moved = pixels.roll(4, dims=3)  # by one patch
    assert not torch.allclose(model(pixels), model(moved), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("architecture", "signals"), MODELS)
def test_logits_are_the_class_tokens(architecture: Architecture, signals: LevelSignals) -> None:
    """That the last level computes nothing else changes neither them nor their gradients."""
    model = tiny(architecture, level_signals=signals)
    logits, expected = model(images()), model.head(model.encode(images())[:, 0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    of_each = [torch.autograd.grad(each.logsumexp(1).sum(), [*model.parameters()])
               for each in (logits, expected)]  # fmt: skip
    for ours, whole in zip(*of_each, strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_are_normalised(architecture: Architecture) -> None:
    model, pixels = tiny(architecture).float(), images()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    model.set_normalisation(mean, std)
    by_hand = torch.stack([(pixels[:, i] / 255 - mean[i]) / std[i] for i in range(3)], dim=1)
    torch.testing.assert_close(model(pixels), model(by_hand))
    other = tiny(architecture).float()
    assert not torch.allclose(other(pixels), model(pixels))
    other.load_state_dict(model.state_dict())  # normalisation is part of the model
    assert torch.equal(other(pixels), model(pixels))


def test_bfloat16() -> None:
    model, pixels = tiny().float(), images()
    model.set_normalisation([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    expected = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.embed(pixels).dtype == torch.float32  # the residual stream
        torch.testing.assert_close(model(pixels).float(), expected, rtol=0, atol=0.05)
    model.bfloat16()
    assert model.pos_encoder is not None
    assert model.pos_encoder.table.dtype == torch.float32  # bf16 cannot tell neighbours apart
    torch.testing.assert_close(model(pixels).float(), expected, rtol=0, atol=0.05)


# ── How it learns ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("architecture", "signals"), MODELS)
def test_every_parameter_learns(architecture: Architecture, signals: LevelSignals) -> None:
    model = tiny(architecture, level_signals=signals, dropout=0.1)
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    assert gradients(model).keys() == dict(model.named_parameters()).keys()
    model.eval()
    labels = torch.tensor([1, 0, 9, 4])
    before = F.cross_entropy(model(images()), labels)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert F.cross_entropy(model(images()), labels) < before


def test_dropout_is_behind_the_ffn_and_not_behind_attention() -> None:
    """With dropout 1 - ε only the attention is left of a layer, in the ring as in the ViT."""
    for architecture in ("ringformer", "transformer"):
        torch.manual_seed(0)
        model = tiny(architecture, dropout=1 - 1e-12, num_levels=1)
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        level = model.encoder.levels()[0]  # type: ignore[operator]
        ring = tiny(num_levels=1).encoder
        assert isinstance(ring, VisionRing)
        expected = x + ring.self_attention(x, level.self_attn)
        torch.testing.assert_close(model.encoder(x), expected)


@pytest.mark.parametrize(
    ("policy", "compiler"),
    [
        (ActivationCheckpointing(levels=1), None),
        (ActivationCheckpointing(levels=2), None),
        (ActivationCheckpointing(levels=1, keep_attention=True), None),
        (ActivationCheckpointing(levels=2, cpu_offload=True), None),
        pytest.param(ActivationCheckpointing(levels=2), "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_checkpoints_and_compiling_change_no_gradient(
    policy: ActivationCheckpointing, compiler: str | None
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(dropout=0.2)
    if compiler:
        model.compile_layers(compiler)
    expected = gradients(model)
    model.checkpoint_activations(policy)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-11)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if compiler else 0)


@pytest.mark.parametrize(("architecture", "signals"), MODELS)
def test_gradients_are_ready_in_one_order(
    architecture: Architecture, signals: LevelSignals
) -> None:
    """DeepSpeed adds up those of all ranks in that order, however many images each has."""
    model = tiny(architecture, level_signals=signals)
    ready, orders = names_as_ready(model), set()
    for count in (1, 4, 9):
        ready.clear()
        model(images(count)).logsumexp(1).sum().backward()
        orders.add(tuple(ready))
    assert len(orders) == 1
    assert len(ready) == len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_levels_and_batches_use_the_same_graphs(architecture: Architecture) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, expected = tiny(architecture, num_levels=6), tiny(architecture, num_levels=6)
    model.compile_layers("eager")
    for count in (4, 3, 5):
        torch.testing.assert_close(model(images(count)), expected(images(count)))
    assert not torch._dynamo.utils.counters["graph_break"]
    if architecture != "transformer":  # whose layers are modules of their own
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# ── What is refused ─────────────────────────────────────────────────────────────────────────────


def test_checkpoints_of_a_vit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing\.levels to 0"):
        tiny("transformer").checkpoint_activations(ActivationCheckpointing(levels=1))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_dim": 18, "num_heads": 4}, r"model_dim \(18\) must be even and a multiple"),
        ({"architecture": "universal", "level_signals": "ffn"}, "for architecture ringformer only"),
        ({"attention_signal_rank": 17}, r"attention_signal_rank \(17\) exceeds model_dim \(16\)"),
        ({"ffn_signal_rank": 17}, r"ffn_signal_rank \(17\) exceeds model_dim \(16\)"),
        ({"max_seq_len": 17}, "max_seq_len"),
        ({"patch_size": 5}, r"model.patch_size \(5\) does not divide the images' side \(12\)"),
    ],
)
@pytest.mark.parametrize("architecture", ["ringformer", "transformer"])
def test_sizes_that_do_not_fit(
    architecture: Architecture, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        tiny(**{"architecture": architecture, **changes})  # type: ignore[arg-type]


def test_images_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"takes images \[B, 3, 12, 12\], not \[2, 1, 12, 12\]"):
        tiny()(torch.zeros(2, 1, 12, 12))
    with pytest.raises(ValueError, match=r"not \[3, 12, 12\]"):
        tiny()(torch.zeros(3, 12, 12))


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ([0.5], [0.5], "1 means and 1 deviations for 3 channels"),
        ([0.5] * 3, [0.5, 0.0, 0.5], "must be over 0"),
    ],
)
def test_normalisation_that_does_not_fit(
    mean: list[float], std: list[float], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        tiny().set_normalisation(mean, std)
