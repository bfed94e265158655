"""Graphs to be timed: one kernel of a given shape, an operator between layers, or a network with synthetic ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgecompress.cost import kernels
from edgecompress.errors import BadModelError
from edgecompress.graph import Graph, Node, normalise, raw_graph
from edgecompress.latency_tables.table import EDGES, KernelKey
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, TensorRange, find_points
from edgecompress.spec import CompressionPolicy, Network

SCALE = 0.05  # of the synthetic ranges: time does not depend on it
CONVOLUTIONS = ("conv", "depthwise", "grouped")


def supported(key: KernelKey) -> bool:
    """Whether a graph of this kind can be built: convolutions, linear layers on one position, operators between."""
    return key.kind in (*CONVOLUTIONS, *EDGES) or (key.kind == "linear" and (key.out_h, key.out_w) == (1, 1))


def one_layer(key: KernelKey, seed: int = 0) -> Graph:
    """The kernel ``key`` as a graph.

    A convolution has a ReLU and a flatten behind it, so that an integer kernel writes integers as it does inside a
    network; a linear layer stands alone: its result is mostly the network's output.
    """
    generator = np.random.default_rng(seed)
    bias = generator.standard_normal(key.out_channels).astype(np.float32)
    if key.kind == "linear":
        weight = generator.standard_normal((key.out_channels, key.in_channels)).astype(np.float32)
        gemm = Node("layer", "Gemm", ("input", "layer.weight", "layer.bias"), ("output",), {"transB": 1})
        flat = {"input": (key.in_channels,), "output": (key.out_channels,)}
        return Graph(("input",), ("output",), (gemm,), {"layer.weight": weight, "layer.bias": bias}, flat)
    shape = (key.out_channels, key.in_channels // key.groups, key.kernel_h, key.kernel_w)
    weight = generator.standard_normal(shape).astype(np.float32)
    pad_h = _padding(key.in_h, key.out_h, key.kernel_h, key.stride_h)
    pad_w = _padding(key.in_w, key.out_w, key.kernel_w, key.stride_w)
    attributes = {
        "kernel_shape": (key.kernel_h, key.kernel_w), "strides": (key.stride_h, key.stride_w), "group": key.groups,
        "pads": (pad_h, pad_w, pad_h, pad_w), "dilations": (1, 1),
    }  # fmt: skip
    out = (key.out_channels, key.out_h, key.out_w)
    nodes = (
        Node("layer", "Conv", ("input", "layer.weight", "layer.bias"), ("sum",), attributes),
        Node("relu", "Relu", ("sum",), ("positive",), {}),
        Node("flatten", "Flatten", ("positive",), ("output",), {"axis": 1}),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input": (key.in_channels, key.in_h, key.in_w),
        "sum": out,
        "positive": out,
        "output": (int(np.prod(out)),),
    }
    return Graph(("input",), ("output",), nodes, {"layer.weight": weight, "layer.bias": bias}, shapes)


def _padding(size_in: int, size_out: int, kernel: int, stride: int) -> int:
    """The smallest symmetric padding that gives ``size_out``: a `LayerSpec` does not carry it."""
    return max(0, -(-((size_out - 1) * stride + kernel - size_in) // 2))


OPERATORS = {
    "add": "Add", "multiply": "Mul", "concat": "Concat", "max_pool": "MaxPool", "average_pool": "AveragePool",
    "global_pool": "GlobalAveragePool", "sigmoid": "Sigmoid", "hard_sigmoid": "HardSigmoid", "hard_swish": "HardSwish",
    "leaky_relu": "LeakyRelu", "softmax": "Softmax",
}  # fmt: skip
POOLS = ("max_pool", "average_pool")


def around_edge(key: KernelKey, *, present: bool, seed: int = 0) -> Graph:
    """1x1 convolutions around the operator ``key``, or the same convolutions without it (the time to subtract).

    An operator is never timed alone: a runtime fuses it with a neighbour where it can, and keeps its own data layout
    between layers. For the ends of a network (``input``, ``output``) it is the convolutions alone.
    """
    build = _Builder(seed)
    joined = key.kind == "concat"
    halves = (key.out_channels // 2, key.out_channels - key.out_channels // 2) if joined else (key.in_channels,) * 2
    image = (key.in_channels, key.in_h, key.in_w)
    first = build.relu(build.convolution(build.input(image), halves[0]))
    value = build.convolution(first, halves[1])
    if key.kind in ("add", "multiply"):
        value = build.relu(build.operator(key, (value, first)) if present else value)
    else:
        value = build.relu(value)
        if present and key.kind in OPERATORS:
            value = build.operator(key, (first, value) if joined else (value,))
    return build.finish(build.relu(build.convolution(value, key.out_channels)))


class _Builder:
    """Adds nodes to a graph one behind the other."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[Node] = []
        self._constants: dict[str, np.ndarray[Any, Any]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def input(self, shape: tuple[int, ...]) -> str:
        self._shapes["input"] = shape
        return "input"

    def convolution(self, value: str, channels: int) -> str:
        name = f"layer{len(self._nodes)}"
        inputs, *extent = self._shapes[value]
        self._constants[f"{name}.weight"] = self._random.standard_normal((channels, inputs, 1, 1)).astype(np.float32)
        self._constants[f"{name}.bias"] = self._random.standard_normal(channels).astype(np.float32)
        attributes = {
            "kernel_shape": (1, 1), "strides": (1, 1), "group": 1, "pads": (0, 0, 0, 0), "dilations": (1, 1)
        }  # fmt: skip
        return self._add("Conv", (value, f"{name}.weight", f"{name}.bias"), (channels, *extent), attributes, name)

    def relu(self, value: str) -> str:
        return self._add("Relu", (value,), self._shapes[value], {})

    def operator(self, key: KernelKey, inputs: tuple[str, ...]) -> str:
        attributes: dict[str, Any] = {"axis": 1} if key.kind in ("concat", "softmax") else {}
        if key.kind in POOLS:
            pad_h = _padding(key.in_h, key.out_h, key.kernel_h, key.stride_h)
            pad_w = _padding(key.in_w, key.out_w, key.kernel_w, key.stride_w)
            attributes = {
                "kernel_shape": (key.kernel_h, key.kernel_w), "strides": (key.stride_h, key.stride_w),
                "pads": (pad_h, pad_w, pad_h, pad_w),
            }  # fmt: skip
        return self._add(OPERATORS[key.kind], inputs, (key.out_channels, key.out_h, key.out_w), attributes)

    def finish(self, value: str) -> Graph:
        output = self._add("Flatten", (value,), (int(np.prod(self._shapes[value])),), {"axis": 1})
        return Graph(("input",), (output,), tuple(self._nodes), self._constants, self._shapes)

    def _add(
        self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], attributes: dict[str, Any], name: str = ""
    ) -> str:
        output = f"value{len(self._nodes)}"
        self._nodes.append(Node(name or f"{op.lower()}{len(self._nodes)}", op, inputs, (output,), attributes))
        self._shapes[output] = tuple(int(size) for size in shape)
        return output


