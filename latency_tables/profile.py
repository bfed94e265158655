"""Measure the table of one network on this machine, from the points to the held-out check; safe to stop and go on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgecompress.cost import kernels
from edgecompress.errors import MissingBackendError, UnknownNameError, UsageError
from edgecompress.files import append_line, locked, write_document
from edgecompress.graph import Graph
from edgecompress.latency_tables.agent import machine_facts, now
from edgecompress.latency_tables.correct import network_id
from edgecompress.latency_tables.interpolate import family_of
from edgecompress.latency_tables.measure import Progress, provenance, this_setting
from edgecompress.latency_tables.onelayer import resized
from edgecompress.latency_tables.points import LEVELS, kernel_points, random_points
from edgecompress.latency_tables.predict import table_model, table_path
from edgecompress.latency_tables.series import Done, measure_divisor, measure_points
from edgecompress.latency_tables.table import KernelKey, Profile, Session, Table, open_table, read_table, sidecar
from edgecompress.latency_tables.targets import is_this_machine
from edgecompress.latency_tables.whole import (
    Check,
    averaged,
    check,
    corrections_of,
    fitted_rows,
    measure_network,
    networks_file,
    policy_at,
    read_networks,
    sub_networks,
)
from edgecompress.spec import CompressionPolicy, Network, Target

MEASURABLE = ("fp32", "int8")
FIT_NETWORKS = 20  # sub-networks that the correction is fitted to
CHECK_NETWORKS = 4  # and others that it is checked with
SESSIONS = 2  # in which each sub-network is measured, apart in time
ADAPTIVE_ROUNDS = 3
ADAPTIVE_ERROR = 0.05  # of a held-out pair, at which its family gets more points
ADAPTIVE_PAIRS = 2


@dataclass(frozen=True)
class ProfileOptions:
    """How to measure. ``time_cap_s`` is for one kernel after its warm-up; ``out`` a file ending in .csv, or a folder;
    ``levels`` widths a side of each layer."""

    precisions: tuple[str, ...] = MEASURABLE
    threads: int = 1
    time_cap_s: float = 0.5
    out: Path | None = None
    levels: int = LEVELS
    networks: int = FIT_NETWORKS
    seed: int = 0


@dataclass(frozen=True)
class Profiled:
    """The table, how its points went, and held-out networks per precision (empty without a graph)."""

    table: Table
    done: Done
    checks: tuple[Check, ...]


def require_measurable(target: Target, precisions: Sequence[str]) -> None:
    """Refuse targets and precisions that cannot be measured here.

    Raises:
        MissingBackendError: the target is another machine or another runtime.
        UnknownNameError: a precision that the target does not run.
    """
    if target.exporter != "onnxruntime":
        raise MissingBackendError(
            f"'{target.name}' runs {target.runtime} {target.runtime_version}, which is not here. Measure it over ssh with "
            "--host user@address, or carry the job by hand with --bundle DIR; until then its latencies are estimated."
        )
    if not is_this_machine(target):
        raise MissingBackendError(
            f"This machine is no {target.device}. Measure it over ssh with --host user@address, or carry the job by hand "
            "with --bundle DIR; until then its latencies are estimated."
        )
    for precision in precisions:
        if precision not in MEASURABLE or precision not in target.precisions:
            raise UnknownNameError("precision", precision, [name for name in MEASURABLE if name in target.precisions])


def profile(
    network: Network,
    target: Target,
    options: ProfileOptions,
    graph: Graph | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Measure what ``target``'s table does not hold yet of ``network``: each layer at the widths a search may visit.

    The points of the grid come first; then random pairs of every family, with more where such a pair is predicted badly;
    then random sub-networks end to end, to which the correction is fitted, and some more to check it with.

    Args:
        graph: the network; without it no whole network is measured, so that nothing is corrected or checked.

    Raises:
        MissingBackendError: the target cannot be measured on this machine.
        UsageError: another process is measuring into the same folder.
        BadFileError: the table there is broken or of another setting.
    """
    require_measurable(target, options.precisions)
    if options.threads < 1 or options.time_cap_s <= 0 or options.levels < 2:
        raise UsageError("Give at least one thread, two levels, and a time cap above zero seconds.")
    setting = this_setting(options.threads)
    out = options.out
    path = out if out is not None and out.suffix == ".csv" else table_path(target, setting, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        table = open_table(path, provenance(target.name, setting))
        load = machine_facts()["load"]
        table = _with_divisors(table, options)
        points = kernel_points(network, target.divisor, options.precisions, options.levels)
        done = measure_points(points, table, time_cap_s=options.time_cap_s, seed=options.seed, progress=progress)
        table = read_table(path, setting)
        for round_number in range(ADAPTIVE_ROUNDS):
            pairs = _doubtful(network, table, target, options, round_number)
            measure_points(pairs, table, time_cap_s=options.time_cap_s, seed=options.seed, progress=progress)
            table = read_table(path, setting)
        checks = [] if graph is None else _whole(network, graph, target, table, options, progress)
        own = provenance(target.name, setting)
        session = Session(
            ended_at=own.created_at, load_before=load, load_after=own.machine["load"], anchors_us=done.anchors_us
        )
        table = read_table(path, setting)
        sessions = (*table.provenance.sessions, session)
        write_document(sidecar(path), table.provenance.model_copy(update={"sessions": sessions}))
    return Profiled(read_table(path, setting), done, tuple(checks))


def _with_divisors(table: Table, options: ProfileOptions) -> Table:
    """Find the channel divisor of each precision once for every table."""
    known = dict(table.provenance.divisors)
    for dtype in options.precisions:
        if dtype not in known:
            known[dtype] = measure_divisor(dtype, threads=options.threads, time_cap_s=options.time_cap_s / 2)
    if known != table.provenance.divisors:
        write_document(sidecar(table.path), table.provenance.model_copy(update={"divisors": known}))
    return read_table(table.path, table.provenance.setting)


def _doubtful(
    network: Network, table: Table, target: Target, options: ProfileOptions, round_number: int
) -> list[KernelKey]:
    """Random pairs of channels: of every family in the first round, then of those whose last pairs were predicted badly.

    A pair is predicted from the rows that were there before it; the table keeps the order in which rows came.
    """
    generator = np.random.default_rng((options.seed, round_number))
    pairs: dict[tuple[object, ...], list[KernelKey]] = {}
    for key in random_points(network, target.divisor, options.precisions, generator, ADAPTIVE_PAIRS):
        pairs.setdefault(key.family, []).append(key)
    if not round_number:
        return [key for keys in pairs.values() for key in keys]
    rows = list(table.usable.values())
    chosen = []
    for family, keys in pairs.items():
        own = [row for row in rows if row.key.family == family]
        before, last = own[:-ADAPTIVE_PAIRS], own[-ADAPTIVE_PAIRS:]
        fitted = family_of(before)
        if fitted is None:
            continue
        errors = [abs(fitted.predict(row.key.in_channels, row.key.out_channels)[0] / row.median_us - 1) for row in last]
        if max(errors) > ADAPTIVE_ERROR:
            chosen += keys
    return chosen


def _whole(
    network: Network,
    graph: Graph,
    target: Target,
    table: Table,
    options: ProfileOptions,
    progress: Progress | None,
) -> list[Check]:
    """Measure sub-networks, fit the corrections, write them into the sidecar, and check them on other sub-networks."""
    total = options.networks + CHECK_NETWORKS
    keeps = list(islice(sub_networks(network, target.divisor, options.seed), total))
    held = Counter((row.dtype, tuple(row.keep_channels.items())) for row in read_networks(table.path))
    todo = [(turn, i, dtype) for turn in range(SESSIONS) for i in range(len(keeps)) for dtype in options.precisions]
    start = time.perf_counter()
    for number, (turn, i, dtype) in enumerate(todo):
        if held[dtype, tuple(keeps[i].items())] <= turn:
            resized_graph = resized(graph, network, policy_at(network, keeps[i], dtype))
            row = measure_network(
                network, resized_graph, keeps[i], dtype, threads=options.threads, seconds=options.time_cap_s,
                now=now(),
            )  # fmt: skip
            append_line(networks_file(table.path), row)
        if progress is not None:
            progress(number + 1, len(todo), (time.perf_counter() - start) / (number + 1) * (len(todo) - number - 1))
    return fit_and_check(network, target, table, keeps, options)


def fit_and_check(
    network: Network, target: Target, table: Table, keeps: Sequence[Mapping[str, int]], options: ProfileOptions
) -> list[Check]:
    """Fit the corrections to the measured ones of ``keeps`` but the last, write them, and check them on those.

    New rows change what the table says of networks that were profiled into it before: their corrections are fitted anew.
    """
    own = network_id(kernels(network, CompressionPolicy(model=network.model)))
    held_out = {tuple(keep.items()) for keep in keeps[options.networks :]}
    known = {**table.provenance.networks, own: Profile(network=network, held_out=tuple(map(dict, held_out)))}
    rows = read_networks(table.path)
    plain = table_model(table, target)
    fitted = tuple(
        correction
        for name, profiled in known.items()
        for correction in corrections_of(plain, profiled.network, fitted_rows(rows, name, profiled.held_out))
    )
    update = {"corrections": fitted, "networks": known}
    write_document(sidecar(table.path), table.provenance.model_copy(update=update))
    model = table_model(read_table(table.path, table.provenance.setting), target)
    checked = [row for row in rows if row.network == own and tuple(row.keep_channels.items()) in held_out]
    return [check(model, network, row) for row in averaged(checked) if row.dtype in options.precisions]
