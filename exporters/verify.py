"""The proof that an exported file is right. A check is a value in ``export.json``; a failed one refuses the artifact."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgecompress.cost import kernels
from edgecompress.errors import GoalMissedError
from edgecompress.exporters import simulate_tensorrt
from edgecompress.exporters.audit import bytes_of_layers, lacking, shapes_of_weights
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.graph import Graph, Node
from edgecompress.interpret import float_constants, run
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, simulate
from edgecompress.spec import CompressionPolicy, Network

Images = NDArray[np.float32]
Value = str | float | int | bool


@dataclass
class Checks:
    """Values found, and sentences about those that failed."""

    values: dict[str, Value] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    outputs: NDArray[np.float32] | None = None  # of the file, for the images that it was checked on
    emulated: NDArray[np.float32] | None = None  # of the integer emulator, for the same images
    layer_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)  # in the file, and weights x bits / 8

    def require(self, holds: bool, name: str, value: Value, otherwise: str) -> None:
        """Record ``value``; a check that does not hold is a failure."""
        self.values[name] = value
        if not holds:
            self.failures.append(otherwise)


def agreement(first: NDArray[np.float32], second: NDArray[np.float32], *, class_scores: bool = True) -> float:
    """Share of images (for masks: pixels) with the same top-1 class; of images within 10 % where outputs are no scores."""
    if class_scores:
        return float((first.argmax(1) == second.argmax(1)).mean())
    flat = second.reshape(len(second), -1)
    error = np.linalg.norm(first.reshape(len(first), -1) - flat, axis=1)
    return float((error <= 0.1 * np.linalg.norm(flat, axis=1)).mean())


def relative_error(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """L2 norm of the difference over that of ``wanted``."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-9))


def require_valid(model: bytes) -> None:
    """Raises GoalMissedError where ONNX's checker or its shape inference refuses the file."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GoalMissedError(
            f"The file would be no valid ONNX: {str(error).strip().splitlines()[0]}. Nothing was written; report it with the run folder."
        ) from error


def check_float(model: bytes, graph: Graph, images: Images) -> Checks:
    """The float file against our own evaluation of the graph in torch."""
    checks = Checks()
    require_valid(model)
    require_shapes(checks, onnx.load_from_string(model), graph)
    found = run_all(OnnxRuntimeRunner(model), images)
    with torch.no_grad():
        wanted = run(graph, torch.from_numpy(images), float_constants(graph)).numpy()
    checks.outputs = found
    error = float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-9))
    checks.require(
        error < 1e-3, "relative_error", error, f"the file's outputs differ by {error:.2%} from the network's"
    )
    return checks


def require_shapes(checks: Checks, held: onnx.ModelProto, graph: Graph) -> None:
    """``held`` has the weights of every layer of ``graph`` at their full shapes, and no others in their place."""
    missing = lacking(shapes_of_weights(held), (graph.constants[layer.inputs[1]].shape for layer in graph.layers))
    checks.require(
        not missing,
        "shapes_in_file",
        not missing,
        f"the file lacks {len(missing)} weight tensors of shapes {missing[:3]}",
    )


def check_shapes(graph: Graph, network: Network, policy: CompressionPolicy) -> Checks:
    """Every layer of the graph that is written has the channels that the policy says: removed, not masked."""
    checks = Checks()
    found = {layer.name: graph.constants[layer.inputs[1]].shape for layer in graph.layers}
    elements = 0
    for kernel in kernels(network, policy):
        shape = found.get(kernel.layer.name)
        if shape is None or kernel.layer.kind == "transposed":
            continue
        elements += int(np.prod(shape))
        wanted = (
            kernel.out_channels,
            1 if kernel.layer.kind == "depthwise" else kernel.in_channels // kernel.layer.groups,
        )
        holds = tuple(shape[:2]) == wanted
        checks.require(
            holds, "shapes_match_policy", holds and not checks.failures,
            f"layer {kernel.layer.name} has weights {shape}, the policy says {wanted}",
        )  # fmt: skip
    checks.values["weight_elements"] = elements
    return checks


def check_size(model: bytes, quantized: QuantizedGraph) -> Checks:
    """Where the bytes are: weights of every layer against weights x bits / 8, everything else per node. Only facts but that
    every layer is there."""
    proto = onnx.load_from_string(model)
    held = bytes_of_layers(proto)
    exact = {name: math.ceil(weight.values.size * weight.bits / 8) for name, weight in quantized.weights.items()}
    checks = Checks(layer_bytes={name: (held.get(name, 0), exact[name]) for name in exact})
    packed = sum(stored for stored, _ in checks.layer_bytes.values())
    layers = [layer for layer in quantized.graph.layers if layer.name in quantized.weights]
    channels = sum(_channel_bytes(layer, quantized.weights[layer.name]) for layer in layers)
    absent = [name for name, (stored, _) in checks.layer_bytes.items() if not stored]
    checks.require(not absent, "weight_bytes", packed, f"the file holds no weights of {', '.join(absent[:3])}")
    checks.values |= {
        "weight_bytes_exact": sum(exact.values()),
        "channel_bytes": channels,
        "other_bytes_per_node": round((len(model) - packed - channels) / len(proto.graph.node), 1),
    }
    return checks


def _channel_bytes(layer: Node, weight: QuantizedWeight) -> int:
    """The weight's scales, the bias with its own, and zero points, which only a Gemm needs."""
    has_bias = len(layer.inputs) > 2 and bool(layer.inputs[2])
    gemm = layer.op == "Gemm"
    per_scale = 4 + gemm + (4 + 4 * gemm if has_bias else 0)
    return per_scale * weight.scale.size + (4 * len(weight.values) if has_bias else 0)


