"""The proof of a LiteRT file: what is in it, read back by the schema, and what it answers in LiteRT itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.litert_writing import schema
from edgecompress.exporters.more_runners import LiteRtRunner
from edgecompress.exporters.runners import run_all
from edgecompress.exporters.to_litert import LiteRtModel
from edgecompress.exporters.to_onnxruntime import grid
from edgecompress.exporters.verify import Checks, Images, agreement, relative_error
from edgecompress.quantize import QuantizedGraph, is_fused_activation

IMAGES_FOR_OPERATORS = 2  # run with all tensors kept
FLOAT_ERROR = 1e-3  # of the largest output, where it is no integer before
SELDOM = 0.05  # share of values that may round otherwise; of XNNPACK an ADD does at some 0.01 %, a LEAKY_RELU at 1 %
OFTEN = 0.25  # the same of kernels that round twice
OUTPUT = "the output"
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


@dataclass
class Contents:
    """What a file holds: its operators, those that touch floats beside conversions, and its weights.

    ``weights`` are the integers ``[out, ...]`` of every weighted operator; ``weight_bytes`` is what they take in the file.
    """

    operators: Counter[str] = field(default_factory=Counter)
    floats: Counter[str] = field(default_factory=Counter)
    weights: list[NDArray[np.int8]] = field(default_factory=list)
    weight_bytes: int = 0


def contents(data: bytes) -> Contents:
    """Read a file as LiteRT's schema says."""
    parts = schema()
    model, found = parts.ModelT.InitFromPackedBuf(data, 0), Contents()
    graph = model.subgraphs[0]
    names = {number: name for name, number in vars(parts.BuiltinOperator).items() if name.isupper()}
    for operator in graph.operators:
        name = names[model.operatorCodes[operator.opcodeIndex].builtinCode]
        tensors = [graph.tensors[number] for number in (*operator.inputs, *operator.outputs) if number >= 0]
        found.operators[name] += 1
        if name not in CONVERSIONS and any(tensor.type == parts.TensorType.FLOAT32 for tensor in tensors):
            found.floats[name] += 1
        kernel = tensors[1] if name in WEIGHTED else None
        if kernel is not None and kernel.type in (parts.TensorType.INT8, parts.TensorType.INT4):
            stored = np.asarray(model.buffers[kernel.buffer].data, np.uint8)
            found.weight_bytes += stored.size
            shape = tuple(int(size) for size in kernel.shape)
            values = stored.view(np.int8) if kernel.type == parts.TensorType.INT8 else _unpacked(stored, shape)
            values = values.reshape(shape)
            found.weights.append(np.moveaxis(values[0], -1, 0) if name == "DEPTHWISE_CONV_2D" else values)
    return found


def _unpacked(stored: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.int8]:
    halves = np.stack([stored & 15, stored >> 4], 1).reshape(-1)[: int(np.prod(shape))].astype(np.int8)
    return np.where(halves > 7, halves - 16, halves).astype(np.int8)


@dataclass(frozen=True)
class Difference:
    """Between what a value is and what its operator should make of its inputs: the largest, in steps, and at how many values."""

    steps: float
    share: float

    def __str__(self) -> str:
        return f"{self.steps:.3g} steps at {self.share:.2%} of the values"


def allowed(model: LiteRtModel, quantized: QuantizedGraph, name: str) -> Difference:
    """One step where a rounding falls otherwise, which is seldom but where LiteRT's own kernels round twice.

    A Sigmoid is rounded to LiteRT's 1/256 before it gets its step.
    """
    node = quantized.graph.producer(name)
    if node is not None and node.op == "Sigmoid" and name in quantized.tensors:
        return Difference(1 + math.ceil(0.5 / 256 / quantized.tensors[name].scale), 1)
    return Difference(1, OFTEN if name in model.rounded_twice else SELDOM)


def operator_differences(model: LiteRtModel, quantized: QuantizedGraph, images: Images) -> dict[str, Difference]:
    """By quantised value, and the output: what LiteRT computes against the emulator's kernel on the very same inputs."""
    found: dict[str, Difference] = {}
    runner = LiteRtRunner(model.data, keep=True)
    for start in range(0, len(images), runner.batch):
        part = torch.from_numpy(images[start : start + runner.batch])
        outputs = run_all(runner, part.numpy())

        def compared(name: str, value: torch.Tensor) -> torch.Tensor:
            held = model.values.get(name)
            if held is None:
                return value
            seen = held.in_natural_order(runner.tensor(held.number))[: len(value)] + grid(quantized, name)[1]
            found[name] = _difference(seen - value.numpy(), found.get(name))
            return torch.from_numpy(np.ascontiguousarray(seen))

        with torch.no_grad():
            wanted = emulate(quantized, part, compared).numpy()
        step = model.step or FLOAT_ERROR * max(float(np.abs(wanted).max()), 1e-9)
        found[OUTPUT] = _difference((outputs - wanted) / step, found.get(OUTPUT))
    return found


