"""Measure kernels on the machine where this file runs: the measuring core of edgecompress, and its agent on a device.

The package imports it to measure here. On a device it stands alone: it needs Python 3.8 or later, numpy, and
onnxruntime (or tensorrt 8.5 or later with build_on_device.py beside it), nothing else. Beside job.json and models/:
  python3 agent.py
One JSON line per row goes to stdout and is appended to rows.jsonl: stop it at any time, the same command goes on.
Exit codes: 0 done, 1 a point or the device failed, 4 no runtime, 5 disk full, 6 the clock is throttled, 7 busy.
"""

# No syntax or library later than Python 3.8, and no import of edgecompress (tests hold both).
from __future__ import annotations

import argparse
import errno
import glob
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

try:
    import numpy as np
except ImportError:
    sys.exit("There is no Python module numpy for " + sys.executable + ". Install it: pip install numpy onnxruntime.")

WARMUP_S = 0.05
WARMUP_RUNS = 5
BATCH_S = 0.005
MIN_BATCHES = 5
STEADY = 0.02  # MAD / median of the batches at which a point is done
MIN_RUNS = 10
QUIET = 0.05  # of the fastest batch, up to which a batch counts as undisturbed
SWEEP_BYTES = 1 << 27  # more than the caches of any CPU here
MAX_RUNS = 1000  # reading the profiler's file takes longer than the runs themselves
ANCHOR_EVERY = 20
DRIFT = 0.05  # of the anchor, beyond which its points are measured again
WORST_SHARE = 0.05  # of all points, the least steady ones, which are measured once more at the end
STOLEN = 0.05  # share of the time that a hypervisor may have given to others
COOLING_S = 60.0  # how long a throttled device is waited for before it is given up
SILENCE_S = 60.0  # without a sign of life from the other end of the line after which the agent ends
NO_RUNTIME, DISK_FULL, THROTTLED, BUSY = 4, 5, 6, 7

Point = TypeVar("Point", bound=Hashable)
Floats = Any  # an array of float64, which Python 3.8 cannot say at runtime


class Problem(Exception):
    """Something the user has to change; ``code`` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        Exception.__init__(self, message)
        self.code = code


# --- one point ---------------------------------------------------------------------------------------------------------


class Runs:
    """Wall times of single runs in microseconds after ``warm`` runs of warm-up, and which of them nothing disturbed.

    Another process on the machine shows as slow batches: ``quiet`` are the runs of batches whose median is at most
    `QUIET` above the fastest batch's. ``contended`` says that fewer than half of the batches were.
    """

    def __init__(self, warm: int, wall_us: Floats, quiet: Any, contended: bool) -> None:
        self.warm, self.wall_us, self.quiet, self.contended = warm, wall_us, quiet, contended


class Times:
    """Microseconds of each quiet run by part: of the layer kernels, and of the other nodes before, between and after.

    ``kernels`` are the operators that the runtime ran for layers, ``others`` the rest.
    """

    def __init__(
        self, parts: dict[str, Floats], kernels: tuple[str, ...], others: tuple[str, ...], contended: bool
    ) -> None:
        self.parts, self.kernels, self.others, self.contended = parts, kernels, others, contended


class Sweep:
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
        enough = len(settled) >= MIN_BATCHES and mad(settled) < STEADY * float(np.median(settled))
        if (enough and len(wall) >= MIN_RUNS) or time.perf_counter() > end:
            break
    calm = _quiet(medians) > 0
    return Runs(warm, np.array(wall), np.repeat(calm, in_batch), bool(2 * calm.sum() < len(calm)))


def _quiet(medians: Sequence[float]) -> Floats:
    """The medians of quiet batches; zero for the others."""
    values = np.array(medians)
    result: Floats = np.where(values <= values.min() * (1 + QUIET), values, 0.0)
    return result


def node_times(events: Iterable[dict[str, Any]], taken: Runs, operators: Iterable[str]) -> Times:
    """Sum the nodes of each run; ``operators`` are those of layers.

    ``events`` are those of ONNX Runtime's profiler, which writes one ``model_run`` at the end of each run.
    """
    wanted = frozenset(operators)
    runs: list[tuple[float, float, float, float]] = []
    layers: dict[str, str] = {}
    others: dict[str, str] = {}
    nodes: list[tuple[bool, float]] = []
    for event in sorted(events, key=lambda e: e["ts"] + e.get("dur", 0)):
        operator = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.append((operator in wanted, float(event["dur"])))
            (layers if operator in wanted else others)[event["name"]] = operator
        elif event.get("cat") == "Session" and event["name"] == "model_run":
            runs.append(_parts(nodes))
            nodes = []
    by_part = np.array(runs[taken.warm :]).reshape(-1, 4)[taken.quiet].T
    parts = dict(zip(("layers", "before", "between", "after"), by_part))  # noqa: B905
    return Times(parts, tuple(layers.values()), tuple(others.values()), taken.contended)


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


def middle(us: Floats) -> float:
    """The mean of the middle half: finer than the median where times are whole microseconds."""
    if len(us) < 3:  # two values have nothing between their quartiles
        return float(np.mean(us))
    low, high = np.percentile(us, (25, 75))
    return float(us[(us >= low) & (us <= high)].mean())


def mad(values: Any) -> float:
    """Median absolute deviation from the median."""
    return float(np.median(np.abs(np.asarray(values) - np.median(values))))


def statistics(us: Any, smallest: float = 0.1) -> dict[str, Any]:
    """Of one point's runs; the median is refined by `middle` and is at least ``smallest``."""
    values = np.asarray(us, dtype=float)
    p10, p90 = (max(float(value), 0.0) for value in np.percentile(values, (10, 90)))
    median = max(middle(values), smallest)
    return {"median_us": median, "mad_us": mad(values), "p10_us": p10, "p90_us": p90, "n_runs": len(values)}


