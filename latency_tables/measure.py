"""Measure kernels on this machine through ONNX Runtime: the runtime's own kernel times, with medians and spread.

What is taken is the profiler's time of the convolution or linear node alone: a one-layer graph also quantises,
transposes and reorders at its edges, which a network does not do at every layer. Weights and activations are warm in
the cache: right for small networks, optimistic for those whose weights outgrow it.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import MissingBackendError
from edgecompress.graph import Graph
from edgecompress.latency_tables.onelayer import model_bytes, one_layer, supported
from edgecompress.latency_tables.table import KernelKey, Provenance, Row, Setting, Status, Table, append_row

LAYER_KERNELS = (
    "Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "Gemm", "FusedGemm", "QGemm", "MatMul",
    "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
)  # fmt: skip
WARMUP_S = 0.05
WARMUP_RUNS = 5
BATCH_S = 0.005
MIN_BATCHES = 5
STEADY = 0.02  # MAD / median of the batches at which a point is done
MAX_RUNS = 1000  # reading the profiler's file takes longer than the runs themselves
ANCHOR = KernelKey("conv", 64, 64, 3, 3, 1, 1, 1, 14, 14, 14, 14, "fp32", "fp32")
ANCHOR_EVERY = 20
ANCHOR_S = 0.1
DRIFT = 0.05  # of the anchor, beyond which its points are measured again

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Times:
    """Microseconds of each run after the warm-up: of the layer kernels alone, and of the whole session (``wall``)."""

    layers_us: np.ndarray[Any, Any]
    wall_us: np.ndarray[Any, Any]
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """How a series of points ended; ``drift`` is the anchor's largest departure from its fastest time."""

    measured: int
    skipped: int
    unsupported: tuple[KernelKey, ...]
    drift: float


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


