"""Whole pruned networks on this machine: what a correction is fitted to, and what a table is checked with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecompress.cost import edges, kernels
from edgecompress.files import read_lines
from edgecompress.graph import Graph
from edgecompress.latency_tables.agent import Runs, run_until_steady
from edgecompress.latency_tables.correct import Correction, Sample, fit, network_id
from edgecompress.latency_tables.onelayer import model_bytes
from edgecompress.latency_tables.points import widths
from edgecompress.latency_tables.predict import TableModel
from edgecompress.spec import CompressionPolicy, Frozen, LayerChoice, Network

SPREAD = 0.35  # of the groups' keep ratios around the network's, as a standard deviation of their logarithm


class NetworkRow(Frozen):
    """One sub-network measured end to end: a line of the table's ``.networks.jsonl``."""

    network: str
    dtype: str
    keep_channels: dict[str, int]
    median_us: float
    p10_us: float
    p90_us: float
    n_runs: int
    contended: bool = False
    measured_at: str


@dataclass(frozen=True)
class Check:
    """A pruned network that nothing was fitted to: what the table predicts, and what it takes."""

    dtype: str
    predicted_us: float
    measured_us: float

    @property
    def error(self) -> float:
        """Signed error of the prediction, as a fraction of the measured time."""
        return self.predicted_us / self.measured_us - 1


def policy_at(network: Network, keep: Mapping[str, int], dtype: str) -> CompressionPolicy:
    """A policy with these widths and one precision everywhere."""
    bits = {"int8": 8, "fp16": 16}.get(dtype, 32)
    choice = LayerChoice(weight_bits=bits, activation_bits=bits)
    return CompressionPolicy(
        model=network.model, keep_channels=dict(keep), layers={layer.name: choice for layer in network.layers}
    )


def sub_networks(network: Network, divisor: int, seed: int = 0) -> Iterator[dict[str, int]]:
    """Random pruned versions of ``network`` on the channel grid, without end and each once; the first is unpruned.

    A keep ratio is drawn for the network, and one around it for every group: alike as a search's policies are, unlike
    enough to tell the layers apart.
    """
    yield network.widths
    generator = np.random.default_rng(seed)
    grids = {group.id: np.array(widths(group.width, divisor, group.width)) for group in network.prunable_groups}
    seen = {tuple(network.widths[name] for name in grids)}
    for _ in range(1000):
        ratio = generator.uniform(0.25, 1.0)
        keep = {
            name: int(grid[np.argmin(np.abs(grid - grid[-1] * min(ratio * generator.lognormal(0.0, SPREAD), 1.0)))])
            for name, grid in grids.items()
        }
        if tuple(keep.values()) not in seen:
            seen.add(tuple(keep.values()))
            yield keep


def whole_us(model: bytes, shape: tuple[int, ...], *, threads: int, seconds: float) -> Runs:
    """Time single images ``[1, *shape]`` through a session without profiler."""
    from edgecompress.exporters.runners import OnnxRuntimeRunner

    runner = OnnxRuntimeRunner(model, threads=threads)
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    return run_until_steady(lambda: runner.run(image), seconds)


def measure_network(
    network: Network, graph: Graph, keep: Mapping[str, int], dtype: str, *, threads: int, seconds: float, now: str
) -> NetworkRow:
    """Measure one pruned version, given as ``graph``."""
    runs = whole_us(model_bytes(graph, dtype), graph.shapes[graph.inputs[0]], threads=threads, seconds=seconds)
    times = runs.wall_us[runs.quiet]
    p10, median, p90 = (float(value) for value in np.percentile(times, (10, 50, 90)))
    built = kernels(network, policy_at(network, keep, dtype))
    return NetworkRow(
        network=network_id(built), dtype=dtype, keep_channels=dict(keep), median_us=median, p10_us=p10, p90_us=p90,
        n_runs=len(times), contended=runs.contended, measured_at=now,
    )  # fmt: skip


def networks_file(table: Path) -> Path:
    """Where the whole networks of the table at ``table`` lie."""
    return table.with_suffix(".networks.jsonl")


def read_networks(table: Path) -> list[NetworkRow]:
    """All measured networks beside the table at ``table``; a line torn by a kill is left out.

    Raises:
        BadFileError: a line that is no measured network.
    """
    path = networks_file(table)
    return read_lines(path, NetworkRow, "measured networks of the latency table") if path.exists() else []


def fitted_rows(rows: Sequence[NetworkRow], network: str, held_out: Sequence[Mapping[str, int]]) -> list[NetworkRow]:
    """The rows of ``network`` but for the versions that only check the correction."""
    return [row for row in rows if row.network == network and row.keep_channels not in held_out]


def averaged(rows: Sequence[NetworkRow]) -> list[NetworkRow]:
    """One row per sub-network and precision: the mean of its sessions. Where a network's data comes to lie in the shared
    cache differs from session to session, and with it the time of networks that fill the cache."""
    groups: dict[tuple[str, str, tuple[tuple[str, int], ...]], list[NetworkRow]] = {}
    for row in rows:
        groups.setdefault((row.network, row.dtype, tuple(row.keep_channels.items())), []).append(row)
    return [
        own[0].model_copy(update={"median_us": float(np.mean([row.median_us for row in own]))})
        for own in groups.values()
    ]


def corrections_of(model: TableModel, network: Network, rows: Sequence[NetworkRow]) -> list[Correction]:
    """Fit a correction per precision to those of ``rows`` that are versions of ``network``."""
    own = network_id(kernels(network, CompressionPolicy(model=network.model)))
    found = []
    for dtype in sorted({row.dtype for row in rows}):
        samples = []
        for row in averaged([row for row in rows if row.network == own and row.dtype == dtype]):
            policy = policy_at(network, row.keep_channels, dtype)
            built = kernels(network, policy)
            sums = model.sums(built, edges(network, policy))
            samples.append(Sample(sums, model.weight_bytes(built, dtype), row.median_us))
        correction = fit(own, dtype, samples)
        if correction is not None:
            found.append(correction)
    return found


def check(model: TableModel, network: Network, row: NetworkRow) -> Check:
    """What the table predicts for a measured network."""
    policy = policy_at(network, row.keep_channels, row.dtype)
    return Check(row.dtype, model(kernels(network, policy), edges(network, policy)).us, row.median_us)
