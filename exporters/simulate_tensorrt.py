"""What a file of the ``trt`` dialect computes, in torch: weights on their grid, values on a clipped s8 grid where read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgecompress.exporters.to_tensorrt import quantized_reads, symmetric_scale
from edgecompress.interpret import apply, float_constants
from edgecompress.quantize import QuantizedGraph, dequantize


def simulate(quantized: QuantizedGraph, x: Tensor) -> Tensor:
    """Outputs for normalised images ``[N, C, H, W]``; TensorRT's differ by single roundings."""
    graph, reads = quantized.graph, quantized_reads(quantized)
    values = {**float_constants(graph), graph.inputs[0]: x}
    for layer in graph.layers:
        if layer.name in quantized.weights:
            values[layer.inputs[1]] = dequantize(quantized.weights[layer.name])
    for node in graph.nodes:
        arguments: list[Tensor | None] = []
        for position, name in enumerate(node.inputs):
            value, how = values.get(name), reads.get((node.outputs[0], position))
            if how is not None and value is not None:
                low, high = how.limits if how.bits < 8 else (-128, 127)
                step = float(np.float32(symmetric_scale(how)))
                value = torch.fake_quantize_per_tensor_affine(value, step, 0, low, high)
            arguments.append(value)
        values[node.outputs[0]] = apply(node, arguments)
    return values[graph.outputs[0]]
