"""The ``trt`` dialect: s8 symmetric activations, prequantised s8 weights, float biases, Q/DQ where TensorRT fuses best.

Q/DQ stand on the inputs of weighted layers and on the skip input of a residual Add; never on the convolution that fuses
into that Add, on the logits, or below a Softmax (modelopt's placement; the TensorRT developer guide, "Q/DQ placement").
An unsigned 8-bit range becomes s8 at ``scale * 255 / 127``: one bit of resolution is the price of symmetry. Fewer bits
save neither bytes nor time here, since values live in int8: TensorRT has no smaller convolution kernel.

Layers that the policy keeps in FP16 (``QuantizedGraph.half``) are cast, with what follows them until the next Q. Of those
with integer weights, a linear layer of 4 bits or fewer is stored as INT4 where the opset has it (weight-only; NVIDIA
supports that for matrix products alone); others hold their weights in FP16, on their grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompress.errors import UsageError
from edgecompress.exporters.onnx_writing import (
    BASE_OPSET,
    FOUR_BITS_OPSET,
    IR_VERSIONS,
    Names,
    attributes_of,
    model_around,
    node,
    tensor,
)
from edgecompress.graph import LAYER_OPS, Array, Graph, Node
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, TensorRange, find_points

_SMALL_TYPES = {
    getattr(TensorProto, name): name for name in ("INT4", "UINT4", "INT2", "UINT2") if hasattr(TensorProto, name)
}


def integer_model(
    quantized: QuantizedGraph,
    *,
    opset: int = BASE_OPSET,
    batch: int | None = 1,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Write the integer graph for TensorRT. Layers without integer weights stay float, and so do all biases.

    Args:
        opset: 15 to 25; 17 is what TensorRT 8.5 to 11 read, INT4 weights need 21 (TensorRT 10) and are FP16 below.
        batch: a static batch size; dynamic when None (the builder then needs an optimisation profile).
        metadata: written as ``edgecompress.<key>`` properties.

    Raises:
        UsageError: the opset is out of range.
    """
    writer = _written(quantized, opset)
    return model_around(quantized.graph, writer.nodes, writer.initializers, opset=opset, batch=batch, metadata=metadata)


def value_names(quantized: QuantizedGraph, *, opset: int = BASE_OPSET) -> dict[tuple[str, bool], str]:
    """Names in the file of the values that nodes compute: ``(value, as FP16) -> name``; cast ones have two."""
    writer, graph = _written(quantized, opset), quantized.graph
    computed = {(value, value in writer.half): writer.written[value] for n in graph.nodes for value in n.outputs}
    return computed | {key: name for key, name in writer.casts.items() if key[0] not in graph.constants}


def _written(quantized: QuantizedGraph, opset: int) -> _Writer:
    if opset not in IR_VERSIONS:
        raise UsageError(f"Opset {opset} cannot be written; choose {min(IR_VERSIONS)} to {max(IR_VERSIONS)}.")
    graph = quantized.graph
    writer = _Writer(
        quantized,
        Names((*graph.inputs, *graph.outputs)),
        quantized_reads(quantized),
        half_values(quantized),
        four_bits=four_bit_layers(quantized) if opset >= FOUR_BITS_OPSET else frozenset(),
    )
    for source in graph.nodes:
        writer.emit(source)
    return writer


def opset_for(quantized: QuantizedGraph, limit: int) -> int:
    """The lowest opset that holds everything, at most ``limit``."""
    return FOUR_BITS_OPSET if limit >= FOUR_BITS_OPSET and four_bit_layers(quantized) else min(limit, BASE_OPSET)


def four_bit_layers(quantized: QuantizedGraph) -> frozenset[str]:
    """Linear layers whose weights, but not their inputs, have 4 bits or fewer: what INT4 storage is for."""
    return frozenset(
        layer.name
        for layer in quantized.graph.layers
        if layer.op == "Gemm"
        and layer.name in quantized.half
        and layer.name in quantized.weights
        and quantized.weights[layer.name].bits <= 4
    )


