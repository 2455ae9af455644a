"""A stack runs one layer at N levels: this module makes parameters, checkpoints and compiles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Concatenate, Generic, ParamSpec

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F

from models.activation_checkpointing import recompute, recompute_but_attention
from models.config import ActivationCheckpointing

P = ParamSpec("P")  # what a layer takes after x


class Stack(nn.Module, Generic[P]):
    """A stack is an encoder or decoder of one layer; a subclass brings weights and equations.

    All weights are parameters of the stack itself and not of submodules: ZeRO-3 has a module's own
    parameters at hand from the beginning to the end of its forward.
    """

    layer: Callable[Concatenate[Tensor, P], Tensor]
    """The equations of one level."""

    def __init__(
        self, num_levels: int, num_heads: int, dropout_p: float, residual_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.num_levels, self.num_heads, self.dropout_p = num_levels, num_heads, dropout_p
        self.residual_scale = residual_scale
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
            Without that, six levels hardly begin to learn (docs/results.md).
        :returns: `[*shape]`, or `[N, *shape]` if owned.
        """
        weight = torch.empty(self.num_levels if owned else 1, *shape)
        for matrix in weight.view(-1, *shape[-2:]):
            init(matrix)
        if residual:
            weight /= self.num_levels / self.residual_scale
        return nn.Parameter(weight if owned else weight[0])

    def layer_norms(self, dim: int, *, owned: bool) -> nn.Parameter:
        """Make weight and bias of LayerNorms.

        :returns: `[N, 2, d]` if each level has its own, else `[2, d]`.
        """
        norm = torch.stack([torch.ones(dim), torch.zeros(dim)])
        return nn.Parameter(norm.repeat(self.num_levels, 1, 1) if owned else norm)

    # ── Parts of a layer ────────────────────────────────────────────────────────────────────────

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split projections into heads: `[B, S, count·d]` → count × `[B, H, S, d/H]`."""
        batch, length, _ = x.shape
        return x.view(batch, length, count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()

    def dropout(self, x: Tensor) -> Tensor:
        """Drop elements out while training."""
        return F.dropout(x, self.dropout_p, self.training)

    # ── How the layer is run ────────────────────────────────────────────────────────────────────

    def checkpoint_activations(self, policy: ActivationCheckpointing) -> None:
        """Keep for the backward pass what `policy` says, from now on."""
        self.checkpointing = policy
        self._prepare_layer()

    def compile_layer(self, backend: str = "inductor") -> None:
        """Compile the layer; all levels and batch shapes use the same graphs."""
        self.compiler = backend
        self._prepare_layer()

    def _prepare_layer(self) -> None:
        layer = self.layer
        if self.checkpointing.keep_attention:  # what is compiled includes the choice of operators
            layer = recompute_but_attention(layer)
        if self.compiler:
            # The layer's numbers (α) are constants; Inductor fails on some that could change.
            torch._dynamo.config.specialize_float = True
            # Inductor's own random numbers and selective checkpointing do not go together.
            selective = self.checkpointing.keep_attention and self.compiler == "inductor"
            layer = torch.compile(
                layer,
                dynamic=True,
                backend=self.compiler,
                options={"fallback_random": True} if selective else None,
            )
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
