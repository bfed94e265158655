"""Exports, measured: python benchmarks/export_matrix.py [--quick] [--only resnet18] [--format onnx] [--phase export|load|time|report]

Networks x policies x formats. ``export`` writes and proves (one process for a network), ``load`` loads the largest,
``time`` measures the kept files (wants a quiet machine), ``report`` writes the page from what there is; without ``--phase``
all of it. Every cell is kept in the cache folder: an interrupted run goes on where it stopped, and formats can be added. The
224 networks have seeded weights and BatchNorm statistics of random images, so nothing is said about their accuracy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from export_bars import LARGEST, LOADED, OPENVINO_SAFE, SAFE, judge
from harness import ROOT, Benchmark
from torch import Tensor, nn

NETWORKS = {  # the order in which they are run
    "resnet56": 32, "vgg16_bn_cifar": 32, "resnet18": 224, "mobilenet_v2": 224, "vgg16_bn": 224, "squeezenet1_1": 224,
    "shufflenet_v2_x1_0": 224, "mobilenet_v3_large": 224, "efficientnet_b0": 224, "regnet_y_400mf": 224, "resnet50": 224,
    "densenet121": 224,
}  # fmt: skip
POLICIES = ("w8a8", "w4a8", "mixed", "pruned")
FORMATS = ("onnx", "onnxruntime", "openvino", "litert", "executorch", "ncnn", "tensorrt")
QUICK_FORMATS = ("onnx", "onnxruntime", "tensorrt")
QUICK = ("resnet56:w8a8", "resnet56:pruned")


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


def exported(source: Any, policy: str, folder: Path, formats: list[str], rows: dict[str, Any]) -> dict[str, Any]:
    """``formats`` of one cell, written into ``folder`` and proven; ``rows`` are those that it has."""
    from edgecompress.errors import EdgeCompressError, UsageError
    from edgecompress.exporters import to_ort_format
    from edgecompress.exporters.formats import export
    from edgecompress.exporters.interface import Interface
    from edgecompress.exporters.runners import has_vnni

    weights = sum(weight.values.size for weight in source.quantized.weights.values())

    def write(key: str, format_name: str, source: Any, place: Path) -> None:
        start = time.monotonic()
        try:
            artifact = export(source, format_name, place)
            rows[key] = {"bytes": artifact.size_bytes, "opset": artifact.opset, "checks": artifact.checks}
            rows[key]["seconds"] = round(time.monotonic() - start, 1)
        except EdgeCompressError as error:
            if isinstance(error, UsageError) and "--allow-float" in str(error) and not source.interface.allow_float:
                write(key, format_name, replace(source, interface=replace(source.interface, allow_float=True)), place)
                rows[key]["floats_allowed"] = str(error)
            else:
                rows[key] = {"error": f"{type(error).__name__}: {error}"}

    safe = replace(source, interface=Interface(saturating_cpu=True))
    for format_name in formats:
        if format_name == "openvino" and not has_vnni():
            write(OPENVINO_SAFE, format_name, safe, folder)
        else:
            write(format_name, format_name, source, folder)
    if policy == "w8a8" and "onnxruntime" in formats:
        write(SAFE, "onnxruntime", safe, folder / "safe")
    integer = folder / "model.int8.onnx"
    if integer.exists() and "onnxruntime" in formats:
        data = to_ort_format.optimised(integer.read_bytes(), ort_format=True)
        checks = to_ort_format.check_same(data, integer.read_bytes(), source.images)
        rows["ort"] = {"bytes": len(data), "checks": checks.values}
        if checks.failures:
            rows["ort"]["error"] = "; ".join(checks.failures)
    if policy == "w8a8" and "onnx" in formats:
        quantize_static(folder, source.images)
    return {"parameters": weights, "formats": rows}


def export_network(name: str, policies: list[str], formats: list[str], cache: Path) -> None:
    """What is missing in the cells of one network; in a process of its own."""
    from edgecompress.errors import EdgeCompressError

    size = NETWORKS[name]
    base = base_of(name, network(name, size), size)
    for policy in policies:
        start, folder, path = time.monotonic(), cache / f"{name}-{policy}", cell_path(cache, name, policy)
        before = json.loads(path.read_text()) if path.exists() else {}
        missing = lacking(before, formats)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = exported(source_of(base, policy, size), policy, folder, missing, before.get("formats", {}))
        except EdgeCompressError as error:
            result = {"refused": str(error)}
        result["seconds"] = before.get("seconds", 0) + time.monotonic() - start
        save(path, result)
        print(f"{name}:{policy}: {result['seconds']:.0f} s {result.get('refused', '')}", flush=True)


def lacking(cell: dict[str, Any], formats: list[str]) -> list[str]:
    """Of ``formats``, those that a cell does not hold yet."""
    done = {key.split(",")[0] for key in cell.get("formats", {})}
    return [] if "refused" in cell else [name for name in formats if name not in done]


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
    from edgecompress.exporters.more_runners import ExecuTorchRunner, LiteRtRunner, NcnnRunner
    from edgecompress.exporters.runners import OnnxRuntimeRunner, OpenVinoRunner

    files: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "float": (folder / "model.onnx", OnnxRuntimeRunner),
        "fast": (folder / "model.int8.onnx", partial(OnnxRuntimeRunner, precise=False)),
        "precise": (folder / "model.int8.onnx", OnnxRuntimeRunner),
        "safe": (folder / "safe" / "model.int8.onnx", partial(OnnxRuntimeRunner, precise=False)),
        "theirs": (folder / "theirs.onnx", partial(OnnxRuntimeRunner, precise=False)),
        "openvino": (folder / "model.openvino.onnx", OpenVinoRunner),
        "litert": (folder / "model.tflite", LiteRtRunner),
        "executorch": (folder / "model.pte", ExecuTorchRunner),
        "ncnn": (folder / "model.ncnn.param", partial(NcnnRunner, shape=(3, size, size))),
    }
    there = {key: partial(load, path) for key, (path, load) in files.items() if path.exists()}
    image = images(1, size, 3).numpy()
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in there}
    for _ in range(4 if policy == "w8a8" else 2):
        for key, load in there.items():
            times[key].append(timed(load, image, seconds))
    found: dict[str, Any] = {f"{key}_us": min(turn[0] for turn in turns) for key, turns in times.items()}
    found["loads_s"] = {key: min(turn[1] for turn in turns) for key, turns in times.items()}
    found["memory"] = measured_memory(folder / "model.int8.onnx")
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


def export_phase(wanted: list[tuple[str, str]], formats: list[str], cache: Path) -> None:
    """Every missing cell, one process for a network."""
    for name in dict.fromkeys(name for name, _ in wanted):
        cells = {policy: cell_path(cache, name, policy) for n, policy in wanted if n == name}
        known = {policy: json.loads(path.read_text()) if path.exists() else {} for policy, path in cells.items()}
        missing = [policy for policy, cell in known.items() if lacking(cell, formats)]
        if missing:
            command = [sys.executable, __file__, "--one", name, "--cache", str(cache)]
            options = [f"--policy={policy}" for policy in missing] + [f"--format={name}" for name in formats]
            subprocess.run([*command, *options], check=False)


def time_phase(wanted: list[tuple[str, str]], cache: Path, seconds: float) -> None:
    """Every cell whose files were not timed yet."""
    for name, policy in wanted:
        path, folder = cell_path(cache, name, policy), cache / f"{name}-{policy}"
        result = json.loads(path.read_text()) if path.exists() else {}
        if "formats" in result and "latency" not in result and (folder / "model.int8.onnx").exists():
            result["latency"] = timings(folder, NETWORKS[name], policy, seconds if policy == "w8a8" else seconds / 2)
            save(path, result)
            print(f"{name}:{policy}: {result['latency']['fast_us']:.0f} us", flush=True)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cells, timed shortly; nothing is written")
    parser.add_argument("--only", action="append", default=[], help="a network such as resnet18; may be repeated")
    parser.add_argument("--format", action="append", default=[], choices=FORMATS, help="export only this one")
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
        export_network(arguments.one, arguments.policy, arguments.format, cache)
        return
    wanted = [(name, policy) for name in NETWORKS for policy in POLICIES]
    if arguments.quick:
        wanted = [(name, policy) for name, policy in wanted if f"{name}:{policy}" in QUICK]
    elif arguments.only:
        wanted = [(name, policy) for name, policy in wanted if name in arguments.only]
    formats = arguments.format or list(QUICK_FORMATS if arguments.quick else FORMATS)
    phases = (arguments.phase,) if arguments.phase else ("export", "load", "time", "report")
    if "export" in phases:
        export_phase(wanted, formats, cache)
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
        found = {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}
        judge(bench, [f"{name}:{policy}" for name in NETWORKS for policy in POLICIES], found, loads)
        if arguments.note:
            bench.details["conditions"] = arguments.note
        bench.write()


if __name__ == "__main__":
    main()
