"""Whole networks on this machine: what they spend outside of their layers' kernels, and a held-out check of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgecompress.cost import Kernel, kernels
from edgecompress.graph import Graph
from edgecompress.latency_tables.measure import row_of
from edgecompress.latency_tables.onelayer import model_bytes
from edgecompress.latency_tables.points import widths
from edgecompress.latency_tables.predict import TableModel, other_key
from edgecompress.latency_tables.table import KernelKey, Row
from edgecompress.spec import CompressionPolicy, LayerChoice, Network


@dataclass(frozen=True)
class Check:
    """A pruned network that no row was made from: what the table predicts, and what it takes."""

    dtype: str
    predicted_us: float
    measured_us: float

    @property
    def error(self) -> float:
        """Signed error of the prediction, as a fraction of the measured time."""
        return self.predicted_us / self.measured_us - 1


def policy_at(network: Network, keep: Mapping[str, int], dtype: str) -> CompressionPolicy:
    """A policy with these widths and one precision everywhere."""
    bits = 8 if dtype == "int8" else 32
    choice = LayerChoice(weight_bits=bits, activation_bits=bits)
    return CompressionPolicy(
        model=network.model, keep_channels=dict(keep), layers={layer.name: choice for layer in network.layers}
    )


def keep_channels(network: Network, divisor: int, fraction: float, seed: int | None = None) -> dict[str, int]:
    """Each prunable group at the width of its grid nearest to ``fraction``, or with a seed at a random one."""
    generator = np.random.default_rng(seed) if seed is not None else None
    keep = {}
    for group in network.prunable_groups:
        grid = widths(group.width, divisor)
        keep[group.id] = (
            int(generator.choice(grid)) if generator else min(grid, key=lambda c: abs(c - fraction * group.width))
        )
    return keep


def whole_us(graph: Graph, dtype: str, *, threads: int, seconds: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Times of single images through a session without profiler, in microseconds, after a warm-up."""
    import time

    from edgecompress.exporters.runners import OnnxRuntimeRunner

    runner = OnnxRuntimeRunner(model_bytes(graph, dtype), threads=threads)
    image = np.random.default_rng(0).standard_normal((1, *graph.shapes[graph.inputs[0]])).astype(np.float32)
    end = time.perf_counter() + min(0.2, seconds)
    while time.perf_counter() < end:
        runner.run(image)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        runner.run(image)
        times.append((time.perf_counter() - start) * 1e6)
    return np.array(times)


def other_row(built: tuple[Kernel, ...], graph: Graph, model: TableModel, *, threads: int, seconds: float) -> Row:
    """What ``graph`` spends outside of the kernels ``built``: its time less the table's sum for them.

    That is pooling, additions, quantising the input and the session, less what the profiler added to the kernels.
    """
    dtype = "int8" if built[0].weight_bits == 8 else "fp32"
    times = whole_us(graph, dtype, threads=threads, seconds=seconds)
    layers = sum(model.kernel(kernel).us for kernel in built)
    rest = row_of(other_key(built, dtype), times, "whole_minus_kernels", "whole network")
    return replace(rest, median_us=rest.median_us - layers, p10_us=rest.p10_us - layers, p90_us=rest.p90_us - layers)


def held_other(model: TableModel, network: Network, dtype: str, divisor: int) -> list[tuple[dict[str, int], KernelKey]]:
    """The two widths at which the rest of ``network`` is measured (full, and about half), as widths and key."""
    found = []
    for fraction in (1.0, 0.5):
        keep = keep_channels(network, divisor, fraction)
        found.append((keep, other_key(kernels(network, policy_at(network, keep, dtype)), dtype)))
    return [pair for pair in found if pair[1] not in model.rows]


def check_table(built: tuple[Kernel, ...], graph: Graph, model: TableModel, *, threads: int, seconds: float) -> Check:
    """Predict and measure one pruned network."""
    dtype = "int8" if built[0].weight_bits == 8 else "fp32"
    measured = float(np.median(whole_us(graph, dtype, threads=threads, seconds=seconds)))
    return Check(dtype, model(built).us, measured)
