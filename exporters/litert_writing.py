"""The LiteRT (TensorFlow Lite) file itself: tensors, buffers and operators as one flatbuffer, by the schema of the wheel.

Nothing here knows of networks; `to_litert` does. Names of operators and options are the schema's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.exporters.more_runners import missing

Array = NDArray[Any]
ALIGNMENT = 16  # of every buffer, as the schema demands: kernels load vectors from it
TYPES = {"float32": "FLOAT32", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "int8": "INT8", "int16": "INT16"}


@dataclass(frozen=True)
class Grid:
    """Where integers lie: ``value = scale * (q - zero)``. ``kind`` is their type: uint8, int8 or int16."""

    scale: float
    zero: int = 0
    kind: str = "int8"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer of the type."""
        info = np.iinfo(self.kind)
        return int(info.min), int(info.max)


@dataclass(frozen=True)
class Written:
    """A tensor of the file: its number there, its shape and, where it holds integers of a scale, their grid."""

    number: int
    shape: tuple[int, ...]
    grid: Grid | None = None


def schema() -> Any:
    """The generated schema of the installed wheel.

    Raises:
        MissingBackendError: LiteRT is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise missing("LiteRT", "litert") from error
    return schema_py_generated


class LiteRtFile:
    """A model of one subgraph that grows operator by operator, in the order in which they run."""

    def __init__(self, *, named: bool = True) -> None:
        self._schema, self._named = schema(), named
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: list[bytes] = [b""]  # the first stands for "no data"
        self._known: dict[bytes, int] = {}
        self._vectors: dict[bytes, Any] = {}  # vectors of steps and zero points, each written once

    def value(self, name: str, shape: Sequence[int], grid: Grid | None = None, kind: str = "float32") -> Written:
        """A computed tensor; of integers where it has a ``grid``."""
        return self._tensor(name, shape, grid.kind if grid else kind, grid, 0)

    def constant(self, name: str, data: Array, grid: Grid | None = None) -> Written:
        """A tensor of the file's own numbers."""
        return self._tensor(name, data.shape, data.dtype.name, grid, self._buffer(_little(data)))

    def weight(self, name: str, values: Array, scale: Array, axis: int, *, four_bits: bool = False) -> Written:
        """Symmetric integer weights, ``scale`` per index of ``axis`` (or of one number); two to a byte with ``four_bits``."""
        data = packed_four_bits(values) if four_bits else _little(values)
        written = self._tensor(name, values.shape, values.dtype.name, None, self._buffer(data))
        tensor = self._tensors[written.number]
        if four_bits:
            tensor.type = self._schema.TensorType.INT4
        tensor.quantization = self._steps(np.atleast_1d(scale), np.zeros(scale.size, np.int64), axis)
        return written

    def bias(self, name: str, values: Array, scale: Array) -> Written:
        """Integers at the steps ``scale`` of their accumulators."""
        written = self.constant(name, values)
        self._tensors[written.number].quantization = self._steps(scale, np.zeros(scale.size, np.int64), 0)
        return written

    def type_of(self, kind: str) -> int:
        """The schema's number for a type of numpy's name."""
        return int(getattr(self._schema.TensorType, TYPES[kind]))

    def count_of(self, kind: str) -> int:
        """Tensors of a type of the schema's name."""
        return sum(tensor.type == getattr(self._schema.TensorType, kind) for tensor in self._tensors)

    def operator(
        self, name: str, inputs: Sequence[Written], output: Written, version: int = 1, **options: Any
    ) -> Written:
        """Append ``name`` (of ``BuiltinOperator``). ``options`` go into its options table, whose class they name.

        Args:
            version: of the operator: the lowest that takes these types, so that older runtimes load the file.
        """
        code = getattr(self._schema.BuiltinOperator, name)
        found = self._schema.OperatorT(
            opcodeIndex=self._codes.setdefault((code, version), len(self._codes)),
            inputs=np.array([tensor.number for tensor in inputs], np.int32),
            outputs=np.array([output.number], np.int32),
        )
        kind = OPTIONS.get(name, "")
        if kind:
            found.builtinOptionsType = getattr(self._schema.BuiltinOptions, kind)
            found.builtinOptions = getattr(self._schema, f"{kind}T")()
            for key, given in options.items():
                assert hasattr(found.builtinOptions, key), f"{kind} has no {key}"
                setattr(found.builtinOptions, key, given)
        self._operators.append(found)
        return output

    def serialised(self, entry: Written, result: Written, metadata: Mapping[str, str]) -> bytes:
        """The file. ``metadata`` is written as named buffers."""
        import flatbuffers

        parts = self._schema
        named = [
            parts.MetadataT(name=name, buffer=self._buffer(text.encode(), shared=False))
            for name, text in metadata.items()
        ]
        subgraph = parts.SubGraphT(
            tensors=self._tensors,
            inputs=np.array([entry.number], np.int32),
            outputs=np.array([result.number], np.int32),
            operators=self._operators,
            name="main",
        )
        # Runtimes up to 2.3 read only the first of the two fields, which is too small for newer operators.
        codes = [
            parts.OperatorCodeT(deprecatedBuiltinCode=min(code, 127), builtinCode=code, version=version)
            for code, version in self._codes
        ]
        model = parts.ModelT(
            version=3,
            description="edgecompress",
            operatorCodes=codes,
            subgraphs=[subgraph],
            buffers=[_Buffer(data, parts) for data in self._buffers],
            metadata=named or None,
        )
        self._vectors.clear()
        builder = flatbuffers.Builder(sum(map(len, self._buffers)) + 2**16)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, name: str, shape: Sequence[int], kind: str, grid: Grid | None, buffer: int) -> Written:
        found = self._schema.TensorT(
            shape=np.array(shape, np.int32),
            type=self.type_of(kind),
            buffer=buffer,
            name=name if self._named else None,
            hasRank=True,
        )
        if grid is not None:
            found.quantization = self._steps(np.array([grid.scale]), np.array([grid.zero]), 0)
        self._tensors.append(found)
        return Written(len(self._tensors) - 1, tuple(int(size) for size in shape), grid)

    def _steps(self, scale: Array, zero: Array, axis: int) -> Any:
        return _Steps(scale.astype(np.float32), zero.astype(np.int64), axis, self._schema, self._vectors)

    def _buffer(self, data: bytes, *, shared: bool = True) -> int:
        """Equal constants lie in the file once."""
        if not shared or data not in self._known:
            self._buffers.append(data)
            self._known.setdefault(data, len(self._buffers) - 1)
            return len(self._buffers) - 1
        return self._known[data]


