"""What a model computes on the way: the states behind each level, and which token attends to which.

Nothing in the model is made for this. A ring's layer is a method that the ring calls N times; for
the time of a recording another function stands in its place, which calls it and takes notes. Other
stacks have one module for each layer, and modules have hooks. Attention matrices exist in neither:
they are computed anew, from what the fused kernel was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from models.attention import attention_weights
from models.stack import Stack


class StackRecording(NamedTuple):
    """A stack of N levels (or layers) has computed this, for B sequences of S positions."""

    states: Tensor
    """What enters the stack, and what leaves each level, `[N + 1, B, S, d]`."""

    self_attention: Tensor
    """Of each level and head, `[N, B, H, S, S]`; a row is a query's and sums to 1."""

    cross_attention: Tensor | None
    """The same of encoder-decoder attention, `[N, B, H, T, S]`; None: the stack has none."""

    ffn_inputs: Tensor | None
    """What a ring's feed-forward network reads at each level, `[N, B, S, d]`; None: it has none, or
    the stack is no ring."""


class _LevelNotes:
    """What was seen while one level ran."""

    def __init__(self) -> None:
        self.attention: list[Tensor] = []  # of self-attention, then of cross-attention
        self.ffn_input: Tensor | None = None


class _StackNotes:
    """What was seen while a stack ran."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.levels: list[_LevelNotes] = []

    def recording(self) -> StackRecording:
        attention = list(zip(*(level.attention for level in self.levels), strict=True))
        ffn_inputs = [x for level in self.levels if (x := level.ffn_input) is not None]
        return StackRecording(
            states=torch.stack(self.states),
            self_attention=torch.stack(attention[0]),
            cross_attention=torch.stack(attention[1]) if attention[1:] else None,
            ffn_inputs=torch.stack(ffn_inputs) if ffn_inputs else None,
        )


class _Recorder(TorchFunctionMode):
    """Sees every call of PyTorch's attention, and notes its matrix at the level that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.level: _LevelNotes | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.level is not None and func is F.scaled_dot_product_attention:
            q, k, _ = args
            weights = attention_weights(q, k, kwargs["attn_mask"], causal=kwargs["is_causal"])
            self.level.attention.append(weights)
        return func(*args, **kwargs)

    def begin_level(self, notes: _StackNotes) -> None:
        self.level = _LevelNotes()
        notes.levels.append(self.level)

    def end_level(self, notes: _StackNotes, state: Tensor) -> None:
        self.level = None
        notes.states.append(state)


def record(stacks: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, StackRecording]:
    """Call `run` without gradients, and return what each stack has computed in it.

    :param stacks: by a name; rings (`models.stack.Stack`), or modules with a list of `layers`.
    :param run: calls the model that they are of once, with all positions of a batch.
    """
    notes = {name: _StackNotes() for name in stacks}
    with ExitStack() as listening, _Recorder() as recorder, torch.no_grad():
        for name, stack in stacks.items():
            listening.enter_context(_input_noted(stack, notes[name]))
            if isinstance(stack, Stack):
                listening.enter_context(_ring_noted(stack, notes[name], recorder))
            else:
                listening.enter_context(_layers_noted(stack, notes[name], recorder))
        run()
    return {name: stack_notes.recording() for name, stack_notes in notes.items()}


@contextmanager
def _input_noted(stack: nn.Module, notes: _StackNotes) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        notes.states.append(args[0])

    with stack.register_forward_pre_hook(note):
        yield


@contextmanager
def _ring_noted(stack: Stack[...], notes: _StackNotes, recorder: _Recorder) -> Iterator[None]:
    """Take notes of a ring. Its layer runs as it is: one that was compiled would show nothing."""

    def layer(x: Tensor, *args: Any) -> Tensor:
        recorder.begin_level(notes)
        x = stack.layer(x, *args)
        recorder.end_level(notes, x)
        return x

    def feed_forward(x: Tensor, *args: Any) -> Tensor:
        notes.levels[-1].ffn_input = x
        y: Tensor = of_class(stack, x, *args)
        return y

    of_class, prepared = type(stack).feed_forward, stack.prepared_layer  # type: ignore[attr-defined]
    stack.prepared_layer, stack.__dict__["feed_forward"] = layer, feed_forward
    try:
        yield
    finally:
        stack.prepared_layer = prepared
        del stack.__dict__["feed_forward"]


@contextmanager
def _layers_noted(stack: nn.Module, notes: _StackNotes, recorder: _Recorder) -> Iterator[None]:
    """Take notes of a stack of modules."""

    def begin(module: nn.Module, args: object) -> None:
        recorder.begin_level(notes)

    def end(module: nn.Module, args: object, output: Tensor) -> None:
        recorder.end_level(notes, output)

    with ExitStack() as hooks:
        for layer in stack.get_submodule("layers").children():
            hooks.enter_context(layer.register_forward_pre_hook(begin))
            hooks.enter_context(layer.register_forward_hook(end))
        yield
