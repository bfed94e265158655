"""What a written ONNX file really holds: the bytes of every layer's weights, and the channels that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod

import onnx
from onnx import TensorProto

LAYERS = ("Conv", "ConvTranspose", "Gemm")
BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4}  # of types that fill less than a byte


def bytes_of_layers(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes that the weights of each layer take in the file, however they are stored; scales and zero points do not count.

    What several layers share counts for the first of them.
    """
    constants = {found.name: found for found in model.graph.initializer}
    writers = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, int] = {}
    counted: set[str] = set()
    for layer in model.graph.node:
        if layer.op_type in LAYERS and len(layer.input) > 1:
            names = _constants_behind(layer.input[1], constants, writers) - counted
            counted |= names
            found[layer.name] = sum(tensor_bytes(constants[name]) for name in names)
    return found


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of the values of an initialiser."""
    kind = TensorProto.DataType.Name(tensor.data_type)
    bits = BITS.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-int(prod(tensor.dims)) * int(bits) // 8)


def shapes_of_weights(model: onnx.ModelProto) -> Counter[tuple[int, ...]]:
    """Shapes of all initialisers of two dimensions or more, each sorted: runtimes transpose the weights of linear layers."""
    return Counter(tuple(sorted(found.dims)) for found in model.graph.initializer if len(found.dims) > 1)


def lacking(found: Counter[tuple[int, ...]], wanted: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes that are wanted and not found as often."""
    return list((Counter(tuple(sorted(shape)) for shape in wanted) - found).elements())


def _constants_behind(
    value: str, constants: Mapping[str, TensorProto], writers: Mapping[str, onnx.NodeProto]
) -> set[str]:
    """Initialisers that ``value`` is made of; of a DequantizeLinear only what it dequantises."""
    if value in constants:
        return {value}
    writer = writers.get(value)
    if writer is None:
        return set()
    inputs = writer.input[:1] if writer.op_type == "DequantizeLinear" else writer.input
    return set().union(*(_constants_behind(name, constants, writers) for name in inputs if name))
