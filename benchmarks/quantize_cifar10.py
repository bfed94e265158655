"""Stage 2 on CIFAR-10: python benchmarks/quantize_cifar10.py [--quick] [--timing]

Needs EDGECOMPRESS_DATA with cifar10-jpeg.tar.gz and the two ResNet checkpoints. Every cell is kept under
build/quantize_cifar10, so that a broken run goes on where it stopped; delete that folder to measure anew.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROOT, Benchmark
from torch import Tensor

from edgecompress.checkpoints import load_weights
from edgecompress.exporters import to_onnx, to_onnxruntime
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.graph import Graph, build_graph
from edgecompress.interpret import float_constants, run
from edgecompress.models import build_model
from edgecompress.posttraining import bias_corrected, equalised
from edgecompress.quantize import BITS, Simulator, calibrate, simulate
from edgecompress.ranges import RANGES
from edgecompress.spec import LayerChoice

CELLS = ROOT / "build" / "quantize_cifar10"
DATA = Path(os.environ.get("EDGECOMPRESS_DATA", "data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = ("resnet20", "resnet56")
CALIBRATION, HELD_OUT = 500, 2000
OWED = "a long search or training: not part of this run"

Choices = dict[str, LayerChoice]


def cell(name: str, compute: Callable[[], Any], *, quick: bool) -> Any:
    """The value of one cell, computed once; a quick run keeps nothing."""
    path = CELLS / f"{name}.json"
    if not quick and path.exists():
        return json.loads(path.read_text())
    start = time.monotonic()
    value = compute()
    print(f"     {name}: {json.dumps(value)} ({time.monotonic() - start:.1f} s)", flush=True)
    if not quick:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value) + "\n")
    return value


@cache
def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images ``uint8 [N, 3, 32, 32]`` and labels of ``train`` or ``test``, in the order of their names."""
    from PIL import Image

    kept = CELLS / f"{split}.npz"  # reading 60,000 JPEG files takes longer than most cells
    if kept.exists():
        with np.load(kept) as file:
            return file["pixels"], file["labels"]
    with tarfile.open(DATA / "cifar10-jpeg.tar.gz") as archive:
        files = {}
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and parts[-3] == split:
                stream = archive.extractfile(member)
                assert stream is not None
                files[parts[-2], parts[-1]] = stream.read()
    names = sorted(files)
    classes = sorted({label for label, _ in names})
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB")) for name in names])
    pixels, labels = pixels.transpose(0, 3, 1, 2), np.array([classes.index(label) for label, _ in names])
    CELLS.mkdir(parents=True, exist_ok=True)
    np.savez(kept, pixels=pixels, labels=labels)
    return pixels, labels


def normalised(pixels: np.ndarray) -> Tensor:
    """The networks' input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255 - mean) / std


@cache
def parts(quick: bool) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Calibration (never held out), held-out images (never seen by ResNet-20) and the test split."""
    pixels, labels = images("train")
    held = np.array(json.loads((DATA / "resnet20_heldout.json").read_text()))
    random = np.random.default_rng(0)
    seen = random.permutation(np.setdiff1d(np.arange(len(labels)), held))
    test_pixels, test_labels = images("test")
    test = random.permutation(len(test_labels))[: 200 if quick else len(test_labels)]
    chosen = {"calibration": seen[: 100 if quick else CALIBRATION], "held_out": held[: 200 if quick else HELD_OUT]}
    found = {name: (normalised(pixels[rows]), labels[rows]) for name, rows in chosen.items()}
    return found | {"test": (normalised(test_pixels[test]), test_labels[test])}


@cache
def graph_of(network: str) -> Graph:
    """A checkpoint as the internal graph."""
    model = build_model(network, 10)
    load_weights(model, DATA / f"{network}_cifar10jpeg.safetensors")
    return build_graph(model.eval(), (3, 32, 32), network)


def batches(x: Tensor, size: int = 100) -> Iterator[Tensor]:
    """``x`` in pieces."""
    yield from x.split(size)


@cache
def simulator_of(network: str, ranges: str, equalise: bool, quick: bool) -> Simulator:
    """The calibrated network; calibration happens once."""
    graph = equalised(graph_of(network)) if equalise else graph_of(network)
    return Simulator(graph, calibrate(graph, batches(parts(quick)["calibration"][0]), ranges=ranges))


def top1(forward: Callable[[Tensor], Tensor], x: Tensor, labels: np.ndarray) -> float:
    """Accuracy in percent."""
    with torch.no_grad():
        found = torch.cat([forward(batch).argmax(1) for batch in batches(x, 250)]).numpy()
    return float(100 * (found == labels).mean())


def uniform(graph: Graph, weight_bits: int, activation_bits: int) -> Choices:
    """The same bits everywhere."""
    return {x.name: LayerChoice(weight_bits=weight_bits, activation_bits=activation_bits) for x in graph.layers}


def mixed(graph: Graph, seed: int = 0) -> Choices:
    """Bits drawn at random for every layer."""
    random = np.random.default_rng(seed)
    return {
        x.name: LayerChoice(weight_bits=int(random.choice(BITS)), activation_bits=int(random.choice(BITS)))
        for x in graph.layers
    }


