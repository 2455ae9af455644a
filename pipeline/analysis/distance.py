"""How far attention looks: the distance between a query and what it attends to, weighted by how
much it does so (Dosovitskiy et al. 2021, arXiv 2010.11929; Raghu et al. 2021, arXiv 2108.08810).
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_distances(length: int) -> Tensor:
    """Return |i - j| of positions in a sentence, `[S, S]`."""
    positions = torch.arange(length, dtype=torch.float32)
    return (positions[:, None] - positions).abs()


def patch_distances(rows: int, columns: int, patch_size: int) -> Tensor:
    """Return how many pixels apart the centres of an image's patches are, row by row, `[P, P]`."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    centres = torch.stack([row.flatten(), column.flatten()], dim=1) * float(patch_size)
    return torch.cdist(centres, centres)


def without_class_token(attention: Tensor) -> Tensor:
    """Return the attention of patches to patches; rows sum to 1 again.

    :param attention: `[…, 1 + P, 1 + P]`, the class token first.
    :returns: `[…, P, P]`.
    """
    patches = attention[..., 1:, 1:]
    return patches / patches.sum(-1, keepdim=True)


def uniform_attention(attention: Tensor) -> Tensor:
    """Return what attention would be if every query looked alike at all that it may look at.

    :param attention: `[N, B, H, S, S]`; a query may look at what any level or head of it looks at.
    :returns: `[1, B, 1, S, S]`.
    """
    allowed = (attention.amax((0, 2)) > 0).to(attention)
    return (allowed / allowed.sum(-1, keepdim=True))[None, :, None]


class MeanAttentionDistance:
    """The mean over all queries of all batches, for each level and head."""

    def __init__(self) -> None:
        self._sum = torch.zeros(())
        self._queries = 0

    def add(self, attention: Tensor, distances: Tensor, real: Tensor) -> None:
        """Take a batch in.

        :param attention: `[N, B, H, S, S]`; nothing attends to padding.
        :param distances: between positions, `[S, S]`.
        :param real: False where a position is padding, `[B, S]`: no query there counts.
        """
        mean = torch.einsum("nbhij,ij->nbhi", attention, distances.to(attention))
        self._sum = self._sum + (mean * real[:, None]).double().sum((1, 3))
        self._queries += int(real.sum())

    def value(self) -> Tensor:
        """Return the means, `[N, H]`, float64."""
        return self._sum / self._queries
