"""Graphs to be timed: one kernel of a given shape with random weights, or a whole network with synthetic ranges."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgecompress.graph import Graph, Node
from edgecompress.latency_tables.table import KernelKey
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, TensorRange, find_points

SCALE = 0.05  # of the synthetic ranges: time does not depend on it
CONVOLUTIONS = ("conv", "depthwise", "grouped")


def supported(key: KernelKey) -> bool:
    """Whether a one-layer graph of this kind can be built: convolutions, and linear layers on one position."""
    return key.kind in CONVOLUTIONS or (key.kind == "linear" and (key.out_h, key.out_w) == (1, 1))


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


def with_synthetic_ranges(graph: Graph, seed: int = 0) -> QuantizedGraph:
    """``graph`` with 8-bit ranges and random integers everywhere: right for timing, meaningless as a network."""
    generator = np.random.default_rng(seed)
    points = find_points(graph)
    ranges = {value: TensorRange(SCALE, 8, points.signed[owner]) for value, owner in points.owner.items()}
    weights = {}
    for layer in graph.layers:
        shape = graph.constants[layer.inputs[1]].shape
        values = generator.integers(-127, 128, shape).astype(np.int8)
        weights[layer.name] = QuantizedWeight(values, np.full(shape[0], SCALE, np.float32), 8)
    return QuantizedGraph(graph, ranges, weights)


def model_bytes(graph: Graph, dtype: str, seed: int = 0) -> bytes:
    """``graph`` at batch 1 as the exporters write it for ONNX Runtime, serialised."""
    from edgecompress.exporters.to_onnx import float_model
    from edgecompress.exporters.to_onnxruntime import integer_model

    model: Any = (
        integer_model(with_synthetic_ranges(graph, seed), batch=1) if dtype == "int8" else float_model(graph, batch=1)
    )
    data: bytes = model.SerializeToString()
    return data