def now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


# --- a series of points ------------------------------------------------------------------------------------------------


def measure_series(
    points: Sequence[Point],
    measure: Callable[[Point], dict[str, Any]],
    write: Callable[[Point, dict[str, Any]], None],
    anchor_us: Callable[[], float],
    every: int = ANCHOR_EVERY,
    drift: float = DRIFT,
) -> list[float]:
    """Measure ``points`` in their order (random, so that a drift does not look like a trend) and write each row at once.

    Every ``every`` points one fixed kernel, the anchor, is measured: where it is over ``drift`` slower than at its
    fastest, the points since the last anchor are measured once more, and marked ``contended`` if it is slow again. At
    the end the `WORST_SHARE` least steady and the contended points are measured once more; a steadier row replaces the
    earlier one, unless the anchor is still slow.

    Args:
        measure: one row: median_us, mad_us, status and whatever else ``write`` stores.
        write: a later row of a point replaces an earlier one.

    Returns:
        The anchor's times in microseconds, in order.
    """
    if not points:
        return []
    anchors = [anchor_us()]
    kept: dict[Point, dict[str, Any]] = {}
    for first in range(0, len(points), every):
        block = points[first : first + every]
        for _ in range(2):
            for point in block:
                kept[point] = measure(point)
                write(point, kept[point])
            anchors.append(anchor_us())
            if anchors[-1] <= min(anchors) * (1 + drift):
                break
        else:
            for point in block:
                if kept[point]["status"] == "ok":
                    kept[point] = dict(kept[point], status="contended")
                    write(point, kept[point])
    again = {point: measure(point) for point in _worst(kept)}
    if again:
        anchors.append(anchor_us())
    slow = anchors[-1] > min(anchors) * (1 + drift)
    for point, row in again.items():
        if (
            row["status"] == "ok"
            and not slow
            and (kept[point]["status"] != "ok" or _spread(row) < _spread(kept[point]))
        ):
            write(point, row)
    return anchors


def _worst(rows: dict[Point, dict[str, Any]]) -> list[Point]:
    contended = [point for point, row in rows.items() if row["status"] == "contended"]
    unsteady = [point for point, row in rows.items() if row["status"] == "ok" and _spread(row) > STEADY]
    unsteady.sort(key=lambda point: -_spread(rows[point]))
    return contended + unsteady[: math.ceil(WORST_SHARE * len(rows))]


def _spread(row: dict[str, Any]) -> float:
    """Dispersion beyond what counting whole microseconds explains."""
    return float((row["mad_us"] - 1) / max(row["median_us"], 1.0))


