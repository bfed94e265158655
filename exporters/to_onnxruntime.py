"""The ``ort`` dialect: what ONNX Runtime's CPU kernels fuse. u8 activations, s8 weights, int32 biases.

Weights have a scale per output channel, or one where the target takes no more (``Target.weight_scales``).
Behind a ReLU the zero point is 0, so that saturation is the ReLU and the node is dropped; elsewhere it is 128. Fewer
than 8 activation bits are an integer Clip between Q and DQ, which still fuses (measured: 1 to 5 % of the time).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from edgecompress.exporters.onnx_writing import BASE_OPSET, Names, attributes_of, model_around, node, tensor
from edgecompress.exporters.packing import Held, store
from edgecompress.graph import Graph, Node
from edgecompress.quantize import (
    QuantizedGraph,
    QuantizedWeight,
    TensorRange,
    find_points,
    gate_reach,
    is_fused_activation,
    steps_to,
)


def int32_bias(bias: np.ndarray, scale_x: float, scale_w: np.ndarray) -> np.ndarray:
    """Bias at the accumulator's scale ``scale_x * scale_w[out]``, rounded half to even."""
    exact = bias.astype(np.float64) / (np.float32(scale_x) * scale_w).astype(np.float64)
    return np.clip(np.rint(exact), -(2**31), 2**31 - 1).astype(np.int32)


def zero_point(how: TensorRange) -> int:
    """Zero point of the u8 container."""
    return 128 if how.signed else 0


def gate_of(quantized: QuantizedGraph, value: str) -> Node | None:
    """The HardSigmoid that yields ``value`` as a clip of its input's integers, if it is one."""
    node = quantized.graph.producer(value)
    if node is None or node.op != "HardSigmoid" or value in quantized.tensors:
        return None
    return node if node.inputs[0] in quantized.tensors else None


def gate_steps(quantized: QuantizedGraph, gate: Node) -> int:
    """Steps of the input's grid between a gate's middle and either end."""
    return steps_to(gate_reach(gate), quantized.tensors[gate.inputs[0]].scale)


def grid(quantized: QuantizedGraph, value: str) -> tuple[np.float32, int]:
    """Scale and zero point of the u8 tensor that holds ``value``."""
    how = quantized.tensors.get(value)
    if how is not None:
        return np.float32(how.scale), zero_point(how)
    gate = gate_of(quantized, value)
    assert gate is not None
    steps = gate_steps(quantized, gate)
    return np.float32(1 / (2 * steps)), 128 - steps


def integer_model(
    quantized: QuantizedGraph,
    *,
    max_opset: int = 25,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
    unpack: bool = True,
) -> onnx.ModelProto:
    """Write the integer graph for ONNX Runtime; the opset is the lowest that the chosen storages need.

    Args:
        max_opset: 4-bit storage needs 21, 2-bit storage 25; below that a layer takes the next larger storage.
        batch: a static batch size; dynamic when None.
        unpack: allow storages that are unpacked by arithmetic when the file is loaded.
    """
    return _Writer(quantized, max_opset, unpack).write(batch, metadata)


def showing_values(
    quantized: QuantizedGraph, *, max_opset: int, unpack: bool, batch: int | None = None
) -> tuple[onnx.ModelProto, list[str]]:
    """The same graph with every quantised value that it holds as one more u8 output, and their names in that order."""
    writer = _Writer(quantized, max_opset, unpack)
    model = writer.write(batch, None)
    names = [name for name in quantized.tensors if name in writer.integers]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(writer.integers[name][0], TensorProto.UINT8, None))
    return model, names


