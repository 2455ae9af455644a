"""This module describes a trained ring to ONNX Runtime, which has the layer's weights ONCE.

    encoder.onnx    source tokens → keys and values of the decoder's cross-attention
    decoder.onnx    the newest token of each hypothesis and the caches → its likeliest next tokens
    weights.bin     the numbers of both, each once

A ring is what ONNX calls a Scan: the layer is its body, x its state, and what a level owns (its
LayerNorms, its signals, its cache) is what it scans. So level signals are not folded but applied
beside the shared matrices, in float32, whatever those are quantized to. A Transformer is N rings of
one level.

With a shortlist of target tokens the encoder's graph also gives their rows of the output
projection, once for a batch, and the decoder's graph multiplies with these; without, with all.

The operators of domain com.microsoft are ONNX Runtime's own (ContribOperators.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data_prep.files import write_atomically
from data_prep.text import EOS_IDX
from models.config import LAYER_NORM_EPS
from models.export_format import DECODER, ENCODER, ONNX_WEIGHTS, Quantization
from models.onnx_builder import (
    BOOL,
    FLOAT,
    INT32,
    INT64,
    Graph,
    Value,
    Values,
    Weights,
)
from models.positions import InterleavedSinusoids
from models.ringformer import RingDecoder, RingEncoder
from models.ringformer.of_transformer import rings_of
from models.ringformer.ring import Ring
from models.seq2seq import TranslationModel


def write_onnx(
    model: TranslationModel,
    folder: Path,
    quantization: Quantization | None,
    *,
    shortlist: bool = False,
) -> None:
    """Write both graphs and their weights into `folder`.

    :param shortlist: the graphs can restrict a batch to some target tokens.
    :raises ValueError: the architecture is not `EXPRESSIBLE`.
    :raises ModelError: a weight to quantize is not a number.
    """
    encoder, decoder = rings_of(model)
    weights = Weights()
    graphs = {
        ENCODER: _encoder(
            model, encoder, decoder, Graph("encoder", weights, quantization), shortlist
        ),
        DECODER: _decoder(model, decoder, Graph("decoder", weights, quantization), shortlist),
    }
    for name, content in graphs.items():
        write_atomically(folder / name, content)
    write_atomically(folder / ONNX_WEIGHTS, bytes(weights.content))


# ── The ring's equations (`ringformer/ring.py`), without gradients ──────────────────────────────


class Layer:
    """The layer of a ring at one level, as the body of a Scan."""

    def __init__(self, name: str, ring: Ring, graph: Graph, shape: str) -> None:
        """Make ready to describe it.

        :param name: of the ring, in the graph.
        :param shape: value with the shape `[B, S, d]` of x, which itself is `[R, d]`, R = B · S.
        """
        self.name, self.ring, self.outer, self.shape, self.x = name, ring, graph, shape, "x"
        self.dim = ring.self_attn_output.size(1)
        self.body = Graph(f"{name}/level", graph.weights, graph.quantization)
        self.scanned: dict[str, str] = {}  # value in the body → value outside, [N, …]

    def owned(self, name: str, values: Tensor) -> str:
        """Return a level's own part of `values`, `[N, …]`."""
        array = values.detach().float().cpu().numpy()
        name = f"{self.name}.{name}"
        if self.outer.quantization and array.ndim == 3:  # A and B: half the size in the file
            half = self.outer.constant(name, array.astype(np.float16))
            return self.scan(name, self.outer.add("Cast", half, to=FLOAT))
        return self.scan(name, self.outer.constant(name, array))

    def scan(self, name: str, values: str) -> str:
        """Return what a level sees of a value outside, `[N, …]`."""
        own = f"{name} of the level"
        self.scanned[own] = values
        return own

    def linear(self, x: str, name: str, weight: Tensor) -> str:
        """Add a product with a matrix that all levels share."""
        return self.body.linear(x, f"{self.name}.{name}", weight)

    def add_norm(self, x: str, y: str, name: str, layer_norm: Tensor) -> str:
        """Add LN_i(α x + y)."""
        if (scale := self.ring.residual_scale) != 1:
            x = self.body.add("Mul", x, self.body.constant("residual scale", float(scale)))
        weight, bias = (self.owned(f"{name}.{i}", layer_norm[:, i]) for i in (0, 1))
        return self.body.add("SkipLayerNormalization", x, y, weight, bias, epsilon=LAYER_NORM_EPS)

    def attend(
        self, q: str, k: str, v: str, *, lengths: str = "", bias: str = "", past: Sequence[str] = ()
    ) -> list[str]:
        """Add softmax(q kᵀ / √(d/H)) v.

        :param lengths: of the keys, `[B]`; those behind are padding.
        :param bias: added to the scores, `[B, 1, queries, keys]`.
        :param past: keys and values that come before k and v.
        :returns: a value `[R, d]`; and with `past` all keys and values.
        """
        body = self.body
        heads, *present = body.add_many(
            "MultiHeadAttention", q, k, v, "", lengths, bias, *past,
            num_heads=self.ring.num_heads, count=1 + len(past),
        )  # fmt: skip
        return [body.add("Reshape", heads, body.ints(-1, self.dim)), *present]

    def self_attention(
        self, x: str, *, lengths: str = "", bias: str = "", past: Sequence[str] = ()
    ) -> list[str]:
        """Add W_o · softmax(q_i k_iᵀ / √(d/H)) v_i, with q_i = (W_q + A_iᵀ B_i) x and so on.

        Parameters and results are those of `attend`.
        """
        ring, body = self.ring, self.body
        qkv = self.linear(x, "qkv", ring.self_attn_qkv.flatten(0, 1))
        if ring.qkv_signal is not None:
            qkv = body.add("Add", qkv, self.owned("qkv signal", ring.qkv_signal))
        parts = body.add_many("Split", qkv, count=3, axis=1, num_outputs=3)
        if (signals := ring.qkv_signals) is not None:
            b = self.owned("qkv B", signals.b.flatten(1, 2).mT)
            inner = body.add_many("Split", body.add("MatMul", x, b), count=3, axis=1, num_outputs=3)
            a = [self.owned(f"{which} A", signals.a[:, i]) for i, which in enumerate("qkv")]
            parts = [body.add("Gemm", *each) for each in zip(inner, a, parts, strict=True)]
        q, k, v = (body.add("Reshape", part, self.shape) for part in parts)
        y, *present = self.attend(q, k, v, lengths=lengths, bias=bias, past=past)
        return [self.linear(y, "self output", ring.self_attn_output), *present]

    def feed_forward(self, x: str) -> str:
        """Add W_down · gelu(W_up (x + A_iᵀ B_i x))."""
        ring, body = self.ring, self.body
        assert ring.ffn_up is not None
        assert ring.ffn_down is not None
        y = x
        if ring.ffn_signal is not None:
            y = body.add("Add", x, self.owned("ffn signal", ring.ffn_signal))
        if (signals := ring.ffn_signals) is not None:
            b = self.owned("ffn B", signals.b.mT)
            a = self.owned("ffn A", signals.a)
            y = body.add("Gemm", body.add("MatMul", x, b), a, x)
        y = body.add("Gelu", self.linear(y, "up", ring.ffn_up))
        return self.linear(y, "down", ring.ffn_down)

    def run(self, x: str, output: str, present: Sequence[str] = ()) -> list[str]:
        """Add the Scan: x ← layer_i(x) for all levels.

        :param output: the body's value of x after the layer.
        :param present: keys and values that the body puts out, to be kept.
        :returns: x, and those, `[N, B, H, T, d/H]`.
        """
        heads = self.ring.num_heads
        cache = (FLOAT, ("batch", heads, "length", self.dim // heads))
        graph = self.body.finish(
            {name: (FLOAT, None) for name in (self.x, *self.scanned)},
            {output: (FLOAT, ("rows", self.dim)), **dict.fromkeys(present, cache)},
        )
        return self.outer.add_many(
            "Scan", x, *self.scanned.values(), count=1 + len(present), body=graph,
            num_scan_inputs=len(self.scanned),
        )  # fmt: skip


def _encoder(
    model: TranslationModel,
    rings: Sequence[RingEncoder],
    decoder: Sequence[RingDecoder],
    graph: Graph,
    shortlist: bool,
) -> bytes:
    """Describe source tokens → keys and values, `[B, H, S, d/H]` each; and with a shortlist, target
    tokens → their rows of the output projection.
    """
    heads, dim = model.config.num_heads, model.config.model_dim
    tokens = graph.add("Shape", "source")
    length = graph.add("Slice", tokens, graph.ints(1), graph.ints(2))
    positions = graph.add("Slice", _positions(model, graph), graph.ints(0), length, graph.ints(0))
    x = _embed(model, graph, "source", "encoder")
    shape = graph.add("Concat", tokens, graph.ints(dim), axis=0)
    x = graph.add("Add", graph.add("Reshape", x, shape), positions)
    x = graph.add("Reshape", x, graph.ints(-1, dim))

    for i, ring in enumerate(rings):
        layer = Layer(f"{graph.name}.{i}", ring, graph, shape)
        assert ring.ffn_layer_norm is not None
        (y,) = layer.self_attention(layer.x, lengths="lengths")
        z = layer.add_norm(layer.x, y, "self norm", ring.self_attn_layer_norm)
        z = layer.add_norm(z, layer.feed_forward(z), "ffn norm", ring.ffn_layer_norm)
        (x,) = layer.run(x, z)

    shape = graph.add("Concat", tokens, graph.ints(heads, dim // heads), axis=0)
    for i, ring_of_decoder in enumerate(decoder):
        weight = ring_of_decoder.cross_attn_kv.flatten(0, 1)
        keys_values = graph.linear(x, f"decoder.{i}.cross kv", weight)
        parts = graph.add_many("Split", keys_values, count=2, axis=1, num_outputs=2)
        for name, part in zip((f"cross_k.{i}", f"cross_v.{i}"), parts, strict=True):
            by_head = graph.add("Reshape", part, shape)
            graph.add_many("Transpose", by_head, count=1, names=[name], perm=[0, 2, 1, 3])
    inputs: Values = {
        "source": (INT64, ("batch", "source length")),
        "lengths": (INT32, ("batch",)),
    }
    if not shortlist:
        return graph.to_bytes(inputs, _cross(decoder))
    ids = graph.constant("row_ids", np.empty(0, np.int64))
    rows = graph.embedding(ids, _embedding_name(model, "output"), model.final_proj.weight)
    graph.add_many("Identity", rows, count=1, names=["rows"])
    return graph.to_bytes(
        {**inputs, ids: (INT64, ("given",))}, {**_cross(decoder), "rows": (FLOAT, ("given", dim))}
    )


def _decoder(
    model: TranslationModel, rings: Sequence[RingDecoder], graph: Graph, shortlist: bool
) -> bytes:
    """Describe a step: the K hypotheses of a sentence are query positions of one sequence, as in
    `ringformer/decoder_state.py`, and `bias` hides from each what is not its past.

    With a shortlist there are three more inputs that may be left out. `ids`, ascending, are what
    the sentences of the batch may have, and `rows` those of the output projection; without them the
    product is with all of it. `hidden` is added to the logits of each sentence: -∞ for what only
    others may have.
    """
    heads, dim = model.config.num_heads, model.config.model_dim
    x = _embed(model, graph, "tokens", "decoder")
    x = graph.add("Add", x, graph.add("Gather", _positions(model, graph), "position"))
    shape = graph.add("Concat", graph.add("Shape", "tokens"), graph.ints(dim), axis=0)

    older: dict[str, Value] = {}
    newer: dict[str, Value] = {}
    for i, ring in enumerate(rings):
        layer = Layer(f"{graph.name}.{i}", ring, graph, shape)
        assert ring.ffn_layer_norm is not None
        names = (f"past_k.{i}", f"past_v.{i}")
        past = [layer.scan(name, name) for name in names]
        y, *kept = layer.self_attention(layer.x, bias="bias", past=past)
        z = layer.add_norm(layer.x, y, "self norm", ring.self_attn_layer_norm)
        q = layer.body.add("Reshape", layer.linear(z, "cross q", ring.cross_attn_q), shape)
        (y,) = layer.attend(q, f"cross_k.{i}", f"cross_v.{i}", lengths="lengths")
        y = layer.linear(y, "cross output", ring.cross_attn_output)
        z = layer.add_norm(z, y, "cross norm", ring.cross_attn_layer_norm)
        z = layer.add_norm(z, layer.feed_forward(z), "ffn norm", ring.ffn_layer_norm)
        x, *present = layer.run(x, z, kept)
        levels, rest = ring.num_levels, dim // heads
        shape_of_cache = (levels, "batch", heads, "past length", rest)
        older |= dict.fromkeys(names, (FLOAT, shape_of_cache))
        newer |= dict.fromkeys(present, (FLOAT, (levels, "batch", heads, "length", rest)))

    _predict(model, graph, x, shortlist)
    found = ("batch", "beam", "found")
    restriction: Values = {
        "rows": (FLOAT, ("given", dim)),
        "ids": (INT64, ("allowed",)),
        "hidden": (FLOAT, ("sentences or 1", 1, "allowed or 1")),
    }
    return graph.to_bytes(
        {
            "tokens": (INT64, ("batch", "beam")),
            "position": (INT64, ()),
            "bias": (FLOAT, ("batch", 1, "beam", "length")),
            "lengths": (INT32, ("batch",)),
            **_cross(rings),
            **older,
            "count": (INT64, (1,)),
            **(restriction if shortlist else {}),
        },
        {
            "next_tokens": (INT64, found),
            "log_probs": (FLOAT, found),
            "end": (FLOAT, ("batch", "beam", 1)),
            **newer,
        },
    )


def _predict(model: TranslationModel, graph: Graph, x: str, shortlist: bool) -> None:
    """Add the likeliest next tokens after each hypothesis, and the log-probability of EOS."""
    weight, bias = model.final_proj.weight, model.final_proj.bias
    own_bias = "" if bias is None else graph.constant("output bias", bias)
    end = graph.ints(EOS_IDX)
    if shortlist:
        ids = graph.constant("ids", np.arange(len(weight)))
        size = graph.add("Shape", ids)
        is_end = graph.add("Cast", graph.add("Equal", ids, end), to=INT32)
        end = graph.add("ArgMax", is_end, axis=0)
        own_bias = own_bias and graph.add("Gather", own_bias, ids)
        logits = _shortlisted(model, graph, x)
    else:
        size = graph.ints(len(weight))
        logits = graph.linear(x, _embedding_name(model, "output"), weight)
    if own_bias:
        logits = graph.add("Add", logits, own_bias)
    shape = graph.add("Concat", graph.add("Shape", "tokens"), graph.ints(-1), axis=0)
    logits = graph.add("Reshape", logits, shape)
    if shortlist:
        hidden = graph.constant("hidden", np.zeros((1, 1, 1), np.float32))
        logits = graph.add("Add", logits, hidden)
    log_probs = graph.add("LogSoftmax", logits, axis=2)
    graph.add_many("Gather", log_probs, end, count=1, names=["end"], axis=2)
    found = ["log_probs", "places" if shortlist else "next_tokens"]
    count = graph.add("Min", "count", size)
    graph.add_many("TopK", log_probs, count, count=2, names=found, axis=2)
    if shortlist:
        graph.add_many("Gather", ids, "places", count=1, names=["next_tokens"])


def _shortlisted(model: TranslationModel, graph: Graph, x: str) -> str:
    """Add the product with the rows that are given, or without any with all of the matrix."""
    weight = model.final_proj.weight
    rows = graph.constant("rows", np.empty((0, weight.size(1)), np.float32))
    some, whole = (
        Graph(f"{graph.name}/{part}", graph.weights, graph.quantization)
        for part in ("some rows", "all rows")
    )
    products = {
        "then_branch": (some, some.add("Gemm", x, rows, transB=1)),
        "else_branch": (whole, whole.linear(x, "output projection", weight)),
    }
    return graph.add(
        "If", graph.add("Cast", graph.add("Size", rows), to=BOOL),
        **{name: part.finish({}, {y: (FLOAT, None)}) for name, (part, y) in products.items()},
    )  # fmt: skip


def _cross(rings: Sequence[RingDecoder]) -> Values:
    """Return what the encoder's graph puts out and the decoder's takes: keys and values."""
    heads, dim = rings[0].num_heads, rings[0].self_attn_output.size(1)
    value = (FLOAT, ("batch", heads, "source length", dim // heads))
    return {f"cross_{which}.{i}": value for i in range(len(rings)) for which in "kv"}


def _positions(model: TranslationModel, graph: Graph) -> str:
    """Add the table of positions, `[max_seq_len, d]`."""
    encoder = model.encoder_frontend.pos_encoder
    assert isinstance(encoder, InterleavedSinusoids)
    return graph.constant("positions", encoder.table)


def _embed(model: TranslationModel, graph: Graph, tokens: str, side: str) -> str:
    """Add the embeddings of tokens, `[R, d]`; tied ones are one matrix, with the output's."""
    frontend = model.encoder_frontend if side == "encoder" else model.decoder_frontend
    x = graph.embedding(
        tokens, _embedding_name(model, side), frontend.get_parameter("embed.weight")
    )
    if model.config.scale_embeddings:
        x = graph.add("Mul", x, graph.constant("scale", math.sqrt(model.config.model_dim)))
    return x


def _embedding_name(model: TranslationModel, side: str) -> str:
    return "embedding" if model.config.tied_embeddings else f"{side} embedding"
