"""How integer weights lie in a file: at their bits. Every storage unpacks to int8 by nodes that fold when a runtime loads.

ONNX Runtime constant-folds all of them, so run time, memory and numerics stay those of int8 (measured: the reference
in docs/file-formats.md). The writer takes whichever storage is smallest for the layer at hand, nodes included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from edgecompress.exporters.onnx_writing import Names, node, tensor

Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class Stored:
    """Nodes and initialisers that yield an int8 tensor called ``output``; ``opset`` is the lowest that has them."""

    kind: str
    output: str
    nodes: tuple[onnx.NodeProto, ...]
    initializers: tuple[TensorProto, ...]
    opset: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, with the field headers."""
        sizes = [len(proto.SerializeToString()) for proto in self.nodes]
        sizes += [len(proto.SerializeToString()) for proto in self.initializers]
        return sum(1 + _varint(size) + size for size in sizes)


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


def store(values: Int8, bits: int, names: Names, *, max_opset: int, unpack: bool = True) -> Stored:
    """The smallest storage of ``values`` at ``bits``.

    Args:
        values: int8 integers that fit ``bits``.
        max_opset: storages that need a later opset are left out.
        unpack: allow storages that need arithmetic at load (dense 3, 5, 6, 7 bits and sparse).
    """
    kinds: list[Callable[[Int8, int, Names], Stored]] = [_as_int8]
    if bits <= 4 and max_opset >= 21:
        kinds.append(_as_int4)
    if bits <= 2 and max_opset >= 25:
        kinds.append(_as_int2)
    if unpack and max_opset >= 18:
        if bits < 8:
            kinds.append(_as_planes)
        if (values == 0).mean() > 0.2 and max_opset >= 21:
            kinds.append(_as_sparse)
    sizes = [kind(values, bits, Names()).size_bytes for kind in kinds]
    return kinds[int(np.argmin(sizes))](values, bits, names)


def _as_int8(values: Int8, bits: int, names: Names) -> Stored:
    name = names.new()
    return Stored("int8", name, (), (tensor(name, values),), 13)


def _cast(values: Int8, kind: str, dtype: Any, opset: int, names: Names) -> Stored:
    packed, output = names.new(), names.new()
    cast = node("Cast", [packed], [output], to=TensorProto.INT8)
    return Stored(kind, output, (cast,), (tensor(packed, values.astype(dtype)),), opset)


def _as_int4(values: Int8, bits: int, names: Names) -> Stored:
    return _cast(values, "int4", ml_dtypes.int4, 21, names)


def _as_int2(values: Int8, bits: int, names: Names) -> Stored:
    return _cast(values, "int2", ml_dtypes.int2, 25, names)


def _bit_columns(flags: NDArray[np.uint8], names: Names) -> tuple[list[onnx.NodeProto], list[TensorProto], str]:
    """Bits ``[rows, n]`` packed eight to a byte; the nodes yield uint8 zeros and ones ``[rows, n / 8, 8]``."""
    packed = np.packbits(flags, axis=1, bitorder="little")[:, :, None]
    data, shifts, one, shifted, bit = (names.new() for _ in range(5))
    nodes = [node("BitShift", [data, shifts], [shifted], direction="RIGHT"), node("BitwiseAnd", [shifted, one], [bit])]
    return (
        nodes,
        [tensor(data, packed), tensor(shifts, np.arange(8, dtype=np.uint8)), tensor(one, np.array([1], np.uint8))],
        bit,
    )


def _as_planes(values: Int8, bits: int, names: Names) -> Stored:
    """Two's complement at ``bits``, one bit-plane after the other: ``value = sum(bit_j * 2**j) - 2**(bits-1)``."""
    codes = (values.astype(np.int16).ravel() + 2 ** (bits - 1)).astype(np.uint8)
    planes = (codes[None] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    nodes, initializers, bit = _bit_columns(planes, names)
    weights, flat_shape, shape, offset, axes = (names.new() for _ in range(5))
    floats, flat, code, centred, cut, shaped, output = (names.new() for _ in range(7))
    initializers += [
        tensor(weights, (2.0 ** np.arange(bits)).astype(np.float32)[None]),
        tensor(flat_shape, np.array([bits, -1], np.int64)),
        tensor(shape, np.array(values.shape, np.int64)),
        tensor(offset, np.array(2 ** (bits - 1), np.float32)),
    ]
    nodes += [
        node("Reshape", [bit, flat_shape], [flat]),
        node("Cast", [flat], [floats], to=TensorProto.FLOAT),
        node("MatMul", [weights, floats], [code]),
        node("Sub", [code, offset], [centred]),
    ]
    if codes.size % 8:
        start, end = names.new(), names.new()
        initializers += [
            tensor(start, np.array([0], np.int64)),
            tensor(end, np.array([codes.size], np.int64)),
            tensor(axes, np.array([1], np.int64)),
        ]
        nodes.append(node("Slice", [centred, start, end, axes], [cut]))
        centred = cut
    nodes += [node("Reshape", [centred, shape], [shaped]), node("Cast", [shaped], [output], to=TensorProto.INT8)]
    return Stored(f"dense{bits}", output, tuple(nodes), tuple(initializers), 18)


def _as_sparse(values: Int8, bits: int, names: Names) -> Stored:
    """A bitmask and the non-zero values in order: ``value[i] = mask[i] * nonzero[cumsum(mask)[i] - 1]``."""
    flat = values.ravel()
    mask = np.pad((flat != 0).astype(np.uint8), (0, -flat.size % 8))
    nonzero = flat[flat != 0] if flat.any() else np.zeros(1, np.int8)
    nodes, initializers, bit = _bit_columns(mask[None], names)
    stored = min((kind(nonzero, bits, Names()) for kind in _value_storages(bits)), key=lambda s: s.size_bytes).kind
    inner = {"int8": _as_int8, "int4": _as_int4, "int2": _as_int2}[stored](nonzero, bits, names)
    line, count, one, axis, shape = (names.new() for _ in range(5))
    flat_mask, mask32, running, position, found, mask8, product, output = (names.new() for _ in range(8))
    initializers += [
        *inner.initializers,
        tensor(line, np.array([-1], np.int64)),
        tensor(one, np.array(1, np.int32)),
        tensor(axis, np.array(0, np.int64)),
    ]
    nodes += [
        *inner.nodes,
        node("Reshape", [bit, line], [flat_mask]),
        node("Cast", [flat_mask], [mask32], to=TensorProto.INT32),
        node("CumSum", [mask32, axis], [running]),
        node("Sub", [running, one], [position]),
        node("Gather", [inner.output, position], [found], axis=0),
        node("Cast", [found], [mask8], to=TensorProto.INT32),
        node("Mul", [mask8, mask32], [product]),
    ]
    if flat.size % 8:
        start, end, cut = names.new(), names.new(), names.new()
        initializers += [tensor(start, np.array([0], np.int64)), tensor(end, np.array([flat.size], np.int64))]
        nodes.append(node("Slice", [product, start, end], [cut]))
        product = cut
    initializers.append(tensor(shape, np.array(values.shape, np.int64)))
    nodes += [node("Cast", [product], [count], to=TensorProto.INT8), node("Reshape", [count, shape], [output])]
    return Stored("sparse", output, tuple(nodes), tuple(initializers), max(18, inner.opset))


def _value_storages(bits: int) -> list[Callable[[Int8, int, Names], Stored]]:
    return [_as_int8, *([_as_int4] if bits <= 4 else [])]
