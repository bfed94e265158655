"""The proof of an OpenVINO file: right in ONNX Runtime, and every operator right in OpenVINO on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgecompress.exporters.check_onnxruntime import check_ort
from edgecompress.exporters.onnx_writing import FOUR_BITS_OPSET
from edgecompress.exporters.operator_proof import (
    IMAGES_FOR_OPERATORS,
    OUTPUT,
    Difference,
    Seen,
    operator_differences,
    require_operators,
)
from edgecompress.exporters.runners import OpenVinoRunner, has_vnni, is_x86, run_all
from edgecompress.exporters.saturation import SAFE_BITS
from edgecompress.exporters.to_onnxruntime import showing_values
from edgecompress.exporters.verify import Checks, Images, agreement, relative_error
from edgecompress.quantize import QuantizedGraph

SELDOM = Difference(1, 0.01)  # measured: one step at 1e-6 to 4e-5 of the values of a layer, 4e-3 of a global average
ANYTHING = Difference(255, 1)
ENOUGH = 0.9  # of the answers the emulator's, where not every operator could be compared


def check_openvino(model: bytes, quantized: QuantizedGraph, images: Images, *, class_scores: bool = True) -> Checks:
    """The file is right (`check_ort`), and OpenVINO runs its layers in 8 bits, each as the emulator does.

    Every operator must be right for the inputs that it got. How far the answers then are from the emulator's is a fact:
    OpenVINO rounds otherwise at one value in some 100,000, and an untrained network amplifies that. Products of 8-bit
    weights saturate where this CPU has no VNNI: the layers that have such are then named, and the answers must agree instead.
    """
    checks = check_ort(model, quantized, images, class_scores=class_scores)
    runner = OpenVinoRunner(model)
    checks.values["openvino"] = runner.runtime
    integer = runner.integer_layers()
    checks.require(
        integer >= len(quantized.weights), "openvino_integer_layers", integer,
        f"OpenVINO runs {integer} of {len(quantized.weights)} quantised layers in 8 bits",
    )  # fmt: skip
    differences = operator_differences(quantized, _runs(quantized, images[:IMAGES_FOR_OPERATORS]))
    saturating = _saturating(quantized)
    require_operators(checks, quantized, differences, lambda name: ANYTHING if name in saturating else SELDOM)
    if saturating:
        worst = max((differences[name] for name in saturating & differences.keys()), key=lambda found: found.steps)
        checks.values["openvino_saturates"] = f"{len(saturating)} layers of 8-bit weights on this CPU: {worst}"
    wanted, found = checks.emulated, run_all(runner, images)
    assert wanted is not None
    checks.outputs = found
    same = agreement(found, wanted, class_scores=class_scores)
    checks.require(
        not saturating or same >= ENOUGH, "openvino_agreement", same,
        f"only {same:.1%} of OpenVINO's answers are the emulator's: its products of 8-bit weights saturate on this CPU. Export with "
        "--saturating-cpu for one like it, or on a CPU with VNNI",
    )  # fmt: skip
    checks.values["openvino_error"] = relative_error(found, wanted)
    return checks


def _runs(quantized: QuantizedGraph, images: Images) -> Iterator[tuple[Images, Seen, NDArray[np.float32]]]:
    """OpenVINO on the same graph with all of its u8 values as outputs."""
    model, names = showing_values(quantized, max_opset=FOUR_BITS_OPSET, unpack=False)
    outputs, *values = OpenVinoRunner(model.SerializeToString()).run_whole(images)
    held = {name: value.astype(np.int32) for name, value in zip(names, values, strict=True)}
    yield images, held.get, outputs


def _saturating(quantized: QuantizedGraph) -> set[str]:
    """Values of layers whose products do not fit 16 bits, where this CPU adds them there; see `saturation`."""
    if not is_x86() or has_vnni():
        return set()
    eight = (name for name, weight in quantized.weights.items() if weight.bits > SAFE_BITS)
    outputs = {layer.name: layer.outputs[0] for layer in quantized.graph.layers}
    return set().union(*(_shown_next(quantized, outputs[name]) for name in eight))


def _shown_next(quantized: QuantizedGraph, value: str) -> set[str]:
    """The quantised values, or `OUTPUT`, that ``value`` becomes without another one between."""
    if value in quantized.tensors:
        return {value}
    readers = quantized.graph.consumers(value)
    found = {OUTPUT} if value in quantized.graph.outputs else set()
    return found.union(*(_shown_next(quantized, reader.outputs[0]) for reader in readers))
