"""The proof of a file for ONNX Runtime: what it fuses of the file, and equality with the integer emulator."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from edgecompress.exporters.emulate import emulate, float_islands, runs_in_integers
from edgecompress.exporters.onnx_writing import IR_VERSIONS
from edgecompress.exporters.operator_proof import (
    IMAGES_FOR_OPERATORS,
    Difference,
    Seen,
    operator_differences,
    require_operators,
)
from edgecompress.exporters.runners import OnnxRuntimeRunner, is_x86, run_all
from edgecompress.exporters.to_onnxruntime import showing_values
from edgecompress.exporters.verify import Checks, Images, agreement, require_shapes, require_valid
from edgecompress.quantize import QuantizedGraph, simulate

KERNEL_NAMES = {
    "Conv": "QLinearConv", "Gemm": "QGemm", "Add": "QLinearAdd", "Mul": "QLinearMul", "Concat": "QLinearConcat",
    "AveragePool": "QLinearAveragePool", "GlobalAveragePool": "QLinearGlobalAveragePool", "Sigmoid": "QLinearSigmoid",
    "MaxPool": "MaxPool",
}  # fmt: skip
FLOAT_OPS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "NhwcFusedConv")
SELDOM = Difference(1, 0.001)  # behind a float island, whose own rounding falls otherwise now and then


def optimised(model: bytes) -> onnx.ModelProto:
    """The graph that ONNX Runtime really runs (before layout transformation)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        OnnxRuntimeRunner(model, optimised_path=path, precise=False)
        return onnx.load(path)


def operators_of(model: onnx.ModelProto) -> Counter[str]:
    """Operators of an optimised graph, counted; a MaxPool counts only where it pools integers."""
    integers = _integer_values(model.graph)
    return Counter(node.op_type for node in model.graph.node if node.op_type != "MaxPool" or node.input[0] in integers)


def _integer_values(graph: onnx.GraphProto) -> set[str]:
    """Values of 8 bits. ONNX Runtime writes no types, but all operators yield what they read, apart from those named here."""
    eight = (TensorProto.UINT8, TensorProto.INT8)
    found = {value.name for value in graph.input if value.type.tensor_type.elem_type in eight}
    for node in graph.node:
        if node.op_type in ("DequantizeLinear", "Cast"):
            continue
        if node.op_type == "QGemm":
            integer = len(node.input) > 8 and bool(node.input[8])  # without a zero point for its result that is float
        else:
            quantises = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear")
            integer = quantises or (bool(node.input) and node.input[0] in found)
        if integer:
            found.update(node.output)
    return found


def fusion_report(quantized: QuantizedGraph, operators: Mapping[str, int]) -> tuple[str, str]:
    """Integer kernels that the optimised graph should have and has, and those that it lacks (empty: none).

    Args:
        operators: see `operators_of`.
    """
    expected = Counter(
        KERNEL_NAMES[node.op]
        for node in quantized.graph.nodes
        if node.op in KERNEL_NAMES and runs_in_integers(quantized, node)
    )
    found = {name: f"{name} {operators.get(name, 0)} of {count}" for name, count in sorted(expected.items())}
    short = [text for name, text in found.items() if operators.get(name, 0) < expected[name]]
    return ", ".join(found.values()), ", ".join(short)


def check_ort(
    model: bytes, quantized: QuantizedGraph, images: Images, *, class_scores: bool = True, precise: bool = True
) -> Checks:
    """Fusion in ONNX Runtime and equality with the integer emulator; see `OnnxRuntimeRunner` for ``precise``.

    Where operators run in float, the answers need not be equal, but every value must be within `SELDOM` of what the emulator
    makes of the very inputs that it got, in a file that shows them and answers as this one does.
    """
    checks = Checks()
    require_valid(model)
    runs = optimised(model)
    require_shapes(checks, runs, quantized.graph)
    operators = operators_of(runs)
    floats = sum(operators[name] for name in FLOAT_OPS)
    stay_float = sum(layer.name not in quantized.weights for layer in quantized.graph.layers)
    integer = operators["QLinearConv"] + operators["QGemm"]
    wanted = len(quantized.weights)
    checks.require(
        floats <= stay_float and integer == wanted, "float_conv_or_gemm", floats,
        f"ONNX Runtime fused {integer} of {wanted} quantised layers and left {floats} in float",
    )  # fmt: skip
    checks.values["integer_layers"] = integer
    islands = float_islands(quantized)
    checks.values["float_islands"] = ", ".join(islands) or "none"
    report, short = fusion_report(quantized, operators)
    checks.require(not short, "integer_kernels", report, f"ONNX Runtime runs operators in float silently: {short}")
    runner = OnnxRuntimeRunner(model, precise=precise)
    found = run_all(runner, images)
    with torch.no_grad():
        x = torch.from_numpy(images)
        exact, floating = emulate(quantized, x).numpy(), simulate(quantized, x).numpy()
    checks.outputs, checks.emulated = found, exact
    difference = float(np.abs(found - exact).max())
    same = agreement(found, exact, class_scores=class_scores)
    holds = difference == 0.0 if is_x86() and not islands else same >= 0.995
    checks.require(
        holds, "emulator_max_difference", difference, f"ONNX Runtime differs from the integer emulator by {difference}"
    )
    checks.values["emulator_agreement"] = same
    checks.values["simulator_agreement"] = agreement(found, floating, class_scores=class_scores)
    if islands and is_x86():
        _check_operators(checks, quantized, images, found, runner.batch, precise)
    return checks


def _check_operators(
    checks: Checks,
    quantized: QuantizedGraph,
    images: Images,
    found: NDArray[np.float32],
    batch: int,
    precise: bool,
) -> None:
    """Every operator in a file of the same graph with all of its u8 values as outputs, which answers what the real one does.

    That file is written anew, so that its answers must be those of the real one (``found``) to the bit. They are, with every
    kind of float island that was tried: more outputs change no kernel. Another ``batch`` (0: free) might, as float sums then
    have another order.
    """
    model, names = showing_values(quantized, max_opset=max(IR_VERSIONS), unpack=True, batch=batch or None)
    showing = OnnxRuntimeRunner(model.SerializeToString(), precise=precise)
    same = np.array_equal(run_all(showing, images), found)
    checks.require(
        same, "shown_file_agrees", same, "the file that shows its values answers otherwise: its operators prove nothing"
    )
    differences = operator_differences(quantized, _runs(showing, names, images))
    require_operators(checks, quantized, differences, lambda name: SELDOM)


def _runs(
    showing: OnnxRuntimeRunner, names: list[str], images: Images
) -> Iterator[tuple[Images, Seen, NDArray[np.float32]]]:
    """Some images, in batches of the file's own size, with the values that it holds."""
    size = showing.batch or IMAGES_FOR_OPERATORS
    for start in range(0, max(IMAGES_FOR_OPERATORS, size), size):
        some = images[np.arange(start, start + size) % len(images)]
        outputs, *values = showing.run_whole(some)
        held = {name: value.astype(np.int32) for name, value in zip(names, values, strict=True)}
        yield some, held.get, outputs