def half_values(quantized: QuantizedGraph) -> frozenset[str]:
    """Values in FP16: results of layers that the policy keeps so, and what follows them until a float value or a Q."""
    graph, reads = quantized.graph, quantized_reads(quantized)
    half: set[str] = set()
    for source in graph.nodes:
        value = source.outputs[0]
        data = [name for name in source.inputs if name and name not in graph.constants]
        follows = (
            source.op not in (*LAYER_OPS, "Softmax")
            and bool(data)
            and half.issuperset(data)
            and not any((value, position) in reads for position in range(len(source.inputs)))
        )
        if follows or (source.op in LAYER_OPS and source.name in quantized.half):
            half.update(source.outputs)
    return frozenset(half)


def symmetric_scale(how: TensorRange) -> float:
    """Step of the s8 tensor that holds ``how``; 7 unsigned bits or fewer, and all signed ranges, fit exactly."""
    return how.scale * 255 / 127 if not how.signed and how.bits == 8 else how.scale


def quantized_reads(quantized: QuantizedGraph) -> dict[tuple[str, int], TensorRange]:
    """Where Q/DQ stand: ``(first output of the reading node, input position) -> range``."""
    graph, ranges = quantized.graph, quantized.tensors
    points, depth = find_points(graph), _depths(graph)
    reads: dict[tuple[str, int], TensorRange] = {}
    read_owners = set()
    for layer in graph.layers:
        if takes_integers(quantized, layer) and layer.inputs[0] in ranges:
            reads[layer.outputs[0], 0] = ranges[layer.inputs[0]]
            read_owners.add(points.owner[layer.inputs[0]])
    for reader in graph.nodes:
        value = reader.outputs[0]
        if reader.op == "Add":
            skip = _skip_input(reader, quantized, depth)
            if skip is not None and reader.inputs[skip] in ranges:
                reads[value, skip] = ranges[reader.inputs[skip]]
        # One scale on all inputs lets TensorRT concatenate integers; the scale is the one behind the Concat.
        if reader.op == "Concat" and value in read_owners:
            reads |= {(value, position): ranges[value] for position in range(len(reader.inputs))}
    return reads


def takes_integers(quantized: QuantizedGraph, layer: Node) -> bool:
    """Whether both operands of a layer are integers."""
    return layer.name in quantized.weights and layer.name not in quantized.half


def _depths(graph: Graph) -> dict[str, int]:
    """Operators on the longest way from an input or a constant to each value."""
    depth: dict[str, int] = {}
    for source in graph.nodes:
        here = 1 + max((depth.get(name, 0) for name in source.inputs), default=0)
        depth |= dict.fromkeys(source.outputs, here)
    return depth


def _skip_input(add: Node, quantized: QuantizedGraph, depth: Mapping[str, int]) -> int | None:
    """The position of the Add's identity input: opposite the deeper of its convolutions. None: nothing fuses."""
    graph = quantized.graph
    branches = []
    for position, value in enumerate(add.inputs):
        before = graph.producer(value)
        alone = len(graph.consumers(value)) == 1 and value not in graph.outputs
        if before is not None and before.op in LAYER_OPS and takes_integers(quantized, before) and alone:
            branches.append((depth[value], -position))
    return 1 + max(branches)[1] if branches else None


