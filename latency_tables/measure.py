"""Measure kernels on this machine through ONNX Runtime: the runtime's own kernel times, with medians and spread.

What is taken of a layer is the profiler's time of its convolution or linear node alone: a one-layer graph also
quantises, transposes and reorders at its ends, which a network does not do at every layer. Those ends, and the
operators without weights, are rows of their own (`around_edge`).
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.errors import MissingBackendError
from edgecompress.graph import Graph
from edgecompress.latency_tables.machine import device_id, machine_facts
from edgecompress.latency_tables.onelayer import around_edge, model_bytes, one_layer, supported
from edgecompress.latency_tables.table import (
    EDGES,
    KernelKey,
    Provenance,
    Row,
    Setting,
    Status,
)

LAYER_KERNELS = (
    "Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "Gemm", "FusedGemm", "QGemm", "MatMul",
    "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
)  # fmt: skip
FUSED = ("add", "multiply", "sigmoid", "hard_sigmoid", "hard_swish", "leaky_relu", "softmax")  # timed by difference
WARMUP_S = 0.05
WARMUP_RUNS = 5
BATCH_S = 0.005
MIN_BATCHES = 5
STEADY = 0.02  # MAD / median of the batches at which a point is done
MIN_RUNS = 10
QUIET = 0.05  # of the fastest batch, up to which a batch counts as undisturbed
MAX_RUNS = 1000  # reading the profiler's file takes longer than the runs themselves
SWEEP_BYTES = 1 << 27  # more than the caches of any CPU here

Floats = NDArray[np.float64]
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Times:
    """Microseconds of each quiet run: of the layer kernels, and of the other nodes before, between and after them.

    ``kernels`` are the operators that the runtime ran for layers, ``others`` the rest.
    """

    layers_us: Floats
    before_us: Floats
    between_us: Floats
    after_us: Floats
    kernels: tuple[str, ...]
    others: tuple[str, ...]
    contended: bool = False


def this_setting(threads: int = 1) -> Setting:
    """Device, runtime and threads as they are here.

    Raises:
        MissingBackendError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingBackendError(
            "ONNX Runtime is not installed here: 'pip install onnxruntime', then profile."
        ) from error
    return Setting(
        device=device_id(), runtime="ONNX Runtime", runtime_version=onnxruntime.__version__,
        provider="CPUExecutionProvider", threads=threads,
    )  # fmt: skip


