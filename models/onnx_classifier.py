"""This module describes an image classifier to any runtime of ONNX, in one file.

    model.onnx      images `[B, C, H, W]`, bytes → logits `[B, classes]`

Its operators are ONNX's own. The levels follow one another in the graph, and what they share is in
the file once. Level signals are applied as in training: they cannot be folded into other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from data_prep.files import write_atomically
from models.config import LAYER_NORM_EPS
from models.export_format import CLASSIFIER
from models.image_classifier import FINAL_LAYER_NORM_EPS, ImageClassifier, num_positions
from models.onnx_builder import FLOAT, UINT8, Graph
from models.ringformer import VisionRing
from models.ringformer.vision_weights import FeedForward, Level, SelfAttention
from models.vision_transformer import VisionTransformer


def write_onnx_classifier(model: ImageClassifier, folder: Path) -> None:
    """Write the graph into `folder`."""
    encoder = model.encoder
    assert isinstance(encoder, VisionRing | VisionTransformer)
    graph = Classifier(model)
    x, levels = graph.embed(), encoder.levels()
    for i, level in enumerate(levels):
        x = graph.layer(graph.add_encodings(x, i), i, level, is_last=i == len(levels) - 1)
    graph.predict(x)
    channels, size = model.image
    content = graph.to_bytes(
        {"images": (UINT8, ("batch", channels, size, size))},
        {"logits": (FLOAT, ("batch", model.head.out_features))},
    )
    write_atomically(folder / CLASSIFIER, content)


class Classifier(Graph):
    """A classifier's equations (`ringformer/vision_ring.py`); x is `[R, d]`, R = B · S."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__("classifier")
        self.model = model
        self.dim, self.num_heads = model.config.model_dim, model.config.num_heads
        self.num_positions = num_positions(model.config, model.image)

    def weight(self, values: Tensor) -> str:
        """Add a constant; equal ones are there once."""
        content = values.detach().float().cpu().contiguous()
        digest = hashlib.sha256(repr(tuple(content.shape)).encode() + content.numpy().tobytes())
        return self.constant(f"weight {digest.hexdigest()[:16]}", content)

    def linear_with_bias(self, x: str, weight: Tensor, bias: Tensor) -> str:
        """Add W x + b."""
        return self.add("Gemm", x, self.weight(weight), self.weight(bias), transB=1)

    def norm(self, x: str, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS) -> str:
        """Add LN(x)."""
        return self.add(
            "LayerNormalization", x, self.weight(weight), self.weight(bias), epsilon=eps
        )

    def embed(self) -> str:
        """Add what the encoder reads: class token and patches of normalised images."""
        model, ints = self.model, self.ints
        mean, std = (self.weight(each[:, None, None]) for each in (model.mean, model.std))
        pixels = self.add("Cast", "images", to=FLOAT)
        x = self.add("Div", pixels, self.constant("255", 255.0))
        x = self.add("Div", self.add("Sub", x, mean), std)
        patches, size = model.patches, model.config.patch_size
        assert patches.bias is not None
        weights = self.weight(patches.weight), self.weight(patches.bias)
        x = self.add("Conv", x, *weights, kernel_shape=[size, size], strides=[size, size])
        x = self.add("Reshape", x, ints(0, self.dim, self.num_positions - 1))
        x = self.add("Transpose", x, perm=[0, 2, 1])
        batch = self.add("Slice", self.add("Shape", "images"), ints(0), ints(1))
        shape = self.add("Concat", batch, ints(1, self.dim), axis=0)
        x = self.add("Concat", self.add("Expand", self.weight(model.class_token), shape), x, axis=1)
        if model.pos_encoder is not None:
            x = self.add("Add", x, self.weight(model.pos_encoder.table))
        return self.add("Reshape", x, ints(-1, self.dim))

    def add_encodings(self, x: str, level: int) -> str:
        """Add a Universal Transformer's encodings."""
        encoder = self.model.encoder
        if not isinstance(encoder, VisionRing) or encoder.encodings is None:
            return x
        nothing = encoder.encodings.table.new_zeros(1, self.num_positions, self.dim)
        added = encoder.add_encodings(nothing, level, range(self.num_positions))
        by_image = self.add("Reshape", x, self.ints(-1, self.num_positions, self.dim))
        x = self.add("Add", by_image, self.weight(added))
        return self.add("Reshape", x, self.ints(-1, self.dim))

    def layer(self, x: str, i: int, level: Level, is_last: bool) -> str:
        """Add level i: x ← x + Attention_i(x); x ← x + FFN_i(x).

        :param is_last: compute the class token alone; then R = B.
        """
        y = self.self_attention(x, i, level.self_attn, is_last)
        x = self.add("Add", self.class_token(x) if is_last else x, y)
        return self.add("Add", x, self.feed_forward(x, level.ffn))

    def class_token(self, x: str) -> str:
        """Add what x is at the class token's position."""
        by_image = self.add("Reshape", x, self.ints(-1, self.num_positions * self.dim))
        return self.add("Slice", by_image, self.ints(0), self.ints(self.dim), self.ints(1))

    def self_attention(self, x: str, i: int, own: SelfAttention, is_last: bool) -> str:
        """Add W_o · softmax(q_i k_iᵀ / √(d/H)) v_i + b_o."""
        y = self.linear_with_bias(self.norm(x, *own.layer_norm), own.qkv, own.qkv_bias)
        parts = self.add_many("Split", y, count=3, axis=1, num_outputs=3)
        if own.signal is not None:  # A_iᵀ B_i x
            low = self.add("MatMul", x, self.weight(own.signal.b.T))
            lows = self.add_many("Split", low, count=3, axis=1, num_outputs=3)
            # Each A by itself: one product would be no faster here, and A three times as large.
            signals = cast(VisionRing, self.model.encoder).qkv_signals
            assert signals is not None
            each = zip(lows, map(self.weight, signals.a[i]), parts, strict=True)
            parts = [self.add("Gemm", *inputs) for inputs in each]
        return self.linear_with_bias(self.attend(parts, is_last), own.output, own.output_bias)

    def attend(self, qkv: Sequence[str], is_last: bool) -> str:
        """Add softmax(q kᵀ / √(d/H)) v."""
        head_dim = self.dim // self.num_heads
        by_head = self.ints(-1, self.num_positions, self.num_heads, head_dim)
        q, k, v = (
            self.add("Transpose", self.add("Reshape", part, by_head), perm=perm)
            for part, perm in zip(qkv, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        if is_last:
            q = self.add("Slice", q, self.ints(0), self.ints(1), self.ints(2))
        q = self.add("Mul", q, self.constant("attention scale", head_dim**-0.5))
        y = self.add("MatMul", self.add("Softmax", self.add("MatMul", q, k), axis=-1), v)
        y = self.add("Transpose", y, perm=[0, 2, 1, 3])
        return self.add("Reshape", y, self.ints(-1, self.dim))

    def feed_forward(self, x: str, own: FeedForward) -> str:
        """Add W_down · gelu(W_up LN_i(x + A_iᵀ B_i x) + b_up) + b_down."""
        if own.static is not None:
            x = self.add("Add", x, self.weight(own.static))
        if own.signal is not None:
            low = self.add("MatMul", x, self.weight(own.signal.b.T))
            x = self.add("Gemm", low, self.weight(own.signal.a), x)
        y = self.linear_with_bias(self.norm(x, *own.layer_norm), own.up, own.up_bias)
        return self.linear_with_bias(self.add("Gelu", y), own.down, own.down_bias)

    def predict(self, x: str) -> None:
        """Add the logits, of what the class token has become."""
        norm: nn.LayerNorm = self.model.final_layer_norm
        y = self.norm(x, norm.weight, norm.bias, FINAL_LAYER_NORM_EPS)
        weights = self.weight(self.model.head.weight), self.weight(self.model.head.bias)
        self.add_many("Gemm", y, *weights, count=1, names=["logits"], transB=1)
