"""What is measured on another machine, as a folder that needs nothing of this package: agent, job.json, micro-models.

The same folder goes over ssh (`latency_tables.remote`) or is carried by hand (``--bundle``, ``--collect``); what comes
back are the records that ``agent.py`` writes, one JSON object a line.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.cost import Kernel, kernels
from edgecompress.errors import BadFileError, UnknownNameError, UsageError
from edgecompress.files import disk_error, locked, read_json, write_document, write_text
from edgecompress.graph import Graph
from edgecompress.latency_tables import agent
from edgecompress.latency_tables.measure import (
    ANCHOR,
    ANCHOR_S,
    LAYER_KERNELS,
    Done,
    measure_kernel,
    provenance,
)
from edgecompress.latency_tables.onelayer import one_layer, supported, with_synthetic_ranges
from edgecompress.latency_tables.points import kernel_points
from edgecompress.latency_tables.predict import other_key, table_model, table_path
from edgecompress.latency_tables.profile import GraphAt, Profiled, ProfileOptions
from edgecompress.latency_tables.table import (
    KernelKey,
    Provenance,
    Row,
    Setting,
    Table,
    append_row,
    kernel_key,
    open_table,
    read_table,
    sidecar,
)
from edgecompress.latency_tables.targets import is_device, running_precision
from edgecompress.latency_tables.whole import Check, keep_channels, policy_at
from edgecompress.spec import Network, Target

TILE = 1 << 14  # bytes of random weights that repeat: a micro-model then packs well, and its time is the same
TENSORRT_OPSET = 17
HELD = ("ok", "unsupported")
README = """Latency job for {device}, made by edgecompress.

On the device, in this folder:

    python3 agent.py

It needs Python 3.8 or later, numpy and {needs}. Stop it at any time: the same command goes on. When it ends, bring the
folder back (rows.jsonl and job.json are enough) and run on the machine that made it:

    edgecompress profile --collect FOLDER
"""


@dataclass(frozen=True)
class Point:
    """One thing to time. A whole network lists the ``kernels`` that it is made of; only a held-out one has ``built``."""

    id: str
    key: KernelKey
    model: Callable[[], bytes]
    kernels: tuple[KernelKey, ...] = ()
    built: tuple[Kernel, ...] = ()

    def spec(self, target: Target) -> dict[str, Any]:
        """As it stands in job.json."""
        engine = "engine" if target.exporter == "tensorrt" else None
        method = engine or ("session" if self.kernels else "node_time")
        return {
            "id": self.id, "model": f"models/{self.id}.onnx", "dtype": self.key.weight_dtype, "method": method,
            "operators": LAYER_KERNELS, "key": self.key, "kernels": self.kernels, "held_out": bool(self.built),
        }  # fmt: skip


@dataclass
class Received:
    """What came back so far: whole networks by point, anchor times in microseconds, notes, and the device's last state."""

    whole: dict[str, Row] = field(default_factory=dict)
    anchors: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    state: dict[str, dict[str, str]] = field(default_factory=dict)
    finished: bool = False
    rows: int = 0


def row_id(key: KernelKey) -> str:
    """SHA-1 of the key as the table writes it: the name of a row that does not depend on where it stands."""
    return hashlib.sha1(",".join(map(str, key)).encode()).hexdigest()


