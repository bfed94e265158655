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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.cost import kernels
from edgecompress.errors import BadFileError, UnknownNameError, UsageError
from edgecompress.files import append_line, disk_error, locked, read_json, write_document, write_text
from edgecompress.graph import Graph
from edgecompress.latency_tables import agent
from edgecompress.latency_tables.correct import network_id
from edgecompress.latency_tables.measure import ENDS, graphs_of, how, measure_kernel, provenance
from edgecompress.latency_tables.onelayer import resized, supported, with_synthetic_ranges
from edgecompress.latency_tables.points import kernel_points, random_points
from edgecompress.latency_tables.predict import table_path
from edgecompress.latency_tables.profile import (
    ADAPTIVE_PAIRS,
    CHECK_NETWORKS,
    Profiled,
    ProfileOptions,
    fit_and_check,
)
from edgecompress.latency_tables.series import ANCHOR, ANCHOR_S, Done
from edgecompress.latency_tables.table import (
    KernelKey,
    Row,
    Session,
    Setting,
    Table,
    append_row,
    open_table,
    read_table,
    sidecar,
)
from edgecompress.latency_tables.targets import is_device
from edgecompress.latency_tables.whole import NetworkRow, networks_file, policy_at, read_networks, sub_networks
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
    """One thing to time: a kernel, or a whole network at the channels ``keep`` (its ``key`` is None)."""

    id: str
    dtype: str
    models: Callable[[], list[bytes]]
    key: KernelKey | None = None
    keep: Mapping[str, int] | None = None

    def spec(self, target: Target, count: int) -> dict[str, Any]:
        """As it stands in job.json, where ``count`` models were written for it."""
        taken = how(self.key) if self.key is not None else {"method": "session", "dtype": self.dtype}
        if target.exporter == "tensorrt":
            taken["method"] = "engine"
        names = [f"models/{self.id}-{number}.onnx" for number in range(count)]
        return {**taken, "id": self.id, "models": names, "key": self.key, "keep": self.keep}


@dataclass
class Received:
    """What came back so far beside rows: anchor times in microseconds, notes, and the device's state."""

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


def points_of(network: Network, target: Target, options: ProfileOptions, graph: Graph | None) -> list[Point]:
    """Everything to time for ``network``, kernels first in random order, then random sub-networks end to end."""
    generator = np.random.default_rng(options.seed)
    keys = [*kernel_points(network, target.divisor, options.precisions, options.levels)]
    keys += random_points(network, target.divisor, options.precisions, generator, ADAPTIVE_PAIRS)
    if target.exporter == "tensorrt":  # one engine cannot tell its ends from its layers, nor be timed with cold caches
        keys = [key for key in keys if key.kind not in ENDS and key.working_set == "warm"]
    keys = list(dict.fromkeys(keys))
    generator.shuffle(keys)
    points = [kernel_point(key, target, options.seed) for key in keys]
    if graph is not None:
        for number, keep in enumerate(sub_networks_of(network, target, options)):
            for dtype in options.precisions:
                points.append(_network_point(network, graph, target, number, keep, dtype))
    return points


def kernel_point(key: KernelKey, target: Target, seed: int = 0) -> Point:
    """The point of one kernel."""

    def models() -> list[bytes]:
        return [device_model(graph, key.weight_dtype, target, seed) for graph in graphs_of(key, seed)]

    return Point(row_id(key), key.weight_dtype, models, key)


def sub_networks_of(network: Network, target: Target, options: ProfileOptions) -> list[dict[str, int]]:
    """The sub-networks that a profile measures whole: those to fit to, then those to check with."""
    return list(islice(sub_networks(network, target.divisor, options.seed), options.networks + CHECK_NETWORKS))


def _network_point(
    network: Network, graph: Graph, target: Target, number: int, keep: Mapping[str, int], dtype: str
) -> Point:
    def models() -> list[bytes]:
        return [device_model(resized(graph, network, policy_at(network, keep, dtype)), dtype, target)]

    return Point(f"network-{number}-{dtype}", dtype, models, keep=keep)


def write_job(folder: Path, points: Iterable[Point], network: Network, target: Target, options: ProfileOptions) -> None:
    """Write a folder that ``python3 agent.py`` inside of it measures."""
    specs = []
    try:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        for point in (replace(kernel_point(ANCHOR, target), id="anchor"), *points):
            models = point.models()
            specs.append(point.spec(target, len(models)))
            for name, data in zip(specs[-1]["models"], models, strict=True):
                (folder / name).write_bytes(data)
    except OSError as error:
        raise disk_error(folder, error) from error
    job = {
        "version": 1, "target": target.name, "runtime": target.runtime, "threads": options.threads,
        "time_cap_s": options.time_cap_s, "anchor_s": ANCHOR_S, "anchor": specs[0], "points": specs[1:],
        "network": network.model_dump(mode="json"), "precisions": options.precisions, "networks": options.networks,
        "seed": options.seed,
    }  # fmt: skip
    write_text(folder / "job.json", json.dumps(job) + "\n")
    shutil.copyfile(Path(agent.__file__), folder / "agent.py")
    if target.exporter == "tensorrt":
        from edgecompress.exporters import build_on_device

        shutil.copyfile(Path(build_on_device.__file__), folder / "build_on_device.py")


