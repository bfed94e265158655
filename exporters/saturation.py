"""Weights for CPUs whose 8-bit products saturate: x86 with AVX2 but no VNNI.

Their kernels add two products of u8 and s8 in 16 bits (vpmaddubsw). ``2 * 255 * 64`` still fits, so that weights of 7 bits
are exact at full speed; at 8 bits only ONNX Runtime's slower kernels are (``session.x64quantprecision``).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgecompress.quantize import QuantizedGraph, quantize_weight
from edgecompress.spec import Target

SAFE_BITS = 7
SATURATION = "saturation"  # property of a file: "none" where the fast kernels cannot saturate


def weights_saturate(target: Target) -> bool:
    """Whether the target's facts rule 8-bit weights out for ONNX Runtime."""
    return target.exporter == "onnxruntime" and target.integer_kernels and max(target.weight_bits) <= SAFE_BITS


def without_saturation(quantized: QuantizedGraph) -> QuantizedGraph:
    """The same network with every weight tensor of 8 bits quantised anew, to 7; weights that are zero stay zero."""
    layers = {layer.name: layer for layer in quantized.graph.layers}
    weights = {
        name: weight
        if weight.bits <= SAFE_BITS
        else quantize_weight(
            torch.from_numpy(quantized.graph.constants[layers[name].inputs[1]] * (weight.values != 0)),
            SAFE_BITS,
            weight.scales,
        )
        for name, weight in quantized.weights.items()
    }
    return replace(quantized, weights=weights)