# --- the machine -------------------------------------------------------------------------------------------------------


def machine_facts() -> dict[str, str]:
    """What identifies this machine and its state: CPU, the instructions that matter, cores, kernel, governor, load."""
    text = text_of("/proc/cpuinfo")
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    flags = (info.get("flags") or info.get("Features") or "").split()
    wanted = (
        "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "fphp", "i8mm", "sve",
    )  # fmt: skip
    board = text_of("/proc/device-tree/model")
    return {
        "cpu": info.get("model name") or board or platform.processor() or platform.machine(),
        "cpu_model": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": " ".join(flag for flag in wanted if flag in flags),
        "cores": str(os.cpu_count() or 1),
        "architecture": platform.machine(),
        "board": board,
        "kernel": platform.release(),
        "governor": text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "load": load(),
    }


def device_id(facts: dict[str, str]) -> str:
    """A short name that is equal on equal CPUs: ``amd-epyc-25-17-1-avx512_vnni``."""
    known = facts["flags"].split()
    best = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp")
    name = next((flag for flag in best if flag in known), "")
    text = (facts["cpu"] + " " + facts["cpu_model"] + " " + name).lower()
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def state() -> dict[str, str]:
    """What may change while measuring: load, clocks of the cores, temperatures, throttling."""
    clocks = sorted(glob.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    heat = sorted(glob.glob("/sys/class/thermal/thermal_zone*/temp"))
    return {
        "load": load(),
        "clock_khz": " ".join(text_of(path) for path in clocks) or "unknown",
        "millidegrees": " ".join(text_of(path) for path in heat) or "unknown",
        "throttled": "yes" if throttled() else "no",
    }


def load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def throttled() -> bool:
    """Whether the firmware holds the clock down right now (Raspberry Pi: the lower four bits of ``get_throttled``)."""
    text = text_of("/sys/devices/platform/soc/soc:firmware/get_throttled")
    if not text and shutil.which("vcgencmd"):
        text = ask("vcgencmd", "get_throttled").partition("=")[2]
    try:
        return bool(int(text, 16) & 0xF)
    except ValueError:
        return False


def stolen() -> tuple[int, int]:
    """Ticks that a hypervisor gave to others, and ticks of all kinds, since the machine started."""
    fields = text_of("/proc/stat").partition("\n")[0].split()[1:]
    ticks = [int(field) for field in fields] if len(fields) >= 8 else [0] * 8
    return ticks[7], sum(ticks[:8])


def ask(*command: str) -> str:
    """What ``command`` prints, or nothing."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def text_of(path: str) -> str:
    """A small file of the system, or nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\0\n ")
    except OSError:
        return ""


# --- the runtimes ------------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """Times nodes (``method`` "node_time": the profiler's kernel time of ``operators``) or whole sessions."""

    def __init__(self, threads: int = 1) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise Problem(
                f"There is no Python module onnxruntime for {sys.executable}. Install it: pip install onnxruntime.",
                NO_RUNTIME,
            ) from error
        self.module, self.threads = onnxruntime, threads

    def facts(self) -> dict[str, str]:
        return {
            "runtime": "ONNX Runtime", "runtime_version": self.module.__version__, "provider": "CPUExecutionProvider",
        }  # fmt: skip

    def warnings(self) -> list[str]:
        governor = text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        if governor and governor != "performance":
            return [
                f"The clock is not fixed: the governor is '{governor}'. For repeatable times set 'performance' first: "
                "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor."
            ]
        return []

    def measure(self, models: Sequence[Any], point: dict[str, Any], time_cap_s: float) -> dict[str, Any]:
        """Statistics of ``models`` (paths or bytes: the point, and where it has one the same without what is timed)."""
        if point["method"] == "session":
            wall = self._run(models[0], False, False, time_cap_s)[0]
            return _measured(wall.wall_us[wall.quiet], "session", "whole network", wall.contended)
        times = self.times(models[0], point, time_cap_s)
        if len(models) == 1:
            ran = times.kernels if point["part"] == "layers" else times.others
            smallest = 0.1 if point["part"] == "layers" else 0.0
            return _measured(times.parts[point["part"]], "node_time", "+".join(ran), times.contended, smallest)
        without = self.times(models[1], point, time_cap_s)
        if len(times.others) > len(without.others) or not point["fused"]:
            return _measured(times.parts["between"], "node_time", "+".join(times.others), times.contended, 0.0)
        more = times.parts["layers"] - middle(without.parts["layers"])
        return _measured(more, "fused", "+".join(times.kernels), times.contended or without.contended, 0.0)

    def times(self, model: Any, point: dict[str, Any], time_cap_s: float) -> Times:
        """Times of the nodes of ``model`` under the profiler."""
        runs, events = self._run(model, True, point["cold"], time_cap_s)
        return node_times(events, runs, point["operators"])

    def _run(self, model: Any, profiled: bool, cold: bool, time_cap_s: float) -> tuple[Runs, list[dict[str, Any]]]:
        options = self.module.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = profiled
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = os.path.join(folder, "profile")
            session = self.module.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            feed = {entry.name: _random(entry) for entry in session.get_inputs()}
            most = MAX_RUNS if profiled else None
            runs = run_until_steady(lambda: session.run(None, feed), time_cap_s, most, Sweep() if cold else None)
            if not profiled:
                return runs, []
            with open(session.end_profiling(), encoding="utf-8") as file:
                return runs, json.load(file)


def _measured(us: Floats, method: str, actual: str, contended: bool, smallest: float = 0.1) -> dict[str, Any]:
    status = "contended" if contended else "ok"
    return {**statistics(us, smallest), "method": method, "actual_kernel": actual, "status": status}


def _random(entry: Any) -> Any:
    """Standard normal numbers (or bytes) for one input of a session, with 1 for each open dimension."""
    shape = [size if isinstance(size, int) else 1 for size in entry.shape]
    values = np.random.default_rng(0).standard_normal(shape)
    kinds = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(uint8)": np.uint8,
        "tensor(int8)": np.int8,
    }
    kind = kinds[entry.type]
    return (np.abs(values) * 40).astype(kind) if "int8" in entry.type else values.astype(kind)


