"""This module knows which positions of a batch are padding; sequences are padded on the right."""

from __future__ import annotations

import numpy as np
import torch
from fairseq2.nn import BatchLayout
from numpy.typing import NDArray
from torch import Tensor

from models.attention import bias_of


class PaddedLayout(BatchLayout):  # type: ignore[misc]  # it is final
    """This is fairseq2's layout of sequences, made on the host at once.

    fairseq2's own constructor fills each row of the positions by itself: on a GPU that is a kernel
    for each sentence.
    """

    def __init__(self, lengths: NDArray[np.int64], width: int, device: torch.device) -> None:
        """Lay out sequences.

        :param lengths: of the sequences, `[B]`.
        :param width: positions of each, padding included.
        :raises ValueError: a length is not from 1 to `width`.
        """
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 1 <= shortest <= longest <= width:
            raise ValueError(f"Lengths must be from 1 to {width}, not {shortest} to {longest}.")
        self._width, self._packed, self._padded = width, False, shortest < width
        self._min_seq_len, self._max_seq_len = shortest, longest
        self._seq_lens: list[int] = lengths.tolist()
        self._seq_begin_indices = list(range(0, (len(lengths) + 1) * width, width))
        if self._padded:
            places = np.arange(width)
            indices = torch.from_numpy(np.where(places < lengths[:, None], places, -1))
            self._position_indices = to_device(indices, device)
        else:
            self._position_indices = torch.arange(width, device=device).expand(len(lengths), -1)

    @property
    def seq_lens_pt(self) -> Tensor:
        """Return the lengths, int32 `[B]`. Nothing that we use of fairseq2 asks for them."""
        return (self._position_indices >= 0).sum(1, dtype=torch.int32)

    @property
    def seq_begin_indices_pt(self) -> Tensor:
        """Return where the sequences begin in the flattened batch, and its end: int32 `[B + 1]`."""
        device = self._position_indices.device
        return torch.tensor(self._seq_begin_indices, dtype=torch.int32, device=device)


def padding_mask(layout: BatchLayout, *, always: bool = False) -> Tensor | None:
    """Return which keys may be attended to.

    :param always: also where nothing is padded: a compiled graph is for batches with a mask.
    :returns: True where one may be, `[B, 1, 1, S]`; None when nothing is padded.
    """
    return (layout.position_indices >= 0)[:, None, None] if always or layout.padded else None


def padding_bias(layout: BatchLayout, dtype: torch.dtype, *, always: bool) -> Tensor | None:
    """Return what attention adds to its scores: 0, or -inf where a key may not be attended to.

    `F.scaled_dot_product_attention` would make it of a mask again at every level.

    :param always: as `padding_mask` takes it.
    :returns: `[B, 1, 1, S]`; None when nothing is padded.
    """
    mask = padding_mask(layout, always=always)
    return None if mask is None else bias_of(mask, dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Make a tensor on the host ready for a copy to `device`."""
    # A copy from pinned memory does not wait for the kernels queued before it.
    return tensor.pin_memory() if device.type == "cuda" else tensor