def post_training(network: str, ranges: str, help_with: str, bits: tuple[int, int], quick: bool) -> float:
    """Held-out accuracy in percent by float fake quantisation; ``help_with`` is plain, equalise or bias."""
    simulator = simulator_of(network, ranges, help_with == "equalise", quick)
    quantized = simulator.quantized(uniform(simulator.graph, *bits))
    if help_with == "bias":
        quantized = bias_corrected(quantized, batches(parts(quick)["calibration"][0]))
    return top1(partial(simulate, quantized), *parts(quick)["held_out"])


def on_test(network: str, as_float: bool, quick: bool) -> float:
    """Test accuracy in percent of the exported file in ONNX Runtime."""
    simulator = simulator_of(network, "mse", False, quick)
    if as_float:
        model = to_onnx.float_model(simulator.graph)
    else:
        model = to_onnxruntime.integer_model(simulator.quantized(uniform(simulator.graph, 8, 8)))
    x, labels = parts(quick)["test"]
    found = run_all(OnnxRuntimeRunner(model.SerializeToString()), x.numpy())
    return float(100 * (found.argmax(1) == labels).mean())


def difference(network: str, bits: str, quick: bool) -> float:
    """Largest difference between the integer emulator and ONNX Runtime over 1,000 held-out images."""
    simulator = simulator_of(network, "mse", False, quick)
    graph = simulator.graph
    choices = {"w8a8": uniform(graph, 8, 8), "w4a4": uniform(graph, 4, 4), "mixed": mixed(graph)}[bits]
    quantized = simulator.quantized(choices)
    x = parts(quick)["held_out"][0][: 50 if quick else 1000]
    found = run_all(OnnxRuntimeRunner(to_onnxruntime.integer_model(quantized).SerializeToString()), x.numpy())
    with torch.no_grad():
        exact = torch.cat([emulate(quantized, batch) for batch in batches(x)]).numpy()
    return float(np.abs(found - exact).max())


def relative_time(network: str, quick: bool) -> float:
    """Time of one policy's fake-quantised evaluation over that of the plain channels_last network, in turns."""
    simulator = simulator_of(network, "mse", False, quick)
    x = parts(quick)["held_out"][0][:250].contiguous(memory_format=torch.channels_last)
    constants = {
        name: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in float_constants(simulator.graph).items()
    }
    choices = uniform(simulator.graph, 4, 8)

    def seconds(forward: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        forward()
        return time.perf_counter() - start

    with torch.no_grad():
        ratios = [
            seconds(lambda: simulator(x, choices)) / seconds(lambda: run(simulator.graph, x, constants))
            for _ in range(3 if quick else 15)
        ]
    return statistics.median(ratios[1:])


def measure(bench: Benchmark, *, timing: bool) -> None:
    """All bars of stage 2."""
    quick = bench.quick
    networks = NETWORKS[:1] if quick else NETWORKS
    for network in networks:
        as_float, integer = (
            cell(f"test-{network}-{kind}", partial(on_test, network, kind == "fp32", quick), quick=quick)
            for kind in ("fp32", "w8a8")
        )
        bench.at_most(f"{network}: test accuracy lost by w8a8 without training", as_float - integer, 0.2, "points")
        bench.details[f"{network}: test accuracy, exported file"] = {"fp32": as_float, "w8a8": integer}
    for network in networks:
        for bits in ("w8a8", "w4a4", "mixed"):
            found = cell(f"exact-{network}-{bits}", partial(difference, network, bits, quick), quick=quick)
            count = 50 if quick else 1000
            bench.at_most(f"{network} {bits}: emulator against ONNX Runtime, {count} images", found, 0, "")
    compared = {}
    for bits in ((8, 8),) if quick else ((8, 8), (4, 8), (4, 4)):
        label = f"w{bits[0]}a{bits[1]}"
        for ranges, help_with in (*((name, "plain") for name in RANGES), ("mse", "bias"), ("mse", "equalise")):
            name = f"held-out-resnet20-{label}-{ranges}-{help_with}"
            compared[f"{label} {ranges} {help_with}"] = cell(
                name, partial(post_training, "resnet20", ranges, help_with, bits, quick), quick=quick
            )
    bench.details["ResNet-20 without training: accuracy on held-out images, float fake quantisation"] = compared
    name = "resnet20: time of a fake-quantised evaluation / plain channels_last network"
    if timing:
        bench.at_most(name, relative_time("resnet20", quick), 1.3, "x")
    else:
        bench.not_run(name, 1.3, "x", "run with --timing on a quiet machine")
    for owed, limit in (
        ("searched mixed bits above uniform w4a4 and w4a8 at equal bytes, before training", 1.0),
        ("searched mixed bits against greedy and integer programming, 5 seeds: mean difference", 0.0),
        ("test accuracy lost at 4 weight bits on average, trained", 0.5),
        ("depthwise network (MobileNet-V2-like): accuracy lost by w8a8 without training", 1.0),
    ):
        bench.not_run(owed, limit, "points", OWED)


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, nothing is written")
    parser.add_argument("--timing", action="store_true", help="the row that needs a quiet machine, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Benchmark("quantize_cifar10", arguments.quick)
    measure(bench, timing=arguments.timing)
    bench.write()


if __name__ == "__main__":
    main()
