"""All of an encoder or decoder but its equations (`ring.py`): weights, and how the layer is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from typing_extensions import Self

from models.config import ActivationCheckpointing, Architecture, ModelConfig
from models.positions import InterleavedSinusoids
from models.ringformer import level_signal
from models.ringformer.activation_checkpointing import recompute, recompute_but_attention
from models.ringformer.level_signal import Signal

NO_SIGNAL: tuple[nn.Parameter | None, nn.Parameter | None] = (None, None)


# As fairseq2 initialises the layers of a Transformer.
INIT_QKV = partial(nn.init.xavier_uniform_, gain=2**-0.5)
INIT_OUTPUT = nn.init.xavier_uniform_
INIT_FFN = partial(nn.init.kaiming_uniform_, a=5**0.5)


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
    """The weights that an iteration works with; those that are shared are the same at each. Without
    a feed-forward network its weights are None."""

    qkv: Tensor  # [3d, d], level signals folded in
    qkv_bias: Tensor | None  # static signals b_i, [3d]
    self_attn_output: Tensor  # [d, d]
    self_attn_layer_norm: Tensor  # weight and bias, [2, d]
    ffn_up: Tensor  # [m, d], level signals folded in
    ffn_up_bias: Tensor | None  # static signal: W_up b_i of W_up (x + b_i), [m]
    ffn_down: Tensor  # [d, m]
    ffn_layer_norm: Tensor  # [2, d]


class Cross(NamedTuple):
    """What a level's encoder-decoder attention works with."""

    q: Tensor  # [d, d]
    k: Tensor  # projected encoder output [B, H, S, d/H]
    v: Tensor
    output: Tensor  # [d, d]
    layer_norm: Tensor  # weight and bias [2, d]


