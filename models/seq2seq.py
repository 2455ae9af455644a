"""This module puts embeddings, output and loss around any encoder and decoder."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from fairseq2.models.seq2seq import Seq2SeqModel
from fairseq2.models.transformer import (
    TransformerDecoder,
    TransformerEmbeddingFrontend,
    TransformerEncoder,
)
from fairseq2.nn import BatchLayout, IncrementalState, IncrementalStateBag, StandardEmbedding
from torch import Tensor, nn

from models.config import ModelConfig
from models.dropout import replace_dropouts
from models.output import OutputProjection
from models.padding import PaddedLayout
from models.positions import InterleavedSinusoids
from models.stack import Layered


def _embedding(vocab_size: int, pad_idx: int, dim: int) -> StandardEmbedding:
    def init(embedding: StandardEmbedding) -> None:
        nn.init.normal_(embedding.weight, std=dim**-0.5)
        with torch.no_grad():
            embedding.weight[pad_idx].zero_()

    return StandardEmbedding(vocab_size, dim, pad_idx, init_fn=init)


class TranslationModel(Layered, Seq2SeqModel):
    """This fairseq2 sequence-to-sequence model is what the trainer and the beam search see."""

    around = ("encoder_frontend", "decoder_frontend", "final_proj")

    final_proj: OutputProjection

    def __init__(
        self,
        config: ModelConfig,
        vocab_sizes: tuple[int, int],
        pad_idx: int,
        encoder: TransformerEncoder,
        decoder: TransformerDecoder,
    ) -> None:
        """Put embeddings and output projection around the two stacks.

        :param vocab_sizes: of the source and the target side.
        :raises ValueError: embeddings to tie are of different sizes.
        """
        super().__init__(config.max_seq_len, config.max_seq_len)
        dim = config.model_dim
        source_size, target_size = vocab_sizes
        if config.tied_embeddings and source_size != target_size:
            raise ValueError(
                f"tied_embeddings needs one vocabulary, not {source_size} and {target_size} tokens"
            )
        source_embed = _embedding(source_size, pad_idx, dim)
        target_embed = (
            source_embed if config.tied_embeddings else _embedding(target_size, pad_idx, dim)
        )
        self.pad_idx = pad_idx
        self.config = config
        self.encoder_frontend = self._frontend(config, source_embed)
        self.encoder = encoder
        self.decoder_frontend = self._frontend(config, target_embed)
        self.decoder = decoder
        if config.tied_embeddings:
            self.final_proj = OutputProjection(source_embed.weight, None, pad_idx)
        else:
            linear = nn.Linear(dim, target_size)
            self.final_proj = OutputProjection(linear.weight, linear.bias, pad_idx)
        replace_dropouts(self)

    @property
    def source_embed(self) -> StandardEmbedding:
        """Return the embedding of source tokens."""
        return cast(StandardEmbedding, self.encoder_frontend.embed)

    @property
    def target_embed(self) -> StandardEmbedding:
        """Return the embedding of target tokens; tied, it is the same."""
        return cast(StandardEmbedding, self.decoder_frontend.embed)

    @staticmethod
    def _frontend(config: ModelConfig, embed: StandardEmbedding) -> TransformerEmbeddingFrontend:
        universal = config.architecture == "universal"  # adds positions in every iteration
        return TransformerEmbeddingFrontend(
            config.model_dim,
            embed,
            None if universal else InterleavedSinusoids(config.model_dim, config.max_seq_len),
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
        decoder_levels: int | None = None,
    ) -> Tensor:
        """Compute logits, or with `targets` the loss.

        :param source_seqs: token ids `[B, S]`, padded on the right.
        :param target_seqs: decoder input `[B, T]`: BOS and all target tokens but the last.
        :param targets: what to predict `[B, T]`, ending with EOS.
        :param state_bag: decode incrementally; `target_seqs` then holds the new positions only.
        :param decoder_levels: run only so many levels of a ring's decoder; None: all.
        :returns: logits `[B, T, V]`; with `targets`, the cross-entropy summed over target tokens.
        """
        seqs = self._decode(
            source_seqs, source_seqs_layout, target_seqs, target_seqs_layout, state_bag,
            decoder_levels,
        )  # fmt: skip
        output: Tensor = self.final_proj(seqs, targets, label_smoothing)
        return output

    def log_probs(
        self,
        source_seqs: Tensor,
        source_seqs_layout: BatchLayout,
        target_seqs: Tensor,
        target_seqs_layout: BatchLayout,
        targets: Tensor,
    ) -> Tensor:
        """Compute the log-probability of each target token; parameters are those of `forward`.

        :returns: `[B, T]`; where a target is padding it has no meaning.
        """
        seqs = self._decode(source_seqs, source_seqs_layout, target_seqs, target_seqs_layout)
        return self.final_proj.log_probs(seqs, targets)

    def _decode(
        self,
        source_seqs: Tensor,
        source_seqs_layout: BatchLayout,
        target_seqs: Tensor,
        target_seqs_layout: BatchLayout,
        state_bag: IncrementalStateBag | None = None,
        decoder_levels: int | None = None,
    ) -> Tensor:
        """Return the decoder's output, `[B, T, d]`; parameters are those of `forward`."""
        state = state_bag.maybe_get_state(self, _EncoderOutput) if state_bag else None
        if state is None:
            seqs, layout = self.encoder_frontend(source_seqs, source_seqs_layout)
            state = _EncoderOutput(self.encoder(seqs, layout), layout)
            if state_bag is not None:
                state_bag.set_state(self, state)

        seqs, layout = self.decoder_frontend(target_seqs, target_seqs_layout, state_bag=state_bag)
        some = {} if decoder_levels is None else {"num_levels": decoder_levels}
        decoded: Tensor = self.decoder(
            seqs, layout, state.seqs, state.layout, state_bag=state_bag, **some
        )
        return decoded

    def logits(self, source_seqs: Tensor, target_seqs: Tensor) -> Tensor:
        """Compute logits from padded ids.

        :param source_seqs: `[B, S]`.
        :param target_seqs: `[B, T]`.
        :returns: `[B, T, V]`.
        """
        layouts = self.layout(source_seqs), self.layout(target_seqs)
        return self(source_seqs, layouts[0], target_seqs, layouts[1])

    def layout(self, seqs: Tensor) -> BatchLayout:
        """Return the layout of ids padded on the right with `pad_idx`.

        :param seqs: `[B, S]`.
        """
        lengths = (seqs != self.pad_idx).sum(1).cpu().numpy()
        return PaddedLayout(lengths, seqs.size(1), seqs.device)


class _EncoderOutput(IncrementalState):
    """The encoder output is kept while decoding, with its layout.

    A decoder reads it in its first step only; later steps use its cache, and the layout.
    """

    def __init__(self, seqs: Tensor, layout: BatchLayout) -> None:
        self.seqs, self.layout = seqs, layout

    def reorder(self, new_order: Tensor) -> None:
        lengths = np.array(self.layout.seq_lens)
        reordered = lengths[new_order.cpu().numpy()]
        if not np.array_equal(reordered, lengths):
            self.layout = PaddedLayout(reordered, self.layout.width, self.seqs.device)

    def size_bytes(self) -> int:
        return self.seqs.nbytes

    def capacity_bytes(self) -> int:
        return self.seqs.nbytes