def write_bundle(folder: Path, network: Network, target: Target, options: ProfileOptions, graph: Graph | None) -> int:
    """Write the whole job of ``network`` to be carried by hand; returns the number of points.

    Raises:
        UsageError: the folder holds something. UnknownNameError: a precision that the target does not run.
    """
    require_precisions(target, options.precisions)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The folder {folder} is not empty. Name a new one with --bundle.")
    points = [p for p in points_of(network, target, options, graph) if p.key is None or supported(p.key)]
    write_job(folder, points, network, target, options)
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


def receive(
    record: Mapping[str, Any], points: Mapping[str, Point], network: Network, table: Table, into: Received
) -> None:
    """Put one record of an agent where it belongs: rows into the table and its networks at once, the rest ``into``."""
    if "id" in record:
        point = points.get(record["id"])
        if point is None:
            raise BadFileError(f"The device sent a row '{record['id']}' that the job does not have. Start over.")
        into.rows += 1
        if record["status"] == "failed":
            into.notes.append(f"{point.id}: {record.get('why', '')}")
        elif point.key is not None:
            append_row(table, row_of(record, point.key))
        elif point.keep is not None:
            append_line(networks_file(table.path), _network_row(record, point, network))
    elif "anchor_us" in record:
        into.anchors.append(float(record["anchor_us"]))
    elif "note" in record:
        into.notes.append(str(record["note"]))
    elif "state" in record:
        into.state["after" if "done" in record else "before"] = record["state"]
        into.finished = "done" in record


def _network_row(record: Mapping[str, Any], point: Point, network: Network) -> NetworkRow:
    keep = dict(point.keep or {})
    built = kernels(network, policy_at(network, keep, point.dtype))
    values = {name: record[name] for name in ("median_us", "p10_us", "p90_us", "n_runs", "measured_at")}
    return NetworkRow(
        network=network_id(built), dtype=point.dtype, keep_channels=keep, contended=record["status"] == "contended",
        **values,
    )  # fmt: skip


def finish(table: Table, target: Target, network: Network, options: ProfileOptions, into: Received) -> Profiled:
    """Complete the provenance, fit the corrections to the whole networks, and check them on others."""
    table = read_table(table.path, table.provenance.setting)
    own = table.provenance
    machine = {f"{name}_{when}": text for when, state in into.state.items() for name, text in state.items()}
    session = Session(
        ended_at=agent.now(), load_before=machine.get("load_before", "unknown"),
        load_after=machine.get("load_after", "unknown"), anchors_us=tuple(into.anchors),
    )  # fmt: skip
    update = {"machine": {**own.machine, **machine}, "sessions": (*own.sessions, session)}
    write_document(sidecar(table.path), own.model_copy(update=update))
    table = read_table(table.path, own.setting)
    keeps = sub_networks_of(network, target, options)
    checks = fit_and_check(network, target, table, keeps, options) if read_networks(table.path) else []
    unsupported = tuple(key for key, row in table.rows.items() if row.status == "unsupported")
    done = Done(into.rows, 0, unsupported, tuple(into.anchors))
    return Profiled(read_table(table.path, own.setting), done, tuple(checks))


def still_to_measure(points: Iterable[Point], table: Table) -> list[Point]:
    """The points that the table does not hold; a kernel without a graph gets its row ``unsupported`` here."""
    held = {key for key, row in table.rows.items() if row.status in HELD}
    networks = {(row.dtype, tuple(row.keep_channels.items())) for row in read_networks(table.path)}
    found = []
    for point in points:
        if point.key is None:
            if (point.dtype, tuple((point.keep or {}).items())) not in networks:
                found.append(point)
        elif not supported(point.key):
            if point.key not in table.rows:
                append_row(table, measure_kernel(point.key))
        elif point.key not in held:
            found.append(point)
    return found


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
    target, network = target_of(job["target"]), Network.model_validate(job["network"])
    options = replace(options, precisions=tuple(job["precisions"]), networks=job["networks"], seed=job["seed"])
    if not allow_mismatch:
        refuse_other_device(target, first["machine"], str(folder))
    points = {spec["id"]: _point_of(spec) for spec in job["points"]}
    table = table_for(target, first, options)
    into = Received()
    with locked(table.path.parent):
        known = {(row.dtype, tuple(row.keep_channels.items())): row for row in read_networks(table.path)}
        skipped = 0
        for record in records:
            point = points.get(record.get("id", ""))
            if point is not None:
                held: Row | NetworkRow | None = (
                    table.rows.get(point.key)
                    if point.key
                    else known.get((point.dtype, tuple((point.keep or {}).items())))
                )
                if held is not None and held.measured_at >= record["measured_at"]:
                    skipped += 1
                    continue
            receive(record, points, network, table, into)
        profiled = finish(table, target, network, options, into)
    for text in dict.fromkeys(into.notes):
        note(text)
    if not into.finished:
        note(f"The job in {folder} has not ended yet: run 'python3 agent.py' in it again, then collect the rest.")
    return replace(profiled, done=replace(profiled.done, skipped=skipped))


def _point_of(spec: Mapping[str, Any]) -> Point:
    key = KernelKey._make(spec["key"]) if spec["key"] is not None else None
    return Point(spec["id"], spec["dtype"], list, key, spec["keep"])


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
