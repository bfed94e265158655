"""A finished run to files: everything is read back from its folder, so that any format can follow at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgecompress.cost import kernels
from edgecompress.data import Dataset
from edgecompress.errors import BadFileError, UnknownNameError, UsageError
from edgecompress.exporters.formats import EXPORTERS, export
from edgecompress.exporters.host import measured_here
from edgecompress.exporters.interface import PLAIN, Interface
from edgecompress.exporters.record import RECORD, as_record, recorded
from edgecompress.exporters.source import ExportSource
from edgecompress.files import write_bytes
from edgecompress.graph import read_graph
from edgecompress.job import Job
from edgecompress.latency_tables.half import faster_in_half
from edgecompress.latency_tables.predict import latency_model
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.original import class_names
from edgecompress.prepare import dataset_of
from edgecompress.progress import Silent
from edgecompress.quantize import QuantizedGraph
from edgecompress.runs import ORIGINAL, RunFolder
from edgecompress.spec import (
    Architecture,
    Artifact,
    CompressionPolicy,
    Config,
)


def formats_for(job: Job) -> tuple[str, ...]:
    """Formats that a run writes by itself."""
    if job.integer:
        return ("onnx", "onnxruntime", "tensorrt")
    return ("onnx", "tensorrt") if job.target.exporter == "tensorrt" else ("onnx",)


BY_TABLE = "table"  # in the place of layers: those that the table has faster in FP16


def export_run(
    path: Path,
    format_name: str,
    *,
    data: Dataset | None = None,
    check: bool = True,
    measure: bool = True,
    interface: Interface = PLAIN,
    half: Sequence[str] = (),
    out: Path | None = None,
) -> Artifact:
    """Write one format of a finished run into its ``exports`` folder; everything is read back from the run's files.

    Args:
        measure: also time it here against the original's file; see `exporters.host`.
        interface: input type, layout, head, opset and batch of the file.
        half: layers that a TensorRT file computes in FP16 beside those of 16 bits; `BY_TABLE`: those that the run's table
            has faster so.
        out: another folder.

    Raises:
        BadFileError: the run is missing, broken or did not finish. GoalMissedError: the artifact failed its proof.
        UsageError: ``out`` cannot be written; ``half`` with another format. UnknownNameError: ``half`` names no layer
            with integer weights.
    """
    run = RunFolder(path)
    config = run.config()
    if format_name not in EXPORTERS:
        raise UnknownNameError("format", format_name, EXPORTERS)
    integers = run.file("quantized.safetensors").exists() or not run.file("graph.onnx").exists()
    quantized, policy, architecture = run.quantized() if integers else None, run.policy(), run.architecture()
    check_built(run.file("policy.json"), policy, quantized, architecture)
    if half:
        if format_name != "tensorrt":
            raise UsageError(f"Layers in FP16 are for TensorRT files; they do not go with the format '{format_name}'.")
        quantized = _in_half(quantized, half, run, config)
    if data is None:
        data = dataset_of(config.data, config, Silent(), architecture.preprocessing)
    images, labels = next(data.batches(data.select_val, 100))
    source = ExportSource(
        graph=read_graph(run.file("graph.onnx")),
        quantized=quantized,
        network=run.network(),
        policy=policy,
        target=target_by_name(config.target),
        preprocessing=data.preprocessing,
        classes=data.classes if data.labelled else class_names(config, architecture.classes),
        images=images.numpy(),
        labels=labels.numpy() if data.labelled else None,
        task=data.task,
        interface=interface,
        table=Path(config.table).name if config.table else "",
    )
    folder = out or run.file("exports")
    artifact = export(source, format_name, folder, check=check)
    if not (check and measure):
        return artifact
    found = measured_here(
        folder / artifact.path, run.file("exports") / ORIGINAL, source.images, interface, data.preprocessing
    )
    artifact = artifact.model_copy(update={"checks": artifact.checks | found})
    write_bytes(folder / RECORD, as_record(recorded(folder), format_name, artifact))
    return artifact


def check_built(
    path: Path, policy: CompressionPolicy, quantized: QuantizedGraph | None, architecture: Architecture
) -> None:
    """Refuse a policy that was edited after the run had built another one.

    Raises:
        BadFileError: its bits or channels are not those of the run's network.
    """
    weights = {} if quantized is None else quantized.weights
    bits = {name: (choice.weight_bits, weights[name].bits) for name, choice in policy.layers.items() if name in weights}
    kept = architecture.keep_channels
    channels = {group: (width, kept[group]) for group, width in policy.keep_channels.items() if group in kept}
    for kind, found in (("weight bits", bits), ("channels", channels)):
        for name, (says, built) in found.items():
            if says != built:
                raise BadFileError(
                    f"The policy {path} says {says} {kind} for '{name}', but the run built {built}: the file records what was "
                    "chosen, and editing it builds nothing. Write the number back, or compress again (--pin-bits sets bits)."
                )


def _in_half(
    quantized: QuantizedGraph | None, names: Sequence[str], run: RunFolder, config: Config
) -> QuantizedGraph | None:
    """``quantized`` with ``names`` (or what the table says) in FP16; a float network has no layer to choose."""
    if tuple(names) == (BY_TABLE,):
        target = target_by_name(config.target)
        latency, _ = latency_model(
            target,
            tables=Path(config.table) if config.table else None,
            require_measured=True,
            allow_mismatch=config.allow_mismatch,
        )
        names = faster_in_half(kernels(run.network(), run.policy()), latency)
    known = quantized.weights if quantized is not None else {}
    for name in names:
        if name not in known:
            raise UnknownNameError("layer with integer weights", name, known)
    return replace(quantized, half=quantized.half | set(names)) if quantized is not None else None
