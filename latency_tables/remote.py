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
from edgecompress.graph import Graph
from edgecompress.latency_tables import jobs, ssh
from edgecompress.latency_tables.jobs import Point, Received
from edgecompress.latency_tables.measure import Progress
from edgecompress.latency_tables.profile import Profiled, ProfileOptions
from edgecompress.latency_tables.table import read_table, refuse_mismatch
from edgecompress.spec import Network, Target

JOB_BYTES = 64 << 20  # of micro-models in one connection: what a small device's memory disk holds
NETWORK_BYTES = 16 << 20  # that a whole network is taken for
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
    graph: Graph | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Measure on the device what its table here does not hold yet of ``network``; rows are kept as they come.

    Raises:
        MissingBackendError: it cannot be reached, refuses the key, or has no Python or runtime.
        UsageError: it is another device than the target. EdgeCompressError: disk full, clock throttled.
        BadFileError: its table here is broken or of another setting.
    """
    jobs.require_precisions(device.target, options.precisions)
    run = _Run(device, network, options)
    first = run.first_record()
    if not device.allow_mismatch:
        jobs.refuse_other_device(device.target, first["machine"], device.host.address)
    table = jobs.table_for(device.target, first, options)
    into = Received()
    with locked(table.path.parent):
        points = {point.id: point for point in jobs.points_of(network, device.target, options, graph)}
        todo = jobs.still_to_measure(points.values(), table)
        started = time.perf_counter()

        def on_record(record: dict[str, Any]) -> None:
            if "setting" in record:
                refuse_mismatch(table.path, table.provenance.setting, jobs.setting_of(record))
            notes = len(into.notes)
            jobs.receive(record, points, network, table, into)
            for text in into.notes[notes:]:
                device.note(text)
            if "id" in record and progress is not None:
                left = (time.perf_counter() - started) / into.rows * max(len(todo) - into.rows, 0)
                progress(min(into.rows, len(todo)), len(todo), left)

        try:
            run.measure(todo, on_record)
        except EdgeCompressError as error:
            kept = len(read_table(table.path).usable)
            raise type(error)(f"{error} {kept} rows are kept in {table.path}.") from error
        profiled = jobs.finish(table, device.target, network, options, into)
    return replace(profiled, done=replace(profiled.done, skipped=len(points) - len(todo)))


@dataclass(frozen=True)
class _Run:
    """One network's connections to one device."""

    device: Device
    network: Network
    options: ProfileOptions

    def first_record(self) -> dict[str, Any]:
        """What the device says of itself, from a job without points."""
        records: list[dict[str, Any]] = []
        self._part([], records.append, tries=2)
        return next(record for record in records if "setting" in record)

    def measure(self, points: Sequence[Point], on_record: Callable[[dict[str, Any]], None]) -> None:
        """Run ``points`` in as many connections as their size asks for and the line needs."""
        for part in _parts(points):
            self._part(part, on_record, TRIES)

    def _part(self, part: Sequence[Point], on_record: Callable[[dict[str, Any]], None], tries: int) -> None:
        done: set[str] = set()
        failed = 0

        def record_in(record: dict[str, Any]) -> None:
            nonlocal failed
            on_record(record)
            if record.get("status") in (*jobs.HELD, "contended", "failed"):
                done.add(record["id"])
                failed = 0

        while True:
            left = [point for point in part if point.id not in done]
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    jobs.write_job(Path(scratch), left, self.network, self.device.target, self.options)
                    ssh.run_job(self.device.host, Path(scratch), record_in)
                return
            except ssh.DroppedError as dropped:
                failed += 1
                if failed >= tries:
                    raise MissingBackendError(
                        f"{dropped} Check the address and the network, then repeat the command."
                    ) from dropped
                if part and len(done) == len(part):
                    return
                pause = PAUSE_S * 2 ** (failed - 1)
                text = f"Trying again in {pause:.0f} s; {len(done)} of {len(part)} rows came through."
                self.device.note(f"{dropped} {text}")
                time.sleep(pause)


def _parts(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Points whose weights fill `JOB_BYTES`, each part in the order that was drawn."""
    part: list[Point] = []
    size = 0
    for point in points:
        weights = NETWORK_BYTES if point.key is None else 4 * point.key.macs // (point.key.out_h * point.key.out_w)
        if part and size + weights > JOB_BYTES:
            yield part
            part, size = [], 0
        part.append(point)
        size += weights
    if part:
        yield part