def device_model(graph: Graph, dtype: str, target: Target, seed: int = 0) -> bytes:
    """``graph`` at batch 1 in the dialect and with the opset that the target's runtime reads."""
    from edgecompress.exporters import to_onnxruntime, to_tensorrt
    from edgecompress.exporters.onnx_writing import BASE_OPSET
    from edgecompress.exporters.to_onnx import float_model

    opset = min(TENSORRT_OPSET, BASE_OPSET, target.max_opset)
    if dtype != "int8":
        model = float_model(graph, opset=opset, batch=1)
    elif target.dialect == "trt":
        model = to_tensorrt.integer_model(with_synthetic_ranges(graph, seed), opset=opset, batch=1)
    else:
        ranges = with_synthetic_ranges(graph, seed)
        model = to_onnxruntime.integer_model(ranges, batch=1, max_opset=target.max_opset)
    for weight in model.graph.initializer:
        if len(weight.raw_data) > TILE:
            weight.raw_data = (weight.raw_data[:TILE] * (len(weight.raw_data) // TILE + 1))[: len(weight.raw_data)]
    data: bytes = model.SerializeToString()
    return data


def require_precisions(target: Target, precisions: Sequence[str]) -> None:
    """Raise UnknownNameError for a precision that the target does not run."""
    for precision in precisions:
        if precision not in target.precisions:
            raise UnknownNameError("precision", precision, target.precisions)


def points_of(network: Network, target: Target, options: ProfileOptions, graph_at: GraphAt | None) -> list[Point]:
    """Everything to time for ``network``, kernels first in random order, then whole networks at known widths."""
    keys = list(kernel_points(network, target.divisor, options.precisions, options.levels))
    np.random.default_rng(options.seed).shuffle(keys)

    def model_of(key: KernelKey) -> Callable[[], bytes]:
        return lambda: device_model(one_layer(key, options.seed), key.weight_dtype, target, options.seed)

    points = [Point(row_id(key), key, model_of(key)) for key in keys]
    if graph_at is not None:
        for dtype in options.precisions:
            for fraction, seed in ((1.0, None), (0.5, None), (1.0, options.seed + 1)):
                keep = keep_channels(network, target.divisor, fraction, seed=seed)
                points.append(_whole(network, target, dtype, keep, graph_at, held_out=seed is not None))
    return points


def _whole(
    network: Network, target: Target, dtype: str, keep: Mapping[str, int], graph_at: GraphAt, *, held_out: bool
) -> Point:
    built = kernels(network, policy_at(network, keep, dtype))
    key = other_key(built, dtype)
    parts = tuple(kernel_key(kernel, running_precision(kernel, target)) for kernel in built)
    name = f"held-out-{dtype}" if held_out else row_id(key)
    return Point(name, key, lambda: device_model(graph_at(keep), dtype, target), parts, built if held_out else ())


def write_job(folder: Path, points: Iterable[Point], target: Target, options: ProfileOptions) -> None:
    """Write a folder that ``python3 agent.py`` inside of it measures."""
    anchor = Point("anchor", ANCHOR, lambda: device_model(one_layer(ANCHOR), "fp32", target))
    chosen = list(points)
    try:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        for point in [anchor, *chosen]:
            (folder / "models" / f"{point.id}.onnx").write_bytes(point.model())
    except OSError as error:
        raise disk_error(folder, error) from error
    job = {
        "version": 1, "target": target.name, "runtime": target.runtime, "threads": options.threads,
        "time_cap_s": options.time_cap_s, "anchor_s": ANCHOR_S, "anchor": anchor.spec(target),
        "points": [point.spec(target) for point in chosen],
    }  # fmt: skip
    write_text(folder / "job.json", json.dumps(job) + "\n")
    shutil.copyfile(Path(agent.__file__), folder / "agent.py")
    if target.exporter == "tensorrt":
        from edgecompress.exporters import build_on_device

        shutil.copyfile(Path(build_on_device.__file__), folder / "build_on_device.py")


def write_bundle(
    folder: Path, network: Network, target: Target, options: ProfileOptions, graph_at: GraphAt | None
) -> int:
    """Write the whole job of ``network`` to be carried by hand; returns the number of points.

    Raises:
        UsageError: the folder holds something. UnknownNameError: a precision that the target does not run.
    """
    require_precisions(target, options.precisions)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The folder {folder} is not empty. Name a new one with --bundle.")
    points = [point for point in points_of(network, target, options, graph_at) if point.kernels or supported(point.key)]
    write_job(folder, points, target, options)
    needs = "tensorrt 8.5 or later" if target.exporter == "tensorrt" else "onnxruntime"
    write_text(folder / "README", README.format(device=target.device, needs=needs))
    return len(points)


# --- what comes back ---------------------------------------------------------------------------------------------------


def setting_of(record: Mapping[str, Any]) -> Setting:
    """The setting that an agent's first record tells."""
    return Setting.model_validate(record["setting"])


def refuse_other_device(target: Target, machine: Mapping[str, str], where: str) -> None:
    """Raise UsageError where ``machine``, the facts of an agent, contradicts ``target``."""
    known = target.facts.get("compute_capability")
    if target.exporter == "tensorrt":
        if known and machine.get("compute_capability") != known:
            raise UsageError(
                f"The GPU at {where} ({machine.get('gpu')}) has compute capability {machine.get('compute_capability')}, "
                f"a {target.device} has {known}. Name its own --target, or give --allow-mismatch."
            )
    elif not is_device(target, machine["architecture"], machine["board"]):
        found = machine["board"] or f"a {machine['architecture']} machine ({machine['cpu']})"
        raise UsageError(
            f"The device at {where} is {found}, not a {target.device}. Name its own --target, or give --allow-mismatch."
        )


def table_for(target: Target, record: Mapping[str, Any], options: ProfileOptions) -> Table:
    """Open or begin the table of the device whose first record is ``record``."""
    setting = setting_of(record)
    out = options.out
    path = out if out is not None and out.suffix == ".csv" else table_path(target, setting, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {key: str(value) for key, value in record["machine"].items()}
    return open_table(path, provenance(target.name, setting).model_copy(update={"machine": machine}))


def row_of(record: Mapping[str, Any], key: KernelKey) -> Row:
    """A row from an agent's record."""
    values = {entry.name: record[entry.name] for entry in fields(Row) if entry.name in record}
    return Row(key=key, **values)


def receive(record: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]], table: Table, into: Received) -> None:
    """Put one record of an agent where it belongs: kernels into the table at once, the rest into ``into``."""
    if "id" in record:
        spec = specs.get(record["id"])
        if spec is None:
            raise BadFileError(f"The device sent a row '{record['id']}' that the job does not have. Start over.")
        row = row_of(record, KernelKey._make(spec["key"]))
        into.rows += 1
        if row.status == "failed":
            into.notes.append(
                f"{row.key.kind} {row.key.in_channels} -> {row.key.out_channels}: {record.get('why', '')}"
            )
        if spec["kernels"]:
            into.whole[record["id"]] = row
        elif row.status != "failed" or row.key not in table.rows:
            append_row(table, row)
    elif "anchor_us" in record:
        into.anchors.append(float(record["anchor_us"]))
    elif "note" in record:
        into.notes.append(str(record["note"]))
    elif "state" in record:
        into.state["after" if "done" in record else "before"] = record["state"]
        into.finished = "done" in record


def finish(
    table: Table, target: Target, specs: Mapping[str, Mapping[str, Any]], into: Received, points: Sequence[Point] = ()
) -> Profiled:
    """Write what whole networks spend outside of their kernels, complete the provenance, and check held-out networks."""
    table = read_table(table.path, table.provenance.setting)
    whole = {name: row for name, row in into.whole.items() if row.status in ("ok", "contended")}
    if any(not specs[name]["held_out"] for name in whole):
        model = table_model(table, target)
        for name, row in whole.items():
            if not specs[name]["held_out"]:
                inside = sum(model.predict(KernelKey._make(key)).us for key in specs[name]["kernels"])
                values = {part: getattr(row, part) - inside for part in ("median_us", "p10_us", "p90_us")}
                append_row(table, replace(row, **values, method="whole_minus_kernels"))
    extended = _with_state(table.provenance, into)
    write_document(sidecar(table.path), extended)
    table = read_table(table.path, table.provenance.setting)
    checks = [
        Check(point.key.weight_dtype, table_model(table, target)(point.built).us, whole[point.id].median_us)
        for point in points
        if point.built and point.id in whole
    ]
    drift = max(into.anchors) / min(into.anchors) - 1 if into.anchors else 0.0
    unsupported = tuple(key for key, row in table.rows.items() if row.status == "unsupported")
    return Profiled(table, Done(into.rows, 0, unsupported, drift), tuple(checks))


def _with_state(provenance: Provenance, into: Received) -> Provenance:
    """Load, clocks and temperatures before and after, and the anchor series, beside the facts of the machine."""
    told = {f"{name}_{when}": text for when, state in into.state.items() for name, text in state.items()}
    if into.anchors:
        told["anchor_us"] = " ".join(f"{us:.1f}" for us in into.anchors)
    return provenance.model_copy(update={"machine": {**provenance.machine, **told}})


def mark_unsupported(points: Iterable[Point], table: Table) -> list[Point]:
    """Write a row for every kernel without a one-layer graph; returns the points that can be measured."""
    possible = []
    for point in points:
        if point.kernels or supported(point.key):
            possible.append(point)
        elif point.key not in table.rows:
            append_row(table, measure_kernel(point.key))
    return possible


def collect(
    folder: Path,
    target_of: Callable[[str], Target],
    options: ProfileOptions,
    note: Callable[[str], None],
    *,
    allow_mismatch: bool = False,
) -> Profiled:
    """Bring the rows of a carried job back into the device's table; collecting twice changes nothing.

    Raises:
        BadFileError: the folder is no job, or was never measured. UsageError: the device is not the job's target.
    """
    job = read_json(folder / "job.json", "latency job")
    records = read_records(folder / "rows.jsonl")
    first = next((record for record in records if "setting" in record), None)
    if not isinstance(job, dict) or first is None:
        raise BadFileError(f"The job in {folder} was not measured yet. Run 'python3 agent.py' in it on the device.")
    target = target_of(job["target"])
    if not allow_mismatch:
        refuse_other_device(target, first["machine"], str(folder))
    table = table_for(target, first, options)
    specs = {spec["id"]: spec for spec in job["points"]}
    into = Received()
    with locked(table.path.parent):
        skipped = 0
        for record in records:
            key = KernelKey._make(specs[record["id"]]["key"]) if record.get("id") in specs else None
            known = table.rows.get(key) if key is not None else None
            if known is not None and known.measured_at >= record["measured_at"] and known.status in HELD:
                skipped += 1
                continue
            receive(record, specs, table, into)
        profiled = finish(table, target, specs, into)
    for text in dict.fromkeys(into.notes):
        note(text)
    if not into.finished:
        note(f"The job in {folder} has not ended yet: run 'python3 agent.py' in it again, then collect the rest.")
    return replace(profiled, done=replace(profiled.done, skipped=skipped))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of ``rows.jsonl``; a last line torn by a kill is left out.

    Raises:
        BadFileError: it is missing, or another line is broken.
    """
    try:
        whole = path.read_bytes().rpartition(b"\n")[0]
    except OSError as error:
        raise BadFileError(
            f"There is no {path}. Run 'python3 agent.py' in that folder on the device, then bring it back."
        ) from error
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise BadFileError(f"Line {number} of {path} is broken. Delete that line.") from error
    return records
