"""Stage 2 on CIFAR-10: python benchmarks/quantize_cifar10.py [--quick] [--timing] [--only PATTERN]

Needs EDGECOMPRESS_DATA with cifar10-jpeg.tar.gz and the two ResNet checkpoints. Every cell is kept under
build/quantize_cifar10, so that a broken run goes on where it stopped; delete that folder to measure anew. ``--only``
measures the cells whose names match and shows no figures.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from cifar10 import CHECKPOINTS, DEPTHWISE, KEPT, dataset, graph_of, images, network, normalised, trained
from quantize_arms import ARMS, SEEDS, UNSEEN, Judge, held_out, held_out_rows, outcome, uniform, weight_bytes
from quantize_arms import simulator_of as calibrated
from torch import Tensor

from edgecompress.cost import average_weight_bits
from edgecompress.exporters import to_onnx, to_onnxruntime
from edgecompress.exporters.emulate import emulate, float_islands
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.finetune import TrainSettings
from edgecompress.interpret import float_constants, run
from edgecompress.learned_steps import LearnedSteps
from edgecompress.posttraining import bias_corrected, equalised
from edgecompress.quantize import BITS, QuantizedGraph, Simulator, calibrate, channels_last, simulate
from edgecompress.ranges import RANGES
from edgecompress.spec import CompressionPolicy, LayerChoice

NETWORKS = (*CHECKPOINTS, DEPTHWISE)
EXACT_IMAGES = 1000
# Of the fine-tuning that the trained bits and their float rival get alike: images of the 45,000, then the schedule.
TUNED = {"resnet20": 16_000, "resnet56": 8_000}
TUNING = TrainSettings(epochs=1, learning_rate=0.01, batch_size=64, weight_decay=0.0)

Choices = Mapping[str, LayerChoice]


# ------------------------------------------------------------------------------------------------ what is measured


@cache
def simulator_of(name: str, ranges: str = "mse", equalise: bool = False) -> Simulator:
    """The calibrated network; calibration happens once."""
    if not equalise:
        return calibrated(name, ranges)
    graph = equalised(graph_of(name))
    x = calibration_images()
    return Simulator(graph, calibrate(graph, x.split(100), ranges=ranges))


def calibration_images() -> Tensor:
    """500 of the images that the networks were trained on."""
    data = dataset(1)
    return data.normalise(data.calibration.images)


@cache
def test_images() -> tuple[Tensor, np.ndarray]:
    """The test split."""
    pixels, labels = images("test")
    return normalised(pixels), labels


def on_test(model: Any) -> float:
    """Test accuracy in percent of a file in ONNX Runtime."""
    x, labels = test_images()
    found = run_all(OnnxRuntimeRunner(model.SerializeToString()), x.numpy())
    return float(100 * (found.argmax(1) == labels).mean())


def mixed(simulator: Simulator, seed: int = 0) -> Choices:
    """Bits drawn at random for every layer."""
    random = np.random.default_rng(seed)
    return {
        x.name: LayerChoice(weight_bits=int(random.choice(BITS)), activation_bits=int(random.choice(BITS)))
        for x in simulator.graph.layers
    }


def float_on_test(name: str) -> float:
    """The untouched checkpoint's float file."""
    return on_test(to_onnx.float_model(graph_of(name)))


def eight_bits_on_test(name: str, equalise: bool = False) -> float:
    """Every layer at w8a8, without training."""
    simulator = simulator_of(name, equalise=equalise)
    return on_test(to_onnxruntime.integer_model(simulator.quantized(uniform(simulator, 8, 8))))


def post_training(name: str, ranges: str, help_with: str, bits: tuple[int, int]) -> float:
    """Held-out accuracy in percent by float fake quantisation; ``help_with`` is plain, equalise or bias."""
    simulator = simulator_of(name, ranges, help_with == "equalise")
    quantized = simulator.quantized(uniform(simulator, *bits))
    if help_with == "bias":
        quantized = bias_corrected(quantized, calibration_images().split(100))
    x, labels = held_out(held_out_rows()[UNSEEN])
    return top1(partial(simulate, quantized), x, labels.numpy())


def uniform_unseen(name: str, weight_bits: int, activation_bits: int) -> dict[str, float]:
    """What uniform bits give on the images that the searched policies are compared on."""
    simulator = simulator_of(name)
    choices = uniform(simulator, weight_bits, activation_bits)
    found = outcome(simulator, choices, *held_out(held_out_rows()[UNSEEN]))
    return {"accuracy": 100 * found.accuracy, "bytes": weight_bytes(simulator.quantized(choices))}


def top1(forward: Callable[[Tensor], Tensor], x: Tensor, labels: np.ndarray) -> float:
    """Accuracy in percent."""
    with torch.no_grad():
        found = torch.cat([forward(batch).argmax(1) for batch in x.split(64)]).numpy()
    return float(100 * (found == labels).mean())


def exactness(name: str, bits: str) -> dict[str, Any]:
    """File in ONNX Runtime, integer emulator and float simulation side by side on held-out images."""
    simulator = simulator_of(name)
    choices = {"w8a8": uniform(simulator, 8, 8), "w4a4": uniform(simulator, 4, 4), "mixed": mixed(simulator)}[bits]
    quantized = simulator.quantized(choices)
    x, _ = held_out(held_out_rows()[:EXACT_IMAGES])
    found = run_all(OnnxRuntimeRunner(to_onnxruntime.integer_model(quantized).SerializeToString()), x.numpy())
    with torch.no_grad():
        exact = torch.cat([emulate(quantized, batch) for batch in x.split(100)]).numpy()
        floating = torch.cat([simulate(quantized, batch) for batch in x.split(64)]).numpy()
    return {
        "difference": float(np.abs(found - exact).max()),
        "disagreement": float(100 * (exact.argmax(1) != floating.argmax(1)).mean()),
        "float_islands": float_islands(quantized),
    }