@dataclass
class _Writer:
    quantized: QuantizedGraph
    names: Names
    reads: Mapping[tuple[str, int], TensorRange]
    half: frozenset[str]
    four_bits: frozenset[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    casts: dict[tuple[str, bool], str] = field(default_factory=dict)
    pairs: dict[tuple[str, TensorRange], str] = field(default_factory=dict)
    scalars: dict[tuple[str, float], str] = field(default_factory=dict)

    def emit(self, source: Node) -> None:
        """``source`` with what its inputs need."""
        weight = self.quantized.weights.get(source.name) if source.op in LAYER_OPS else None
        half = source.outputs[0] in self.half
        inputs = []
        for position, name in enumerate(source.inputs):
            how = self.reads.get((source.outputs[0], position))
            if weight is not None and position == 1:
                inputs.append(self._weight(source.name, weight, half=half))
            elif how is not None:
                inputs.append(self._pair(name, how))
            else:
                inputs.append(self._read(name, half=half))
        outputs = [self._result(name) for name in source.outputs]
        name = source.name if source.op in LAYER_OPS else ""
        self.nodes.append(node(source.op, inputs, outputs, name, **attributes_of(source)))
        for value in source.outputs:
            if half and value in self.quantized.graph.outputs:
                self.nodes.append(node("Cast", [self.written[value]], [value], to=TensorProto.FLOAT))

    def _weight(self, layer: str, weight: QuantizedWeight, *, half: bool) -> str:
        if half and layer not in self.four_bits:
            scale = weight.scale.reshape(-1, *(1,) * (weight.values.ndim - 1))
            return self._constant((weight.values * scale).astype(np.float16))
        kind = ml_dtypes.int4 if half else np.int8
        # INT4 was only seen with one scale per channel.
        scale = weight.channel_scale.astype(np.float16) if half else weight.scale
        # Three inputs with equally many zero points: TensorRT 8's parser insists on them.
        parts = (weight.values.astype(kind), scale, np.zeros(scale.shape, kind))
        return self._node("DequantizeLinear", [self._constant(part) for part in parts], axis=0)

    def _pair(self, value: str, how: TensorRange) -> str:
        """Q and DQ of ``value``, shared by all that read it at the same range."""
        if (value, how) not in self.pairs:
            source = self._read(value, half=False)
            scale, zero = self._scalar("scale", symmetric_scale(how)), self._scalar("zero", 0)
            if how.bits < 8 and how.limits != (0, 127):  # 7 unsigned bits end where s8 saturates
                # Clipped in float: an integer Clip between Q and DQ builds, but nobody has seen it fuse on a GPU.
                low, high = (self._scalar("scale", limit * how.scale) for limit in how.limits)
                source = self._node("Clip", [source, low, high])
            integers = self._node("QuantizeLinear", [source, scale, zero])
            self.pairs[value, how] = self._node("DequantizeLinear", [integers, scale, zero])
        return self.pairs[value, how]

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        output = self.names.new()
        self.nodes.append(node(op, inputs, [output], **attributes))
        return output

    def _read(self, value: str, *, half: bool) -> str:
        """A value or constant in FP16 or FP32; an absent optional input keeps its empty name."""
        graph = self.quantized.graph
        if value in graph.constants:
            if (value, half) not in self.casts:
                constant = graph.constants[value]
                self.casts[value, half] = self._constant(
                    constant.astype(np.float16) if half and constant.dtype == np.float32 else constant
                )
            return self.casts[value, half]
        if not value or value in graph.inputs:
            self.written[value] = value
        if not value or half == (value in self.half):
            return self.written[value]
        if (value, half) not in self.casts:
            kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
            self.casts[value, half] = self._node("Cast", [self.written[value]], to=kind)
        return self.casts[value, half]

    def _result(self, value: str) -> str:
        """The name of what a node computes; the network's output is FP32, whatever computes it."""
        kept = value in self.quantized.graph.outputs and value not in self.half
        self.written[value] = value if kept else self.names.new()
        return self.written[value]

    def _constant(self, values: Array) -> str:
        name = self.names.new()
        self.initializers.append(tensor(name, values))
        return name

    def _scalar(self, kind: str, value: float) -> str:
        if (kind, value) not in self.scalars:
            self.scalars[kind, value] = self._constant(np.array(value, np.int8 if kind == "zero" else np.float32))
        return self.scalars[kind, value]


def lint(model: onnx.ModelProto) -> list[str]:
    """What in ``model`` TensorRT would refuse or silently change; empty for a file of this dialect.

    Each line names the node or initialiser and the rule: no zero point but 0, no uint8, no int32 DequantizeLinear, below 8
    bits only weight-only INT4 of linear layers, positive scales, weights per output channel on axis 0, no Q/DQ on logits
    or below Softmax.
    """
    constants = {constant.name: constant for constant in model.graph.initializer}
    weight_only = _weight_only(model)
    problems = [
        f"initialiser '{name}' is {_SMALL_TYPES[constant.data_type]}: TensorRT's convolutions and layers with integer "
        "inputs take int8"
        for name, constant in constants.items()
        if constant.data_type in _SMALL_TYPES and not (constant.data_type == TensorProto.INT4 and name in weight_only)
    ]
    outputs = {value.name for value in model.graph.output}
    into_softmax = {name for found in model.graph.node if found.op_type == "Softmax" for name in found.input}
    for found in model.graph.node:
        if found.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        where = f"{found.op_type} '{found.name or found.output[0]}'"
        rules = (*_lint_zero_point(found, constants), *_lint_scale(found, constants))
        problems += [f"{where} {text}" for text in rules]
        data = constants.get(found.input[0])
        if data is not None and data.data_type in (TensorProto.INT32, TensorProto.UINT8):
            problems.append(f"{where} reads {TensorProto.DataType.Name(data.data_type).lower()}: only int8 is accepted")
        if found.output[0] in outputs:
            problems.append(f"{where} writes the output: logits stay float")
        if found.output[0] in into_softmax:
            problems.append(f"{where} feeds a Softmax, which stays float")
    return problems


def _weight_only(model: onnx.ModelProto) -> set[str]:
    """Inputs of those DequantizeLinear that a Gemm with float input reads as its weight, and no other node."""
    producers = {name: found for found in model.graph.node for name in found.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for found in model.graph.node:
        for name in found.input:
            readers.setdefault(name, []).append(found)
    return {
        name
        for found in model.graph.node
        if found.op_type == "DequantizeLinear"
        for name in found.input
        if all(
            reader.op_type == "Gemm"
            and reader.input[1] == found.output[0]
            and getattr(producers.get(reader.input[0]), "op_type", "") != "DequantizeLinear"
            for reader in readers.get(found.output[0], [])
        )
    }


def _lint_zero_point(found: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> list[str]:
    if len(found.input) < 3 or found.input[2] not in constants:
        return ["names no constant zero point, so its type is uint8 or unknown: write int8 zeros"]
    zero = constants[found.input[2]]
    problems = []
    data = constants.get(found.input[0])
    four_bits = data is not None and data.data_type == TensorProto.INT4
    if zero.data_type != (TensorProto.INT4 if four_bits else TensorProto.INT8):
        problems.append(f"has a {TensorProto.DataType.Name(zero.data_type).lower()} zero point: only int8 is accepted")
    if found.input[1] in constants and list(zero.dims) != list(constants[found.input[1]].dims):
        problems.append("has another number of zero points than of scales, which TensorRT 8 refuses")
    if np.any(numpy_helper.to_array(zero).astype(np.int32)):
        problems.append("has a zero point that is not 0: TensorRT is symmetric")
    return problems


def _lint_scale(found: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> list[str]:
    if found.input[1] not in constants:
        return ["has a scale that is not constant"]
    scale, data = numpy_helper.to_array(constants[found.input[1]]), constants.get(found.input[0])
    axis = next((helper.get_attribute_value(a) for a in found.attribute if a.name == "axis"), 1)
    problems = [] if (scale > 0).all() else ["has a scale that is not positive"]
    if scale.size > 1 and data is None:
        problems.append(f"has {scale.size} scales on an activation: one is accepted")
    elif scale.size > 1 and data is not None and (axis != 0 or scale.size != data.dims[0]):
        problems.append(f"has {scale.size} scales on axis {axis} of {list(data.dims)}: output channels are axis 0")
    return problems
