"""Measure the table of one network on this machine, from the points to the held-out check; safe to stop and go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompress.cost import kernels
from edgecompress.errors import MissingBackendError, UnknownNameError, UsageError
from edgecompress.files import locked
from edgecompress.graph import Graph
from edgecompress.latency_tables.measure import Done, Progress, measure_points, provenance, this_setting
from edgecompress.latency_tables.points import LEVELS, kernel_points
from edgecompress.latency_tables.predict import table_model, table_path
from edgecompress.latency_tables.table import Table, append_row, open_table, read_table
from edgecompress.latency_tables.targets import is_this_machine
from edgecompress.latency_tables.whole import Check, check_table, held_other, keep_channels, other_row, policy_at
from edgecompress.spec import Network, Target

MEASURABLE = ("fp32", "int8")
# The graph of the network at the given widths per channel group.
GraphAt = Callable[[Mapping[str, int]], Graph]


@dataclass(frozen=True)
class ProfileOptions:
    """How to measure. ``time_cap_s`` is for one kernel after its warm-up; ``out`` a file ending in .csv, or a folder;
    ``levels`` widths a side of each layer."""

    precisions: tuple[str, ...] = MEASURABLE
    threads: int = 1
    time_cap_s: float = 0.5
    out: Path | None = None
    levels: int = LEVELS
    seed: int = 0


@dataclass(frozen=True)
class Profiled:
    """The table, how its points went, and one held-out network per precision (empty without ``graph_at``)."""

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
    graph_at: GraphAt | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Measure what ``target``'s table does not hold yet of ``network``: each layer at the widths a search may visit.

    Args:
        graph_at: builds the network at given widths; without it, what the network spends outside of its layers stays
            unmeasured, and the table is not checked on a whole network.

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
        points = kernel_points(network, target.divisor, options.precisions, options.levels)
        done = measure_points(points, table, time_cap_s=options.time_cap_s, seed=options.seed, progress=progress)
        table = read_table(path, setting)
        checks: list[Check] = []
        if graph_at is not None:
            table, checks = _whole(network, target, table, options, graph_at)
    return Profiled(table, done, tuple(checks))


def _whole(
    network: Network, target: Target, table: Table, options: ProfileOptions, graph_at: GraphAt
) -> tuple[Table, list[Check]]:
    """Rows for the rest of the network, then one random pruned network per precision that no row was made from."""
    graphs: dict[tuple[int, ...], Graph] = {}

    def graph(keep: Mapping[str, int]) -> Graph:
        widths = tuple(keep.values())
        if widths not in graphs:
            graphs[widths] = graph_at(keep)
        return graphs[widths]

    seconds = 2 * options.time_cap_s
    model = table_model(table, target)
    for dtype in options.precisions:
        for keep, _ in held_other(model, network, dtype, target.divisor):
            built = kernels(network, policy_at(network, keep, dtype))
            append_row(table, other_row(built, graph(keep), model, threads=options.threads, seconds=seconds))
    table = read_table(table.path, table.provenance.setting)
    model = table_model(table, target)
    keep = keep_channels(network, target.divisor, 1.0, seed=options.seed + 1)
    checks = [
        check_table(
            kernels(network, policy_at(network, keep, dtype)),
            graph(keep),
            model,
            threads=options.threads,
            seconds=seconds,
        )
        for dtype in options.precisions
    ]
    return table, checks
