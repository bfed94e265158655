"""How integer weights lie in a file: at their bits. Every storage unpacks to int8 by nodes that fold when a runtime loads.

ONNX Runtime constant-folds all of them, so run time, memory and numerics stay those of int8 (measured: the reference
in docs/file-formats.md). The writer takes whichever storage is smallest for the layer at hand, nodes included, as long as
it still loads quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from edgecompress.exporters.onnx_writing import Names, node, tensor

Int8 = NDArray[np.int8]
SPARSE_ZEROS = 0.2  # share of zeros from which a bitmask is tried
LARGE = 1 << 24  # weights of a layer above which loading must be short of steps
_SMALL = 1 << 15  # weights up to which the smallest storage wins however many steps it takes
_BYTE_INDEX = 1 << 18  # weights from which a table of 256 rows is small beside them


@dataclass(frozen=True)
class Stored:
    """Nodes and initialisers that yield an int8 tensor called ``output``; ``opset`` is the lowest that has them.

    ``weights`` hold the bits of the weights, ``tables`` what it takes to unpack them.
    """

    kind: str
    output: str
    nodes: tuple[onnx.NodeProto, ...]
    weights: tuple[TensorProto, ...]
    tables: tuple[TensorProto, ...]
    opset: int

    @property
    def initializers(self) -> tuple[TensorProto, ...]:
        """All of them."""
        return self.weights + self.tables

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return field_bytes(*self.nodes, *self.initializers)


def field_bytes(*protos: onnx.NodeProto | TensorProto) -> int:
    """Bytes that ``protos`` take in a file, with their field headers."""
    sizes = [len(proto.SerializeToString()) for proto in protos]
    return sum(1 + _varint(size) + size for size in sizes)


def _varint(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)


Held = dict[bytes, str]  # tables that a file has already: the name of each by its type, shape and content


def store(
    values: Int8, bits: int, names: Names, *, max_opset: int, unpack: bool = True, held: Held | None = None
) -> Stored:
    """The smallest storage of ``values`` at ``bits``.

    Args:
        values: int8 integers that fit ``bits``.
        max_opset: storages that need a later opset are left out.
        unpack: allow storages that need arithmetic at load (dense 3, 5, 6, 7 bits and sparse).
        held: of the layers before, and then of this one too: the tables by which layers are unpacked stand in the file once.
    """
    held = {} if held is None else held
    kinds = _kinds(values, bits, max_opset, unpack)
    sizes = [bytes_beside(bytes_of(kind(values, bits, Names())), held) for kind in kinds]
    stored = _sharing(kinds[int(np.argmin(sizes))](values, bits, names), held)
    held |= {content_of(table): table.name for table in stored.tables}
    return stored


def storages(values: Int8, bits: int, used: int, *, max_opset: int) -> list[Stored]:
    """All that `store` chooses from, each with names as long as those after ``used`` others; it compares them with the shortest."""
    return [kind(values, bits, Names(used=used)) for kind in _kinds(values, bits, max_opset, unpack=True)]


Part = tuple[int, tuple[tuple[bytes, int], ...]]  # bytes of nodes and weights, and of every table with its content


def bytes_of(stored: Stored) -> Part:
    """Bytes of a storage, those of tables apart: layers may share them."""
    tables = tuple((content_of(table), field_bytes(table)) for table in stored.tables)
    return field_bytes(*stored.nodes, *stored.weights), tables


def bytes_beside(part: Part, held: Container[bytes]) -> int:
    """Bytes in a file that has the tables of ``held`` already. How long their names are there does not count: `sizes` must
    come to the same choice without the file."""
    own, tables = part
    return own + sum(size for content, size in tables if content not in held)


def _kinds(values: Int8, bits: int, max_opset: int, unpack: bool) -> list[Callable[[Int8, int, Names], Stored]]:
    kinds: list[Callable[[Int8, int, Names], Stored]] = [_as_int8]
    if bits <= 4 and max_opset >= 21:
        kinds.append(_as_int4)
    if bits <= 2 and max_opset >= 25:
        kinds.append(_as_int2)
    return kinds + _unpacked(values, bits, max_opset) if unpack else kinds


def _sharing(stored: Stored, held: Held) -> Stored:
    """``stored`` with the tables of ``held`` in the place of its own that are the same."""
    known = {table.name: content_of(table) for table in stored.tables}
    instead = {name: held[content] for name, content in known.items() if content in held}
    nodes = []
    for written in stored.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(written)
        copy.input[:] = [instead.get(name, name) for name in written.input]
        nodes.append(copy)
    own = tuple(table for table in stored.tables if table.name not in instead)
    return replace(stored, nodes=tuple(nodes), tables=own)


def content_of(table: TensorProto) -> bytes:
    """Type, shape and content, by which tables are the same."""
    return f"{table.data_type} {list(table.dims)} ".encode() + table.raw_data


def _unpacked(values: Int8, bits: int, max_opset: int) -> list[Callable[[Int8, int, Names], Stored]]:
    """Storages that a runtime unpacks by arithmetic when it loads the file, as far as that stays quick.

    Every step takes time and memory that grow with the layer (about 0.1 s for 33 million weights, measured), so that
    the largest layers take the storages with few steps.
    """
    kinds: list[Callable[[Int8, int, Names], Stored]] = []
    if max_opset >= 21 and bits in _PARTS and not (bits == 7 and values.size > LARGE):
        kinds.append(partial(_as_parts, container=2 if max_opset >= 25 else 0) if bits == 3 else _as_parts)
    if max_opset >= 18 and bits < 8 and values.size <= (LARGE if max_opset < 21 else _SMALL):
        kinds.append(_as_planes)
    if max_opset >= 21 and (values == 0).mean() > SPARSE_ZEROS and values.size <= LARGE:
        kinds.append(_as_sparse)
    return kinds


def _as_int8(values: Int8, bits: int, names: Names) -> Stored:
    name = names.new()
    return Stored("int8", name, (), (tensor(name, values),), (), 13)


def _cast(values: Int8, kind: str, dtype: Any, opset: int, names: Names) -> Stored:
    packed, output = names.new(), names.new()
    cast = node("Cast", [packed], [output], to=TensorProto.INT8)
    return Stored(kind, output, (cast,), (tensor(packed, values.astype(dtype)),), (), opset)


def _as_int4(values: Int8, bits: int, names: Names) -> Stored:
    return _cast(values, "int4", ml_dtypes.int4, 21, names)


def _as_int2(values: Int8, bits: int, names: Names) -> Stored:
    return _cast(values, "int2", ml_dtypes.int2, 25, names)


# Bits of the container that a Cast unpacks (the low ones), and bits of each look-up for the others.
_PARTS = {2: (0, 2), 3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 1)}


def _as_parts(values: Int8, bits: int, names: Names, *, container: int | None = None) -> Stored:
    """Two's complement at ``bits``: the low bits as UINT4 or UINT2, the high ones looked up several weights at a time.

    ``value = low + sum(table_k[index_k])``: an index holds the same bit (or two) of 4 or 8 neighbours, its row of the
    table what that bit is worth in each of them. Small layers have the small table.
    """
    usual, width = _PARTS[bits]
    container = usual if container is None else container
    index_bits = 4 if values.size < _BYTE_INDEX else 8
    group = index_bits // width
    codes = np.pad(values.ravel(), (0, -values.size % max(group, 8))).astype(np.int16)
    nodes: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []
    tables: list[TensorProto] = []
    found = []
    if container:
        low, output = names.new(), names.new()
        held = (codes & (2**container - 1)).reshape(-1, group)
        weights.append(tensor(low, held.astype(ml_dtypes.uint4 if container == 4 else ml_dtypes.uint2)))
        nodes.append(node("Cast", [low], [output], to=TensorProto.INT8))
        found.append(output)
    for start in range(container, bits, width):
        part, table, data, index, output = _part(codes, start, width, group), *(names.new() for _ in range(4))
        worth = _worth(start, width, group, signed=start + width == bits)
        weights.append(tensor(data, part.astype(ml_dtypes.uint4 if index_bits == 4 else np.uint8)))
        tables.append(tensor(table, worth))
        nodes += [
            node("Cast", [data], [index], to=TensorProto.INT32),
            node("Gather", [table, index], [output], axis=0),
        ]
        found.append(output)
    total = found[0]
    for other in found[1:]:
        total, before = names.new(), total
        nodes.append(node("Add", [before, other], [total]))
    if codes.size != values.size:
        line, start_at, end, flat, cut = (names.new() for _ in range(5))
        tables += [
            tensor(line, np.array([-1], np.int64)),
            tensor(start_at, np.array([0], np.int64)),
            tensor(end, np.array([values.size], np.int64)),
        ]
        nodes += [node("Reshape", [total, line], [flat]), node("Slice", [flat, start_at, end], [cut])]
        total = cut
    shape, shaped = names.new(), names.new()
    tables.append(tensor(shape, np.array(values.shape, np.int64)))
    nodes.append(node("Reshape", [total, shape], [shaped]))
    return Stored(f"dense{bits}", shaped, tuple(nodes), tuple(weights), tuple(tables), 25 if container == 2 else 21)


def _part(codes: NDArray[np.int16], start: int, width: int, group: int) -> NDArray[np.uint8]:
    """Bits ``start`` to ``start + width`` of ``group`` neighbours side by side, the first one lowest."""
    fields = (codes >> start & (2**width - 1)).reshape(-1, group)
    packed: NDArray[np.uint8] = (fields << (width * np.arange(group, dtype=np.int16))).sum(1).astype(np.uint8)
    return packed


def _worth(start: int, width: int, group: int, *, signed: bool) -> Int8:
    """What each index of `_part` adds to its ``group`` weights."""
    fields = np.arange(2 ** (width * group))[:, None] >> width * np.arange(group) & (2**width - 1)
    if signed:
        fields = np.where(fields >= 2 ** (width - 1), fields - 2**width, fields)
    worth: Int8 = (fields << start).astype(np.int8)
    return worth


def _bit_columns(
    flags: NDArray[np.uint8], names: Names
) -> tuple[list[onnx.NodeProto], TensorProto, list[TensorProto], str]:
    """Bits ``[rows, n]`` packed eight to a byte, with tables and nodes that yield uint8 zeros and ones ``[rows, n / 8, 8]``."""
    packed = np.packbits(flags, axis=1, bitorder="little")[:, :, None]
    data, shifts, one, shifted, bit = (names.new() for _ in range(5))
    nodes = [node("BitShift", [data, shifts], [shifted], direction="RIGHT"), node("BitwiseAnd", [shifted, one], [bit])]
    return (
        nodes,
        tensor(data, packed),
        [tensor(shifts, np.arange(8, dtype=np.uint8)), tensor(one, np.array([1], np.uint8))],
        bit,
    )


def _as_planes(values: Int8, bits: int, names: Names) -> Stored:
    """Two's complement at ``bits``, one bit-plane after the other: ``value = sum(bit_j * 2**j) - 2**(bits-1)``."""
    codes = (values.astype(np.int16).ravel() + 2 ** (bits - 1)).astype(np.uint8)
    planes = (codes[None] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    nodes, packed, tables, bit = _bit_columns(planes, names)
    weights, flat_shape, shape, offset, axes = (names.new() for _ in range(5))
    floats, flat, code, centred, cut, shaped, output = (names.new() for _ in range(7))
    tables += [
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
        tables += [
            tensor(start, np.array([0], np.int64)),
            tensor(end, np.array([codes.size], np.int64)),
            tensor(axes, np.array([1], np.int64)),
        ]
        nodes.append(node("Slice", [centred, start, end, axes], [cut]))
        centred = cut
    nodes += [node("Reshape", [centred, shape], [shaped]), node("Cast", [shaped], [output], to=TensorProto.INT8)]
    return Stored(f"dense{bits}", output, tuple(nodes), (packed,), tuple(tables), 18)


def _as_sparse(values: Int8, bits: int, names: Names) -> Stored:
    """A bitmask and the non-zero values in order: ``value[i] = mask[i] * nonzero[cumsum(mask)[i] - 1]``."""
    flat = values.ravel()
    mask = np.pad((flat != 0).astype(np.uint8), (0, -flat.size % 8))
    nonzero = flat[flat != 0] if flat.any() else np.zeros(1, np.int8)
    nodes, packed, tables, bit = _bit_columns(mask[None], names)
    stored = min((kind(nonzero, bits, Names()) for kind in _value_storages(bits)), key=lambda s: s.size_bytes).kind
    inner = {"int8": _as_int8, "int4": _as_int4, "int2": _as_int2}[stored](nonzero, bits, names)
    line, count, one, axis, shape = (names.new() for _ in range(5))
    flat_mask, mask32, running, position, found, mask8, product, output = (names.new() for _ in range(8))
    tables += [
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
        tables += [tensor(start, np.array([0], np.int64)), tensor(end, np.array([flat.size], np.int64))]
        nodes.append(node("Slice", [product, start, end], [cut]))
        product = cut
    tables.append(tensor(shape, np.array(values.shape, np.int64)))
    nodes += [node("Cast", [product], [count], to=TensorProto.INT8), node("Reshape", [count, shape], [output])]
    return Stored("sparse", output, tuple(nodes), (packed, *inner.weights), tuple(tables), max(18, inner.opset))


def sparse_storage(values: Int8, bits: int) -> Stored:
    """``values`` as a bitmask with the non-zero ones, whether that is the smallest storage or not."""
    return _as_sparse(values, bits, Names())


def _value_storages(bits: int) -> list[Callable[[Int8, int, Names], Stored]]:
    return [_as_int8, *([_as_int4] if bits <= 4 else [])]
