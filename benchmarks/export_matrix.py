"""Exports, measured: python benchmarks/export_matrix.py [--quick] [--only resnet18] [--phase export|load|time|report]

Networks x policies x formats. ``export`` writes and proves (one process for a network), ``load`` loads the largest,
``time`` measures the kept files (wants a quiet machine), ``report`` writes the page from what there is; without ``--phase``
all of it. Every cell is kept in the cache folder: an interrupted run goes on where it stopped. The 224 networks have seeded
weights and BatchNorm statistics of random images, so nothing is said about their accuracy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import ROOT, Benchmark
from torch import Tensor, nn

NETWORKS = {  # the order in which they are run
    "resnet56": 32, "vgg16_bn_cifar": 32, "resnet18": 224, "mobilenet_v2": 224, "vgg16_bn": 224, "squeezenet1_1": 224,
    "shufflenet_v2_x1_0": 224, "mobilenet_v3_large": 224, "efficientnet_b0": 224, "regnet_y_400mf": 224, "resnet50": 224,
    "densenet121": 224,
}  # fmt: skip
POLICIES = ("w8a8", "w4a8", "mixed", "pruned")
FORMATS = ("onnx", "onnxruntime", "openvino", "litert", "tensorrt")
SAFE = "onnxruntime, 7-bit weights"
SPEED = {"resnet18": 3.0, "vgg16_bn": 3.5, "mobilenet_v2": 2.2, "resnet56": 2.0}
QUICK = ("resnet56:w8a8", "resnet56:pruned")
AVX2 = "the CPU has AVX2 but no VNNI: 8-bit products take two instructions more, and saturate at 8-bit weights"
UNPACKING = (
    "look-up tables and scales beside small or 7-bit layers; a layer above 16 million weights keeps 7 bits as int8"
)
LARGEST = "vgg16_bn"  # 138 million parameters
LOADED = ("mixed", "w3a8")  # policies at which it is loaded


def images(count: int, size: int, seed: int) -> Tensor:
    """Smooth noise, which looks more like photos to a network than white noise does."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=size, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)


def network(name: str, size: int) -> nn.Module:
    """Seeded weights; BatchNorm statistics estimated on random images, so that activations are sane."""
    from edgecompress.models import build_model

    torch.manual_seed(0)
    model = build_model(name, 10 if size == 32 else 1000)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    with torch.no_grad():
        model(images(16, size, 1))
    return model.eval()


def choices_of(policy: str, layers: list[str]) -> dict[str, Any]:
    """Bits of every layer."""
    from edgecompress.spec import LayerChoice

    if policy.startswith("w"):
        return {name: LayerChoice(weight_bits=int(policy[1]), activation_bits=int(policy[3])) for name in layers}
    bits = torch.randint(2, 9, (len(layers), 2), generator=torch.Generator().manual_seed(7)).tolist()
    return {name: LayerChoice(weight_bits=w, activation_bits=a) for name, (w, a) in zip(layers, bits, strict=True)}


@dataclass(frozen=True)
class Base:
    """What all policies of a network share that do not prune it."""

    name: str
    model: nn.Module
    graph: Any
    simulator: Any


def base_of(name: str, model: nn.Module, size: int) -> Base:
    """The graph with calibrated ranges."""
    from edgecompress.graph import build_graph
    from edgecompress.quantize import Simulator, calibrate

    graph = build_graph(model, (3, size, size), name)
    return Base(name, model, graph, Simulator(graph, calibrate(graph, [images(4, size, 2)], samples=8000)))