def _difference(steps: NDArray[np.generic], before: Difference | None) -> Difference:
    distance = np.abs(steps)
    share = float((distance >= 1).mean())
    largest = float(distance.max())
    if before is not None:
        largest, share = max(largest, before.steps), max(share, before.share)
    return Difference(largest, share)


def check_contents(model: LiteRtModel, quantized: QuantizedGraph) -> Checks:
    """Every layer's integers are in the file, nothing computes in float that is not named, and where the bytes are."""
    checks, found = Checks(), contents(model.data)
    left = Counter(_fingerprint(values) for values in found.weights)
    lost = [name for name, weight in quantized.weights.items() if not _taken(left, _fingerprint(weight.values))]
    layers = len(quantized.weights)
    checks.require(
        not lost, "integer_layers", layers - len(lost), f"the integers of {', '.join(lost)} are not in the file"
    )
    names, floats = ", ".join(model.floats), sum(found.floats.values())
    holds = bool(model.floats) == bool(floats)
    kinds = ", ".join(f"{count} {name}" for name, count in found.floats.items())
    checks.require(holds, "float_operators", floats, f"it computes in float: {kinds}; meant to: {names or 'nothing'}")
    exact = sum(weight.values.size * weight.bits / 8 for weight in quantized.weights.values())
    total = sum(found.operators.values())
    checks.values |= {
        "float_islands": names or "none",
        "operators": ", ".join(f"{count} {name}" for name, count in sorted(found.operators.items())),
        "weight_bytes": found.weight_bytes,
        "weight_bytes_exact": round(exact),
        "int4_layers": model.int4,
        "other_bytes_per_operator": round((len(model.data) - found.weight_bytes) / total, 1),
    }
    return checks


def _fingerprint(values: NDArray[np.int8]) -> bytes:
    """Shape and integers of each output channel; their order within one is that of the file's layout."""
    rows = np.sort(values.reshape(len(values), -1), axis=1)
    return str(rows.shape).encode() + rows.tobytes()


def _taken(left: Counter[bytes], wanted: bytes) -> bool:
    left[wanted] -= 1
    return left[wanted] >= 0


def check_litert(
    model: LiteRtModel,
    quantized: QuantizedGraph,
    images: Images,
    exact: NDArray[np.float32],
    *,
    class_scores: bool = True,
) -> Checks:
    """`check_contents`, and LiteRT answers as the integer emulator does.

    Args:
        exact: what the emulator answers to ``images``.

    Every operator must be right for the inputs that it got in the file. How far the answers then are from the emulator's
    is a fact: an ADD rounds otherwise at one value in some ten thousand, and an untrained network amplifies that. So is
    the agreement of LiteRT's own kernels, without XNNPACK: they round twice.
    """
    checks = check_contents(model, quantized)
    differences = operator_differences(model, quantized, images[:IMAGES_FOR_OPERATORS])
    absorbed = {node.inputs[0] for node in quantized.graph.nodes if is_fused_activation(quantized.graph, node)}
    unseen = [name for name in quantized.tensors if name not in differences and name not in absorbed]
    limits = {name: allowed(model, quantized, name) for name in differences}
    wrong = [*unseen]
    for name, found_there in differences.items():
        if found_there.steps > limits[name].steps or found_there.share > limits[name].share:
            wrong.append(f"{name}: {found_there}")
    worst = max(differences.values(), key=lambda found: (found.steps, found.share))
    why = f"{len(wrong)} values are not what their operators make of their inputs ({'; '.join(wrong[:3])})"
    checks.require(not wrong, "operator_difference", str(worst), why)
    checks.values["operators_compared"] = len(differences)
    runner = LiteRtRunner(model.data)
    found = checks.outputs = run_all(runner, images)
    checks.emulated = exact
    checks.values["litert"] = runner.runtime
    checks.values["emulator_agreement"] = agreement(found, exact, class_scores=class_scores)
    checks.values["emulator_error"] = relative_error(found, exact)
    if model.step:
        checks.values["emulator_max_difference_steps"] = float(np.abs(found - exact).max() / model.step)
    plain = run_all(LiteRtRunner(model.data, xnnpack=False), images)
    checks.values["without_xnnpack_agreement"] = agreement(plain, exact, class_scores=class_scores)
    return checks