def machine_facts() -> dict[str, str]:
    """What identifies this machine and its state: CPU, the instructions that matter, cores, kernel, governor, load."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "asimd",
        "asimddp",
        "fphp",
        "i8mm",
        "sve",
    )
    name = info.get("model name") or _text_of("/proc/device-tree/model") or platform.processor() or platform.machine()
    return {
        "cpu": name,
        "cpu_model": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": " ".join(flag for flag in wanted if flag in flags),
        "cores": str(os.cpu_count() or 1),
        "kernel": platform.release(),
        "governor": _text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
    }


def device_id() -> str:
    """A short name that is equal on equal CPUs: ``amd-epyc-25-17-1-avx512_vnni``."""
    facts = machine_facts()
    best = next(
        (
            flag
            for flag in ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp")
            if flag in facts["flags"].split()
        ),
        "",
    )
    text = f"{facts['cpu']} {facts['cpu_model']} {best}".lower()
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def _cpu_info() -> dict[str, str]:
    text = _text_of("/proc/cpuinfo")
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def provenance(target: str, setting: Setting) -> Provenance:
    """The provenance of a table that is measured here and now."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("edgecompress")
    except PackageNotFoundError:
        own = "unknown (not installed)"
    return Provenance(
        target=target, setting=setting, machine=machine_facts(), edgecompress_version=own, created_at=_now()
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def measure_graph(graph: Graph, dtype: str, *, threads: int = 1, time_cap_s: float = 1.0, seed: int = 0) -> Times:
    """Run ``graph`` at batch 1 with the runtime's profiler on, until its batches are steady or the time is up."""
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
        warm, wall = _run_until_steady(lambda: session.run(None, {name: image}), time_cap_s)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _times(events, warm, wall)


def _run_until_steady(run: Callable[[], object], time_cap_s: float) -> tuple[int, list[float]]:
    """Warm up by time, then run batches. Returns how many runs were warm-up, and the wall time of each other, in us."""
    start = time.perf_counter()
    warm = 0
    while warm < WARMUP_RUNS or time.perf_counter() - start < min(WARMUP_S, time_cap_s):
        run()
        warm += 1
    one = (time.perf_counter() - start) / warm
    in_batch = max(1, min(round(BATCH_S / one), MAX_RUNS // MIN_BATCHES // 2))
    wall: list[float] = []
    medians: list[float] = []
    end = time.perf_counter() + time_cap_s
    while len(wall) < MAX_RUNS:
        for _ in range(in_batch):
            before = time.perf_counter()
            run()
            wall.append((time.perf_counter() - before) * 1e6)
        medians.append(float(np.median(wall[-in_batch:])))
        enough = len(medians) >= MIN_BATCHES and _mad(np.array(medians)) < STEADY * float(np.median(medians))
        if enough or time.perf_counter() > end:
            break
    return warm, wall


def _times(events: list[dict[str, Any]], warm: int, wall: list[float]) -> Times:
    """Sum the layer kernels of each run: the profiler writes one ``model_run`` at the end of each."""
    runs: list[float] = []
    kernels: dict[str, str] = {}
    layers_us = 0.0
    for event in sorted(events, key=lambda e: e["ts"] + e.get("dur", 0)):
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and operator in LAYER_KERNELS:
            layers_us += event["dur"]
            kernels[event["name"]] = operator
        elif event.get("cat") == "Session" and event["name"] == "model_run":
            runs.append(layers_us)
            layers_us = 0.0
    return Times(np.array(runs[warm:]), np.array(wall), tuple(kernels.values()))


def measure_kernel(key: KernelKey, *, threads: int = 1, time_cap_s: float = 1.0, seed: int = 0) -> Row:
    """Measure one kernel. A kind that no one-layer graph exists for gets the status ``unsupported``."""
    if not supported(key):
        return Row(key, 0.0, 0.0, 0.0, 0.0, 0, "node_time", "", "unsupported", _now())
    times = measure_graph(one_layer(key, seed), key.weight_dtype, threads=threads, time_cap_s=time_cap_s, seed=seed)
    return row_of(key, times.layers_us, "node_time", "+".join(times.kernels))


def row_of(key: KernelKey, us: np.ndarray[Any, Any], method: str, actual: str, status: Status = "ok") -> Row:
    """The statistics of ``us`` as a row. The profiler counts whole microseconds: the median of a fast kernel is refined
    by the mean of the middle half of its runs."""
    p10, low, high, p90 = (float(value) for value in np.percentile(us, (10, 25, 75, 90)))
    middle = us[(us >= low) & (us <= high)]
    median = max(float(middle.mean()), 0.1)
    return Row(key, median, _mad(us), p10, p90, len(us), method, actual, status, _now())


def _mad(values: np.ndarray[Any, Any]) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def measure_points(
    points: Sequence[KernelKey],
    table: Table,
    *,
    time_cap_s: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Done:
    """Measure every point that ``table`` does not hold yet and append it at once: a kill loses at most one.

    The order is random, so that a drift of the machine does not look like a trend over channels. Every `ANCHOR_EVERY`
    points one fixed kernel is measured: where it is over `DRIFT` slower than at its fastest, the points since the last
    anchor are measured once more, and marked ``contended`` if the anchor is slow again.

    Args:
        time_cap_s: seconds for one point after its warm-up.
        progress: called with points done, points to do, and the seconds left as far as can be told.
    """
    held = {key for key, row in table.rows.items() if row.status in ("ok", "unsupported")}
    todo = [key for key in dict.fromkeys(points) if key not in held]
    np.random.default_rng(seed).shuffle(todo)
    threads = table.provenance.setting.threads
    skipped = len(set(points)) - len(todo)
    unsupported: list[KernelKey] = []
    worst, best, start = 0.0, float("inf"), time.perf_counter()
    for first in range(0, len(todo), ANCHOR_EVERY):
        block = todo[first : first + ANCHOR_EVERY]
        for attempt in range(2):
            rows = []
            for number, key in enumerate(block):
                rows.append(measure_kernel(key, threads=threads, time_cap_s=time_cap_s, seed=seed))
                append_row(table, rows[-1])
                done = first + number + 1
                if progress is not None:
                    progress(done, len(todo), (time.perf_counter() - start) / done * (len(todo) - done))
            anchor = measure_kernel(ANCHOR, threads=threads, time_cap_s=max(time_cap_s, ANCHOR_S)).median_us
            best = min(best, anchor)
            if anchor <= best * (1 + DRIFT):
                break
            if attempt:
                for row in rows:
                    append_row(table, replace(row, status="contended" if row.status == "ok" else row.status))
        worst = max(worst, anchor / best - 1)
        unsupported += [row.key for row in rows if row.status == "unsupported"]
    return Done(len(todo), skipped, tuple(unsupported), worst)
