"""The ``trt`` dialect: s8 symmetric activations, prequantised s8 weights, float biases, Q/DQ where TensorRT fuses best.

Q/DQ stand on the inputs of weighted layers and on the skip input of a residual Add; never on the convolution that fuses
into that Add, on the logits, or below a Softmax (modelopt's placement; the TensorRT developer guide, "Q/DQ placement").
An unsigned 8-bit range becomes s8 at ``scale * 255 / 127``: one bit of resolution is the price of symmetry. Fewer bits
save neither bytes nor time here, since values live in int8: TensorRT has no smaller convolution kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompress.errors import UsageError
from edgecompress.exporters.onnx_writing import (
    BASE_OPSET,
    IR_VERSIONS,
    Names,
    attributes_of,
    model_around,
    node,
    tensor,
)
from edgecompress.graph import LAYER_OPS, Array, Graph, Node
from edgecompress.quantize import QuantizedGraph, TensorRange, find_points

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
        opset: 15 to 25; 17 is what TensorRT 8.5 to 11 read.
        batch: a static batch size; dynamic when None (the builder then needs an optimisation profile).
        metadata: written as ``edgecompress.<key>`` properties.

    Raises:
        UsageError: the opset is out of range.
    """
    if opset not in IR_VERSIONS:
        raise UsageError(f"Opset {opset} cannot be written; choose {min(IR_VERSIONS)} to {max(IR_VERSIONS)}.")
    graph = quantized.graph
    writer = _Writer(quantized, Names((*graph.inputs, *graph.outputs)), quantized_reads(quantized))
    for source in graph.nodes:
        writer.emit(source)
    return model_around(graph, writer.nodes, writer.initializers, opset=opset, batch=batch, metadata=metadata)


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
        if layer.name in quantized.weights and layer.inputs[0] in ranges:
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
        if before is not None and before.op in LAYER_OPS and before.name in quantized.weights and alone:
            branches.append((depth[value], -position))
    return 1 + max(branches)[1] if branches else None


@dataclass
class _Writer:
    quantized: QuantizedGraph
    names: Names
    reads: Mapping[tuple[str, int], TensorRange]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    pairs: dict[tuple[str, TensorRange], str] = field(default_factory=dict)
    scalars: dict[tuple[str, float], str] = field(default_factory=dict)

    def emit(self, source: Node) -> None:
        weight = self.quantized.weights.get(source.name) if source.op in LAYER_OPS else None
        inputs = []
        for position, name in enumerate(source.inputs):
            how = self.reads.get((source.outputs[0], position))
            if weight is not None and position == 1:
                # Three inputs with equally many zero points: TensorRT 8's parser insists on them.
                zeros = self._constant(np.zeros(len(weight.values), np.int8))
                parts = [self._constant(weight.values), self._constant(weight.scale), zeros]
                inputs.append(self._node("DequantizeLinear", parts, axis=0))
            else:
                inputs.append(self._name(name) if how is None else self._pair(name, how))
        outputs = [self._name(name) for name in source.outputs]
        name = source.name if source.op in LAYER_OPS else ""
        self.nodes.append(node(source.op, inputs, outputs, name, **attributes_of(source)))

    def _pair(self, value: str, how: TensorRange) -> str:
        """Q and DQ of ``value``, shared by all that read it at the same range."""
        if (value, how) not in self.pairs:
            source = self._name(value)
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

    def _name(self, value: str) -> str:
        """The file's name of a float value or constant; an absent optional input keeps its empty name."""
        graph = self.quantized.graph
        if value not in self.written:
            kept = value in (*graph.inputs, *graph.outputs, "")
            self.written[value] = value if kept else self.names.new()
            if value in graph.constants:
                self.initializers.append(tensor(self.written[value], graph.constants[value]))
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

    Each line names the node or initialiser and the rule: no zero point but 0, no uint8, no int32 DequantizeLinear, no
    initialiser below 8 bits, positive scales, weights per output channel on axis 0, no Q/DQ on logits or below Softmax.
    """
    constants = {constant.name: constant for constant in model.graph.initializer}
    problems = [
        f"initialiser '{name}' is {_SMALL_TYPES[constant.data_type]}: TensorRT's convolutions take int8"
        for name, constant in constants.items()
        if constant.data_type in _SMALL_TYPES
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


def _lint_zero_point(found: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> list[str]:
    if len(found.input) < 3 or found.input[2] not in constants:
        return ["names no constant zero point, so its type is uint8 or unknown: write int8 zeros"]
    zero = constants[found.input[2]]
    problems = []
    if zero.data_type != TensorProto.INT8:
        problems.append(f"has a {TensorProto.DataType.Name(zero.data_type).lower()} zero point: only int8 is accepted")
    if found.input[1] in constants and list(zero.dims) != list(constants[found.input[1]].dims):
        problems.append("has another number of zero points than of scales, which TensorRT 8 refuses")
    if np.any(numpy_helper.to_array(zero)):
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
