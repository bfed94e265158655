"""Does NVIDIA's parser and builder accept a file? TensorRT-RTX answers without a GPU; it is a check, never a product.

TensorRT-RTX knows SM75, 80, 86, 89, 120, 121 and no Jetson, so what it builds is thrown away: an engine is an artifact
only when ``build_on_device.py`` built it on the device that runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import BadFileError, GoalMissedError, MissingBackendError, UnknownNameError
from edgecompress.quantize import QuantizedGraph

BUILT = "built"
# Reasons that were seen, and what helped; the last fits all.
MENDS = {
    "FP32 GEMM is not supported": "give the linear layer 16 bits in the policy: this GPU multiplies no FP32 matrices",
    "Non-zero zero point": "this is no file for TensorRT; export --format tensorrt",
    "has type Int32": "this is no file for TensorRT; export --format tensorrt",
    "CHECK(dtype == W.type())": "give the layer's input 16 bits in the policy: INT4 weights do not go with integer inputs",
    "optimization profile": "export with a fixed --batch",
    "Failed to import initializer": "leave --max-opset at 21 or below",
    "": "give the layer that it names 16 or 32 bits in the policy",
}


def check_builds(model_bytes: bytes, *, capabilities: Iterable[str] = ("SM86", "SM89")) -> dict[str, str]:
    """Parse and build a serialised ONNX model with ``tensorrt_rtx`` for each compute capability; nothing is kept.

    Returns:
        ``{"tensorrt_rtx": version, "SM86": "built", ...}``, where a refusal stands in the place of ``"built"`` as
        ``"parser: ..."`` or ``"builder: ..."``; ``{"tensorrt_rtx": "not installed"}`` without the package.

    Raises:
        UnknownNameError: TensorRT-RTX does not know a capability.
    """
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ImportError:
        return {"tensorrt_rtx": "not installed"}
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    result = {"tensorrt_rtx": str(trt.__version__)}
    for capability in capabilities:
        if capability not in known:
            raise UnknownNameError("compute capability of TensorRT-RTX", capability, known)
        result[capability] = _build(trt, model_bytes, capability)
    return result


def _build(trt: Any, model_bytes: bytes, capability: str) -> str:
    logger = _collector(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model_bytes):
        errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        return f"parser: {_sentence(errors or logger.messages)}"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        found = network.get_input(number)
        if -1 in tuple(found.shape):
            shapes = [tuple(batch if size == -1 else size for size in found.shape) for batch in (1, 1, 8)]
            profile.set_shape(found.name, *shapes)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        return f"builder: {_sentence(logger.messages)}"
    return BUILT


def _collector(trt: Any) -> Any:
    """A logger that keeps errors and prints nothing."""

    class Collector(trt.ILogger):  # type: ignore[misc]  # the base exists only where TensorRT is installed
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.messages.append(message)

    return Collector()


def _sentence(messages: list[str]) -> str:
    """The first message that says something, on one line."""
    return " ".join((messages or ["refused without a message"])[0].split())


def mend_for(refusal: str) -> str:
    """What to change where TensorRT-RTX refused a file for a reason that is known; else that the layer can be left float."""
    return next((mend for reason, mend in MENDS.items() if reason in refusal), MENDS[""])


def two_four_layers(quantized: QuantizedGraph) -> dict[str, bool]:
    """Layers with integer weights, and whether those are 2:4 sparse, which ``build_on_device.py --sparse`` makes use of.

    Of four neighbouring input channels two or more are zero, for every output channel and kernel position (TensorRT developer
    guide, "Structured sparsity"). A last group of fewer than four counts as filled up with zeros.
    """
    result = {}
    for name, weight in quantized.weights.items():
        rows = weight.values.reshape(*weight.values.shape[:2], -1)  # out, in / groups, kernel
        filled = np.pad(rows != 0, ((0, 0), (0, -rows.shape[1] % 4), (0, 0)))
        result[name] = bool((filled.reshape(len(rows), -1, 4, rows.shape[2]).sum(2) <= 2).all())
    return result


def build_engine_here(model_path: Path, out: Path, *, fp16: bool = False, seconds: float = 3.0) -> dict[str, Any]:
    """Build ``model.engine`` and ``engine.json`` into ``out`` with the TensorRT and the GPU of this machine.

    Runs the same code as ``build_on_device.py``; ``reference.npz`` beside the model is checked when it is there.

    Args:
        fp16: let float layers run in FP16 (TensorRT 8 to 10).
        seconds: how long the engine is timed.

    Returns:
        The content of ``engine.json``.

    Raises:
        MissingBackendError: ``tensorrt`` is not installed here or there is no GPU.
        BadFileError: TensorRT refuses the model. GoalMissedError: the engine's outputs are wrong.
    """
    from edgecompress.exporters import build_on_device

    options = ["--onnx", str(model_path), "--out", str(out), "--seconds", str(seconds), *(["--fp16"] if fp16 else [])]
    reference = model_path.parent / "reference.npz"
    options += [] if reference.exists() else ["--no-check"]
    try:
        if build_on_device.load_tensorrt()[1]:
            raise build_on_device.Problem("TensorRT-RTX only checks, its engines are no artifacts", 4)
        return build_on_device.build(build_on_device.parse_arguments(options), say=lambda text: None)
    except build_on_device.Problem as problem:
        if problem.code == MissingBackendError.exit_code:
            raise MissingBackendError(
                f"No engine can be built on this machine ({problem}): copy {model_path.name} and build_on_device.py "
                "to the device and run build_on_device.py there."
            ) from problem
        kind = GoalMissedError if problem.code == GoalMissedError.exit_code else BadFileError
        raise kind(str(problem)) from problem