class _Buffer:
    """A buffer whose data is aligned: the generated class aligns single bytes."""

    def __init__(self, data: bytes, parts: Any) -> None:
        self._data, self._parts = data, parts

    def Pack(self, builder: Any) -> Any:  # the generated classes call it so
        vector = None
        if self._data:
            builder.StartVector(1, len(self._data), ALIGNMENT)
            builder.head -= len(self._data)
            builder.Bytes[builder.head : builder.head + len(self._data)] = self._data
            vector = builder.EndVector()
        self._parts.BufferStart(builder)
        if vector is not None:
            self._parts.BufferAddData(builder, vector)
        return self._parts.BufferEnd(builder)


class _Steps:
    """Quantisation parameters of a tensor; equal vectors lie in the file once, as those of a layer's zero points do."""

    def __init__(self, scale: Array, zero: Array, axis: int, parts: Any, vectors: dict[bytes, Any]) -> None:
        self._scale, self._zero, self._axis, self._parts, self._vectors = scale, zero, axis, parts, vectors

    def Pack(self, builder: Any) -> Any:
        scale, zero = (self._vector(builder, numbers) for numbers in (self._scale, self._zero))
        self._parts.QuantizationParametersStart(builder)
        self._parts.QuantizationParametersAddScale(builder, scale)
        self._parts.QuantizationParametersAddZeroPoint(builder, zero)
        self._parts.QuantizationParametersAddQuantizedDimension(builder, self._axis)
        return self._parts.QuantizationParametersEnd(builder)

    def _vector(self, builder: Any, numbers: Array) -> Any:
        key = numbers.dtype.str.encode() + numbers.tobytes()
        if key not in self._vectors:
            self._vectors[key] = builder.CreateNumpyVector(numbers)
        return self._vectors[key]


def packed_four_bits(values: Array) -> bytes:
    """Two's complement of 4 bits, the first value in the low half of the first byte."""
    flat = values.reshape(-1).astype(np.int16) & 15
    flat = np.append(flat, 0) if flat.size % 2 else flat
    return bytes((flat[0::2] | flat[1::2] << 4).astype(np.uint8))


def _little(data: Array) -> bytes:
    return data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()


OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "CONCATENATION": "ConcatenationOptions",
    "RESHAPE": "ReshapeOptions",
    "TRANSPOSE": "TransposeOptions",
    "PAD": "PadOptions",
    "PADV2": "PadV2Options",
    "STRIDED_SLICE": "StridedSliceOptions",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "LEAKY_RELU": "LeakyReluOptions",
    "QUANTIZE": "QuantizeOptions",
    "DEQUANTIZE": "DequantizeOptions",
    "ARG_MAX": "ArgMaxOptions",
}