def searched(name: str, seed: int) -> dict[str, Any]:
    """All arms on one seed's images."""
    judge = Judge(name, seed)
    return {arm: judge.arm(arm) for arm in ARMS}


def tuned_float(name: str) -> float:
    """The float rival: the checkpoint after the fine-tuning that the integers get, on test."""
    from edgecompress.graph import build_graph

    model = trained(network(name), f"{name}-tuned", dataset(TUNED[name]), TUNING, network(name))
    return on_test(to_onnx.float_model(build_graph(model, (3, 32, 32), name)))


def tuned_integers(name: str, bits: list[int]) -> dict[str, Any]:
    """The searched bits after quantisation-aware training with distillation: the file on test, and its average bits."""
    from edgecompress.trace import trace

    simulator = simulator_of(name)
    layers = [layer.name for layer in trace(network(name), (3, 32, 32), name).network.layers]
    choices = {x: LayerChoice(weight_bits=b, activation_bits=8) for x, b in zip(layers, bits, strict=True)}
    start = simulator.quantized(choices)
    module = trained(LearnedSteps(start), f"{name}-integers", dataset(TUNED[name]), TUNING, network(name))
    finished = module.finished()  # type: ignore[operator]
    policy = CompressionPolicy(model=name, layers=dict(choices))
    x = test_images()[0][:EXACT_IMAGES]
    return {
        "before": on_test(to_onnxruntime.integer_model(start)),
        "after": on_test(to_onnxruntime.integer_model(finished)),
        "average_weight_bits": average_weight_bits(trace(network(name), (3, 32, 32), name).network, policy),
        "weight_bytes": weight_bytes(finished),
        "disagreement": disagreement(finished, x),
    }


def disagreement(quantized: QuantizedGraph, x: Tensor) -> float:
    """Percent of images to which the integer emulator gives another class than the float simulation."""
    with torch.no_grad():
        pairs = [(emulate(quantized, part).argmax(1), simulate(quantized, part).argmax(1)) for part in x.split(100)]
    return float(100 * torch.cat([a != b for a, b in pairs]).float().mean())


def relative_time(name: str) -> float:
    """CPU time of one policy's evaluation, preparation included, over that of the plain channels_last network, in turns."""
    simulator = simulator_of(name)
    x, _ = held_out(held_out_rows()[:512])
    x = channels_last(x)
    constants = {key: channels_last(value) for key, value in float_constants(simulator.graph).items()}

    def seconds(forward: Callable[[Tensor], Tensor]) -> float:
        start = time.process_time()
        for part in x.split(64):
            forward(part)
        return time.process_time() - start

    def policy(part: Tensor) -> Tensor:
        return run(simulator.graph, part, constants)

    ratios = []
    with torch.no_grad():
        for turn in range(9):
            start = time.process_time()
            forward = simulator.forward(mixed(simulator, turn % 3))
            ratios.append((time.process_time() - start + seconds(forward)) / seconds(policy))
    return statistics.median(ratios[3:])  # the first three quantise their weights; a search meets every width again


# ------------------------------------------------------------------------------------------------------ the cells


def cells() -> dict[str, Callable[[], Any]]:
    """Everything that is measured, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name in NETWORKS:
        found |= {f"exact-{name}-{bits}": partial(exactness, name, bits) for bits in ("w8a8", "w4a4", "mixed")}
        found[f"test-{name}-fp32"] = partial(float_on_test, name)
        found[f"test-{name}-w8a8"] = partial(eight_bits_on_test, name)
    found[f"test-{DEPTHWISE}-w8a8-equalised"] = partial(eight_bits_on_test, DEPTHWISE, True)
    for name in CHECKPOINTS:
        for weights, inputs in ((4, 4), (4, 8)):
            found[f"unseen-{name}-w{weights}a{inputs}"] = partial(uniform_unseen, name, weights, inputs)
        found |= {f"search-{name}-{seed}": partial(searched, name, seed) for seed in range(SEEDS)}
        found[f"tuned-{name}-float"] = partial(tuned_float, name)
        found[f"tuned-{name}-integers"] = partial(_tuned_from_search, name)
    for bits in ((8, 8), (4, 8), (4, 4)):
        for ranges, help_with in (*((ranges, "plain") for ranges in RANGES), ("mse", "bias"), ("mse", "equalise")):
            label = f"held-out-resnet20-w{bits[0]}a{bits[1]}-{ranges}-{help_with}"
            found[label] = partial(post_training, "resnet20", ranges, help_with, bits)
    found["time-resnet20"] = partial(relative_time, "resnet20")
    return found


def _tuned_from_search(name: str) -> dict[str, Any]:
    return tuned_integers(name, value(f"search-{name}-0")["ddpg"]["weight_bits"])


def value(name: str) -> Any:
    """One cell, measured once."""
    path = KEPT / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.process_time()
    found = cells()[name]()
    print(f"     {name}: {json.dumps(found)} ({time.process_time() - start:.0f} s of CPU)", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return found


def kept(name: str) -> Any:
    """One cell if it was measured."""
    return value(name) if (KEPT / f"{name}.json").exists() else None


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a pattern of cells to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in cells():
        if re.fullmatch(arguments.only, name):
            value(name)


if __name__ == "__main__":
    main()
