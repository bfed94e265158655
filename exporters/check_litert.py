"""The proof of a LiteRT file: what is in it, read back by the schema, and what it answers in LiteRT itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgecompress.exporters.litert_writing import schema
from edgecompress.exporters.more_runners import LiteRtRunner
from edgecompress.exporters.operator_proof import (
    IMAGES_FOR_OPERATORS,
    Difference,
    Seen,
    operator_differences,
    require_operators,
)
from edgecompress.exporters.runners import run_all
from edgecompress.exporters.to_litert import LiteRtModel
from edgecompress.exporters.to_onnxruntime import grid
from edgecompress.exporters.verify import Checks, Images, agreement, relative_error
from edgecompress.quantize import QuantizedGraph

SELDOM = 0.05  # share of values that may round otherwise; of XNNPACK an ADD does at some 0.01 %, a LEAKY_RELU at 1 %
OFTEN = 0.25  # the same of kernels that round twice
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


def allowed(model: LiteRtModel, quantized: QuantizedGraph, name: str) -> Difference:
    """One step where a rounding falls otherwise, which is seldom but where LiteRT's own kernels round twice.

    A Sigmoid is rounded to LiteRT's 1/256 before it gets its step.
    """
    node = quantized.graph.producer(name)
    if node is not None and node.op == "Sigmoid" and name in quantized.tensors:
        return Difference(1 + math.ceil(0.5 / 256 / quantized.tensors[name].scale), 1)
    return Difference(1, OFTEN if name in model.rounded_twice else SELDOM)


def runs(model: LiteRtModel, quantized: QuantizedGraph, images: Images) -> Iterator[tuple[Images, Seen, Images]]:
    """LiteRT on ``images``, batch by batch, with all of its tensors kept; see `operator_differences`."""
    runner = LiteRtRunner(model.data, keep=True)
    for start in range(0, len(images), runner.batch):
        part = images[start : start + runner.batch]
        outputs = run_all(runner, part)

        def seen(name: str, count: int = len(part)) -> NDArray[np.integer] | None:
            held = model.values.get(name)
            if held is None:
                return None
            return held.in_natural_order(runner.tensor(held.number))[:count] + grid(quantized, name)[1]

        yield part, seen, outputs


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
    differences = operator_differences(quantized, runs(model, quantized, images[:IMAGES_FOR_OPERATORS]), model.step)
    require_operators(checks, quantized, differences, partial(allowed, model, quantized))
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