def provenance(target: str, setting: Setting) -> Provenance:
    """The provenance of a table that is measured here and now."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("edgecompress")
    except PackageNotFoundError:
        own = "unknown (not installed)"
    return Provenance(
        target=target, setting=setting, machine=machine_facts(), edgecompress_version=own, created_at=now()
    )


def now() -> str:
    """The time of a measurement, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def measure_graph(
    graph: Graph, dtype: str, *, threads: int = 1, time_cap_s: float = 1.0, seed: int = 0, cold: bool = False
) -> Times:
    """Run ``graph`` at batch 1 with the runtime's profiler on, until its batches are steady or the time is up.

    Args:
        cold: sweep the caches before every run, so that weights come from memory.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            model_bytes(graph, dtype, seed), options, providers=["CPUExecutionProvider"]
        )
        name = graph.inputs[0]
        image = np.random.default_rng(seed).standard_normal((1, *graph.shapes[name])).astype(np.float32)
        sweep = _Sweep() if cold else None
        runs = run_until_steady(lambda: session.run(None, {name: image}), time_cap_s, MAX_RUNS, sweep)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _times(events, runs)


@dataclass(frozen=True)
class Runs:
    """Wall times of single runs in microseconds after ``warm`` runs of warm-up, and which of them nothing disturbed.

    Another process on the machine shows as slow batches: `quiet` are the runs of batches whose median is at most `QUIET`
    above the fastest batch's. ``contended`` says that fewer than half of the batches were.
    """

    warm: int
    wall_us: Floats
    quiet: NDArray[np.bool_]
    contended: bool


class _Sweep:
    """Fills every cache with something else."""

    def __init__(self) -> None:
        self._buffer = np.zeros(SWEEP_BYTES, np.uint8)

    def __call__(self) -> None:
        self._buffer += 1


def run_until_steady(
    run: Callable[[], object],
    time_cap_s: float,
    most_runs: int | None = None,
    before_each: Callable[[], object] | None = None,
) -> Runs:
    """Warm up by time, then run batches until `MIN_BATCHES` quiet ones agree to `STEADY`, or the time is up.

    ``before_each`` is called before each run of a batch and not timed.
    """
    start = time.perf_counter()
    warm = 0
    while warm < WARMUP_RUNS or time.perf_counter() - start < min(WARMUP_S, time_cap_s):
        run()
        warm += 1
    one = (time.perf_counter() - start) / warm
    in_batch = max(1, round(BATCH_S / one))
    if most_runs is not None:
        in_batch = min(in_batch, max(1, most_runs // MIN_BATCHES // 4))
    wall: list[float] = []
    medians: list[float] = []
    end = time.perf_counter() + time_cap_s
    while most_runs is None or len(wall) < most_runs:
        for _ in range(in_batch):
            if before_each is not None:
                before_each()
            before = time.perf_counter()
            run()
            wall.append((time.perf_counter() - before) * 1e6)
        medians.append(float(np.median(wall[-in_batch:])))
        quiet = _quiet(medians)
        settled = quiet[quiet > 0]
        enough = len(settled) >= MIN_BATCHES and _mad(settled) < STEADY * float(np.median(settled))
        if (enough and len(wall) >= MIN_RUNS) or time.perf_counter() > end:
            break
    calm = _quiet(medians) > 0
    return Runs(warm, np.array(wall), np.repeat(calm, in_batch), bool(2 * calm.sum() < len(calm)))


def _quiet(medians: Sequence[float]) -> Floats:
    """The medians of quiet batches; zero for the others."""
    values = np.array(medians)
    result: Floats = np.where(values <= values.min() * (1 + QUIET), values, 0.0)
    return result


def _times(events: list[dict[str, Any]], taken: Runs) -> Times:
    """Sum the kernels of each run: the profiler writes one ``model_run`` at the end of each."""
    runs: list[tuple[float, float, float, float]] = []
    layers: dict[str, str] = {}
    others: dict[str, str] = {}
    nodes: list[tuple[bool, float]] = []
    for event in sorted(events, key=lambda e: e["ts"] + e.get("dur", 0)):
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            is_layer = operator in LAYER_KERNELS
            nodes.append((is_layer, float(event["dur"])))
            (layers if is_layer else others)[event["name"]] = operator
        elif event.get("cat") == "Session" and event["name"] == "model_run":
            runs.append(_parts(nodes))
            nodes = []
    by_part = np.array(runs[taken.warm :]).reshape(-1, 4)[taken.quiet].T
    return Times(
        by_part[0], by_part[1], by_part[2], by_part[3], tuple(layers.values()), tuple(others.values()), taken.contended
    )


def _parts(nodes: list[tuple[bool, float]]) -> tuple[float, float, float, float]:
    """Time of the layers, and of the other nodes before the first, between, and after the last of them."""
    where = [position for position, (is_layer, _) in enumerate(nodes) if is_layer]
    first, last = (where[0], where[-1]) if where else (len(nodes), len(nodes))
    layers = before = between = after = 0.0
    for position, (is_layer, us) in enumerate(nodes):
        if is_layer:
            layers += us
        elif position < first:
            before += us
        elif position < last:
            between += us
        else:
            after += us
    return layers, before, between, after


def measure_kernel(key: KernelKey, *, threads: int = 1, time_cap_s: float = 1.0, seed: int = 0) -> Row:
    """Measure one kernel. A kind that no graph exists for gets the status ``unsupported``."""
    if not supported(key):
        return Row(key, 0.0, 0.0, 0.0, 0.0, 0, "node_time", "", "unsupported", now())

    def run(graph: Graph) -> Times:
        cold = key.working_set == "cold"
        return measure_graph(graph, key.weight_dtype, threads=threads, time_cap_s=time_cap_s, seed=seed, cold=cold)

    if key.kind not in EDGES:
        times = run(one_layer(key, seed))
        return row_of(key, times.layers_us, "node_time", "+".join(times.kernels), _status(times))
    times = run(around_edge(key, present=True, seed=seed))
    others = "+".join(times.others)
    if key.kind in ("input", "output"):
        own = times.before_us if key.kind == "input" else times.after_us
        return row_of(key, own, "node_time", others, _status(times))
    without = run(around_edge(key, present=False, seed=seed))
    if len(times.others) > len(without.others) or key.kind not in FUSED:
        return row_of(key, times.between_us, "node_time", others, _status(times))
    base = middle(without.layers_us)
    return row_of(key, times.layers_us - base, "fused", "+".join(times.kernels), _status(times, without))


def _status(*series: Times) -> Status:
    return "contended" if any(times.contended for times in series) else "ok"


def row_of(key: KernelKey, us: Floats, method: str, actual: str, status: Status = "ok") -> Row:
    """The statistics of ``us`` as a row; its median is refined by `middle`."""
    p10, p90 = (float(value) for value in np.percentile(us, (10, 90)))
    median = middle(us)
    if key.kind not in EDGES:
        median = max(median, 0.1)
    return Row(key, max(median, 0.0), _mad(us), max(p10, 0.0), max(p90, 0.0), len(us), method, actual, status, now())


def middle(us: Floats) -> float:
    """The mean of the middle half: finer than the median where times are whole microseconds."""
    low, high = np.percentile(us, (25, 75))
    return float(us[(us >= low) & (us <= high)].mean())


def _mad(values: Floats) -> float:
    return float(np.median(np.abs(values - np.median(values))))
