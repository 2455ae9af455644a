"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from fairseq2.nn import BatchLayout
from numpy.typing import NDArray
from torch import Tensor

from data_prep.batch_plan import Indices
from data_prep.shards import ShardReader, TokenIds
from data_prep.vocabulary import BOS_IDX, PAD_IDX


@dataclass(frozen=True)
class Batch:
    """A collated micro-batch; sequences are padded on the right."""

    source: Tensor
    """Token ids with EOS `[B, S]`."""

    source_layout: BatchLayout

    target_input: Tensor
    """BOS and the target without its EOS `[B, T]`."""

    target_layout: BatchLayout

    targets: Tensor
    """Target token ids with EOS `[B, T]`."""


def collate(reader: ShardReader, indices: Indices, device: torch.device) -> Batch:
    """Read and pad the pairs `indices`.

    For an empty micro-batch (more ranks than sentences) it is a pair without anything to predict,
    so that all ranks take part in the step.
    """
    pairs = [reader[int(index)] for index in (indices if len(indices) else [0])]
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    source, target = _pad(sources), _pad(targets)
    target_input = np.concatenate(
        [np.full((len(target), 1), BOS_IDX, dtype=np.int64), target[:, :-1]], axis=1
    )
    if not len(indices):
        target[:] = PAD_IDX
    tensors = [_to(device, ids) for ids in (source, target_input, target)]
    return Batch(
        tensors[0],
        BatchLayout.of(tensors[0], [len(ids) for ids in sources]),
        tensors[1],
        BatchLayout.of(tensors[1], [len(ids) for ids in targets]),
        tensors[2],
    )


def _to(device: torch.device, ids: NDArray[np.int64]) -> Tensor:
    tensor = torch.from_numpy(ids)
    if device.type != "cuda":
        return tensor.to(device)
    # From pinned memory a copy does not wait for the kernels before it.
    return tensor.pin_memory().to(device, non_blocking=True)


def _pad(sequences: list[TokenIds]) -> NDArray[np.int64]:
    lengths = np.array([len(ids) for ids in sequences])
    padded = np.full((len(sequences), lengths.max()), PAD_IDX, dtype=np.int64)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(sequences)
    return padded
