"""Every format that a finished run can be exported to, in one visible dictionary, and the one way to write an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgecompress.errors import GoalMissedError, UnknownNameError, UsageError
from edgecompress.exporters import verify
from edgecompress.exporters.onnx_writing import IR_VERSIONS, metadata_of
from edgecompress.exporters.to_onnx import float_model
from edgecompress.files import read_json, sha256, write_bytes, write_text, written_whole
from edgecompress.graph import Graph
from edgecompress.quantize import QuantizedGraph
from edgecompress.spec import Artifact, CompressionPolicy, Network, Preprocessing, Target


@dataclass(frozen=True)
class ExportSource:
    """A compressed network and what a deployer must know of it. ``quantized`` is None where the target runs no integers.

    ``images`` are normalised ``float32 [N, C, H, W]``: what the checks run on. ``class_scores``: axis 1 of the outputs are
    scores of classes.
    """

    graph: Graph
    quantized: QuantizedGraph | None
    network: Network
    policy: CompressionPolicy
    target: Target
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    images: NDArray[np.float32]
    class_scores: bool = True

    @property
    def metadata(self) -> dict[str, str]:
        """What is written into every file; everything else is in ``export.json``."""
        return metadata_of(self.preprocessing, self.classes)


@dataclass(frozen=True)
class Exporter:
    """One format: how it is written and how it is proven. ``beside`` adds files for the device."""

    dialect: str
    file_name: str
    write: Callable[[ExportSource], onnx.ModelProto]
    check: Callable[[ExportSource, bytes], verify.Checks]
    beside: Callable[[ExportSource, Path], None] | None = None


def _write_onnx(source: ExportSource) -> onnx.ModelProto:
    opset = min(17, source.target.max_opset)
    return float_model(source.graph, opset=opset, metadata=source.metadata)


def _check_onnx(source: ExportSource, data: bytes) -> verify.Checks:
    shapes = verify.check_shapes(source.graph, source.network, source.policy)
    return verify.merged(shapes, verify.check_float(data, source.graph, source.images))


def _write_ort(source: ExportSource) -> onnx.ModelProto:
    from edgecompress.exporters.to_onnxruntime import integer_model

    # A TensorRT target says nothing of ONNX Runtime's opset; its integer file is for the host and for ORT on the device.
    max_opset = source.target.max_opset if source.target.exporter == "onnxruntime" else max(IR_VERSIONS)
    return integer_model(_integers(source), metadata=source.metadata, max_opset=max_opset)


def _check_ort(source: ExportSource, data: bytes) -> verify.Checks:
    return verify.check_ort(data, _integers(source), source.images, class_scores=source.class_scores)


def _write_trt(source: ExportSource) -> onnx.ModelProto:
    from edgecompress.exporters.to_tensorrt import integer_model

    opset = min(17, source.target.max_opset) if source.target.exporter == "tensorrt" else 17
    if source.quantized is None:
        return float_model(source.graph, opset=opset, batch=1, metadata=source.metadata)
    return integer_model(source.quantized, opset=opset, metadata=source.metadata)


def _check_trt(source: ExportSource, data: bytes) -> verify.Checks:
    if source.quantized is None:
        return verify.check_float(data, source.graph, source.images[:1])
    return verify.check_trt(data, source.quantized, source.images, class_scores=source.class_scores)


def _files_for_the_device(source: ExportSource, folder: Path) -> None:
    """The build script and a few inputs with the outputs that the engine must give."""
    from edgecompress.exporters.runners import OnnxRuntimeRunner

    shutil.copyfile(Path(__file__).with_name("build_on_device.py"), folder / "build_on_device.py")
    runner = OnnxRuntimeRunner(folder / "model.onnx", optimise=False)
    images = source.images[:16]
    outputs = np.concatenate([runner.run(image[None]) for image in images])
    with written_whole(folder / "reference.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, inputs=images, outputs=outputs)


EXPORTERS: dict[str, Exporter] = {
    "onnx": Exporter("float", "model.onnx", _write_onnx, _check_onnx),
    "onnxruntime": Exporter("ort", "model.int8.onnx", _write_ort, _check_ort),
    "tensorrt": Exporter("trt", "tensorrt/model.onnx", _write_trt, _check_trt, _files_for_the_device),
}


def _integers(source: ExportSource) -> QuantizedGraph:
    if source.quantized is None:
        raise UsageError(
            f"The run holds no integer network (target '{source.target.name}', stage 2 was not run). Export --format onnx."
        )
    return source.quantized


def export(source: ExportSource, format_name: str, folder: Path, *, check: bool = True) -> Artifact:
    """Write one artifact, prove it, and record it in ``export.json`` of ``folder``.

    The file takes its final name only when every check holds.

    Raises:
        UnknownNameError: no such format. GoalMissedError: a check failed; nothing is left under the final name.
    """
    if format_name not in EXPORTERS:
        raise UnknownNameError("format", format_name, EXPORTERS)
    exporter = EXPORTERS[format_name]
    model = exporter.write(source)
    data = model.SerializeToString()
    checks = exporter.check(source, data) if check else verify.Checks({"verified": False})
    if checks.failures:
        raise GoalMissedError(
            f"The {format_name} export failed its proof: {'; '.join(checks.failures)}. Nothing was written; report it with the run folder."
        )
    path = folder / exporter.file_name
    write_bytes(path, data)
    if exporter.beside is not None:
        exporter.beside(source, path.parent)
    artifact = Artifact(
        path=exporter.file_name,
        format=format_name,
        dialect=exporter.dialect,
        sha256=sha256(data),
        size_bytes=len(data),
        policy_sha256=sha256(source.policy.model_dump_json().encode()),
        inputs=_signature(model.graph.input),
        outputs=_signature(model.graph.output),
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        preprocessing=source.preprocessing,
        checks=checks.values,
    )
    _record(folder, format_name, artifact)
    return artifact


def _signature(values: object) -> dict[str, list[int | str]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values  # type: ignore[attr-defined]
    }


def _record(folder: Path, format_name: str, artifact: Artifact) -> None:
    path = folder / "export.json"
    known: Mapping[str, object] = read_json(path, "export record") if path.exists() else {}
    write_text(path, json.dumps({**known, format_name: artifact.model_dump(mode="json")}, indent=1) + "\n")
