"""An integer emulator of the ``ort`` dialect that equals ONNX Runtime bit for bit on x86 CPUs (without VNNI: see `OnnxRuntimeRunner`).

It is the proof that a file computes what the policy says. Operators without an integer kernel run as named float islands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgecompress.exporters.to_onnxruntime import gate_of, gate_steps, grid, int32_bias, zero_point
from edgecompress.graph import LAYER_OPS, Graph, Node
from edgecompress.interpret import apply, conv_padding, float_constants
from edgecompress.quantize import QuantizedGraph, TensorRange, is_fused_activation

MOVES = ("Flatten", "Reshape", "Transpose", "Slice", "Identity")


def runs_in_integers(quantized: QuantizedGraph, node: Node) -> bool:
    """Whether ONNX Runtime has an integer kernel for ``node`` as it is written; moving values needs none."""
    if node.op in MOVES:
        return True
    if node.op in LAYER_OPS:
        return node.name in quantized.weights
    if node.op == "HardSigmoid":
        return gate_of(quantized, node.outputs[0]) is not None
    if meets_a_constant(quantized.graph, node):
        return False
    absorbed = is_fused_activation(quantized.graph, node)
    return (absorbed or node.op in KERNELS) and _result(quantized.graph, node) in quantized.tensors


def meets_a_constant(graph: Graph, node: Node) -> bool:
    """Whether ``node`` adds or multiplies with a float constant, which no integer kernel takes."""
    return node.op in ("Add", "Mul") and any(name in graph.constants for name in node.inputs)


def _result(graph: Graph, node: Node) -> str:
    """What ``node`` yields together with the activation that it absorbs."""
    readers = graph.consumers(node.outputs[0])
    after = readers[0] if len(readers) == 1 and is_fused_activation(graph, readers[0]) else node
    return after.outputs[0]


def float_islands(quantized: QuantizedGraph) -> list[str]:
    """Operators that will run in float, as ``op name``."""
    return [f"{node.op} {node.name}" for node in quantized.graph.nodes if not runs_in_integers(quantized, node)]


def emulate(
    quantized: QuantizedGraph, x: Tensor, on_integers: Callable[[str, Tensor], Tensor] = lambda name, value: value
) -> Tensor:
    """Outputs ``[N, ...]`` float32 for normalised images ``[N, C, H, W]`` float32, as ONNX Runtime computes them.

    Args:
        on_integers: sees every u8 value by its name and returns what its consumers will read.
    """
    graph = quantized.graph
    activations = {node.inputs[0]: node for node in graph.nodes if is_fused_activation(graph, node)}
    fused = {before: node.outputs[0] for before, node in activations.items()}
    constants = float_constants(graph)

    def activated(node: Node, result: Tensor) -> Tensor:
        after = activations.get(node.outputs[0])
        return result if after is None else apply(after, [result, *(constants.get(name) for name in after.inputs[1:])])

    floats: dict[str, Tensor] = {}
    integers: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        integers[name] = on_integers(name, value)

    keep(graph.inputs[0], _quantize(x, quantized.tensors[graph.inputs[0]]))
    for node in graph.nodes:
        value = node.outputs[0]
        if value in integers or value in floats:
            continue
        value = fused.get(value, value)
        how = quantized.tensors.get(value)
        kernel = KERNELS.get(node.op)
        layer = node.op in LAYER_OPS
        if node.op == "HardSigmoid" and gate_of(quantized, value) is not None:
            steps = gate_steps(quantized, node)
            keep(value, integers[node.inputs[0]].clamp(128 - steps, 128 + steps))
            continue
        floating = how is None and not layer
        if (layer and node.name not in quantized.weights) or floating or meets_a_constant(graph, node):
            kernel = None  # float weights, or an output that is not quantised: ONNX Runtime computes it in float
        if kernel is not None and all(name in integers for name in _activations(graph, node)):
            result = kernel(node, integers, quantized, how)
            if how is None:
                floats[value] = activated(node, result)
            else:
                keep(value, _clip(result, how))
            continue
        arguments = [_float(name, floats, integers, quantized, constants) for name in node.inputs]
        result = apply(node, arguments)
        result = activated(node, result)
        if how is None:
            floats[value] = result
        else:
            keep(value, _quantize(result, how))
    outputs = _float(graph.outputs[0], floats, integers, quantized, constants)
    assert outputs is not None
    return outputs


def _activations(graph: Graph, node: Node) -> list[str]:
    return [name for name in node.inputs if name and name not in graph.constants]


def _float(
    name: str,
    floats: Mapping[str, Tensor],
    integers: Mapping[str, Tensor],
    quantized: QuantizedGraph,
    constants: Mapping[str, Tensor],
) -> Tensor | None:
    if name in integers:
        return _dequantize(name, integers, quantized)
    return floats.get(name, constants.get(name)) if name else None


def _dequantize(name: str, integers: Mapping[str, Tensor], quantized: QuantizedGraph) -> Tensor:
    scale, zero = grid(quantized, name)
    return (integers[name] - zero).float() * float(scale)


def _float32(scale: float) -> float:
    return float(np.float32(scale))


def _quantize(x: Tensor, how: TensorRange) -> Tensor:
    return _clip((x / _float32(how.scale)).round() + zero_point(how), how)


def _clip(q: Tensor, how: TensorRange) -> Tensor:
    """Saturate in the u8 container, then the integer Clip of fewer bits."""
    low, high = how.limits
    return q.clamp(0, 255).clamp(low + zero_point(how), high + zero_point(how)).to(torch.int32)


def _conv(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    scale, zero = grid(quantized, node.inputs[0])
    weight = quantized.weights[node.name]
    x = (integers[node.inputs[0]] - zero).double()
    w = torch.from_numpy(weight.values).double()
    if node.op == "Conv":
        left, right, top, bottom = conv_padding(node)
        strides, dilations = (
            tuple(node.attributes.get("strides", (1, 1))),
            tuple(node.attributes.get("dilations", (1, 1))),
        )
        total = F.conv2d(
            F.pad(x, (left, right, top, bottom)), w, None, strides, 0, dilations, int(node.attributes.get("group", 1))
        )
    else:
        total = F.linear(x, w if node.attributes.get("transB", 0) else w.t())
    shape = (1, -1, *(1,) * (total.dim() - 2))
    scales = scale * weight.channel_scale
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = int32_bias(quantized.graph.constants[node.inputs[2]], float(scale), weight.scale)
        total = total + torch.from_numpy(bias).double().view(shape)
    if how is None:
        return total.float() * torch.from_numpy(scales).view(shape)
    multiplier = torch.from_numpy(scales / np.float32(how.scale)).view(shape)
    return (total.float() * multiplier).round() + zero_point(how)


def _add(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    """QLinearAdd: ``round(fma(a, ra, fma(b, rb, zc - (ra * za + rb * zb))))`` in float32."""
    assert how is not None
    (scale_a, zero_a), (scale_b, zero_b) = (grid(quantized, name) for name in node.inputs)
    ratio_a, ratio_b = scale_a / np.float32(how.scale), scale_b / np.float32(how.scale)
    za, zb, zc = np.float32(zero_a), np.float32(zero_b), np.float32(zero_point(how))
    offset = np.float32(zc - np.float32(np.float32(ratio_a * za) + np.float32(ratio_b * zb)))
    a, b = (integers[name].double() for name in node.inputs)
    inner = (b * float(ratio_b) + float(offset)).float()
    return (a * float(ratio_a) + inner.double()).float().round()


def _global_average(
    node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None
) -> Tensor:
    """The integer sum times ``scale_x / (scale_y * positions)``, as MLAS requantises it."""
    assert how is not None
    scale, zero = grid(quantized, node.inputs[0])
    x = integers[node.inputs[0]] - zero
    positions = x.shape[2] * x.shape[3]
    multiplier = scale / np.float32(np.float32(how.scale) * np.float32(positions))
    return (x.sum((2, 3), keepdim=True).float() * float(multiplier)).round() + zero_point(how)


def _concat(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    assert how is not None
    parts = []
    for name in node.inputs:
        if grid(quantized, name) == (np.float32(how.scale), zero_point(how)):
            parts.append(integers[name].float())
        else:
            parts.append((_dequantize(name, integers, quantized) / _float32(how.scale)).round() + zero_point(how))
    return torch.cat(parts, int(node.attributes["axis"]))


def _mul(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    """QLinearMul: the integer product times ``scale_a * scale_b / scale_c``, one float32 operation after the other."""
    assert how is not None
    (scale_a, zero_a), (scale_b, zero_b) = (grid(quantized, name) for name in node.inputs)
    product = (integers[node.inputs[0]] - zero_a) * (integers[node.inputs[1]] - zero_b)
    ratio = np.float32(scale_a * scale_b) / np.float32(how.scale)
    return (product.float() * float(ratio) + zero_point(how)).round()


def _by_value(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    """Integer kernels that are defined by their float result: QLinearSigmoid (a table) and QLinearAveragePool."""
    assert how is not None
    result = apply(node, [_dequantize(node.inputs[0], integers, quantized)])
    return (result / _float32(how.scale)).round() + zero_point(how)


def _same(node: Node, integers: Mapping[str, Tensor], quantized: QuantizedGraph, how: TensorRange | None) -> Tensor:
    """Operators that only move integers."""
    value = integers[node.inputs[0]].float()
    constants = [torch.from_numpy(quantized.graph.constants[name].copy()) for name in node.inputs[1:]]
    return apply(node, [value, *constants])


KERNELS: dict[str, Callable[[Node, Mapping[str, Tensor], QuantizedGraph, TensorRange | None], Tensor]] = {
    "Conv": _conv,
    "Gemm": _conv,
    "Add": _add,
    "GlobalAveragePool": _global_average,
    "Concat": _concat,
    "MaxPool": _same,
    "Flatten": _same,
    "Reshape": _same,
    "Transpose": _same,
    "Slice": _same,
    "Mul": _mul,
    "Sigmoid": _by_value,
    "AveragePool": _by_value,
}