def with_synthetic_ranges(graph: Graph, seed: int = 0, bits: Mapping[str, int] | None = None) -> QuantizedGraph:
    """``graph`` with 8-bit ranges and random integers everywhere: right for timing, meaningless as a network.

    Args:
        bits: of the weights of layers by name, 8 where it says nothing.
    """
    generator = np.random.default_rng(seed)
    points = find_points(graph)
    ranges = {value: TensorRange(SCALE, 8, points.signed[owner]) for value, owner in points.owner.items()}
    weights = {}
    for layer in graph.layers:
        shape = graph.constants[layer.inputs[1]].shape
        width = (bits or {}).get(layer.name, 8)
        largest = 2 ** (width - 1) - 1
        values = generator.integers(-largest, largest + 1, shape).astype(np.int8)
        weights[layer.name] = QuantizedWeight(values, np.full(shape[0], SCALE, np.float32), width)
    return QuantizedGraph(graph, ranges, weights)


def model_bytes(graph: Graph, dtype: str, seed: int = 0, bits: Mapping[str, int] | None = None) -> bytes:
    """``graph`` at batch 1 as the exporters write it for ONNX Runtime, serialised."""
    from edgecompress.exporters.to_onnx import float_model
    from edgecompress.exporters.to_onnxruntime import integer_model

    model: Any = (
        integer_model(with_synthetic_ranges(graph, seed, bits), batch=1)
        if dtype == "int8"
        else float_model(graph, batch=1)
    )
    data: bytes = model.SerializeToString()
    return data


def resized(graph: Graph, network: Network, policy: CompressionPolicy) -> Graph:
    """``graph`` with random weights of the channels of ``policy``: the same operators, at the sizes to be timed.

    Raises:
        BadModelError: the graph holds sizes of its own (a channel shuffle, say), so that it cannot be resized.
    """
    from edgecompress.exporters.to_onnx import float_model

    built = {kernel.layer.name: kernel for kernel in kernels(network, policy)}
    generator = np.random.default_rng(0)
    constants = dict(graph.constants)
    nodes = []
    for node in graph.nodes:
        kernel = built.get(node.name)
        if kernel is None:
            nodes.append(node)
            continue
        shape = list(constants[node.inputs[1]].shape)
        attributes = dict(node.attributes)
        if kernel.layer.kind == "depthwise":
            shape[0] = attributes["group"] = kernel.out_channels
        else:
            columns = kernel.in_channels // kernel.layer.groups
            transposed = node.op == "Gemm" and not attributes.get("transB", 0)
            shape[:2] = [columns, kernel.out_channels] if transposed else [kernel.out_channels, columns]
        constants[node.inputs[1]] = generator.standard_normal(shape).astype(np.float32)
        if len(node.inputs) > 2 and node.inputs[2]:
            constants[node.inputs[2]] = generator.standard_normal(kernel.out_channels).astype(np.float32)
        nodes.append(replace(node, attributes=attributes))
    try:
        return normalise(raw_graph(float_model(replace(graph, nodes=tuple(nodes), constants=constants))))
    except Exception as error:
        raise BadModelError(
            f"{network.model} cannot be resized for timing ({type(error).__name__}: {error}). Prune it for real."
        ) from error
