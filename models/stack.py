"""A stack runs one layer at N levels: this module makes parameters, checkpoints and compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import ClassVar, Concatenate, Generic, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from models.activation_checkpointing import recompute, recompute_but_attention
from models.attention import attention
from models.config import ActivationCheckpointing
from models.dropout import dropout
from models.positions import InterleavedSinusoids

P = ParamSpec("P")  # what a layer takes after x


class LayerNorm(NamedTuple):
    """A LayerNorm has these weights."""

    weight: Tensor  # [d]
    bias: Tensor  # [d]


class Stack(nn.Module, Generic[P]):
    """A stack is an encoder or decoder of one layer; a subclass brings weights and equations.

    All weights are parameters of the stack itself and not of submodules: ZeRO-3 has a module's own
    parameters at hand from the beginning to the end of its forward.
    """

    layer: Callable[Concatenate[Tensor, P], Tensor]
    """The equations of one level."""

    def __init__(
        self,
        num_levels: int,
        model_dim: int,
        num_heads: int,
        dropout_p: float,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.dropout_p = num_levels, num_heads, dropout_p
        self.head_dim, self.residual_scale = model_dim // num_heads, residual_scale
        self.encodings: InterleavedSinusoids | None = None
        """A Universal Transformer's, of positions and levels."""

        self.checkpointing = ActivationCheckpointing()
        self.compiler: str | None = None
        self.prepared_layer = self.layer

    # ── Parameters ──────────────────────────────────────────────────────────────────────────────

    def matrices(
        self,
        init: Callable[[Tensor], Tensor],
        *shape: int,
        owned: bool = False,
        residual: bool = False,
    ) -> nn.Parameter:
        """Make freshly initialised matrices.

        :param init: fills one matrix in place.
        :param shape: the last two sizes are a matrix's.
        :param owned: each level has its own.
        :param residual: the product is added to the residual stream, N times, so it starts at α/N.
            Without that, six levels hardly begin to learn (docs/experiments.md).
        :returns: `[*shape]`, or `[N, *shape]` if owned.
        """
        weight = torch.empty(self.num_levels if owned else 1, *shape)
        for matrix in weight.view(-1, *shape[-2:]):
            init(matrix)
        if residual:
            weight /= self.num_levels / self.residual_scale
        return nn.Parameter(weight if owned else weight[0])

    def biases(
        self, init: Callable[[Tensor], Tensor], size: int, *, owned: bool = False
    ) -> nn.Parameter:
        """Make freshly initialised biases.

        :param init: fills them in place.
        :param owned: each level has its own.
        :returns: `[size]`, or `[N, size]` if owned.
        """
        shape = (self.num_levels, size) if owned else (size,)
        return nn.Parameter(init(torch.empty(shape)))

    def layer_norms(self, dim: int, *, owned: bool) -> nn.Parameter:
        """Make weight and bias of LayerNorms.

        :returns: `[N, 2, d]` if each level has its own, else `[2, d]`.
        """
        norm = torch.stack([torch.ones(dim), torch.zeros(dim)])
        return nn.Parameter(norm.repeat(self.num_levels, 1, 1) if owned else norm)

    def per_level(self, weight: Tensor, owned: bool) -> Sequence[Tensor]:
        """Return a weight as each level sees it.

        :param owned: whether the first dimension of `weight` is the levels'.
        """
        return weight.unbind() if owned else [weight] * self.num_levels

    def norm_per_level(self, norm: Tensor, owned: bool) -> Sequence[LayerNorm]:
        """Return a LayerNorm as each level sees it: one gradient is put together of all levels'.

        :param norm: what `layer_norms` has made.
        """
        parts = norm.flatten(0, -2).unbind()
        norms = [LayerNorm(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return norms if owned else norms * self.num_levels

    # ── Parts of a layer ────────────────────────────────────────────────────────────────────────

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split projections into heads: `[B, S, count·d]` → count × `[B, H, S, d/H]`."""
        # All sizes are numbers: a compiled graph would compute with one that it had to find.
        x = torch.unflatten(x, 2, (count, self.num_heads, self.head_dim))
        # Gradients are put together in this order, at once; a single one is not copied.
        parts = x.unbind(2) if count > 1 else [x.squeeze(2)]
        return tuple(part.transpose(1, 2) for part in parts)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Return softmax(q kᵀ / √(d/H)) v, head by head: `[B, H, S, d/H]` → `[B, S, d]`."""
        return attention(q, k, v, mask, causal=causal).transpose(1, 2).flatten(2)

    def dropout(self, x: Tensor) -> Tensor:
        """Drop elements out while training."""
        return dropout(x, self.dropout_p, self.training)

    def add_encodings(self, x: Tensor, level: int, positions: range) -> Tensor:
        """Add a Universal Transformer's encodings of level and positions; others have none.

        :param positions: of `x` in its sequence; one for all where `x` holds hypotheses.
        :raises ValueError: there is no encoding of such a position.
        """
        if self.encodings is None:
            return x
        # N times at full size they bury what the tokens say (docs/experiments.md).
        added = self.encodings.at(positions) + self.encodings.table[level]
        return x + (added / self.num_levels).to(x.dtype)

    # ── How the layer is run ────────────────────────────────────────────────────────────────────

    def checkpoint_activations(self, policy: ActivationCheckpointing) -> None:
        """Keep for the backward pass what `policy` says, from now on."""
        self.checkpointing = policy
        self._prepare_layer()

    def compile_layer(self, backend: str) -> None:
        """Compile the layer for training; all levels and batches use the same graphs."""
        self.compiler = backend
        self._prepare_layer()

    @property
    def compiled(self) -> bool:
        """Whether a compiled layer runs. It wants all batches alike, or there are graphs for each
        kind of them."""
        return self.training and self.compiler is not None

    def _prepare_layer(self) -> None:
        layer = self.layer
        if self.checkpointing.keep_attention:  # what is compiled includes the choice of operators
            layer = recompute_but_attention(layer)
        if self.compiler:
            # The layer's numbers (α) are constants; Inductor fails on some that could change.
            torch._dynamo.config.specialize_float = True
            # That a batch is as long on either side holds for no other.
            torch.fx.experimental._config.use_duck_shape = False
            # Inductor's own random numbers and selective checkpointing do not go together.
            selective = self.checkpointing.keep_attention and self.compiler == "inductor"
            compiled = torch.compile(
                layer,
                dynamic=True,
                backend=self.compiler,
                options={"fallback_random": True} if selective else None,
            )

            def while_training(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
                return (compiled if self.training else self.layer)(x, *args, **kwargs)

            layer = while_training
        self.prepared_layer = layer

    def run(
        self, x: Tensor, at_level: Callable[[int, Tensor], Tensor], num_levels: int | None = None
    ) -> Tensor:
        """Compute x ← at_level(i, x) for i = 0…N-1, with activation checkpointing.

        :param at_level: calls `prepared_layer`, or `layer`, with the weights of level i.
        :param num_levels: run only so many of the N levels; None: all.
        """

        def segment(levels: range, x: Tensor) -> Tensor:
            for i in levels:
                x = at_level(i, x)
            return x

        policy, levels = self.checkpointing, range(num_levels or self.num_levels)
        if not (policy.levels and self.training):
            return segment(levels, x)
        with save_on_cpu(pin_memory=x.is_cuda) if policy.cpu_offload else nullcontext():
            if policy.keep_attention:  # `prepared_layer` recomputes
                return segment(levels, x)
            for first in levels[:: policy.levels]:
                x = recompute(segment, levels[first : first + policy.levels], x)
        return x


class ParameterCounts(NamedTuple):
    """How many parameters a model has, each shared one counted once."""

    total: int
    core: int
    """Without what its data are the size of, such as the embeddings of a vocabulary."""


class Layered(nn.Module):
    """A model with an encoder, and perhaps a decoder, each of them a stack of layers."""

    around: ClassVar[tuple[str, ...]]
    """How the names of parameters begin that are not of the core."""

    @property
    def parameter_counts(self) -> ParameterCounts:
        """Count the parameters. (Of weights that ZeRO 3 has cut up there is nothing to count.)"""
        around = {
            id(parameter)
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if name.startswith(self.around)
        }
        sizes = [(p.numel(), id(p) not in around) for p in self.parameters()]
        return ParameterCounts(
            total=sum(size for size, _ in sizes), core=sum(size for size, core in sizes if core)
        )

    @property
    def stacks(self) -> dict[str, nn.Module]:
        """Return encoder and decoder by these names."""
        return {name: m for name, m in self.named_children() if name in ("encoder", "decoder")}

    def checkpoint_activations(self, policy: ActivationCheckpointing) -> None:
        """Keep for the backward pass what `policy` says, from now on.

        :raises ValueError: the architecture has no levels to recompute.
        """
        for stack in self.stacks.values():
            if isinstance(stack, Stack):
                stack.checkpoint_activations(policy)
            elif policy.levels:
                raise ValueError(
                    f"{type(stack).__name__} has no activation checkpointing; set "
                    "training.activation_checkpointing.levels to 0"
                )

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the layers with torch.compile: a ring's one, or each of a Transformer's."""
        for stack in self.stacks.values():
            if isinstance(stack, Stack):
                stack.compile_layer(backend)
            else:
                assert isinstance(stack.layers, nn.ModuleList)
                for layer in stack.layers:
                    layer.compile(dynamic=True, backend=backend)  # type: ignore[no-untyped-call]
