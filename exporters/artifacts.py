"""Open any file that a runtime here can run, without trusting it: no path in it leads out of its folder, nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from edgecompress.errors import BadFileError, UnknownNameError
from edgecompress.exporters.interface import PROPERTY
from edgecompress.exporters.record import RECORD, recorded
from edgecompress.exporters.runners import OnnxRuntimeRunner, OpenVinoRunner, Runner
from edgecompress.exporters.saturation import SATURATION
from edgecompress.files import file_sha256
from edgecompress.spec import Artifact, Preprocessing

if TYPE_CHECKING:
    import onnx

PREPROCESS = "edgecompress.preprocess"
NO_SATURATION = f"edgecompress.{SATURATION}"
_UNPACKING = {"BitShift", "BitwiseAnd", "CumSum", "Gather"}  # one of them is in every storage that `packing` computes


@dataclass(frozen=True)
class Opened:
    """A file in its runtime.

    ``preprocessing`` is what the file says of its images. ``as_written``: run without optimisation, so that its time means
    nothing. ``beside``: the files that hold its weights, where it does not.
    """

    runner: Runner
    pixels: bool
    preprocessing: Preprocessing | None = None
    as_written: bool = False
    beside: tuple[Path, ...] = ()


def open_artifact(path: Path, *, threads: int = 1, runtime: str = "") -> Opened:
    """Load ``path`` into the runtime that its suffix names, or into ``runtime``.

    Raises:
        BadFileError: it is missing, damaged, of another kind, or reaches out of its folder.
        UnknownNameError: no such runtime. MissingBackendError: the runtime is not installed.
    """
    if not path.is_file():
        raise BadFileError(f"There is no artifact at {path}. Name an exported file or the folder of a finished run.")
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise BadFileError(f"{path} is none of the files that can be measured here: {known}. Name one of those.")
    name = runtime or SUFFIXES[path.suffix]
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES)
    if path.suffix == ".onnx":
        return _open_onnx(path, name, threads)
    if SUFFIXES[path.suffix] != name:
        raise BadFileError(f"{name} does not read {path.suffix} files; leave --runtime out.")
    runner = RUNTIMES[name](path, threads, True)
    said = _said(path, getattr(runner, "metadata", {}))
    weights = path.with_suffix(".bin")
    beside = (weights,) if path.suffix in (".param", ".xml") and weights.is_file() else ()
    return Opened(runner, _takes_pixels(said), _prepared(said), beside=beside)


def _open_onnx(path: Path, name: str, threads: int) -> Opened:
    model, beside = _checked_onnx(path)
    said = _said(path, {entry.key: entry.value for entry in model.metadata_props})
    if name == "openvino" and _is_packed(model):
        raise BadFileError(
            f"{path.name} holds weights below 8 bits in a form that OpenVINO does not unpack rightly. Export --format openvino."
        )
    as_written = name == "onnxruntime" and is_trt_dialect(model)
    if name == "onnxruntime" and said.get(NO_SATURATION) == "none":
        runner: Runner = OnnxRuntimeRunner(path, threads=threads, precise=False)
        return Opened(runner, _takes_pixels(said), _prepared(said), beside=beside)
    runner = RUNTIMES[name](path, threads, not as_written)
    return Opened(runner, _takes_pixels(said), _prepared(said), as_written, beside)


def _onnx_runtime(path: Path, threads: int, optimise: bool) -> Runner:
    return OnnxRuntimeRunner(path, threads=threads, optimise=optimise)


def _openvino(path: Path, threads: int, optimise: bool) -> Runner:
    return OpenVinoRunner(path, threads=threads)


def _ncnn(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import NcnnRunner

    artifact = _recorded(path)
    sizes = next(iter(artifact.inputs.values()), []) if artifact else [1, 0, 0, 0]
    return NcnnRunner(path, threads=threads, shape=tuple(size if isinstance(size, int) else 0 for size in sizes[1:]))


def _executorch(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import ExecuTorchRunner

    return ExecuTorchRunner(path, threads=threads)


def _litert(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import LiteRtRunner

    return LiteRtRunner(path, threads=threads)


def _recorded(path: Path) -> Artifact | None:
    """The row of the file in ``export.json``, which lies beside it (for TensorRT's files one folder up); None without one.

    Raises:
        BadFileError: the record is broken, or the row is that of another content of the file.
    """
    path = path.absolute()
    folders = (path.parent, path.parent.parent) if path.parent.name == "tensorrt" else (path.parent,)
    for folder in folders:
        name = path.relative_to(folder).as_posix()
        for format_name, row in recorded(folder).items():
            if isinstance(row, dict) and row.get("path") == name:
                return _checked_row(row, format_name, folder / RECORD, path)
    return None


def _checked_row(row: Mapping[str, object], format_name: str, record: Path, path: Path) -> Artifact:
    try:
        artifact = Artifact.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (format_name, *first["loc"])))
        raise BadFileError(
            f"The export record {record} is wrong at '{where}': {first['msg']}. Export {path.name} again."
        ) from error
    if artifact.sha256 != file_sha256(path):
        raise BadFileError(
            f"{path} does not say how it wants its images, and {record} describes another file of this name (its sha256 differs). "
            "Export it again, or move it to a folder of its own."
        )
    return artifact


def _said(path: Path, properties: Mapping[str, str]) -> Mapping[str, str]:
    """The properties of a file; where it has none, those that its row in ``export.json`` has in their place."""
    if PREPROCESS in properties or (artifact := _recorded(path)) is None:
        return properties
    facts = artifact.facts
    said = {PROPERTY: json.dumps({"pixels": facts.get("pixels") == "True" or facts.get("input") == "uint8"})}
    if artifact.preprocessing is not None:
        said[PREPROCESS] = artifact.preprocessing.model_dump_json()
    if facts.get("saturating_cpu") == "True":
        said[NO_SATURATION] = "none"
    return said | dict(properties)


def _tensorrt(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.run_tensorrt import TensorRtRunner

    if path.suffix != ".engine":
        raise BadFileError(f"TensorRT runs engines, {path.name} is none. Build one with build_on_device.py beside it.")
    return TensorRtRunner(path)


RUNTIMES: dict[str, Callable[[Path, int, bool], Runner]] = {
    "onnxruntime": _onnx_runtime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
    "ncnn": _ncnn,
    "executorch": _executorch,
    "litert": _litert,
}
SUFFIXES = {
    ".onnx": "onnxruntime", ".ort": "onnxruntime", ".xml": "openvino", ".engine": "tensorrt", ".param": "ncnn",
    ".pte": "executorch", ".tflite": "litert",
}  # fmt: skip


def _takes_pixels(said: Mapping[str, str]) -> bool:
    try:
        return bool(json.loads(said.get(PROPERTY) or "{}").get("pixels"))
    except (ValueError, AttributeError) as error:
        raise BadFileError(f"The property {PROPERTY} of the file is broken ({error}). Export it again.") from error


def _prepared(said: Mapping[str, str]) -> Preprocessing | None:
    written = said.get(PREPROCESS)
    try:
        return Preprocessing.model_validate_json(written) if written else None
    except ValueError as error:
        raise BadFileError(f"The property {PREPROCESS} of the file is broken. Export it again.") from error


def _checked_onnx(path: Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """The model without its outside data, and the files with that, once all are known to lie in its folder."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BadFileError(
            f"{path} is no ONNX file ({type(error).__name__}). Name an exported .onnx or a run folder."
        ) from error
    folder = path.parent.resolve()
    entries = (entry for found in model.graph.initializer for entry in found.external_data)
    locations = sorted({entry.value for entry in entries if entry.key == "location"})
    for location in locations:
        if not (folder / location).resolve().is_relative_to(folder):
            raise BadFileError(
                f"{path} wants to read {location}, which lies outside its folder. Do not trust it; export it again."
            )
    return model, tuple(folder / location for location in locations)


def _is_packed(model: onnx.ModelProto) -> bool:
    """Whether what a DequantizeLinear reads is unpacked from constants by arithmetic, see `packing`, or has 2 bits."""
    import onnx

    kinds = (onnx.TensorProto.UINT2, onnx.TensorProto.INT2)
    unpacked = {found.name: found.data_type in kinds for found in model.graph.initializer}  # made of constants alone
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and any(unpacked.get(name) for name in node.input):
            return True
        if all(name in unpacked for name in node.input if name):
            how = node.op_type in _UNPACKING or any(unpacked[name] for name in node.input if name)
            unpacked |= dict.fromkeys(node.output, how)
    return False


def is_trt_dialect(model: onnx.ModelProto) -> bool:
    """Whether activations are quantised to s8: such a file is run as written, ONNX Runtime would fuse half of it."""
    import onnx

    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    quantizers = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2)
    return any(types.get(node.input[2]) == onnx.TensorProto.INT8 for node in quantizers)
