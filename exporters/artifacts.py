"""Open any file that a runtime here can run, without trusting it: no path in it leads out of its folder, nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompress.errors import BadFileError, UnknownNameError
from edgecompress.exporters.interface import PROPERTY
from edgecompress.exporters.runners import OnnxRuntimeRunner, OpenVinoRunner, Runner
from edgecompress.exporters.saturation import SATURATION
from edgecompress.files import read_json
from edgecompress.spec import Preprocessing

if TYPE_CHECKING:
    import onnx

PREPROCESS = "edgecompress.preprocess"


@dataclass(frozen=True)
class Opened:
    """A file in its runtime.

    ``preprocessing`` is what the file says of its images. ``as_written``: run without optimisation, so that its time means
    nothing.
    """

    runner: Runner
    pixels: bool
    preprocessing: Preprocessing | None = None
    as_written: bool = False


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
        model = _checked_onnx(path)
        said = {entry.key: entry.value for entry in model.metadata_props}
        if name == "openvino" and _is_packed(model):
            raise BadFileError(
                f"{path.name} holds weights below 8 bits in a form that OpenVINO does not unpack rightly. Export --format openvino."
            )
        as_written = name == "onnxruntime" and is_trt_dialect(model)
        if name == "onnxruntime" and said.get(f"edgecompress.{SATURATION}") == "none":
            runner: Runner = OnnxRuntimeRunner(path, threads=threads, precise=False)
            return Opened(runner, _takes_pixels(said), _prepared(said))
        return Opened(RUNTIMES[name](path, threads, not as_written), _takes_pixels(said), _prepared(said), as_written)
    if SUFFIXES[path.suffix] != name:
        raise BadFileError(f"{name} does not read {path.suffix} files; leave --runtime out.")
    runner = RUNTIMES[name](path, threads, True)
    said = dict(getattr(runner, "metadata", {}))
    if "preprocessing" in (record := _recorded(path)):
        said.setdefault(PREPROCESS, json.dumps(record["preprocessing"]))
    return Opened(runner, _takes_pixels(said), _prepared(said))


def _onnx_runtime(path: Path, threads: int, optimise: bool) -> Runner:
    return OnnxRuntimeRunner(path, threads=threads, optimise=optimise)


def _openvino(path: Path, threads: int, optimise: bool) -> Runner:
    return OpenVinoRunner(path, threads=threads)


def _ncnn(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import NcnnRunner

    sizes = next(iter(_recorded(path).get("inputs", {}).values()), [1, 0, 0, 0])
    return NcnnRunner(path, threads=threads, shape=tuple(int(size) for size in sizes[1:]))


def _executorch(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import ExecuTorchRunner

    return ExecuTorchRunner(path)


def _litert(path: Path, threads: int, optimise: bool) -> Runner:
    from edgecompress.exporters.more_runners import LiteRtRunner

    return LiteRtRunner(path, threads=threads)


def _recorded(path: Path) -> dict[str, Any]:
    """What ``export.json`` beside the file says of it: formats without properties of their own keep them there."""
    record = path.with_name("export.json")
    known: Mapping[str, Any] = read_json(record, "export record") if record.is_file() else {}
    found = (entry for entry in known.values() if isinstance(entry, dict) and entry.get("path") == path.name)
    return next(found, {})


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


def _checked_onnx(path: Path) -> onnx.ModelProto:
    """The model without its outside data, once all paths in it are known to stay in its folder."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BadFileError(
            f"{path} is no ONNX file ({type(error).__name__}). Name an exported .onnx or a run folder."
        ) from error
    folder = path.parent.resolve()
    for found in model.graph.initializer:
        for entry in found.external_data:
            if entry.key == "location" and not (folder / entry.value).resolve().is_relative_to(folder):
                raise BadFileError(
                    f"{path} wants to read {entry.value}, which lies outside its folder. Do not trust it; export it again."
                )
    return model


def _is_packed(model: onnx.ModelProto) -> bool:
    """Whether weights are unpacked by arithmetic, see `packing`."""
    import onnx

    kinds = (onnx.TensorProto.UINT4, onnx.TensorProto.UINT2, onnx.TensorProto.INT2)
    return any(found.data_type in kinds for found in model.graph.initializer)


def is_trt_dialect(model: onnx.ModelProto) -> bool:
    """Whether activations are quantised to s8: such a file is run as written, ONNX Runtime would fuse half of it."""
    import onnx

    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    quantizers = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2)
    return any(types.get(node.input[2]) == onnx.TensorProto.INT8 for node in quantizers)
