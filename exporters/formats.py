"""Every format that a finished run can be exported to, in one visible dictionary, and the one way to write an artifact."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgecompress.errors import GoalMissedError, UnknownNameError, UsageError
from edgecompress.exporters import conversions, verify
from edgecompress.exporters.check_onnxruntime import check_ort
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.interface import adapt, on_pixel_grid, signature
from edgecompress.exporters.memory import planned_activation_bytes
from edgecompress.exporters.onnx_writing import (
    BASE_OPSET,
    FOUR_BITS_OPSET,
    IR_VERSIONS,
    oldest_onnxruntime,
    say,
)
from edgecompress.exporters.record import RECORD, as_record, check_place, recorded
from edgecompress.exporters.runners import OnnxRuntimeRunner, Runner, run_all
from edgecompress.exporters.saturation import SATURATION, weights_saturate, without_saturation
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.files import disk_error, sha256, write_together
from edgecompress.quantize import QuantizedGraph
from edgecompress.spec import Artifact

OPENVINO_FILE = "model.openvino.onnx"


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

    @property
    def is_right(self) -> bool:
        """Whether no check failed."""
        return not self.checks.failures


@dataclass(frozen=True)
class Exporter:
    """A format that is an ONNX file or made from one: how that is written and proven.

    ``beside`` makes more files for the device from the finished one. ``convert`` makes the files of another format from the
    finished ONNX model; ``file_name`` is the first of them. ``outdates`` are files that were built from an earlier export, and
    their row in ``export.json``. ``says_score``: the file itself tells the score that it was proven to have.
    """

    dialect: str
    file_name: str
    write: Callable[[ExportSource], onnx.ModelProto]
    check: Callable[[ExportSource, bytes], verify.Checks]
    beside: Callable[[ExportSource, bytes], Mapping[str, bytes]] | None = None
    convert: Callable[[ExportSource, bytes, bool], conversions.Converted] | None = None
    outdates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    says_score: bool = False

    def make(self, source: ExportSource, check: bool) -> Made:
        """Write the ONNX file, prove it, put the interface around it, and convert it where the format is another."""
        model = self.write(source)
        plain = model.SerializeToString()
        checks = self.check(source, plain) if check else verify.Checks({"verified": False})
        model = adapt(model, source.interface, source.preprocessing)
        changed = model.SerializeToString() != plain
        if self.says_score and not source.interface.bare:
            say(model, {name: f"{value:.6g}" for name, value in _score(source, checks).items()})
        data = model.SerializeToString()
        if check and changed:
            verify.require_valid(data)
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
    beside: None = None
    outdates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _write_onnx(source: ExportSource) -> onnx.ModelProto:
    # Nothing in it needs a later opset than the base: a higher one is written, within the target's, for who asks for it.
    opset = min(source.interface.max_opset or BASE_OPSET, source.target.max_opset)
    batch = source.interface.batch_or(None)
    return float_model(source.graph, opset=opset, batch=batch, metadata=source.metadata | source.facts)


def _check_onnx(source: ExportSource, data: bytes) -> verify.Checks:
    return verify.merged(
        verify.check_float(data, source.graph, source.images), *_check_network(source, len(data), None)
    )


def _check_network(
    source: ExportSource, file_bytes: int, quantized: QuantizedGraph | None
) -> tuple[verify.Checks, verify.Checks]:
    """What every format must keep: the policy's channels, and the memory of the target for one batch of the file."""
    activations = planned_activation_bytes(
        source.graph, quantized.tensors if quantized else (), batch=source.interface.batch or 1
    )
    unpacked = sum(weight.values.size for weight in quantized.weights.values()) if quantized else 0
    return (
        verify.check_shapes(source.graph, source.network, source.policy),
        verify.check_memory(activations, max(unpacked, file_bytes), source.target.memory_mb),
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
    return verify.merged(
        check_ort(
            data,
            quantized,
            source.images,
            class_scores=source.task.class_scores,
            precise=not _avoids_saturation(source),
        ),
        verify.check_size(data, quantized),
        *_check_network(source, len(data), quantized),
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

    quantized = _for_the_cpu(source)
    return verify.merged(
        check_openvino(data, quantized, source.images, class_scores=source.task.class_scores),
        verify.check_size(data, quantized),
        *_check_network(source, len(data), quantized),
    )


def _write_trt(source: ExportSource) -> onnx.ModelProto:
    from edgecompress.exporters import to_tensorrt

    limit, batch = source.interface.opset(_trt_limit(source)), source.interface.batch_or(1)
    if source.quantized is None:
        return float_model(source.graph, opset=min(limit, BASE_OPSET), batch=batch, metadata=source.metadata)
    opset = to_tensorrt.opset_for(source.quantized, limit)
    return to_tensorrt.integer_model(source.quantized, opset=opset, batch=batch, metadata=source.metadata)


def _trt_limit(source: ExportSource) -> int:
    """The highest opset for the target. INT4 is read by TensorRT 10 and later, also where their manual ends at opset 20, but
    only who asks for it by ``--max-opset`` gets it there."""
    from edgecompress.exporters.build_on_device import version_of

    target, asked = source.target, source.interface.max_opset or 0
    if target.exporter != "tensorrt" or (asked >= FOUR_BITS_OPSET and version_of(target.runtime_version) >= (10,)):
        return FOUR_BITS_OPSET
    return target.max_opset


def _check_trt(source: ExportSource, data: bytes) -> verify.Checks:
    if source.quantized is None:
        return _check_onnx(source, data)
    return verify.merged(
        verify.check_trt(data, source.quantized, source.images, class_scores=source.task.class_scores),
        verify.check_size(data, source.quantized),
        *_check_network(source, len(data), source.quantized),
    )


def _files_for_the_device(source: ExportSource, model: bytes) -> dict[str, bytes]:
    """The build script, and inputs with the outputs that the engine must give: 16 images, of small ones up to 64."""
    from edgecompress.exporters.simulate_tensorrt import engine_limits

    runner = OnnxRuntimeRunner(model, optimise=False)
    plain = source.images[: min(max(16, 12_000_000 // source.images[0].nbytes), 64)]
    images = source.interface.images(plain, source.preprocessing)
    limits = engine_limits(source.quantized, plain) if source.quantized is not None else {}
    arrays: dict[str, Any] = {"inputs": images, "outputs": run_all(runner, images), **limits}
    reference = io.BytesIO()
    np.savez(reference, **arrays)
    return {
        "build_on_device.py": Path(__file__).with_name("build_on_device.py").read_bytes(),
        "reference.npz": reference.getvalue(),
    }


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
        for more in _check_network(source, len(model.data), quantized):
            checks.values |= more.values
            checks.failures += more.failures
    return Made(
        files={"model.tflite": model.data},
        checks=checks,
        inputs=model.inputs,
        outputs=model.outputs,
        oldest_runtime=to_litert.oldest_runtime(model),
    )


EXPORTERS: dict[str, Exporter | DirectExporter] = {
    "onnx": Exporter("float", "model.onnx", _write_onnx, _check_onnx, says_score=True),
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
    "openvino": Exporter("ort", OPENVINO_FILE, _write_openvino, _check_openvino),
    "tensorrt": Exporter(
        "trt",
        "tensorrt/model.onnx",
        _write_trt,
        _check_trt,
        _files_for_the_device,
        outdates={"engine": ("tensorrt/model.engine", "tensorrt/engine.json")},
    ),
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
    known = recorded(folder)
    try:
        made = exporter.make(source, check)
        beside = exporter.beside(source, made.files[exporter.file_name]) if exporter.beside and made.is_right else {}
    except OSError as error:  # temporary files
        raise disk_error(Path(error.filename or tempfile.gettempdir()), error) from error
    checks = made.checks
    checks.values |= _score(source, checks)
    if checks.failures:
        raise GoalMissedError(
            f"The {format_name} export failed its proof: {'; '.join(checks.failures)}. Nothing was written; report it with the run folder."
        )
    artifact = Artifact(
        path=exporter.file_name,
        format=format_name,
        dialect=exporter.dialect,
        sha256=sha256(made.files[exporter.file_name]),
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
        layer_bytes=checks.layer_bytes,
    )
    _write(folder, exporter, made.files, beside, known, artifact)
    return artifact


def _write(
    folder: Path,
    exporter: Exporter | DirectExporter,
    files: Mapping[str, bytes],
    beside: Mapping[str, bytes],
    known: Mapping[str, Any],
    artifact: Artifact,
) -> None:
    """All files with their record, or nothing; what was built from an earlier export goes then."""
    still = {row: said for row, said in known.items() if row not in exporter.outdates}
    path = folder / exporter.file_name
    together = {path.with_name(name): content for name, content in beside.items()}
    # The file that names the artifact comes after those that it needs, the record last.
    together |= {folder / name: content for name, content in reversed(list(files.items()))}
    write_together(together | {folder / RECORD: as_record(still, artifact.format, artifact)})
    for name in (name for names in exporter.outdates.values() for name in names):
        (folder / name).unlink(missing_ok=True)


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


def _score(source: ExportSource, checks: verify.Checks) -> dict[str, float | int]:
    """The task's own score of the file on the images that were checked; empty where nothing was, or so few have none."""
    if source.labels is None or checks.outputs is None:
        return {}
    task, outputs, labels = source.task, torch.from_numpy(checks.outputs), torch.from_numpy(source.labels)
    score = float(task.score([task.measure(outputs, labels)]))
    return {task.score_name: score, "scored_images": len(labels)} if math.isfinite(score) else {}


def _oldest(exporter: Exporter, source: ExportSource, model: onnx.ModelProto) -> str:
    """The oldest runtime that is known to load the file: tried for ONNX Runtime, the target's own for TensorRT."""
    if exporter.dialect == "trt":
        if source.target.exporter == "tensorrt":
            return f"TensorRT {source.target.runtime_version}"
        return f"TensorRT {'10.0' if model.opset_import[0].version >= FOUR_BITS_OPSET else '8.5'}"
    if exporter.file_name == OPENVINO_FILE:
        return (
            f"OpenVINO {version('openvino')}, the one it was proven in"
            if find_spec("openvino")
            else "OpenVINO, not tried"
        )
    return f"ONNX Runtime {oldest_onnxruntime(model)}"


def _signature(values: object) -> dict[str, list[int | str]]:
    return {value.name: signature(value) for value in values}  # type: ignore[attr-defined]