class TensorRT:
    """Builds one engine per point and times it between CUDA events, without transfers (``method`` "engine").

    The calls of TensorRT and CUDA are those of build_on_device.py, which travels beside this file.
    """

    def __init__(self, threads: int = 1) -> None:
        try:
            import tensorrt
        except ImportError as error:
            raise Problem(
                f"There is no Python module tensorrt for {sys.executable}. On a Jetson it comes with JetPack: sudo apt "
                "install python3-libnvinfer, then use the system's python3.",
                NO_RUNTIME,
            ) from error
        import build_on_device  # type: ignore[import-not-found]  # beside this file on the device

        self.trt, self.tools = tensorrt, build_on_device
        try:
            self.cuda = build_on_device.Cuda()
            self.gpu, self.capability = self.cuda.device()
        except build_on_device.Problem as problem:
            raise Problem(str(problem), NO_RUNTIME) from problem
        self.power = build_on_device.power_state()

    def facts(self) -> dict[str, str]:
        return {"runtime": "TensorRT", "runtime_version": self.trt.__version__, "provider": "GPU"}

    def machine(self) -> dict[str, str]:
        """The GPU and its power state, as far as the tools on the device tell."""
        capability = ".".join(str(number) for number in self.capability)
        return {"gpu": self.gpu, "compute_capability": capability, **{k: str(v) for k, v in self.power.items()}}

    def warnings(self) -> list[str]:
        if self.power["gpu_clock_locked"]:
            return []
        known = "is not locked" if self.power["gpu_clock_locked"] is False else "may not be locked"
        return [f"The GPU clock {known}: for repeatable times run 'sudo nvpmodel -m 0' and 'sudo jetson_clocks' first."]

    def measure(self, models: Sequence[Any], point: dict[str, Any], time_cap_s: float) -> dict[str, Any]:
        """Statistics of the GPU's time; ``actual_kernel`` are the engine's layers with the precision that they really have.

        What stands between layers is the difference of two engines.
        """
        us, actual, contended = self._time(models[0], point, time_cap_s)
        if len(models) == 1:
            return _measured(us, "engine", actual, contended)
        without, _, also = self._time(models[1], point, time_cap_s)
        return _measured(us - middle(without), "fused", actual, contended or also, 0.0)

    def _time(self, model: Any, point: dict[str, Any], time_cap_s: float) -> tuple[Floats, str, bool]:
        with open(model, "rb") as file:
            data = file.read()
        args = self.tools.parse_arguments(["--fp16"] if point["dtype"] != "fp32" else [])
        quantized = point["dtype"] == "int8"
        if quantized and self.tools.version_of(self.trt.__version__) >= (11,):
            args.fp16 = False  # strongly typed: the file decides
        typed, flags = self.tools.choose_flags(
            self.tools.version_of(self.trt.__version__), self.capability, quantized, args
        )
        plan = self.tools.build_plan(self.trt, data, typed, flags, args)
        engine = self.trt.Runtime(self.trt.Logger(self.trt.Logger.WARNING)).deserialize_cuda_engine(plan)
        if engine is None:
            raise Problem("The engine was built but cannot be loaded.")
        inspector = engine.create_engine_inspector()
        layers = self.tools.layer_precisions(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))
        session = self.tools.Session(self.trt, engine, self.cuda, 1)
        start, end = self.cuda.new("cudaEventCreate"), self.cuda.new("cudaEventCreate")
        times: list[float] = []

        def run() -> None:
            self.cuda.call("cudaEventRecord", start, session.stream)
            session.enqueue()
            self.cuda.call("cudaEventRecord", end, session.stream)
            self.cuda.call("cudaStreamSynchronize", session.stream)
            times.append(self.cuda.elapsed_us(start, end))

        try:
            runs = run_until_steady(run, time_cap_s)
        finally:
            for event in (start, end):
                self.cuda.call("cudaEventDestroy", event)
            for address in session.addresses:
                self.cuda.call("cudaFree", self.tools.ctypes.c_void_p(address))
            self.cuda.call("cudaStreamDestroy", session.stream)
        actual = "+".join("{type} {precision}".format(**layer) for layer in layers)
        return np.array(times[runs.warm :])[runs.quiet], actual, runs.contended


