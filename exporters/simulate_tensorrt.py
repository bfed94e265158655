"""What a file of the ``trt`` dialect computes, in torch, and the proof that a file computes it.

Two right implementations of a quantised network need not agree on its outputs: sums in another order flip single
roundings, and a network may amplify those (an untrained MobileNet-V2 turns them into several percent). So the proof goes node
by node: what each one makes of the *file's own* inputs, where nothing is amplified and a wrong scale, weight or edge stands out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecompress.exporters.build_on_device import compare
from edgecompress.exporters.runners import OnnxRuntimeRunner
from edgecompress.exporters.to_tensorrt import half_values, quantized_reads, symmetric_scale, value_names
from edgecompress.graph import Node
from edgecompress.interpret import apply, float_constants
from edgecompress.quantize import QuantizedGraph, TensorRange, dequantize

# Largest difference of a node's result, relative to its largest value. Float32 sums in another order gave at most 2e-5 (on
# nine networks of 224 pixels at 8, 4 and mixed bits), FP16 keeps 11 bits; a scale that is off by 1 % is off by 1e-2.
TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-3
_VALUES_AT_ONCE = 20_000_000


class _Arithmetic:
    """One node at a time, for given inputs. ``all_half``: every result is rounded to FP16."""

    def __init__(self, quantized: QuantizedGraph, *, all_half: bool = False) -> None:
        self.quantized, self.reads, self.half = quantized, quantized_reads(quantized), half_values(quantized)
        if all_half:
            self.half = frozenset(value for node in quantized.graph.nodes for value in node.outputs)
        self.constants = float_constants(quantized.graph)
        for layer in quantized.graph.layers:
            if layer.name in quantized.weights:
                self.constants[layer.inputs[1]] = dequantize(quantized.weights[layer.name])

    def __call__(self, node: Node, values: Mapping[str, Tensor]) -> Tensor:
        half = node.outputs[0] in self.half
        arguments: list[Tensor | None] = []
        for position, name in enumerate(node.inputs):
            value, how = values.get(name, self.constants.get(name)), self.reads.get((node.outputs[0], position))
            if how is not None and value is not None:
                value = _on_grid(value, how)
            arguments.append(_as_half(value) if half else value)
        result = apply(node, arguments)
        return result.half().float() if half else result


def _as_half(value: Tensor | None) -> Tensor | None:
    return value.half().float() if value is not None and value.is_floating_point() else value


def _on_grid(value: Tensor, how: TensorRange) -> Tensor:
    """Divided by the step, as ONNX says: torch's own operator multiplies by its inverse and rounds ties otherwise."""
    low, high = how.limits if how.bits < 8 else (-128, 127)
    step = torch.tensor(symmetric_scale(how), dtype=torch.float32)
    return (value / step).round().clamp(low, high) * step


def simulate(quantized: QuantizedGraph, x: Tensor, *, all_half: bool = False) -> Tensor:
    """Outputs for normalised images ``[N, C, H, W]``; TensorRT's differ by single roundings and what becomes of them.

    With ``all_half`` what is not integer is FP16, as TensorRT's FP16 flag allows.
    """
    graph, compute = quantized.graph, _Arithmetic(quantized, all_half=all_half)
    values = {graph.inputs[0]: x}
    for node in graph.nodes:
        values[node.outputs[0]] = compute(node, values)
    return values[graph.outputs[0]]


def engine_limits(quantized: QuantizedGraph, images: NDArray[np.float32]) -> dict[str, float]:
    """How far a right engine's outputs may be from the file's: ``max_error`` and ``min_agreement`` of `compare`.

    Three times as far as this network's own outputs are when everything between its integers is rounded to FP16, which flips
    single roundings as other kernels do; at least a relative error of 0.1, and 5 % of the images (one at the least) of
    another class.
    """
    with torch.no_grad():
        x = torch.from_numpy(images)
        spread = compare(simulate(quantized, x, all_half=True).numpy(), simulate(quantized, x).numpy())
    other = max(3 * (1 - spread["top1_agreement"]), 0.05, 1 / len(images))
    return {"max_error": max(3 * spread["relative_error"], 0.1), "min_agreement": max(1 - other, 0.0)}


def node_errors(model: onnx.ModelProto, quantized: QuantizedGraph, images: NDArray[np.float32]) -> dict[str, float]:
    """Error of every node of ``model``, run as written, for the inputs that it got: 1 and above is wrong.

    Largest absolute difference over largest value, in units of `TOLERANCE` (`HALF_TOLERANCE` in FP16).

    Args:
        images: normalised ``[N, C, H, W]``.

    Raises:
        BadFileError: ONNX Runtime refuses the file, for instance because a value that should be there is missing.
    """
    graph, compute = quantized.graph, _Arithmetic(quantized)
    names = value_names(quantized, opset=model.opset_import[0].version)
    runner = OnnxRuntimeRunner(_with_values(model, names).SerializeToString(), optimise=False)
    per_image = sum(int(np.prod(graph.shapes.get(value, 0))) for value, _ in names)
    size = max(_VALUES_AT_ONCE // max(per_image, 1), 1)
    errors: dict[str, float] = {}
    for start in range(0, len(images), size):
        part = images[start : start + size]
        found = runner.session.run([*names.values()], {runner.input_name: part})
        given = {key: torch.from_numpy(value).float() for key, value in zip(names, found, strict=True)}
        given[graph.inputs[0], False] = torch.from_numpy(part)
        for node in graph.nodes:
            half = node.outputs[0] in compute.half
            # A node reads what a Cast made of a value: ONNX Runtime may have kept more of it than FP16 holds.
            read = {name: given.get((name, half), given.get((name, not half))) for name in node.inputs}
            with torch.no_grad():
                expected = compute(node, {name: value for name, value in read.items() if value is not None})
            error = float((expected - given[node.outputs[0], half]).abs().max() / expected.abs().max().clamp(min=1e-9))
            error = error / (HALF_TOLERANCE if half else TOLERANCE) if error == error else float("inf")
            label = node.name or node.outputs[0]
            errors[label] = max(errors.get(label, 0.0), error)
    return errors


def _with_values(model: onnx.ModelProto, names: Mapping[tuple[str, bool], str]) -> onnx.ModelProto:
    """A copy with a free batch that also gives the values of ``names``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for end in (*copy.graph.input, *copy.graph.output):
        end.type.tensor_type.shape.dim[0].dim_param = "N"
    there = {end.name for end in copy.graph.output}
    for (_, half), name in names.items():
        if name not in there:
            kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
            copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return copy