class _Writer:
    def __init__(self, quantized: QuantizedGraph, max_opset: int, unpack: bool) -> None:
        self.quantized = quantized
        self.graph: Graph = quantized.graph
        self.max_opset = max_opset
        self.unpack = unpack
        self.names = Names((*self.graph.inputs, *self.graph.outputs))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        given = (*self.graph.inputs, *(name for name in self.graph.outputs if name not in quantized.tensors))
        self.float_names: dict[str, str] = {name: name for name in given}
        self.read_names: dict[str, str] = {}
        self.integers: dict[str, tuple[str, str, str]] = {}  # names of u8 tensor, scale and zero point
        self.shared: dict[tuple[str, float], str] = {}
        self.held: Held = {}
        self.opset = min(BASE_OPSET, max_opset)
        self.owner = find_points(self.graph).owner

    def write(self, batch: int | None, metadata: Mapping[str, str] | None) -> onnx.ModelProto:
        fused = {node.inputs[0]: node.outputs[0] for node in self.graph.nodes if is_fused_activation(self.graph, node)}
        self._quantize(self.graph.inputs[0])
        for source in self.graph.nodes:
            if source.inputs[0] in fused and source.outputs[0] == fused[source.inputs[0]]:
                if source.outputs[0] not in self.quantized.tensors:  # the output itself: nothing saturates it
                    self._emit(source, source.outputs[0])
                continue
            result = source.outputs[0]
            absorbed = fused.get(result)
            if absorbed is not None and absorbed in self.quantized.tensors:
                result = absorbed
            self._emit(source, result)
            if result in self.quantized.tensors:
                self._quantize(result)
        for name in self.graph.outputs:
            self._read(name)  # an output that is quantised leaves its grid
        return model_around(self.graph, self.nodes, self.initializers, opset=self.opset, batch=batch, metadata=metadata)

    def _emit(self, source: Node, result: str) -> None:
        """Write one operator whose float result is called ``result`` in the graph."""
        output = self.float_names.setdefault(result, self.names.new())
        weight = self.quantized.weights.get(source.name) if source.op in ("Conv", "Gemm") else None
        if gate_of(self.quantized, source.outputs[0]) is not None:
            self._gate(source)
            return
        if weight is None:
            inputs = [self._read(name) for name in source.inputs]
            name = source.name if source.op in ("Conv", "Gemm") else ""
            self.nodes.append(node(source.op, inputs, [output], name, **attributes_of(source)))
            return
        how = self.quantized.tensors[source.inputs[0]]
        inputs = [self._read(source.inputs[0]), self._weight(source)]
        if len(source.inputs) > 2 and source.inputs[2]:
            integers = int32_bias(self.graph.constants[source.inputs[2]], how.scale, weight.scale)
            scale = self._constant(np.asarray(np.float32(how.scale) * weight.scale))
            inputs.append(self.names.new())
            zeros = self._zeros(source, weight, integers.dtype)
            self.nodes.append(node("DequantizeLinear", [self._constant(integers), scale, *zeros], [inputs[2]], axis=0))
        self.nodes.append(node(source.op, inputs, [output], source.name, **attributes_of(source)))

    def _weight(self, source: Node) -> str:
        weight = self.quantized.weights[source.name]
        stored = store(
            weight.values, weight.bits, self.names, max_opset=self.max_opset, unpack=self.unpack, held=self.held
        )
        self.opset = max(self.opset, stored.opset)
        self.initializers += stored.initializers
        self.nodes += stored.nodes
        output = self.names.new()
        inputs = [stored.output, self._constant(weight.scale), *self._zeros(source, weight, weight.values.dtype)]
        self.nodes.append(node("DequantizeLinear", inputs, [output], axis=0))
        return output

    def _zeros(self, source: Node, weight: QuantizedWeight, dtype: np.dtype) -> list[str]:
        """ONNX Runtime fuses a Gemm only when its constants name their zero points; a Conv does without."""
        return [self._constant(np.zeros(weight.scale.shape, dtype))] if source.op == "Gemm" else []

    def _quantize(self, value: str) -> None:
        """Q and a Clip below 8 bits; the DQ follows where ``value`` is first read."""
        how = self.quantized.tensors.get(value)
        if how is None:
            return
        source = self.float_names.setdefault(value, self.names.new())
        scale, zero = self._scalar("scale", how.scale), self._scalar("zero", zero_point(how))
        integers = self.names.new()
        self.nodes.append(node("QuantizeLinear", [source, scale, zero], [integers]))
        if how.bits < 8 and self.owner.get(value, value) == value:  # a pooled value was clipped before
            low, high = (limit + zero_point(how) for limit in how.limits)
            clipped = self.names.new()
            self.nodes.append(node("Clip", [integers, self._scalar("u8", low), self._scalar("u8", high)], [clipped]))
            integers = clipped
        self.integers[value] = (integers, scale, zero)

    def _gate(self, source: Node) -> None:
        """HardSigmoid as an integer Clip of its input, read at its own scale and zero point."""
        value = source.outputs[0]
        steps, (scale, zero) = gate_steps(self.quantized, source), grid(self.quantized, value)
        clipped = self.names.new()
        ends = [self._scalar("u8", 128 - steps), self._scalar("u8", 128 + steps)]
        self.nodes.append(node("Clip", [self.integers[source.inputs[0]][0], *ends], [clipped]))
        self.integers[value] = (clipped, self._scalar("scale", float(scale)), self._scalar("zero", zero))

    def _read(self, name: str) -> str:
        if name in self.graph.constants:
            if name not in self.read_names:
                self.read_names[name] = self._constant(self.graph.constants[name])
            return self.read_names[name]
        if name in self.integers and name not in self.read_names:
            self.read_names[name] = name if name in self.graph.outputs else self.names.new()
            self.nodes.append(node("DequantizeLinear", self.integers[name], [self.read_names[name]]))
        return self.read_names.get(name) or self.float_names.get(name, name)

    def _constant(self, values: np.ndarray) -> str:
        name = self.names.new()
        self.initializers.append(tensor(name, values))
        return name

    def _scalar(self, kind: str, value: float) -> str:
        if (kind, value) not in self.shared:
            self.shared[kind, value] = self._constant(np.array(value, np.float32 if kind == "scale" else np.uint8))
        return self.shared[kind, value]