BACKENDS: dict[str, Any] = {"ONNX Runtime": OnnxRuntime, "TensorRT": TensorRT}


# --- a job -------------------------------------------------------------------------------------------------------------


class Output:
    """Records as JSON lines: on stdout, and appended to ``path`` at once, so that a kill loses at most one."""

    def __init__(self, path: str) -> None:
        self.path = path

    def held(self) -> list[dict[str, Any]]:
        """What an earlier start left; a last line torn by a kill is cut off the file."""
        try:
            with open(self.path, "rb") as file:
                whole, newline, torn = file.read().rpartition(b"\n")
        except OSError:
            return []
        if torn:
            with open(self.path, "r+b") as file:
                file.truncate(len(whole) + len(newline))
        return [json.loads(line) for line in whole.splitlines()]

    def __call__(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, sort_keys=True) + "\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                folder = os.path.dirname(self.path)
                raise Problem(
                    f"The disk of the device is full at {folder}. Free some space there.", DISK_FULL
                ) from error
            raise


def measure_point(backend: Any, folder: str, point: dict[str, Any], time_cap_s: float) -> dict[str, Any]:
    """One row. A model that the runtime refuses is ``failed``; disturbed times are ``contended`` or ``throttled``."""
    steal, ticks = stolen()
    try:
        row = backend.measure([os.path.join(folder, model) for model in point["models"]], point, time_cap_s)
    except (KeyboardInterrupt, SystemExit, MemoryError, BrokenPipeError):
        raise
    except Exception as error:  # whatever a runtime throws; the series goes on
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        zero = dict.fromkeys(("median_us", "mad_us", "p10_us", "p90_us"), 0.0)
        return {
            **zero, "n_runs": 0, "method": point["method"], "actual_kernel": "", "status": "failed",
            "measured_at": now(), "why": first[:300],
        }  # fmt: skip
    more_steal, more_ticks = stolen()
    if more_steal - steal > STOLEN * max(more_ticks - ticks, 1):
        row["status"] = "contended"
    if throttled():
        row["status"] = "throttled"
    return {**row, "measured_at": now()}


