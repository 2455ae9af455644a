"""The order in which gradients become ready, in which DeepSpeed adds up those of all ranks."""

from __future__ import annotations

from torch import nn


def names_as_ready(model: nn.Module) -> list[str]:
    """Return a list that gets the name of each parameter when its gradient is ready."""
    ready: list[str] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda parameter: ready.append(names[parameter])
        )
    return ready