class Stack(nn.Module):
    """The weights of a stack and what they are at each level; activation checkpointing, compiling.

    All weights are parameters of the stack itself and not of submodules: ZeRO-3 has a module's own
    parameters at hand from the beginning to the end of its forward.
    """

    layer: Callable[..., Tensor]
    """The equations of one iteration."""

    def __init__(self, config: ModelConfig, *, has_ffn: bool = True) -> None:
        super().__init__()
        dim, inner_dim, rank = config.model_dim, config.ffn_inner_dim, config.rank
        self.num_levels, self.num_heads = config.num_levels, config.num_heads
        self.dropout_p = config.dropout
        self.owned = OWNED_BY_LEVELS[config.architecture]
        owned = self.owned.attention
        self.self_attn_qkv = self._matrices(INIT_QKV, 3, dim, dim, owned=owned)
        self.self_attn_output = self._matrices(INIT_OUTPUT, dim, dim, owned=owned, residual=True)
        self.self_attn_layer_norm = self._layer_norms(dim)
        self.ffn_up = self.ffn_down = None
        if has_ffn:
            self.ffn_up = self._matrices(INIT_FFN, inner_dim, dim)
            self.ffn_down = self._matrices(INIT_FFN, dim, inner_dim, residual=True)
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
        self.encodings: InterleavedSinusoids | None = None
        if config.architecture == "universal":  # of positions, and of levels
            length = max(config.max_seq_len, self.num_levels)
            self.encodings = InterleavedSinusoids(dim, length, persistent=False)
        self.checkpointing = ActivationCheckpointing()
        self.compiler: str | None = None
        self.prepared_layer: Callable[..., Tensor] = self.layer
        self._levels: list[Level] = []
        self._made_of: tuple[Any, ...] = ()

    def _matrices(
        self,
        init: Callable[[Tensor], Tensor],
        *shape: int,
        owned: bool = False,
        residual: bool = False,
    ) -> nn.Parameter:
        """:param residual: its product is added to the residual stream, N times: it starts at 1/N.
        Without that, six levels hardly begin to learn (docs/results.md)."""
        weight = torch.empty(self.num_levels if owned else 1, *shape)
        for matrix in weight.view(-1, *shape[-2:]):
            init(matrix)
        if residual:
            weight /= self.num_levels
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
            return self.make_levels()
        autocast = torch.is_autocast_enabled(self.self_attn_qkv.device.type)
        made_of = (autocast, *((p.data_ptr(), p._version, p.dtype) for p in self.parameters()))
        if made_of != self._made_of:
            self._levels, self._made_of = self.make_levels(), made_of
        return self._levels

    def train(self, mode: bool = True) -> Self:
        self._levels, self._made_of = [], ()
        return super().train(mode)

    def make_levels(self) -> list[Level]:
        static = self.ffn_signal
        up_bias = None if static is None or self.ffn_up is None else F.linear(static, self.ffn_up)
        columns = (
            self.folded_qkv(),
            self.per_level(self.qkv_signal, True),
            self.per_level(self.self_attn_output, self.owned.attention),
            self.per_level(self.self_attn_layer_norm, self.owned.layer_norms),
            self.folded_ffn_up(),
            self.per_level(up_bias, True),
            self.per_level(self.ffn_down, False),
            self.per_level(self.ffn_layer_norm, self.owned.layer_norms),
        )
        return [Level(*weights) for weights in zip(*columns, strict=True)]

    def folded_qkv(self) -> Sequence[Tensor]:
        """W + A_iᵀ B_i of q, k and v, `[3d, d]`."""
        weight: Tensor = self.self_attn_qkv
        owned = self.owned.attention
        if self.qkv_signal_a is not None and self.qkv_signal_b is not None:
            signal = Signal(self.qkv_signal_a, self.qkv_signal_b)
            weight, owned = level_signal.fold(weight, signal), True
        return self.per_level(weight.flatten(-3, -2), owned)

    def folded_ffn_up(self) -> Sequence[Tensor | None]:
        """W_up (I + A_iᵀ B_i), `[m, d]`; None without a feed-forward network."""
        weight: Tensor | None = self.ffn_up
        if weight is None or self.ffn_signal_a is None or self.ffn_signal_b is None:
            return self.per_level(weight, False)
        signal = Signal(self.ffn_signal_a, self.ffn_signal_b)
        return self.per_level(level_signal.fold_into_input(weight, signal), True)

    def per_level(self, weight: Tensor | None, owned: bool) -> Sequence[Any]:
        return weight.unbind() if owned and weight is not None else [weight] * self.num_levels

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """`[B, S, count·d]` → count × `[B, H, S, d/H]`."""
        batch, length, _ = x.shape
        return x.view(batch, length, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_p, self.training)

    # ── How the layer is run ────────────────────────────────────────────────────────────────────

    def checkpoint_activations(self, policy: ActivationCheckpointing) -> None:
        self.checkpointing = policy
        self._prepare_layer()

    def compile_layer(self, backend: str = "inductor") -> None:
        """Compile the layer; all levels and batch shapes use the same graphs."""
        self.compiler = backend
        self._prepare_layer()

    def _prepare_layer(self) -> None:
        layer = self.layer
        if self.checkpointing.keep_attention:  # what is compiled includes the choice of operators
            layer = partial(recompute_but_attention, layer)
        if self.compiler:
            # Inductor's own random numbers and selective checkpointing do not go together.
            selective = self.checkpointing.keep_attention and self.compiler == "inductor"
            options: Any = {"fallback_random": True} if selective else None
            layer = torch.compile(layer, dynamic=True, backend=self.compiler, options=options)
        self.prepared_layer = layer

    def run(self, x: Tensor, layer: Callable[[int, Tensor], Tensor], positions: range) -> Tensor:
        """x ← layer(i, x), i = 0…N-1, with activation checkpointing.

        :param positions: of `x` in its sequence; one for all where `x` holds hypotheses.
        :raises ValueError: a Universal Transformer has no encoding of such a position.
        """

        def segment(levels: range, x: Tensor) -> Tensor:
            for i in levels:
                if self.encodings is not None:
                    # N times at full size they bury what the tokens say (docs/results.md).
                    added = self.encodings.at(positions) + self.encodings.table[i]
                    x = x + (added / self.num_levels).to(x.dtype)
                x = layer(i, x)
            return x

        policy, levels = self.checkpointing, range(self.num_levels)
        if not (policy.levels and self.training):
            return segment(levels, x)
        with save_on_cpu(pin_memory=x.is_cuda) if policy.cpu_offload else nullcontext():
            if policy.keep_attention:  # `prepared_layer` recomputes
                return segment(levels, x)
            for first in levels[:: policy.levels]:
                x = recompute(segment, levels[first : first + policy.levels], x)
        return x


class DecoderStack(Stack):
    """With the weights of encoder-decoder attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, has_ffn=config.architecture != "one_wide_ffn")
        dim, owned = config.model_dim, self.owned.attention
        self.cross_attn_q = self._matrices(INIT_QKV, dim, dim, owned=owned)
        self.cross_attn_kv = self._matrices(INIT_QKV, 2, dim, dim, owned=owned)
        self.cross_attn_output = self._matrices(INIT_OUTPUT, dim, dim, owned=owned, residual=True)
        self.cross_attn_layer_norm = self._layer_norms(dim)

    def cross(self, encoder_output: Tensor) -> list[Cross]:
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
