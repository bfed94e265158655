"""Exports, measured: python benchmarks/export_matrix.py [--quick] [--only resnet18:w8a8] [--cache FOLDER]

Networks x policies x formats. Every cell runs in a process of its own and is kept as JSON in the cache folder: an
interrupted run goes on where it stopped. The 224 networks have seeded weights and BatchNorm statistics of random images, so
nothing is said about their accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import ROOT, Benchmark
from torch import Tensor, nn

NETWORKS = {
    "resnet56": 32, "vgg16_bn_cifar": 32, "resnet18": 224, "resnet50": 224, "mobilenet_v2": 224,
    "mobilenet_v3_large": 224, "efficientnet_b0": 224, "vgg16_bn": 224, "squeezenet1_1": 224, "shufflenet_v2_x1_0": 224,
    "densenet121": 224, "regnet_y_400mf": 224, "googlenet": 224, "mnasnet1_0": 224, "resnext50_32x4d": 224,
}  # fmt: skip
POLICIES = ("w8a8", "w4a8", "mixed", "pruned")
FORMATS = ("onnx", "onnxruntime", "openvino", "tensorrt")
SPEED = {"resnet18": 3.0, "vgg16_bn": 3.5, "mobilenet_v2": 2.2, "resnet56": 2.0}
QUICK = ("resnet56:w8a8", "resnet56:pruned")
LARGEST = "vgg16_bn"  # 138 million parameters


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


def source_of(name: str, policy: str, size: int) -> Any:
    """The compressed network of a cell, with what exporters want to know of it."""
    from edgecompress.describe import network_of
    from edgecompress.exporters.formats import ExportSource
    from edgecompress.graph import build_graph
    from edgecompress.latency_tables.targets import target_by_name
    from edgecompress.prune import prune
    from edgecompress.quantize import Simulator, calibrate
    from edgecompress.spec import CompressionPolicy, Preprocessing
    from edgecompress.trace import trace

    model, shape, keep = network(name, size), (3, size, size), {}
    traced = trace(model, shape, name) if policy == "pruned" else None
    if traced is not None:
        groups = traced.network.prunable_groups
        keep = {group.id: max(group.width // 32 * 16, min(group.width, 16)) for group in groups}
        model = prune(model, traced, keep)
    graph = build_graph(model, shape, name)
    simulator = Simulator(graph, calibrate(graph, [images(4, size, 2)], samples=8000))
    choices = choices_of(policy, [layer.name for layer in graph.layers])
    return ExportSource(
        graph=graph,
        quantized=simulator.quantized(choices),
        network=traced.network if traced else network_of(graph, name),
        policy=CompressionPolicy(model=name, keep_channels=keep, layers=choices),
        target=target_by_name("x86"),
        preprocessing=Preprocessing(size=(size, size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        classes=(),
        images=images(32 if size == 32 else 4, size, 3).numpy(),
    )


def cell(name: str, policy: str, *, seconds: float) -> dict[str, Any]:
    """Export one network at one policy to every format, prove it, and time it against its own float file."""
    from edgecompress.errors import EdgeCompressError
    from edgecompress.exporters.formats import export
    from edgecompress.exporters.memory import measured_memory
    from edgecompress.exporters.runners import OpenVinoRunner

    start, size = time.monotonic(), NETWORKS[name]
    try:
        source = source_of(name, policy, size)
    except EdgeCompressError as error:
        return {"refused": str(error), "seconds": time.monotonic() - start}
    weights = sum(weight.values.size for weight in source.quantized.weights.values())
    result: dict[str, Any] = {"parameters": weights, "formats": {}}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for format_name in FORMATS:
            row: dict[str, Any] = {}
            result["formats"][format_name] = row
            try:
                artifact = export(source, format_name, folder)
                row |= {"bytes": artifact.size_bytes, "opset": artifact.opset, "checks": artifact.checks}
            except EdgeCompressError as error:
                row["error"] = f"{type(error).__name__}: {error}"
        image = source.images[:1]
        original = folder / "model.onnx"
        if (folder / "model.int8.onnx").exists() and original.exists():
            result["latency"] = latencies(original, folder / "model.int8.onnx", image, seconds)
            result["memory"] = measured_memory(folder / "model.int8.onnx")
        if policy == "w8a8" and original.exists():
            result["quantize_static"] = quantize_static(folder, source.images, seconds)
        if (folder / "model.openvino.onnx").exists():
            runner = OpenVinoRunner(folder / "model.openvino.onnx")
            result["openvino_us"] = timed(lambda: runner, image, seconds)[0]
    result["seconds"] = time.monotonic() - start
    return result


def timed(load: Callable[[], Any], image: np.ndarray, seconds: float) -> tuple[float, float]:
    """Median microseconds of one image, and seconds to load; one session is alive at a time."""
    from edgecompress.exporters.runners import measure_latency_us

    start = time.perf_counter()
    runner = load()
    loaded = time.perf_counter() - start
    return measure_latency_us(runner, image, seconds=seconds)["median_us"], loaded


def latencies(original: Path, integer: Path, image: np.ndarray, seconds: float) -> dict[str, float]:
    """Two turns of both files, the better of each: what else runs on the machine only ever adds."""
    from edgecompress.exporters.runners import OnnxRuntimeRunner

    turns = [
        [timed(lambda path=path: OnnxRuntimeRunner(path), image, seconds) for path in (original, integer)]  # type: ignore[misc]
        for _ in range(2)
    ]
    float_us, integer_us = (min(turn[number][0] for turn in turns) for number in (0, 1))
    load_s = min(turn[1][1] for turn in turns)
    return {"float_us": float_us, "integer_us": integer_us, "speed": float_us / integer_us, "load_s": load_s}


def quantize_static(folder: Path, calibration: np.ndarray, seconds: float) -> dict[str, float]:
    """ONNX Runtime's own quantiser on the same float file: QDQ, u8 activations, s8 weights per channel, MinMax."""
    import logging

    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    from edgecompress.exporters.runners import OnnxRuntimeRunner

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image[None]}

    logging.getLogger().setLevel(logging.ERROR)
    theirs, ours, image = folder / "theirs.onnx", folder / "model.int8.onnx", calibration[:1]
    quantize(
        folder / "model.onnx", theirs, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    times = [
        [timed(lambda path=path: OnnxRuntimeRunner(path), image, seconds)[0] for path in (ours, theirs)]  # type: ignore[misc]
        for _ in range(3)
    ]
    mine, other = (min(turn[number] for turn in times) for number in (0, 1))
    return {"ours_us": mine, "theirs_us": other, "time": mine / other, "bytes": float(theirs.stat().st_size)}


def cells(only: list[str], quick: bool) -> list[str]:
    """Keys ``network:policy`` in order."""
    every = [f"{name}:{policy}" for name in NETWORKS for policy in POLICIES]
    return [key for key in every if key in (only or QUICK)] if quick or only else every


def run_cell(key: str, cache: Path, quick: bool) -> dict[str, Any]:
    """One cell in a fresh process, or what an earlier run left of it."""
    path = cache / f"{key.replace(':', '-')}{'-quick' if quick else ''}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--one", key, "--cache", str(path), *(["--quick"] if quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{key} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(path.read_text())
    print(f"{key}: {result['seconds']:.0f} s {result.get('refused', '')}", flush=True)
    return result


def judge(bench: Benchmark, found: dict[str, dict[str, Any]]) -> None:
    """The bars over all cells that were run; a bar of which nothing was run is left out."""
    built = {key: result for key, result in found.items() if "formats" in result}
    rows = {(key, name): row for key, result in built.items() for name, row in result["formats"].items()}
    failed = {f"{key} {name}": row["error"] for (key, name), row in rows.items() if "error" in row}
    bench.at_most("artifacts that are not exported and verified", len(failed), 0, f"of {len(rows)}")
    integer = {key: row["checks"] for (key, name), row in rows.items() if name == "onnxruntime" and "checks" in row}
    exact = [checks["emulator_max_difference"] for checks in integer.values() if checks["float_islands"] == "none"]
    islands = {key: checks["float_islands"] for key, checks in integer.items() if checks["float_islands"] != "none"}
    bench.at_most("difference to the integer emulator, all-integer files", max(exact, default=0.0), 0, "")
    bench.at_most("layers that run in float", sum(checks["float_conv_or_gemm"] for checks in integer.values()), 0, "")
    trt = {key: row["checks"] for (key, name), row in rows.items() if name == "tensorrt" and "checks" in row}
    refused = {
        f"{key} {sm}": checks[f"tensorrt_rtx_{sm}"]
        for key, checks in trt.items()
        for sm in ("SM86", "SM89")
        if checks.get(f"tensorrt_rtx_{sm}", "not tried") != "built"
    }
    bench.at_most("TensorRT-RTX builds that were refused", len(refused), 0, f"of {2 * len(trt)}")
    for name, limit in SPEED.items():
        if "latency" in built.get(f"{name}:w8a8", {}):
            speed = built[f"{name}:w8a8"]["latency"]["speed"]
            bench.at_least(f"{name} w8a8: speed against fp32, 1 thread", speed, limit, "x")
    static = {key: result["quantize_static"] for key, result in built.items() if "quantize_static" in result}
    for key, other in static.items():
        bench.at_most(f"{key.split(':')[0]}: time against quantize_static", other["time"], 1.02, "x")
    for key, result in built.items():
        name, policy = key.split(":")
        row = result["formats"]["onnxruntime"]
        if policy in ("w4a8", "mixed") and f"{name}:w8a8" in static and "bytes" in row:
            share = row["bytes"] / static[f"{name}:w8a8"]["bytes"]
            bench.at_most(f"{key}: bytes against quantize_static", share, 0.999, "x")
        if "checks" in row:
            packed = row["checks"]["weight_bytes"] / row["checks"]["weight_bytes_exact"]
            bench.at_most(f"{key}: weight bytes / (weights x bits / 8)", packed, 1.02, "x")
            bench.at_most(f"{key}: other bytes a node", row["checks"]["other_bytes_per_node"], 200, "B")
        if name == LARGEST and "latency" in result:
            bench.at_most(f"{key}: load time", result["latency"]["load_s"], 3.0, "s")
            peak = (result["memory"]["runtime_bytes"] + result["memory"]["run_peak_bytes"]) / 1e9
            bench.at_most(f"{key}: peak memory of a fresh process", peak, 1.5, "GB")
    bench.details["failed"] = failed
    bench.details["refused by TensorRT-RTX"] = refused
    bench.details["float islands"] = islands
    bench.details["not built"] = {key: result["refused"] for key, result in found.items() if "refused" in result}
    bench.details["cells"] = found


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cells, timed shortly; nothing is written")
    parser.add_argument("--only", action="append", default=[], help="a cell such as resnet18:w8a8; may be repeated")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "export_matrix", help="where cells are kept")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        name, policy = arguments.one.split(":")
        result = cell(name, policy, seconds=0.1 if arguments.quick else 1.5)
        arguments.cache.write_text(json.dumps(result, indent=1) + "\n")
        return
    bench = Benchmark("export_matrix", arguments.quick or bool(arguments.only))
    arguments.cache.mkdir(parents=True, exist_ok=True)
    wanted = cells(arguments.only, arguments.quick)
    judge(bench, {key: run_cell(key, arguments.cache, arguments.quick) for key in wanted})
    bench.write()


if __name__ == "__main__":
    main()
