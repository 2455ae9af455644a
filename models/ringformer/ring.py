"""RingFormer's encoder and decoder: ONE layer each, run for levels i = 1…N (arXiv 2502.13181).

How it differs from a plain post-LN Transformer:
- every projection is shared by all levels; each level owns its LayerNorms and level signals;
- level signals are folded into the weights once per forward pass; q, k and v are one product;
- cross-attention has no level signal and the encoder output is the same at every level, so its
  keys and values are computed once, not N times, and are cached once while decoding;
- sequences are padded on the right, so causal self-attention never sees padding and needs no mask;
- while decoding, the hypotheses of a sentence share its cache (`decoder_state.py`).

The rivals that differ in what a level owns are this same code: `OWNED_BY_LEVELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from fairseq2.models.transformer import TransformerDecoder, TransformerEncoder
from fairseq2.nn import BatchLayout, IncrementalStateBag
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from typing_extensions import Self

from models.config import ActivationCheckpointing, Architecture, ModelConfig
from models.positions import sinusoids
from models.ringformer import level_signal
from models.ringformer.activation_checkpointing import recompute, recompute_but_attention
from models.ringformer.decoder_state import Cross, DecoderState
from models.ringformer.level_signal import Signal

LAYER_NORM_EPS = 1e-5
NO_SIGNAL: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)


class Owned(NamedTuple):
    """Which weights a level has for itself; the others are one for all levels."""

    attention: bool = False
    layer_norms: bool = False


OWNED_BY_LEVELS: dict[Architecture, Owned] = {
    "ringformer": Owned(layer_norms=True),
    "universal": Owned(),  # arXiv 1807.03819
    "one_wide_ffn": Owned(attention=True, layer_norms=True),  # arXiv 2309.01826
}


class Level(NamedTuple):
    """The weights that an iteration works with; those that are shared are the same at each."""

    qkv: Tensor  # [3d, d], level signals folded in
    qkv_signal: Signal | None  # of q, k and v, where it is not folded: [3, r, d]
    qkv_bias: Tensor | None  # [3d]: static signals
    self_attn_output: Tensor  # [d, d]
    self_attn_layer_norm: Tensor  # weight and bias, [2, d]
    ffn_up: Tensor | None  # [m, d]; None: no feed-forward network
    ffn_signal: Signal | None  # [r, d]
    ffn_bias: Tensor | None  # [d], added to its input: static signals
    ffn_down: Tensor  # [d, m]
    ffn_layer_norm: Tensor  # [2, d]


def padding_mask(layout: BatchLayout) -> Tensor | None:
    """True where a key may be attended to, `[B, 1, 1, S]`; None when nothing is padded."""
    return (layout.position_indices >= 0)[:, None, None] if layout.padded else None


class Ring(nn.Module):
    """The weights of a stack, and the loop over levels with activation checkpointing.

    All weights are parameters of the ring itself and not of submodules: ZeRO-3 has a module's own
    parameters at hand from the beginning to the end of its forward.
    """

    encodings: Tensor | None
    """Of positions and of levels, added before each iteration of a Universal Transformer."""

    level: Callable[..., Tensor]
    """One iteration: the layer."""

    fold_qkv = fold_ffn = True
    """Fold level signals into the weights, or apply them to the tokens. The result is the same;
    folding was faster at base size (docs/benchmarks.md)."""

    def __init__(self, config: ModelConfig, *, has_ffn: bool = True) -> None:
        super().__init__()
        dim, inner_dim, rank = config.model_dim, config.ffn_inner_dim, config.rank
        self.num_levels, self.num_heads = config.num_levels, config.num_heads
        self.dropout_p = config.dropout
        self.owned = OWNED_BY_LEVELS[config.architecture]
        self.self_attn_qkv = self._matrices(3, dim, dim, owned=self.owned.attention)
        self.self_attn_output = self._matrices(dim, dim, owned=self.owned.attention)
        self.self_attn_layer_norm = self._layer_norms(dim)
        self.ffn_up = self._matrices(inner_dim, dim) if has_ffn else None
        self.ffn_down = self._matrices(dim, inner_dim) if has_ffn else None
        self.ffn_layer_norm = self._layer_norms(dim) if has_ffn else None

        signals = config.level_signals if config.architecture == "ringformer" else "none"
        self.qkv_signal_a, self.qkv_signal_b = (
            self._signal(3, rank, dim) if signals in ("all", "attention") else NO_SIGNAL
        )
        self.ffn_signal_a, self.ffn_signal_b = (
            self._signal(rank, dim) if signals in ("all", "ffn") else NO_SIGNAL
        )
        static = signals == "static"
        self.qkv_signal = nn.Parameter(torch.zeros(self.num_levels, 3 * dim)) if static else None
        self.ffn_signal = nn.Parameter(torch.zeros(self.num_levels, dim)) if static else None
        universal = config.architecture == "universal"
        length = max(config.max_seq_len, self.num_levels)
        encodings = sinusoids(length, dim) if universal else None
        self.register_buffer("encodings", encodings, persistent=False)
        self.checkpointing = ActivationCheckpointing()
        self.compiler: str | None = None
        self.prepared_level: Callable[..., Tensor] = self.level
        self._levels: list[Level] = []
        self._made_of: tuple[Any, ...] = ()

    def _matrices(self, *shape: int, owned: bool = False) -> nn.Parameter:
        weight = torch.empty(self.num_levels if owned else 1, *shape)
        for matrix in weight.view(-1, *shape[-2:]):
            nn.init.xavier_uniform_(matrix)
        return nn.Parameter(weight if owned else weight[0])

    def _layer_norms(self, dim: int) -> nn.Parameter:
        """Weight and bias of each level's LayerNorm `[N, 2, d]`, or of one for all `[2, d]`."""
        norm = torch.stack([torch.ones(dim), torch.zeros(dim)])
        return nn.Parameter(norm.repeat(self.num_levels, 1, 1) if self.owned.layer_norms else norm)

    def _signal(self, *shape: int) -> tuple[nn.Parameter, nn.Parameter]:
        a = torch.zeros(self.num_levels, *shape)
        b = torch.empty(self.num_levels, *shape).normal_(std=level_signal.INIT_STD)
        return nn.Parameter(a), nn.Parameter(b)

    # ── Levels ──────────────────────────────────────────────────────────────────────────────────

    def levels(self) -> list[Level]:
        """Every level's weights; kept until a parameter changes, unless gradients may flow.

        A write through `.data` is seen after the next call of `train` or `eval`.
        """
        if self.training or torch.is_grad_enabled():
            return self._make_levels()
        autocast = torch.is_autocast_enabled(self.self_attn_qkv.device.type)
        made_of = (autocast, *((p.data_ptr(), p._version, p.dtype) for p in self.parameters()))
        if made_of != self._made_of:
            self._levels, self._made_of = self._make_levels(), made_of
        return self._levels

    def train(self, mode: bool = True) -> Self:
        self._levels, self._made_of = [], ()
        return super().train(mode)

    def _make_levels(self) -> list[Level]:
        qkv: Tensor = self.self_attn_qkv
        qkv_owned = self.owned.attention
        qkv_signal = _signal_of(self.qkv_signal_a, self.qkv_signal_b)
        if qkv_signal and self.fold_qkv:
            qkv, qkv_owned, qkv_signal = level_signal.fold(qkv, qkv_signal), True, None
        up: Tensor | None = self.ffn_up
        up_owned = False
        ffn_signal = _signal_of(self.ffn_signal_a, self.ffn_signal_b)
        if ffn_signal and self.fold_ffn and up is not None:
            up, up_owned, ffn_signal = level_signal.fold_into_input(up, ffn_signal), True, None
        columns = (
            self.per_level(qkv.flatten(-3, -2), qkv_owned),
            self._signals_per_level(qkv_signal),
            self.per_level(self.qkv_signal, True),
            self.per_level(self.self_attn_output, self.owned.attention),
            self.per_level(self.self_attn_layer_norm, self.owned.layer_norms),
            self.per_level(up, up_owned),
            self._signals_per_level(ffn_signal),
            self.per_level(self.ffn_signal, True),
            self.per_level(self.ffn_down, False),
            self.per_level(self.ffn_layer_norm, self.owned.layer_norms),
        )
        return [Level(*weights) for weights in zip(*columns, strict=True)]

    def per_level(self, weight: Tensor | None, owned: bool) -> Sequence[Any]:
        return weight.unbind() if owned and weight is not None else [weight] * self.num_levels

    def _signals_per_level(self, signal: Signal | None) -> Sequence[Signal | None]:
        if signal is None:
            return [None] * self.num_levels
        return [Signal(a, b) for a, b in zip(signal.a, signal.b, strict=True)]

    def run(self, x: Tensor, level: Callable[[int, Tensor], Tensor], positions: range) -> Tensor:
        """Apply `level(i, x)` for i = 0…N-1.

        :param positions: of `x` in its sequence; one for all where `x` holds hypotheses.
        :raises ValueError: a Universal Transformer has no encoding of such a position.
        """
        if self.encodings is not None and positions.stop > self.encodings.size(0):
            raise ValueError(
                f"A sequence of {positions.stop} tokens exceeds model.max_seq_len "
                f"({self.encodings.size(0)})."
            )

        def segment(levels: range, x: Tensor) -> Tensor:
            for i in levels:
                if self.encodings is not None:
                    encoding = self.encodings[positions.start : positions.stop] + self.encodings[i]
                    x = x + encoding.to(x.dtype)
                x = level(i, x)
            return x

        checkpointing = self.checkpointing
        if not (checkpointing.levels and self.training):
            return segment(range(self.num_levels), x)
        offload = save_on_cpu(pin_memory=x.is_cuda) if checkpointing.cpu_offload else nullcontext()
        with offload:
            if checkpointing.keep_attention:  # `prepared_level` recomputes
                return segment(range(self.num_levels), x)
            for first in range(0, self.num_levels, checkpointing.levels):
                levels = range(first, min(first + checkpointing.levels, self.num_levels))
                x = recompute(segment, levels, x)
        return x

    def checkpoint_activations(self, policy: ActivationCheckpointing) -> None:
        self.checkpointing = policy
        self._prepare_level()

    def compile_level(self, backend: str = "inductor") -> None:
        """Compile the layer; all levels and batch shapes use the same graphs."""
        self.compiler = backend
        self._prepare_level()

    def _prepare_level(self) -> None:
        level = self.level
        if self.checkpointing.keep_attention:  # what is compiled includes the choice of operators
            level = partial(recompute_but_attention, level)
        if self.compiler:
            # Inductor's own random numbers and selective checkpointing do not go together.
            selective = self.checkpointing.keep_attention and self.compiler == "inductor"
            options: Any = {"fallback_random": True} if selective else None
            level = torch.compile(level, dynamic=True, backend=self.compiler, options=options)
        self.prepared_level = level

    # ── The equations ───────────────────────────────────────────────────────────────────────────

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """`[B, S, count·d]` → count × `[B, H, S, d/H]`."""
        batch, length, _ = x.shape
        return x.view(batch, length, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()

    def qkv(self, x: Tensor, level: Level) -> tuple[Tensor, ...]:
        """q_i = W_q x + M_i x, and k_i and v_i alike."""
        qkv = F.linear(x, level.qkv, level.qkv_bias)
        if level.qkv_signal is not None:
            qkv = qkv + level_signal.apply(x, level.qkv_signal)
        return self.heads(qkv, 3)

    def feed_forward(self, x: Tensor, level: Level) -> Tensor:
        """W_down · dropout(gelu(W_up (x + M_i x)))."""
        if level.ffn_signal is not None:
            x = x + level_signal.apply(x, level.ffn_signal)
        if level.ffn_bias is not None:
            x = x + level.ffn_bias
        assert level.ffn_up is not None
        return F.linear(self.dropout(F.gelu(F.linear(x, level.ffn_up))), level.ffn_down)

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_p, self.training)

    def add_norm(self, x: Tensor, y: Tensor, layer_norm: Tensor) -> Tensor:
        """LN_i(x + dropout(y))."""
        weight, bias = layer_norm.unbind()
        return F.layer_norm(x + self.dropout(y), weight.shape, weight, bias, LAYER_NORM_EPS)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Heads `[B, H, S, d/H]` → `[B, S, d]`."""
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return heads.transpose(1, 2).flatten(2)


def _signal_of(a: Tensor | None, b: Tensor | None) -> Signal | None:
    return Signal(a, b) if a is not None and b is not None else None


class RingEncoder(Ring, TransformerEncoder):
    """x ← LN_i(x + SelfAttention_i(x)); x ← LN_i(x + FFN_i(x)), i = 1…N."""

    def __init__(self, config: ModelConfig) -> None:
        TransformerEncoder.__init__(self)
        Ring.__init__(self, config)

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        """:param seqs: embedded source `[B, S, d]`. :returns: same shape."""
        levels, mask = self.levels(), padding_mask(seqs_layout)
        positions = range(seqs.size(1))
        return self.run(seqs, lambda i, x: self.prepared_level(x, levels[i], mask), positions)

    def level(self, x: Tensor, level: Level, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x, level)
        attention = F.linear(attend(q, k, v, mask), level.self_attn_output)
        x = self.add_norm(x, attention, level.self_attn_layer_norm)
        return self.add_norm(x, self.feed_forward(x, level), level.ffn_layer_norm)


class RingDecoder(Ring, TransformerDecoder):
    """As the encoder, causal, with x ← LN_i(x + CrossAttention(x, encoder output)) in between."""

    def __init__(self, config: ModelConfig) -> None:
        TransformerDecoder.__init__(self)
        Ring.__init__(self, config, has_ffn=config.architecture != "one_wide_ffn")
        dim, owned = config.model_dim, self.owned.attention
        self.cross_attn_q = self._matrices(dim, dim, owned=owned)
        self.cross_attn_kv = self._matrices(2, dim, dim, owned=owned)
        self.cross_attn_output = self._matrices(dim, dim, owned=owned)
        self.cross_attn_layer_norm = self._layer_norms(dim)

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        encoder_output: Tensor,
        encoder_output_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """
        :param seqs: embedded target `[B, T, d]`; with a `state_bag`, its positions from
            `state_bag.step_nr` on (after the first call one at a time).
        :param encoder_output: `[B, S, d]`; with a `state_bag`, read in the first call only.
        :returns: same shape as `seqs`.
        """
        if state_bag is None:
            levels, cross = self.levels(), self._cross(encoder_output)
            mask = padding_mask(encoder_output_layout)
            return self.run(
                seqs,
                lambda i, x: self.prepared_level(x, levels[i], cross[i], mask),
                range(seqs.size(1)),
            )
        state = state_bag.maybe_get_state(self, DecoderState)
        if state is None:
            mask = padding_mask(encoder_output_layout)
            state = DecoderState(self._cross(encoder_output), mask)
            state_bag.set_state(self, state)
        begin = state_bag.step_nr
        return self._step(seqs, state, range(begin, begin + seqs.size(1)))

    def _step(self, seqs: Tensor, state: DecoderState, positions: range) -> Tensor:
        """Decode incrementally; the hypotheses of a sentence are positions of one sequence."""
        levels = self.levels()
        x, mask = state.begin_step(seqs)

        def level(i: int, x: Tensor) -> Tensor:
            append = partial(state.caches[i].append, end=mask.size(3))
            return self.level(x, levels[i], state.cross[i], state.cross_mask, mask, append)

        return self.run(x, level, positions).reshape(seqs.shape)

    def _cross(self, encoder_output: Tensor) -> list[Cross]:
        """Keys and values of every level: computed once where the levels share the projection."""
        owned = self.owned.attention
        weights = self.per_level(self.cross_attn_kv, owned)
        if owned:
            keys_values = [self._keys_values(encoder_output, weight) for weight in weights]
        else:
            keys_values = [self._keys_values(encoder_output, weights[0])] * self.num_levels
        columns = (
            self.per_level(self.cross_attn_q, owned),
            *zip(*keys_values, strict=True),
            self.per_level(self.cross_attn_output, owned),
            self.per_level(self.cross_attn_layer_norm, self.owned.layer_norms),
        )
        return [Cross(*weights) for weights in zip(*columns, strict=True)]

    def _keys_values(self, encoder_output: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return self.heads(F.linear(encoder_output, weight.flatten(0, 1)), 2)

    def level(
        self,
        x: Tensor,
        level: Level,
        cross: Cross,
        cross_mask: Tensor | None,
        self_mask: Tensor | None = None,
        append: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """:param append: adds keys and values to the cache and returns all; then `self_mask` too
        must be given."""
        q, k, v = self.qkv(x, level)
        if append is not None:
            k, v = append(k, v)
        attention = attend(q, k, v, self_mask, causal=self_mask is None)
        attention = F.linear(attention, level.self_attn_output)
        x = self.add_norm(x, attention, level.self_attn_layer_norm)

        (q,) = self.heads(F.linear(x, cross.q), 1)
        attention = F.linear(attend(q, cross.k, cross.v, cross_mask), cross.output)
        x = self.add_norm(x, attention, cross.layer_norm)
        if level.ffn_up is None:
            return x
        return self.add_norm(x, self.feed_forward(x, level), level.ffn_layer_norm)
