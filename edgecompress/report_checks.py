"""What the exporters proved of a file, as sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = str | float | int | bool

_TEXTS = {
    "relative_error": "Parity: output error against the network in torch",
    "shapes_in_file": "The file holds every weight at its shape",
    "shapes_match_policy": "Channels are removed as the policy says",
    "weight_elements": "Weight elements in the file",
    "accuracy": "Accuracy on the images that it was checked on",
    "float_conv_or_gemm": "Fusion: layers left in float",
    "integer_layers": "Fusion: layers that run as integers",
    "float_islands": "Float islands",
    "integer_kernels": "Fusion: integer kernels found and expected",
    "emulator_max_difference": "Parity: largest difference from the integer emulator",
    "emulator_agreement": "Parity: same class as the integer emulator",
    "dialect_node_error": "Parity: largest error of a node for its own inputs, of what is allowed",
    "dialect_error": "Output error against the dialect in torch",
    "dialect_agreement": "Same class as the dialect in torch",
    "simulator_error": "Output error against the float simulation",
    "simulator_agreement": "Same class as the float simulation",
    "dialect_lint": "Lint of the TensorRT dialect",
    "half_layers": "Layers in FP16",
    "two_four_sparse_layers": "Layers with 2:4 sparse weights",
    "tensorrt_rtx": "TensorRT-RTX",
    "weight_bytes": "Bytes of weights in the file",
    "weight_bytes_exact": "Bytes of weights at their bits",
    "channel_bytes": "Bytes of scales and biases",
    "other_bytes_per_node": "Other bytes per operator",
    "activation_peak_bytes": "Planned peak of activations, bytes",
    "weight_memory_bytes": "Planned memory of weights, bytes",
    "interface_agreement": "Same answers as without the options of its interface",
    "scored_images": "Images that it was checked on",
    "openvino": "Runtime",
    "openvino_integer_layers": "OpenVINO: layers that run as integers",
    "openvino_agreement": "OpenVINO: same class as the integer emulator",
    "openvino_error": "OpenVINO: output error against the integer emulator",
    "verified": "Verified",
}
_SHARES = (
    "emulator_agreement",
    "dialect_agreement",
    "simulator_agreement",
    "openvino_agreement",
    "interface_agreement",
    "accuracy",
)
_LARGEST = {
    "relative_error": 1e-3,
    "float_conv_or_gemm": 0,
    "emulator_max_difference": 0,
    "dialect_node_error": 1,
}  # a pass up to here
_GOOD = ("built", "clean")


@dataclass(frozen=True)
class Check:
    """One proof: what, with which result, and whether it passed (None where it is only a fact)."""

    text: str
    value: str
    passed: bool | None = None


def checks_of(values: Mapping[str, Value]) -> list[Check]:
    """The checks of one file in the order they were made; keys that are not known here are shown as they are."""
    return [_check(key, value) for key, value in values.items()]


def _check(key: str, value: Value) -> Check:
    text = _TEXTS.get(key, key)
    if key.startswith("tensorrt_rtx_"):
        text = f"TensorRT-RTX builds it for {key.removeprefix('tensorrt_rtx_')} (a check, not an engine)"
        return Check(text, str(value), value == "built")
    if key in _LARGEST and not isinstance(value, str):
        return Check(text, f"{value:.2g}", True if value <= _LARGEST[key] else None)
    if isinstance(value, bool):
        return Check(text, "yes" if value else "no", value)
    if key in _SHARES:
        return Check(text, f"{100 * float(value):.1f} %")
    if isinstance(value, float):
        return Check(text, f"{value:.2g}")
    if isinstance(value, int):
        return Check(text, f"{value:,}")
    return Check(text, value, True if value in _GOOD else None)
