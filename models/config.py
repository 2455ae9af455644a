"""These are the `model` sections of recipes, and a ring's policy of activation checkpointing."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field as Limit
from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from data_prep.section import Section

Architecture = Literal["ringformer", "transformer", "universal", "one_wide_ffn"]
LevelSignals = Literal["all", "attention", "ffn", "static", "none"]

Ranks = dict[str, tuple[LevelSignals, ...]]
"""Keys that say the rank of signals, each with the values of `level_signals` that have those."""

EXPRESSIBLE: tuple[Architecture, ...] = ("ringformer", "transformer")
"""Those whose levels can be written as the layers of a standard Transformer. Not `universal`
(encodings are added before each layer), not `one_wide_ffn` (decoder layers have no feed-forward
network)."""

LAYER_NORM_EPS = 1e-5
"""The LayerNorms' of every architecture."""


class ActivationCheckpointing(Section):
    """What is kept for the backward pass of a ring, and what is recomputed in it."""

    levels: int = Limit(default=0, ge=0)
    """Keep what enters each segment of that many levels and recompute the rest; 0 keeps all."""

    keep_attention: bool = False
    """Selective: keep the outputs of attention too, the dearest to recompute. Needs levels 1."""

    cpu_offload: bool = False
    """Hold what enters the segments in the host's memory until it is needed."""

    @model_validator(mode="after")
    def _fits_together(self) -> ActivationCheckpointing:
        if self.keep_attention and self.levels != 1:
            raise ValueError(f"keep_attention needs levels 1, not {self.levels}")
        if self.cpu_offload and not self.levels:
            raise ValueError("cpu_offload needs levels of at least 1: with 0 nothing is recomputed")
        return self


def _num_levels(values: dict[str, Any]) -> Any:
    """Return the default of what this is named after; 1 if that is not valid itself."""
    return values.get("num_levels", 1)


class LayersConfig(Section):
    """Architecture and sizes of the layers, whatever they read."""

    ranks: ClassVar[Ranks]

    architecture: Architecture = "ringformer"
    """Model family: `ringformer`; `transformer` (fairseq2's own layers: post-LN, for images those
    of a ViT, pre-LN); `universal` (one shared layer; before each of its N iterations 1/N of
    position and level encodings is added); `one_wide_ffn` (attention per layer, one FFN for all
    encoder layers, none in a decoder)."""

    model_dim: PositiveInt = 512
    """Width d of the embeddings and of every level."""

    num_heads: PositiveInt = 8
    """Attention heads; must divide model_dim."""

    ffn_inner_dim: PositiveInt = 2048
    """Width of the feed-forward network's hidden layer."""

    num_levels: PositiveInt = 6
    """N: how often the ring runs its one layer (a plain Transformer has that many layers); of a
    translation model, its one encoder and its one decoder layer."""

    level_signals: LevelSignals = "all"
    """RingFormer's ablations: input-dependent signals on attention and FFN (`all`, the paper's
    model), on one of them, `static` (a learned vector per level instead), or `none`."""

    dropout: float = Limit(default=0.1, ge=0, lt=1)
    """Dropout probability on embeddings, sublayer outputs and FFN hidden units."""

    @property
    def deepest(self) -> int:
        """Return the number of levels of the deepest stack."""
        return self.num_levels

    @property
    def plain(self) -> Self:
        """Return what a Transformer of this width and depth has."""
        return self.model_copy(update={"architecture": "transformer", "level_signals": "all"})

    @property
    def overruled(self) -> set[str]:
        """Return the keys that say nothing, since others that were given say all of it."""
        return set()

    def rank_of(self, rank: int | None) -> int:
        """Return the rank of level signals: what a key says, or the paper's choice."""
        return rank or max(1, self.model_dim // 16)

    def check_ranks(self) -> None:
        """Check that the keys that say ranks are of signals that the model has. (Older models may
        have a rank of none; it changes nothing.)

        :raises ValueError: one is not.
        """
        for key, signals in self.ranks.items():
            rank = getattr(self, key)
            own = self.level_signals if self.architecture == "ringformer" else "none"
            if rank is not None and own not in signals:
                raise ValueError(
                    f"{key} ({rank}) is for architecture ringformer with level_signals "
                    f"{' or '.join(signals)} only"
                )

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        for key in self.ranks:
            rank = getattr(self, key)
            if rank is not None and rank > self.model_dim:
                raise ValueError(f"{key} ({rank}) exceeds model_dim ({self.model_dim})")
        return self

    @model_validator(mode="after")
    def _layers_fit_together(self) -> Self:
        if self.model_dim % self.num_heads or self.model_dim % 2:
            raise ValueError(
                f"model_dim ({self.model_dim}) must be even and a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.level_signals != "all" and self.architecture != "ringformer":
            raise ValueError(
                f"level_signals ({self.level_signals}) is for architecture ringformer only"
            )
        return self


class ModelConfig(LayersConfig):
    """A translation model; the defaults are the paper's base model (8.94M core parameters)."""

    ranks: ClassVar[Ranks] = {"signal_rank": ("all", "attention", "ffn")}

    encoder_levels: PositiveInt = Limit(default_factory=_num_levels)
    """N of the encoder alone."""

    decoder_levels: PositiveInt = Limit(default_factory=_num_levels)
    """N of the decoder alone. Few levels make translating fast: each word passes through them one
    after the other, while the encoder takes a sentence at once."""

    signal_rank: PositiveInt | None = None
    """Rank r of the level signals; null means model_dim / 16, the paper's choice."""

    residual_scale: float = Limit(default=1.0, ge=1)
    """α: each LayerNorm is of α x + sublayer(x), as in DeepNorm (arXiv 2203.00555), and what is
    added starts at α/N of the usual initial weights. Deep stacks need more than 1, the paper's."""

    tied_embeddings: bool = True
    """Share one matrix between source embedding, target embedding and output projection (of a joint
    vocabulary). False is the published model: three matrices and an output bias."""

    scale_embeddings: bool = True
    """Multiply embeddings by sqrt(model_dim). False is the published model."""

    max_seq_len: PositiveInt = 512
    """Longest sequence in tokens that the model accepts (EOS included)."""

    @property
    def deepest(self) -> int:
        """Return the number of levels of the deepest stack."""
        return max(self.encoder_levels, self.decoder_levels)

    @property
    def overruled(self) -> set[str]:
        both = {"encoder_levels", "decoder_levels"} <= self.model_fields_set
        return {"num_levels"} if both else set()

    @property
    def rank(self) -> int:
        """Return the rank r of the level signals."""
        return self.rank_of(self.signal_rank)


class VisionConfig(LayersConfig):
    """An image classifier. Side and channels of the images, and the classes, are the data's."""

    ranks: ClassVar[Ranks] = {
        "attention_signal_rank": ("all", "attention"),
        "ffn_signal_rank": ("all", "ffn"),
    }

    patch_size: PositiveInt = 16
    """Side of a patch in pixels, of which each becomes one token; must divide the images' side."""

    attention_signal_rank: PositiveInt | None = None
    """Rank of the level signals on attention; null means model_dim / 16, the paper's choice."""

    ffn_signal_rank: PositiveInt | None = None
    """Rank of the level signals on the FFN; null means model_dim / 16, the paper's choice."""

    @property
    def attention_rank(self) -> int:
        """Return the rank of the level signals on attention."""
        return self.rank_of(self.attention_signal_rank)

    @property
    def ffn_rank(self) -> int:
        """Return the rank of the level signals on the FFN."""
        return self.rank_of(self.ffn_signal_rank)
