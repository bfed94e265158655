"""Measure the table of one network on another machine over ssh. A break of the connection costs the point in hand."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgecompress.errors import EdgeCompressError, MissingBackendError
from edgecompress.files import locked
from edgecompress.latency_tables import jobs, ssh
from edgecompress.latency_tables.jobs import Point, Received
from edgecompress.latency_tables.measure import Progress
from edgecompress.latency_tables.profile import GraphAt, Profiled, ProfileOptions
from edgecompress.latency_tables.table import read_table, refuse_mismatch
from edgecompress.spec import Network, Target

JOB_BYTES = 64 << 20  # of micro-models in one connection: what a small device's memory disk holds
TRIES = 6  # connections in a row that may fail without one new row
PAUSE_S = 1.0  # before the second try; doubles with each further one

Note = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """What to talk to, as what, and where to tell a person about it."""

    host: ssh.Host
    target: Target
    note: Note
    allow_mismatch: bool = False


def profile_host(
    network: Network,
    device: Device,
    options: ProfileOptions,
    graph_at: GraphAt | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Measure on the device what its table here does not hold yet of ``network``; rows are kept as they come.

    Raises:
        MissingBackendError: it cannot be reached, refuses the key, or has no Python or runtime.
        UsageError: it is another device than the target. EdgeCompressError: disk full, clock throttled.
        BadFileError: its table here is broken or of another setting.
    """
    jobs.require_precisions(device.target, options.precisions)
    first = _first_record(device, options)
    if not device.allow_mismatch:
        jobs.refuse_other_device(device.target, first["machine"], device.host.address)
    table = jobs.table_for(device.target, first, options)
    into = Received()
    with locked(table.path.parent):
        points = jobs.mark_unsupported(jobs.points_of(network, device.target, options, graph_at), table)
        held = {key for key, row in table.rows.items() if row.status in jobs.HELD}
        todo = [point for point in points if point.built or point.key not in held]
        if not any(not point.built for point in todo):
            todo = []  # nothing new to check
        specs = {point.id: point.spec(device.target) for point in points}
        started = time.perf_counter()

        def on_record(record: dict[str, Any]) -> None:
            if "setting" in record:
                refuse_mismatch(table.path, table.provenance.setting, jobs.setting_of(record))
            notes = len(into.notes)
            jobs.receive(record, specs, table, into)
            for text in into.notes[notes:]:
                device.note(text)
            if "id" in record and progress is not None:
                left = (time.perf_counter() - started) / into.rows * max(len(todo) - into.rows, 0)
                progress(min(into.rows, len(todo)), len(todo), left)

        try:
            _measure(device, todo, options, on_record)
        except EdgeCompressError as error:
            kept = len(read_table(table.path).usable)
            raise type(error)(f"{error} {kept} rows are kept in {table.path}.") from error
        profiled = jobs.finish(table, device.target, specs, into, points)
    return replace(profiled, done=replace(profiled.done, skipped=len(points) - len(todo)))


def _first_record(device: Device, options: ProfileOptions) -> dict[str, Any]:
    """What the device says of itself, from a job without points."""
    records: list[dict[str, Any]] = []
    _measure(device, None, options, records.append)
    return next(record for record in records if "setting" in record)


def _measure(
    device: Device, points: Sequence[Point] | None, options: ProfileOptions, on_record: Callable[[dict[str, Any]], None]
) -> None:
    """Run ``points`` (None: an empty job) in as many connections as their size asks for and the line needs."""
    done: set[str] = set()
    failed = 0

    def record_in(record: dict[str, Any]) -> None:
        nonlocal failed
        on_record(record)
        if record.get("status") in (*jobs.HELD, "contended", "failed"):
            done.add(record["id"])
            failed = 0

    parts: list[list[Point] | None] = [None] if points is None else list(_parts(points))
    for part in parts:
        while True:
            left = [] if part is None else [point for point in part if point.id not in done]
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    jobs.write_job(Path(scratch), left, device.target, options)
                    ssh.run_job(device.host, Path(scratch), record_in)
                break
            except ssh.DroppedError as dropped:
                failed += 1
                if failed >= TRIES or (part is None and failed >= 2):
                    raise MissingBackendError(
                        f"{dropped} Check the address and the network, then repeat the command."
                    ) from dropped
                if part is not None and all(point.id in done for point in part):
                    break
                pause = PAUSE_S * 2 ** (failed - 1)
                device.note(f"{dropped} Trying again in {pause:.0f} s; {len(done)} rows came through so far.")
                time.sleep(pause)


def _parts(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Points whose weights fill `JOB_BYTES`, each part in the order that was drawn."""
    part: list[Point] = []
    size = 0
    for point in points:
        key = point.key
        weights = (
            sum(_weight_bytes(kernel.macs, kernel.out_h * kernel.out_w) for kernel in point.kernels)
            if point.kernels
            else _weight_bytes(key.macs, key.out_h * key.out_w)
        )
        if part and size + weights > JOB_BYTES:
            yield part
            part, size = [], 0
        part.append(point)
        size += weights
    if part:
        yield part


def _weight_bytes(macs: int, positions: int) -> int:
    return 4 * macs // positions
