"""The output projection leads from the decoder's output to logits, or straight to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MAX_LOGITS = 1 << 25  # elements of a chunk of logits: 1,024 tokens of a vocabulary of 32k
NARROW = 4  # times as many of 16 bits; there are two such chunks at a time: 0.5 GiB


class OutputProjection(nn.Module):
    """The projection computes logits W h (+ b), or straight their cross-entropy.

    The cross-entropy is computed without ever holding all logits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, pad_idx: int) -> None:
        """Hold parameters that may belong to others too.

        :param weight: `[V, d]`, an embedding's or its own.
        :param bias: `[V]`, or None.
        :param pad_idx: the target that is not predicted.
        """
        super().__init__()
        self.weight, self.bias, self.pad_idx = weight, bias, pad_idx

    def forward(
        self, seqs: Tensor, targets: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Compute logits, or with `targets` the loss.

        :param seqs: the decoder's output, `[B, T, d]`.
        :param targets: token ids `[B, T]`; `pad_idx` is not predicted.
        :returns: logits `[B, T, V]`, or the float32 cross-entropy summed over the targets.
        """
        if targets is None:
            return F.linear(seqs, self.weight, self.bias)
        tensors: tuple[Tensor | None, ...] = (seqs.flatten(0, -2), self.weight, self.bias)
        device = seqs.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
        with torch.autocast(device, enabled=False):
            loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
                *tensors,
                targets.flatten(),
                self.pad_idx,
                label_smoothing,
                torch.is_grad_enabled(),
            )
        return loss

    @torch.inference_mode()
    def log_probs(self, seqs: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probability of each target.

        :param seqs: the decoder's output, `[B, T, d]`.
        :param targets: token ids `[B, T]`.
        :returns: at least float32, `[B, T]`.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        rows = max(1, MAX_LOGITS // self.weight.size(0))
        x, tokens = seqs.flatten(0, -2), targets.view(-1, 1)
        found = []
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            logits = F.linear(x[part], self.weight, self.bias).to(dtype)
            found.append(logits.gather(1, tokens[part]) - logits.logsumexp(dim=1, keepdim=True))
        return torch.cat(found).view(targets.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """This computes `F.cross_entropy(F.linear(x, weight, bias), …, reduction="sum")` by chunks.

    The forward pass has each chunk's probabilities at hand and computes the gradients from them at
    once; nothing of size tokens × vocabulary outlives its chunk. For each logit of 16 bits its
    operators read and write 14 bytes, for one of 32 bits 52; label smoothing adds 2, or 12.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        pad_idx: int,
        label_smoothing: float,
        wanted: bool,
    ) -> Tensor:
        """Compute the loss, and the gradients that `backward` returns.

        :param x: `[tokens, d]`.
        :param targets: `[tokens]`.
        :param wanted: whether gradients are.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        narrow = weight.dtype != dtype
        real = (targets != pad_idx)[:, None]
        real_x, grad_x = x * real, torch.empty_like(x)
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        loss = x.new_zeros((), dtype=dtype)
        smoothing = label_smoothing / weight.size(0)
        rows = max(1, MAX_LOGITS * (NARROW if narrow else 1) // weight.size(0))
        for begin in range(0, x.size(0), rows):
            part = slice(begin, begin + rows)
            target = targets[part, None]
            logits = F.linear(x[part], weight, bias)
            predicted = logits.gather(1, target).to(dtype)
            if narrow:
                # Softmax has float32 inside. The largest probability keeps more of its digits than
                # any logarithm of 16 bits.
                probs = logits.softmax(dim=1)
                largest, place = probs.max(dim=1, keepdim=True)
                log_sum = logits.gather(1, place).to(dtype) - largest.to(dtype).log()
            else:
                log_sum = logits.logsumexp(dim=1, keepdim=True)
            row_loss = log_sum - (1 - label_smoothing) * predicted
            if label_smoothing:
                row_loss = row_loss - smoothing * logits.sum(dim=1, keepdim=True, dtype=dtype)
            loss += (row_loss * real[part]).sum()
            if not wanted:
                continue
            if narrow:
                grad = _gradient(probs, target, label_smoothing)
                torch.addmm(_less(smoothing, weight), grad, weight, out=grad_x[part])
                grad_weight += torch.addmm(_less(smoothing, real_x[part]), grad.T, real_x[part])
            else:
                grad = logits.sub_(log_sum).exp_()  # probabilities
                if label_smoothing:
                    grad -= smoothing
                less = grad.new_full((), label_smoothing - 1)
                grad.scatter_add_(1, target, less.expand_as(target))
                torch.mm(grad, weight, out=grad_x[part])
                grad_weight.addmm_(grad.T, real_x[part])
            if grad_bias is not None:
                grad_bias += (grad.T @ real[part].to(grad.dtype))[:, 0]
        grad_x *= real
        if narrow and grad_bias is not None:
            grad_bias -= smoothing * real.sum()
        if wanted:
            ctx.save_for_backward(
                grad_x,
                grad_weight.to(weight.dtype),
                None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else grad * grad_output.to(grad.dtype)
            for grad in ctx.saved_tensors
        )
        return (*grads, None, None, None, None)


def _gradient(probs: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Turn probabilities of 16 bits into the gradient of their logits, without what smoothing takes
    from all of them.

    :param target: `[rows, 1]`.
    """
    # On a CPU, scatter_ and a sum into float32 would copy all of it.
    place = torch.arange(len(probs), device=probs.device), target[:, 0]
    probs.index_put_(place, probs.new_zeros(()))
    # 1 - p of the target would keep few of its digits; the sum of the others keeps all.
    return probs.index_put_(place, label_smoothing - probs.sum(dim=1))


def _less(smoothing: float, rows: Tensor) -> Tensor:
    """Return what smoothing takes from each row of the gradient of logits times `rows`.

    :param rows: `[n, d]`.
    :returns: `[d]`.
    """
    return (-smoothing * rows.sum(0, dtype=torch.float32)).to(rows.dtype)
