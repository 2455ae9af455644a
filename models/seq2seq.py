"""The encoder-decoder around any pair of stacks: embeddings, positions, output, loss."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from fairseq2.models.seq2seq import Seq2SeqModel
from fairseq2.models.transformer import (
    TransformerDecoder,
    TransformerEmbeddingFrontend,
    TransformerEncoder,
)
from fairseq2.nn import (
    BatchLayout,
    IncrementalState,
    IncrementalStateBag,
    Linear,
    PositionEncoder,
    StandardEmbedding,
    TiedProjection,
)
from fairseq2.nn.functional import cross_entropy
from torch import Tensor, nn

from models.config import ModelConfig


def sinusoids(length: int, dim: int) -> Tensor:
    """`[length, dim]`: sin in even, cos in odd columns, angle p / 10000^{i/d} (design of the
    published model; fairseq2's own table keeps the halves apart)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10000.0) / dim))
    angles = position * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class InterleavedSinusoids(PositionEncoder):
    """Adds sinusoidal positions; the table is a buffer because a frozen Parameter would break
    ZeRO-3's recomputation."""

    table: Tensor

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__(dim)
        self.register_buffer("table", sinusoids(max_seq_len, dim), persistent=False)

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        state_bag: IncrementalStateBag | None = None,
    ) -> Tensor:
        """:param seqs: `[B, S, d]`. :raises ValueError: longer than the table."""
        begin = state_bag.step_nr if state_bag is not None else 0
        end = begin + seqs.size(1)
        if end > self.table.size(0):
            raise ValueError(
                f"A sequence of {end} tokens exceeds model.max_seq_len ({self.table.size(0)})."
            )
        return seqs + self.table[begin:end].to(seqs.dtype)


def _embedding(vocab_size: int, pad_idx: int, dim: int) -> StandardEmbedding:
    def init(embedding: StandardEmbedding) -> None:
        nn.init.normal_(embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            embedding.weight[pad_idx].zero_()

    return StandardEmbedding(vocab_size, dim, pad_idx, init_fn=init)


class TranslationModel(Seq2SeqModel):
    """A fairseq2 sequence-to-sequence model: what the trainer and the beam search see."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        pad_idx: int,
        encoder: TransformerEncoder,
        decoder: TransformerDecoder,
    ) -> None:
        super().__init__(config.max_seq_len, config.max_seq_len)
        dim = config.model_dim
        source_embed = _embedding(vocab_size, pad_idx, dim)
        target_embed = (
            source_embed if config.tied_embeddings else _embedding(vocab_size, pad_idx, dim)
        )
        self.pad_idx = pad_idx
        self.encoder_frontend = self._frontend(config, source_embed)
        self.encoder = encoder
        self.decoder_frontend = self._frontend(config, target_embed)
        self.decoder = decoder
        self.final_proj: TiedProjection | Linear = (
            TiedProjection(source_embed.weight, bias=None)
            if config.tied_embeddings
            else Linear(dim, vocab_size, bias=True)
        )

    @property
    def source_embed(self) -> StandardEmbedding:
        return cast(StandardEmbedding, self.encoder_frontend.embed)

    @property
    def target_embed(self) -> StandardEmbedding:
        return cast(StandardEmbedding, self.decoder_frontend.embed)

    @staticmethod
    def _frontend(config: ModelConfig, embed: StandardEmbedding) -> TransformerEmbeddingFrontend:
        return TransformerEmbeddingFrontend(
            config.model_dim,
            embed,
            InterleavedSinusoids(config.model_dim, config.max_seq_len),
            no_scale=not config.scale_embeddings,
            dropout_p=config.dropout,
        )

    def forward(  # type: ignore[override]
        self,
        source_seqs: Tensor,
        source_seqs_layout: BatchLayout,
        target_seqs: Tensor,
        target_seqs_layout: BatchLayout,
        targets: Tensor | None = None,
        *,
        state_bag: IncrementalStateBag | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """
        :param source_seqs: token ids `[B, S]`, padded on the right.
        :param target_seqs: decoder input `[B, T]`: BOS and all target tokens but the last.
        :param targets: what to predict `[B, T]`, ending with EOS.
        :param state_bag: decode incrementally; `target_seqs` then holds the new positions only.
        :returns: logits `[B, T, V]`; with `targets`, the cross-entropy summed over target tokens.
        """
        state = state_bag.maybe_get_state(self, _EncoderOutput) if state_bag else None
        if state is None:
            seqs, layout = self.encoder_frontend(source_seqs, source_seqs_layout)
            state = _EncoderOutput(self.encoder(seqs, layout), layout)
            if state_bag is not None:
                state_bag.set_state(self, state)

        seqs, layout = self.decoder_frontend(target_seqs, target_seqs_layout, state_bag=state_bag)
        seqs = self.decoder(seqs, layout, state.seqs, state.layout, state_bag=state_bag)
        logits = self.final_proj(seqs)
        if targets is None:
            return logits
        return cross_entropy(logits, targets, self.pad_idx, label_smoothing=label_smoothing)

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        """:param source: padded ids `[B, S]`. :param target: `[B, T]`. :returns: `[B, T, V]`."""
        return self(source, self.layout(source), target, self.layout(target))

    def checkpoint_levels(self, segment_length: int) -> None:
        """Recompute activations in the backward pass, in segments of that many levels; 0: keep.

        :raises ValueError: the architecture cannot.
        """
        for stack in (self.encoder, self.decoder):
            if hasattr(stack, "segment_length"):
                stack.segment_length = segment_length  # type: ignore[assignment]
            elif segment_length:
                raise ValueError(
                    f"{type(stack).__name__} has no activation checkpointing; set "
                    "training.checkpoint_levels to 0"
                )

    def layout(self, seqs: Tensor) -> BatchLayout:
        """The layout of ids padded on the right with `pad_idx`, `[B, S]`."""
        return BatchLayout.of(seqs, (seqs != self.pad_idx).sum(1).tolist())


class _EncoderOutput(IncrementalState):
    def __init__(self, seqs: Tensor, layout: BatchLayout) -> None:
        self.seqs, self.layout = seqs, layout

    def reorder(self, new_order: Tensor) -> None:
        self.seqs = self.seqs.index_select(0, new_order)
        lengths = self.layout.seq_lens
        self.layout = BatchLayout.of(self.seqs, [lengths[i] for i in new_order.tolist()])

    def size_bytes(self) -> int:
        return self.seqs.nbytes

    def capacity_bytes(self) -> int:
        return self.seqs.nbytes


def core_parameters(model: nn.Module) -> int:
    """Parameters without embeddings and output projection, each shared one counted once."""
    outside: set[Any] = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if "frontend" in name or "final_proj" in name
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)