def source_of(base: Base, policy: str, size: int) -> Any:
    """The compressed network of a cell, with what exporters want to know of it."""
    from edgecompress.describe import network_of
    from edgecompress.exporters.source import ExportSource
    from edgecompress.latency_tables.targets import target_by_name
    from edgecompress.prune import prune
    from edgecompress.spec import CompressionPolicy, Preprocessing
    from edgecompress.trace import trace

    shape, keep, network = (3, size, size), {}, None
    if policy == "pruned":
        traced = trace(base.model, shape, base.name)
        groups = traced.network.prunable_groups
        keep = {group.id: max(group.width // 32 * 16, min(group.width, 16)) for group in groups}
        network = traced.network
        base = base_of(base.name, prune(base.model, traced, keep), size)
    choices = choices_of(policy, [layer.name for layer in base.graph.layers])
    return ExportSource(
        graph=base.graph,
        quantized=base.simulator.quantized(choices),
        network=network or network_of(base.graph, base.name),
        policy=CompressionPolicy(model=base.name, keep_channels=keep, layers=choices),
        target=target_by_name("x86"),
        preprocessing=Preprocessing(size=(size, size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        classes=(),
        images=images(32 if size == 32 else 4, size, 3).numpy(),
    )


def exported(source: Any, policy: str, folder: Path) -> dict[str, Any]:
    """Every format of one cell, written into ``folder`` and proven."""
    from edgecompress.errors import EdgeCompressError
    from edgecompress.exporters import to_ort_format
    from edgecompress.exporters.formats import export
    from edgecompress.exporters.interface import Interface

    weights = sum(weight.values.size for weight in source.quantized.weights.values())
    rows: dict[str, Any] = {}

    def write(key: str, format_name: str, source: Any, place: Path) -> None:
        try:
            artifact = export(source, format_name, place)
            rows[key] = {"bytes": artifact.size_bytes, "opset": artifact.opset, "checks": artifact.checks}
        except EdgeCompressError as error:
            rows[key] = {"error": f"{type(error).__name__}: {error}"}

    for format_name in FORMATS:
        write(format_name, format_name, source, folder)
    if policy == "w8a8":
        write(SAFE, "onnxruntime", replace(source, interface=Interface(saturating_cpu=True)), folder / "safe")
    integer = folder / "model.int8.onnx"
    if integer.exists():
        data = to_ort_format.optimised(integer.read_bytes(), ort_format=True)
        checks = to_ort_format.check_same(data, integer.read_bytes(), source.images)
        rows["ort"] = {"bytes": len(data), "checks": checks.values}
        if checks.failures:
            rows["ort"]["error"] = "; ".join(checks.failures)
    if policy == "w8a8" and (folder / "model.onnx").exists():
        quantize_static(folder, source.images)
    return {"parameters": weights, "formats": rows}


def export_network(name: str, policies: list[str], cache: Path) -> None:
    """All missing cells of one network; in a process of its own."""
    from edgecompress.errors import EdgeCompressError

    size = NETWORKS[name]
    base = base_of(name, network(name, size), size)
    for policy in policies:
        start, folder = time.monotonic(), cache / f"{name}-{policy}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            result = exported(source_of(base, policy, size), policy, folder)
        except EdgeCompressError as error:
            result = {"refused": str(error)}
        result["seconds"] = time.monotonic() - start
        save(cell_path(cache, name, policy), result)
        print(f"{name}:{policy}: {result['seconds']:.0f} s {result.get('refused', '')}", flush=True)


def cell_path(cache: Path, name: str, policy: str) -> Path:
    """Where a cell is kept."""
    return cache / f"{name}-{policy}.json"


def save(path: Path, result: dict[str, Any]) -> None:
    """Written whole, so that a killed run leaves no half cell."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def timings(folder: Path, size: int, policy: str, seconds: float) -> dict[str, Any]:
    """Times of a cell's files, one session alive at a time; the best of several turns.

    What else runs on the machine only ever adds. ``fast``: the kernels that ONNX Runtime takes by itself; ``precise``: those
    that cannot saturate.
    """
    from edgecompress.exporters.memory import measured_memory
    from edgecompress.exporters.runners import OnnxRuntimeRunner, OpenVinoRunner

    integer = folder / "model.int8.onnx"
    loads: dict[str, Callable[[], Any]] = {
        "float": lambda: OnnxRuntimeRunner(folder / "model.onnx"),
        "fast": lambda: OnnxRuntimeRunner(integer, precise=False),
        "precise": lambda: OnnxRuntimeRunner(integer),
        "safe": lambda: OnnxRuntimeRunner(folder / "safe" / "model.int8.onnx", precise=False),
        "theirs": lambda: OnnxRuntimeRunner(folder / "theirs.onnx", precise=False),
        "openvino": lambda: OpenVinoRunner(folder / "model.openvino.onnx"),
    }
    wanted = list(loads) if policy == "w8a8" else ["float", "fast"]
    if not (folder / "model.openvino.onnx").exists():
        wanted = [key for key in wanted if key != "openvino"]
    image = images(1, size, 3).numpy()
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in wanted}
    for _ in range(4 if policy == "w8a8" else 2):
        for key in wanted:
            times[key].append(timed(loads[key], image, seconds))
    found: dict[str, Any] = {f"{key}_us": min(turn[0] for turn in turns) for key, turns in times.items()}
    found["load_s"] = min(turn[1] for turn in times["fast"])
    found["memory"] = measured_memory(integer)
    if policy == "w8a8":
        found["theirs_bytes"] = (folder / "theirs.onnx").stat().st_size
    return found


def timed(load: Callable[[], Any], image: np.ndarray, seconds: float) -> tuple[float, float]:
    """Microseconds of one image that a tenth of all runs stay below (the rest was disturbed), and seconds to load."""
    from edgecompress.exporters.runners import measure_latency_us

    start = time.perf_counter()
    runner = load()
    loaded = time.perf_counter() - start
    return measure_latency_us(runner, image, seconds=seconds)["p10_us"], loaded


def quantize_static(folder: Path, calibration: np.ndarray) -> None:
    """ONNX Runtime's own quantiser on the same float file: QDQ, u8 activations, s8 weights per channel, MinMax."""
    import logging

    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image[None]}

    logging.getLogger().setLevel(logging.ERROR)
    quantize(
        folder / "model.onnx", folder / "theirs.onnx", Reader(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip


def load_phase(cache: Path) -> None:
    """Load time and peak memory of the largest network at random bits and at 3 bits, in fresh processes.

    The files are those of the cells; they are written here without their proof, which takes minutes for this network.
    """
    from edgecompress.exporters.memory import measured_memory
    from edgecompress.exporters.runners import OnnxRuntimeRunner
    from edgecompress.exporters.to_onnxruntime import integer_model

    missing = [policy for policy in LOADED if not (cache / f"load-{policy}.onnx").exists()]
    base = base_of(LARGEST, network(LARGEST, NETWORKS[LARGEST]), NETWORKS[LARGEST]) if missing else None
    for policy in missing:
        assert base is not None
        quantized = base.simulator.quantized(choices_of(policy, [layer.name for layer in base.graph.layers]))
        (cache / f"load-{policy}.onnx").write_bytes(integer_model(quantized).SerializeToString())
    for policy in LOADED:
        file = cache / f"load-{policy}.onnx"
        loads = []
        for _ in range(3):
            start = time.perf_counter()
            OnnxRuntimeRunner(file, precise=False)
            loads.append(time.perf_counter() - start)
        found = {"bytes": file.stat().st_size, "loads_s": loads, "memory": measured_memory(file)}
        save(cache / f"load-{policy}.json", found)
        print(f"{LARGEST}:{policy}: loads in {min(loads):.2f} s", flush=True)


def export_phase(wanted: list[tuple[str, str]], cache: Path) -> None:
    """Every missing cell, one process for a network."""
    for name in dict.fromkeys(name for name, _ in wanted):
        missing = [policy for n, policy in wanted if n == name and not cell_path(cache, name, policy).exists()]
        if missing:
            command = [sys.executable, __file__, "--one", name, "--cache", str(cache)]
            subprocess.run([*command, *(f"--policy={policy}" for policy in missing)], check=False)


def time_phase(wanted: list[tuple[str, str]], cache: Path, seconds: float) -> None:
    """Every cell whose files were not timed yet."""
    for name, policy in wanted:
        path, folder = cell_path(cache, name, policy), cache / f"{name}-{policy}"
        result = json.loads(path.read_text()) if path.exists() else {}
        if "formats" in result and "latency" not in result and (folder / "model.int8.onnx").exists():
            result["latency"] = timings(folder, NETWORKS[name], policy, seconds)
            save(path, result)
            print(f"{name}:{policy}: {result['latency']['fast_us']:.0f} us", flush=True)


def judge(bench: Benchmark, found: dict[str, dict[str, Any]], loads: dict[str, Any]) -> None:
    """The bars over all cells that were run; what was not run stands as owed."""
    built = {key: result for key, result in found.items() if "formats" in result}
    rows = {(key, name): row for key, result in built.items() for name, row in result["formats"].items()}
    failed = {f"{key} {name}": row["error"] for (key, name), row in rows.items() if "error" in row}
    every = [f"{name}:{policy}" for name in NETWORKS for policy in POLICIES]
    missing = [key for key in every if key not in found]
    bar, unit = "artifacts that are not exported and verified", f"of {len(rows)}"
    if failed:
        bench.misses(bar, len(failed), 0, unit, "listed under 'failed'")
    else:
        bench.at_most(bar, 0, 0, unit)
    if missing and not bench.quick:
        bench.not_run(
            "cells of the matrix that were not run", 0, f"of {len(every)}", f"{len(missing)} of {len(every)} cells"
        )
    exactness(bench, rows)
    refused = accepted_by_tensorrt(bench, rows)
    for name in SPEED:
        speed(bench, name, built.get(f"{name}:w8a8", {}).get("latency"))
    for key, result in built.items():
        sizes(bench, key, result, built.get(f"{key.split(':')[0]}:w8a8", {}).get("latency", {}).get("theirs_bytes"))
    for policy in LOADED if not bench.quick else ():
        if policy not in loads:
            bench.not_run(f"{LARGEST} {policy}: load time, best of 3", 3.0, "s", "not run")
    for policy, loaded in loads.items():
        bench.at_most(f"{LARGEST} {policy}: load time, best of 3", min(loaded["loads_s"]), 3.0, "s")
        peak = (loaded["memory"]["runtime_bytes"] + loaded["memory"]["run_peak_bytes"]) / 1e9
        bench.at_most(f"{LARGEST} {policy}: peak memory of a fresh process", peak, 1.5, "GB")
    bench.details["loading the largest network"] = loads
    bench.details["failed"] = failed
    bench.details["refused by TensorRT-RTX"] = refused
    bench.details["not built"] = {key: result["refused"] for key, result in found.items() if "refused" in result}
    bench.details["not run"] = missing
    bench.details["cells"] = found


def exactness(bench: Benchmark, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Integer files against the emulator, and kernels that should be integers."""
    for name in ("onnxruntime", SAFE):
        integer = {key: row["checks"] for (key, kind), row in rows.items() if kind == name and "checks" in row}
        if not integer:
            continue
        exact = [checks["emulator_max_difference"] for checks in integer.values() if checks["float_islands"] == "none"]
        islands = {key: checks["float_islands"] for key, checks in integer.items() if checks["float_islands"] != "none"}
        bench.at_most(
            f"{name}: difference to the integer emulator", max(exact, default=0.0), 0, f"of {len(exact)} files"
        )
        floats = sum(checks["float_conv_or_gemm"] for checks in integer.values())
        bench.at_most(f"{name}: layers that run in float", floats, 0, "")
        if islands:
            agreement = min(integer[key]["emulator_agreement"] for key in islands)
            bench.at_least(f"{name}: top-1 agreement of files with float islands", agreement, 0.995, "")
        bench.details[f"float islands, {name}"] = islands


def accepted_by_tensorrt(bench: Benchmark, rows: dict[tuple[str, str], dict[str, Any]]) -> dict[str, str]:
    """What TensorRT-RTX refused, by file and GPU generation; a refusal fails the export, whose error names reason and mend."""
    trt = {key: row["checks"] for (key, name), row in rows.items() if name == "tensorrt" and "checks" in row}
    refused = {
        f"{key} {sm}": str(checks[f"tensorrt_rtx_{sm}"])
        for key, checks in trt.items()
        for sm in ("SM86", "SM89")
        if checks.get(f"tensorrt_rtx_{sm}", "not tried") != "built"
    }
    refused |= {key: row["error"] for (key, _), row in rows.items() if "TensorRT-RTX refuses" in row.get("error", "")}
    bench.at_most("TensorRT-RTX builds (SM86, SM89) that were refused", len(refused), 0, f"of {2 * len(trt)}")
    return refused


def speed(bench: Benchmark, name: str, times: dict[str, Any] | None) -> None:
    """Times of the w8a8 files against float and against `quantize_static`, each with the kernels of this CPU."""
    from edgecompress.exporters.runners import has_vnni

    limit, reason = SPEED[name], "" if has_vnni() else AVX2
    kinds = {"fast": "8-bit weights", "safe": "7-bit weights"} | (
        {} if has_vnni() else {"precise": "8-bit, exact kernels"}
    )
    for key, words in kinds.items():
        bar = f"{name} w8a8, {words}: speed against fp32, 1 thread"
        if times is None:
            bench.not_run(bar, limit, "x", "not timed")
        elif times["float_us"] / times[f"{key}_us"] >= limit:
            bench.at_least(bar, times["float_us"] / times[f"{key}_us"], limit, "x")
        else:
            bench.misses(bar, times["float_us"] / times[f"{key}_us"], limit, "x", reason)
    if times is not None:
        bench.at_most(f"{name}: time against quantize_static", times["fast_us"] / times["theirs_us"], 1.02, "x")


def sizes(bench: Benchmark, key: str, result: dict[str, Any], theirs_bytes: int | None) -> None:
    """Bytes of one integer file, and of the largest network how it loads."""
    name, policy = key.split(":")
    row = result["formats"]["onnxruntime"]
    if policy in ("w4a8", "mixed") and theirs_bytes and "bytes" in row:
        bench.at_most(f"{key}: bytes against quantize_static", row["bytes"] / theirs_bytes, 0.999, "x")
    if "checks" in row:
        packed = row["checks"]["weight_bytes"] / row["checks"]["weight_bytes_exact"]
        if packed <= 1.02:
            bench.at_most(f"{key}: weight bytes / (weights x bits / 8)", packed, 1.02, "x")
        else:
            bench.misses(f"{key}: weight bytes / (weights x bits / 8)", packed, 1.02, "x", UNPACKING)
        bench.at_most(f"{key}: other bytes a node", row["checks"]["other_bytes_per_node"], 200, "B")
    if name == LARGEST and "latency" in result:
        bench.at_most(f"{key}: load time", result["latency"]["load_s"], 3.0, "s")
        memory = result["latency"]["memory"]
        peak = (memory["runtime_bytes"] + memory["run_peak_bytes"]) / 1e9
        bench.at_most(f"{key}: peak memory of a fresh process", peak, 1.5, "GB")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cells, timed shortly; nothing is written")
    parser.add_argument("--only", action="append", default=[], help="a network such as resnet18; may be repeated")
    parser.add_argument("--phase", choices=("export", "load", "time", "report"), help="only this part")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "export_matrix", help="where cells are kept")
    parser.add_argument("--note", default="", help="a word on the conditions, for the page")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--policy", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = arguments.cache / "quick" if arguments.quick and not arguments.one else arguments.cache
    cache.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        export_network(arguments.one, arguments.policy, cache)
        return
    wanted = [(name, policy) for name in NETWORKS for policy in POLICIES]
    if arguments.quick:
        wanted = [(name, policy) for name, policy in wanted if f"{name}:{policy}" in QUICK]
    elif arguments.only:
        wanted = [(name, policy) for name, policy in wanted if name in arguments.only]
    phases = (arguments.phase,) if arguments.phase else ("export", "load", "time", "report")
    if "export" in phases:
        export_phase(wanted, cache)
    if "load" in phases and not (arguments.quick or arguments.only):
        load_phase(cache)
    if "time" in phases:
        time_phase(wanted, cache, 0.1 if arguments.quick else 0.7)
    if "report" in phases:
        paths = {f"{name}:{policy}": cell_path(cache, name, policy) for name, policy in wanted}
        bench = Benchmark("export_matrix", arguments.quick or bool(arguments.only))
        loads = {
            policy: json.loads((cache / f"load-{policy}.json").read_text())
            for policy in LOADED
            if (cache / f"load-{policy}.json").exists()
        }
        judge(bench, {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}, loads)
        if arguments.note:
            bench.details["conditions"] = arguments.note
        bench.write()


if __name__ == "__main__":
    main()
