"""This module builds ONNX graphs node by node; large constants may go into a file beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from models.export_format import ONNX_WEIGHTS, ModelError, Quantization

OPSET, IR_VERSION = 21, 10  # of 2024; newer ones bring nothing here
CONTRIB = "com.microsoft"  # operators that are ONNX Runtime's own (its ContribOperators.md)
CONTRIB_OPERATORS = (
    "GatherBlockQuantized", "MatMulNBits", "MultiHeadAttention", "SkipLayerNormalization",
)  # fmt: skip
BLOCKS = (64, 128, 256)  # inputs that share a scale; MatMulNBits is slow with fewer
ZERO = 128  # a quantized 0
ALIGNMENT = 4096  # of tensors in weights.bin, which is mapped; smaller ones are in the graph

FLOAT, INT64, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32
BOOL, UINT8 = onnx.TensorProto.BOOL, onnx.TensorProto.UINT8

Array = NDArray[Any]
Value = tuple[int, Sequence[int | str] | None]
"""Type and shape of an input or output of a graph; words are sizes that vary."""

Values = Mapping[str, Value]


class Weights:
    """The content of weights.bin, and where in it a tensor is; equal ones are there once."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.offsets: dict[bytes, int] = {}  # of tensors, by a digest of their content

    def tensor(self, name: str, array: Array) -> onnx.TensorProto:
        """Return a reference to a tensor, which is stored when it is first asked for."""
        content = array.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self.offsets:
            self.content += bytes(-len(self.content) % ALIGNMENT)
            self.offsets[digest] = len(self.content)
            self.content += content
        tensor = onnx.TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        place = {"location": ONNX_WEIGHTS, "offset": self.offsets[digest], "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class Graph:
    """A graph that is being built; values are known by their names."""

    def __init__(
        self, name: str, weights: Weights | None = None, quantization: Quantization | None = None
    ) -> None:
        """Begin one.

        :param weights: takes the large constants; None: they stay in the graph.
        """
        self.name, self.weights, self.quantization = name, weights, quantization
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, and return that."""
        return self.add_many(operator, *inputs, count=1, **attributes)[0]

    def add_many(
        self, operator: str, *inputs: str, count: int, names: Sequence[str] = (), **attributes: Any
    ) -> list[str]:
        """Add a node, and return its outputs.

        :param inputs: an empty one is left out.
        :param names: of the outputs; by default the node's name and a number.
        """
        node = f"{self.name}/{operator}_{len(self.nodes)}"
        outputs = list(names) or [f"{node}:{i}" for i in range(count)]
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        domain = CONTRIB if operator in CONTRIB_OPERATORS else None
        self.nodes.append(
            helper.make_node(operator, inputs, outputs, name=node, domain=domain, **attributes)
        )
        return outputs

    def constant(self, name: str, value: Tensor | Array | float) -> str:
        """Add a constant, in weights.bin if it is large and there is one."""
        if isinstance(value, Tensor):
            value = value.detach().float().cpu().numpy()
        elif isinstance(value, float):
            value = np.array(value, np.float32)
        array = np.ascontiguousarray(value)
        if name not in self.constants:
            self.constants[name] = (
                numpy_helper.from_array(array, name)
                if self.weights is None or array.nbytes < ALIGNMENT
                else self.weights.tensor(name, array)
            )
        return name

    def ints(self, *values: int) -> str:
        """Add a constant vector of integers."""
        return self.constant(f"[{','.join(map(str, values))}]", np.array(values, np.int64))

    def linear(self, x: str, name: str, weight: Tensor) -> str:
        """Add the product W x, in int8 if weights are quantized: then x is, too, block by block.

        :param x: `[R, in]`.
        :param weight: `[out, in]`.
        """
        outputs, inputs = weight.shape
        if not self.quantization:
            return self.add("Gemm", x, self.constant(name, weight), transB=1)
        q, scales = quantize(name, weight)
        blocks, block = scales.shape[1], block_of(inputs)
        if missing := blocks * block - inputs:  # the last block is filled up at loading
            zero = self.constant("quantized 0", np.array(ZERO, np.uint8))
            pads = self.ints(0, 0, 0, missing)
            matrix = self.add("Pad", self.constant(f"{name}.rows", q), pads, zero)
            matrix = self.add("Reshape", matrix, self.ints(outputs, blocks, block))
        else:
            matrix = self.constant(name, q.reshape(outputs, blocks, block))
        return self.add(
            "MatMulNBits", x, matrix, self.constant(f"{name}.scales", scales),
            K=inputs, N=outputs, bits=8, block_size=block, accuracy_level=4,
        )  # fmt: skip

    def embedding(self, tokens: str, name: str, weight: Tensor) -> str:
        """Add the embeddings of tokens, `[R, d]`.

        :param tokens: of any shape.
        :param name: of the matrix, which may be the output projection's too.
        """
        if self.quantization:
            q, scales = quantize(name, weight)
            x = self.add(
                "GatherBlockQuantized", self.constant(f"{name}.rows", q), tokens,
                self.constant(f"{name}.scales", scales),
                bits=8, block_size=block_of(weight.size(1)), quantize_axis=1,
            )  # fmt: skip
        else:
            x = self.add("Gather", self.constant(name, weight), tokens)
        return self.add("Reshape", x, self.ints(-1, weight.size(1)))

    def finish(self, inputs: Values, outputs: Values) -> onnx.GraphProto:
        """Return what has been built. A constant among the inputs is what is taken without one."""
        takes, gives = (
            [helper.make_tensor_value_info(name, *value) for name, value in side.items()]
            for side in (inputs, outputs)
        )
        constants = list(self.constants.values())
        return helper.make_graph(self.nodes, self.name, takes, gives, initializer=constants)

    def to_bytes(self, inputs: Values, outputs: Values) -> bytes:
        """Return the content of a file with this graph as a model."""
        domains = {"": OPSET, CONTRIB: 1} if self.weights is not None else {"": OPSET}
        opsets = [helper.make_opsetid(name, number) for name, number in domains.items()]
        graph = self.finish(inputs, outputs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def block_of(inputs: int) -> int:
    """Return how many inputs share a scale: with the least to fill up, then as many as can be."""
    return min(BLOCKS, key=lambda block: (-(-inputs // block) * block, -block))


def quantize(name: str, weight: Tensor) -> tuple[Array, Array]:
    """Return a matrix as w = (q - 128) · scale, where a block of an output's inputs has one scale.

    :param weight: `[out, in]`.
    :returns: q `[out, in]`, and the scales `[out, blocks]`.
    :raises ModelError: a weight is not a number, which quantized inputs would hide.
    """
    array, block = weight.detach().float().cpu().numpy(), block_of(weight.size(1))
    scales = np.maximum.reduceat(np.abs(array), range(0, weight.size(1), block), axis=1)
    scales /= np.float32(ZERO - 1)
    if not np.isfinite(scales).all():
        raise ModelError(f"{name}: not all weights are numbers; training has diverged")
    scales[scales == 0] = 1
    q = np.rint(array / scales.repeat(block, axis=1)[:, : weight.size(1)]) + ZERO
    return q.astype(np.uint8), scales
