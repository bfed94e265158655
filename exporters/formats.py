"""Every format that a finished run can be exported to, in one visible dictionary, and the one way to write an artifact."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgecompress.errors import GoalMissedError, UnknownNameError, UsageError
from edgecompress.exporters import conversions, verify
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.interface import adapt, on_pixel_grid, signature
from edgecompress.exporters.memory import planned_activation_bytes
from edgecompress.exporters.onnx_writing import (
    BASE_OPSET,
    FOUR_BITS_OPSET,
    IR_VERSIONS,
    oldest_onnxruntime,
)
from edgecompress.exporters.record import check_place, record, write_all
from edgecompress.exporters.runners import OnnxRuntimeRunner, Runner, run_all
from edgecompress.exporters.saturation import SATURATION, weights_saturate, without_saturation
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.files import file_sha256, sha256, written_whole
from edgecompress.quantize import QuantizedGraph
from edgecompress.spec import Artifact
from edgecompress.tasks import Task


@dataclass(frozen=True)
class Made:
    """The files of a format, the first of which names the artifact, with their proof and what is recorded of them.

    ``opset`` and ``ir_version`` are 0 where no file of ONNX stands behind it.
    """

    files: Mapping[str, bytes]
    checks: verify.Checks
    inputs: Mapping[str, list[int | str]]
    outputs: Mapping[str, list[int | str]]
    oldest_runtime: str
    opset: int = 0
    ir_version: int = 0


@dataclass(frozen=True)
class Exporter:
    """A format that is an ONNX file or made from one: how that is written and proven. ``beside`` adds files for the device.

    ``convert`` makes the files of another format from the finished ONNX model; ``file_name`` is the first of them.
    """

    dialect: str
    file_name: str
    write: Callable[[ExportSource], onnx.ModelProto]
    check: Callable[[ExportSource, bytes], verify.Checks]
    beside: Callable[[ExportSource, Path], None] | None = None
    convert: Callable[[ExportSource, bytes, bool], conversions.Converted] | None = None

    def make(self, source: ExportSource, check: bool) -> Made:
        """Write the ONNX file, prove it, put the interface around it, and convert it where the format is another."""
        model = self.write(source)
        plain = model.SerializeToString()
        checks = self.check(source, plain) if check else verify.Checks({"verified": False})
        model = adapt(model, source.interface, source.preprocessing)
        data = model.SerializeToString()
        if check and data != plain:
            onnx.checker.check_model(data, full_check=True)
            outer, inner = OnnxRuntimeRunner(data, optimise=False), OnnxRuntimeRunner(plain, optimise=False)
            _require_same_answers(checks, source, outer, inner)
        files, oldest = {self.file_name: data}, _oldest(self, source, model)
        if self.convert is not None and not checks.failures:
            converted = self.convert(source, data, check)
            files, oldest = dict(converted.files), converted.oldest_runtime
            checks.values |= converted.checks.values
            checks.failures += converted.checks.failures
        return Made(
            files=files,
            checks=checks,
            inputs=_signature(model.graph.input),
            outputs=_signature(model.graph.output),
            oldest_runtime=oldest,
            opset=model.opset_import[0].version,
            ir_version=model.ir_version,
        )


@dataclass(frozen=True)
class DirectExporter:
    """A format that is written from the integers themselves, without ONNX between: ``make`` writes and proves it."""

    dialect: str
    file_name: str
    make: Callable[[ExportSource, bool], Made]
    beside: Callable[[ExportSource, Path], None] | None = None


def _write_onnx(source: ExportSource) -> onnx.ModelProto:
    opset = source.interface.opset(min(BASE_OPSET, source.target.max_opset))
    batch = source.interface.batch_or(None)
    return float_model(source.graph, opset=opset, batch=batch, metadata=source.metadata | source.facts)


def _check_onnx(source: ExportSource, data: bytes) -> verify.Checks:
    shapes = verify.check_shapes(source.graph, source.network, source.policy)
    memory = planned_activation_bytes(source.graph)
    return verify.merged(
        shapes,
        verify.check_float(data, source.graph, source.images),
        verify.check_memory(memory, len(data), source.target.memory_mb),
    )


def _write_ort(source: ExportSource) -> onnx.ModelProto:
    # A TensorRT target says nothing of ONNX Runtime's opset; its integer file is for the host and for ORT on the device.
    max_opset = source.target.max_opset if source.target.exporter == "onnxruntime" else max(IR_VERSIONS)
    return integer_model(
        _for_the_cpu(source),
        metadata=source.metadata | _said_of_saturation(source),
        max_opset=source.interface.opset(max_opset),
        batch=source.interface.batch_or(None),
    )


def _avoids_saturation(source: ExportSource) -> bool:
    return source.interface.saturating_cpu or weights_saturate(source.target)


def _said_of_saturation(source: ExportSource) -> dict[str, str]:
    return {SATURATION: "none"} if _avoids_saturation(source) else {}


def _for_the_cpu(source: ExportSource) -> QuantizedGraph:
    """The integers as the kernels of ONNX Runtime and OpenVINO on the target can take them."""
    return without_saturation(_integers(source)) if _avoids_saturation(source) else _integers(source)


def _check_ort(source: ExportSource, data: bytes) -> verify.Checks:
    quantized = _for_the_cpu(source)
    memory = planned_activation_bytes(source.graph, quantized.tensors)
    unpacked = sum(weight.values.size for weight in quantized.weights.values())
    return verify.merged(
        verify.check_ort(
            data,
            quantized,
            source.images,
            class_scores=source.task.class_scores,
            precise=not _avoids_saturation(source),
        ),
        verify.check_size(data, quantized),
        verify.check_memory(memory, max(unpacked, len(data)), source.target.memory_mb),
    )


def _write_plain(source: ExportSource) -> onnx.ModelProto:
    """The float file of one image that another format is made from."""
    if not source.interface.is_plain or source.interface.batch not in (None, 1):
        raise UsageError(
            "The formats ncnn and executorch take one normalised float NCHW image and answer scores. Leave --input, --layout, "
            "--fold-normalisation, --head and --batch out."
        )
    return float_model(source.graph, opset=BASE_OPSET, batch=1, metadata=source.metadata)


def _write_openvino(source: ExportSource) -> onnx.ModelProto:
    """The ``ort`` dialect with weights as int8 or INT4: OpenVINO knows no INT2, and runs unpacked weights in float."""
    return integer_model(
        _for_the_cpu(source),
        metadata=source.metadata | _said_of_saturation(source),
        max_opset=source.interface.opset(FOUR_BITS_OPSET),
        batch=source.interface.batch_or(None),
        unpack=False,
    )


def _check_openvino(source: ExportSource, data: bytes) -> verify.Checks:
    from edgecompress.exporters.check_openvino import check_openvino

    return check_openvino(data, _for_the_cpu(source), source.images, class_scores=source.task.class_scores)


def _write_trt(source: ExportSource) -> onnx.ModelProto:
    from edgecompress.exporters import to_tensorrt

    limit = source.target.max_opset if source.target.exporter == "tensorrt" else FOUR_BITS_OPSET
    limit, batch = source.interface.opset(limit), source.interface.batch_or(1)
    if source.quantized is None:
        return float_model(source.graph, opset=min(limit, BASE_OPSET), batch=batch, metadata=source.metadata)
    opset = to_tensorrt.opset_for(source.quantized, limit)
    return to_tensorrt.integer_model(source.quantized, opset=opset, batch=batch, metadata=source.metadata)


def _check_trt(source: ExportSource, data: bytes) -> verify.Checks:
    if source.quantized is None:
        return verify.check_float(data, source.graph, source.images)
    return verify.check_trt(data, source.quantized, source.images, class_scores=source.task.class_scores)


def _files_for_the_device(source: ExportSource, folder: Path) -> None:
    """The build script, and inputs with the outputs that the engine must give: 16 images, of small ones up to 64."""
    from edgecompress.exporters.simulate_tensorrt import engine_limits

    shutil.copyfile(Path(__file__).with_name("build_on_device.py"), folder / "build_on_device.py")
    runner = OnnxRuntimeRunner(folder / "model.onnx", optimise=False)
    plain = source.images[: min(max(16, 12_000_000 // source.images[0].nbytes), 64)]
    images = source.interface.images(plain, source.preprocessing)
    outputs = run_all(runner, images)
    limits = engine_limits(source.quantized, plain) if source.quantized is not None else {}
    arrays: dict[str, Any] = {"inputs": images, "outputs": outputs, **limits}
    with written_whole(folder / "reference.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _make_litert(source: ExportSource, check: bool) -> Made:
    """The integers as a ``.tflite`` file, proven in LiteRT; see `to_litert`."""
    from edgecompress.exporters import to_litert
    from edgecompress.exporters.check_litert import check_contents, check_litert
    from edgecompress.exporters.more_runners import LiteRtRunner

    quantized, interface = _integers(source), source.interface
    if interface.batch == 0 or interface.max_opset is not None or interface.saturating_cpu:
        raise UsageError(
            "A LiteRT file has a fixed batch, no opset, and no kernels that saturate. Leave --batch dynamic, --max-opset and "
            "--saturating-cpu out."
        )
    with torch.no_grad():
        exact = emulate(quantized, torch.from_numpy(source.images)).numpy()
    write = partial(to_litert.integer_model, quantized, largest_score=float(np.abs(exact).max()))
    said = {f"edgecompress.{name}": text for name, text in source.metadata.items()}
    model = write(interface=interface, preprocessing=source.preprocessing, metadata=said)
    checks = verify.Checks({"verified": False})
    if check:
        inside = replace(interface, input="float32", layout="nchw", pixels=False, head="scores")
        plain = model if interface.is_plain else write(interface=inside)
        checks = check_litert(plain, quantized, source.images, exact, class_scores=source.task.class_scores)
        if plain is not model:
            _require_same_answers(checks, source, LiteRtRunner(model.data), LiteRtRunner(plain.data))
            whole = check_contents(model, quantized)
            checks.values |= whole.values
            checks.failures += whole.failures
        peak = planned_activation_bytes(source.graph, quantized.tensors)
        limit = verify.check_memory(peak, len(model.data), source.target.memory_mb)
        checks.values |= limit.values
        checks.failures += limit.failures
    return Made(
        files={"model.tflite": model.data},
        checks=checks,
        inputs=model.inputs,
        outputs=model.outputs,
        oldest_runtime=to_litert.oldest_runtime(model),
    )


EXPORTERS: dict[str, Exporter | DirectExporter] = {
    "onnx": Exporter("float", "model.onnx", _write_onnx, _check_onnx),
    "onnxruntime": Exporter("ort", "model.int8.onnx", _write_ort, _check_ort),
    "ort": Exporter(
        "ort", "model.int8.ort", _write_ort, _check_ort, convert=partial(conversions.optimised, name="model.int8.ort")
    ),
    "onnxruntime-optimised": Exporter(
        "ort",
        "model.optimised.onnx",
        _write_ort,
        _check_ort,
        convert=partial(conversions.optimised, name="model.optimised.onnx"),
    ),
    "ncnn": Exporter("float", "model.ncnn.param", _write_plain, _check_onnx, convert=conversions.ncnn),
    "executorch": Exporter("xnnpack", "model.pte", _write_plain, _check_onnx, convert=conversions.executorch),
    "litert": DirectExporter("litert", "model.tflite", _make_litert),
    "openvino": Exporter("ort", "model.openvino.onnx", _write_openvino, _check_openvino),
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
    exporter, interface = EXPORTERS[format_name], source.interface
    check_place(folder / exporter.file_name)
    if interface.head != "scores" and not source.task.class_scores:
        raise UsageError(
            f"The outputs of the task '{source.task.name}' are no scores of classes, so that no {interface.head} can follow. "
            "Leave --head out."
        )
    made = exporter.make(source, check)
    checks = made.checks
    if check and source.labels is not None and checks.outputs is not None:
        checks.values |= _score(source.task, checks.outputs, source.labels)
    if checks.failures:
        raise GoalMissedError(
            f"The {format_name} export failed its proof: {'; '.join(checks.failures)}. Nothing was written; report it with the run folder."
        )
    path = folder / exporter.file_name
    write_all(folder, made.files)
    if exporter.beside is not None:
        exporter.beside(source, path.parent)
    artifact = Artifact(
        path=exporter.file_name,
        format=format_name,
        dialect=exporter.dialect,
        sha256=file_sha256(path),
        size_bytes=sum(len(content) for content in made.files.values()),
        policy_sha256=sha256(source.policy.model_dump_json().encode()),
        inputs=dict(made.inputs),
        outputs=dict(made.outputs),
        opset=made.opset,
        ir_version=made.ir_version,
        oldest_runtime=made.oldest_runtime,
        facts=source.facts,
        preprocessing=source.preprocessing,
        checks=checks.values,
    )
    record(folder, format_name, artifact)
    return artifact


def _require_same_answers(checks: verify.Checks, source: ExportSource, outer: Runner, inner: Runner) -> None:
    """A file with an interface around it (``outer``) answers to the same pixels what the plain one (``inner``) does."""
    interface, how = source.interface, source.preprocessing
    images = on_pixel_grid(source.images, how) if interface.takes_pixels else source.images
    wanted, found = run_all(inner, images), run_all(outer, interface.images(images, how))
    if interface.head == "argmax":
        same = float((found == wanted.argmax(1)).mean())
    else:
        same = verify.agreement(found, wanted, class_scores=source.task.class_scores)
    checks.require(same >= 0.99, "interface_agreement", same, f"with {interface} {1 - same:.1%} of its answers change")


def _score(task: Task, outputs: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, verify.Value]:
    """The task's own score on the images that were checked; empty where so few images have none."""
    score = float(task.score([task.measure(torch.from_numpy(outputs), torch.from_numpy(labels))]))
    return {task.score_name: score, "scored_images": len(labels)} if math.isfinite(score) else {}


def _oldest(exporter: Exporter, source: ExportSource, model: onnx.ModelProto) -> str:
    """The oldest runtime that is known to load the file: tried for ONNX Runtime, the target's own for TensorRT."""
    if exporter.dialect == "trt":
        if source.target.exporter == "tensorrt":
            return f"TensorRT {source.target.runtime_version}"
        return f"TensorRT {'10.0' if model.opset_import[0].version >= FOUR_BITS_OPSET else '8.5'}"
    return f"ONNX Runtime {oldest_onnxruntime(model)}"


def _signature(values: object) -> dict[str, list[int | str]]:
    return {value.name: signature(value) for value in values}  # type: ignore[attr-defined]