def run_job(folder: str, emit: Output, say: Callable[[str], None]) -> None:
    """Measure what ``rows.jsonl`` of ``folder`` does not hold yet of its ``job.json``."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    backend = BACKENDS[job["runtime"]](job["threads"])
    machine = machine_facts()
    machine.update(backend.machine() if hasattr(backend, "machine") else {})
    facts = {"device": device_id(machine), **backend.facts(), "threads": job["threads"], "batch": 1}
    if "gpu" in machine:
        facts["device"] = "-".join(machine["gpu"].lower().split())
    held = emit.held()
    for record in held:
        if "setting" in record and record["setting"] != facts:
            raise Problem(
                f"{emit.path} was begun with {record['setting']}, here is {facts}. Move rows.jsonl away to begin anew."
            )
    emit({"setting": facts, "machine": machine, "state": state(), "at": now()})
    for warning in backend.warnings():
        emit({"note": warning})
        say(warning)
    done = {record["id"] for record in held if record.get("status") in ("ok", "unsupported", "failed")}
    points = {point["id"]: point for point in job["points"] if point["id"] not in done}
    start, count = time.perf_counter(), [0]

    def measure(name: str) -> dict[str, Any]:
        return _unthrottled(lambda: measure_point(backend, folder, points[name], job["time_cap_s"]), emit, say)

    def write(name: str, row: dict[str, Any]) -> None:
        emit({"id": name, **row})
        count[0] += 1
        left = (time.perf_counter() - start) / count[0] * max(len(points) - count[0], 0)
        say(f"{count[0]} of {len(points)}, about {left:.0f} s left")

    def anchor_us() -> float:
        row = measure_point(backend, folder, job["anchor"], max(job["time_cap_s"], job["anchor_s"]))
        if row["status"] == "failed":
            raise Problem(f"{facts['runtime']} {facts['runtime_version']} cannot run a plain convolution: {row['why']}")
        emit({"anchor_us": row["median_us"], "at": now()})
        return float(row["median_us"])

    measure_series(list(points), measure, write, anchor_us)
    emit({"done": True, "state": state(), "at": now()})


def _unthrottled(measure: Callable[[], dict[str, Any]], emit: Output, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; while the clock is throttled, wait for the device to cool down and measure again."""
    end = time.perf_counter() + COOLING_S
    row = measure()
    while row["status"] == "throttled":
        if time.perf_counter() > end:
            heat = state()["millidegrees"]
            raise Problem(
                f"The device throttles its clock and did not recover in {COOLING_S:.0f} s (temperatures {heat} "
                "millidegrees). Cool it or give it a stronger supply, then repeat the command.",
                THROTTLED,
            )
        say("the clock is throttled; waiting for the device to cool down")
        time.sleep(min(5.0, COOLING_S / 4))
        row = measure()
    return row


def hold_device(wait_s: float = 15.0) -> Any:
    """Hold the one place for a measurement on this device (a socket's name: nothing to clean up), or a `Problem`."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    end = time.monotonic() + wait_s
    while sys.platform.startswith("linux"):
        try:
            lock.bind("\0edgecompress-agent")
            break
        except OSError as error:
            if time.monotonic() > end:
                lock.close()
                raise Problem("Another measurement runs on this device. Wait for its end.", BUSY) from error
            time.sleep(0.2)
    return lock


def end_with_the_line(stream: Any) -> None:
    """End this process when ``stream``, the other end's sign of life, closes or stays silent."""
    import select

    def watch() -> None:
        while select.select([stream], [], [], SILENCE_S)[0] and os.read(stream.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default=os.path.dirname(os.path.abspath(__file__)), help="folder; by default this one")
    parser.add_argument("--tethered", action="store_true", help="end when stdin closes; no progress on stderr")
    args = parser.parse_args(arguments)
    if args.tethered:
        end_with_the_line(sys.stdin)

    def say(text: str) -> None:
        if not args.tethered:
            sys.stderr.write(text + "\n")

    emit = Output(os.path.join(args.job, "rows.jsonl"))
    try:
        lock = hold_device()
        with lock:
            run_job(args.job, emit, say)
    except Problem as problem:
        sys.stdout.write(json.dumps({"error": str(problem), "code": problem.code}) + "\n")
        say("error: " + str(problem))
        return problem.code
    except KeyboardInterrupt:
        say("stopped; what was measured is in rows.jsonl, the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