def check_memory(activations: int, weights: int, limit_mb: int) -> Checks:
    """Planned memory against the target's (0: no limit). ``activations`` and ``weights`` are bytes."""
    checks = Checks({"weight_memory_bytes": weights})
    needed = (activations + weights) / 2**20
    checks.require(
        not limit_mb or needed <= limit_mb, "activation_peak_bytes", activations,
        f"running it is planned to take {needed:.0f} MiB, the target has {limit_mb}",
    )  # fmt: skip
    return checks


def check_trt(model: bytes, quantized: QuantizedGraph, images: Images, *, class_scores: bool = True) -> Checks:
    """The dialect's rules, every node as it should be when run as written, and TensorRT-RTX's verdict where it is installed.

    Outputs are compared too, but decide nothing: see `simulate_tensorrt`.
    """
    from edgecompress.exporters.check_tensorrt import BUILT, check_builds, mend_for, two_four_layers
    from edgecompress.exporters.to_tensorrt import lint

    require_valid(model)
    checks, proto = Checks(), onnx.load_from_string(model)
    require_shapes(checks, proto, quantized.graph)
    broken = lint(proto)
    checks.require(
        not broken,
        "dialect_lint",
        "; ".join(broken) or "clean",
        f"the file breaks the dialect: {'; '.join(broken[:1])}",
    )
    errors = simulate_tensorrt.node_errors(proto, quantized, images)
    worst = max(errors, key=lambda name: errors[name])
    checks.require(
        errors[worst] < 1, "dialect_node_error", errors[worst],
        f"'{worst}' computes something else from its inputs than it should (of {len(errors)} nodes "
        f"{sum(not error < 1 for error in errors.values())} do)",
    )  # fmt: skip
    found = checks.outputs = run_all(OnnxRuntimeRunner(model, optimise=False), images)
    with torch.no_grad():
        x = torch.from_numpy(images)
        wanted, simulated = simulate_tensorrt.simulate(quantized, x).numpy(), simulate(quantized, x).numpy()
    # The second pair: s8 behind a ReLU has half the resolution of the search's u8.
    checks.values |= {
        "dialect_error": relative_error(found, wanted),
        "dialect_agreement": agreement(found, wanted, class_scores=class_scores),
        "simulator_error": relative_error(found, simulated),
        "simulator_agreement": agreement(found, simulated, class_scores=class_scores),
        "half_layers": len(quantized.half),
        "two_four_sparse_layers": ", ".join(name for name, holds in two_four_layers(quantized).items() if holds)
        or "none",
    }
    builds = check_builds(model)
    checks.values |= {
        f"tensorrt_rtx_{key.removeprefix('tensorrt_rtx')}".rstrip("_"): value for key, value in builds.items()
    }
    refused = {key: value for key, value in builds.items() if key.startswith("SM") and value != BUILT}
    if refused:
        reason = next(iter(refused.values()))
        checks.failures.append(f"TensorRT-RTX refuses the file: {reason} (to mend it, {mend_for(reason)})")
    return checks


def merged(*parts: Checks) -> Checks:
    """All values and failures together."""
    values: dict[str, Value] = {}
    for part in parts:
        values |= part.values
    outputs = next((part.outputs for part in parts if part.outputs is not None), None)
    failures = [failure for part in parts for failure in part.failures]
    layer_bytes = {name: held for part in parts for name, held in part.layer_bytes.items()}
    return Checks(values, failures, outputs, layer_bytes=layer_bytes)
