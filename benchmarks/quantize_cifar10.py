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
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from cifar10 import CHECKPOINTS, DEPTHWISE, KEPT, dataset, graph_of, images, network, normalised, trained
from harness import Benchmark
from quantize_arms import ARMS, CHOSEN, EFFORT, SEEDS, Judge, held_out, held_out_rows, uniform, weight_bytes
from quantize_arms import simulator_of as calibrated
from torch import Tensor, nn

from edgecompress.cost import average_weight_bits
from edgecompress.exporters import to_onnx, to_onnxruntime
from edgecompress.exporters.emulate import emulate, float_islands
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.finetune import TrainSettings
from edgecompress.interpret import float_constants, run
from edgecompress.learned_steps import LearnedSteps
from edgecompress.posttraining import bias_corrected, equalised, without_upper_ends
from edgecompress.quantize import BITS, QuantizedGraph, Simulator, calibrate, channels_last, simulate
from edgecompress.ranges import RANGES
from edgecompress.spec import CompressionPolicy, LayerChoice

NETWORKS = (*CHECKPOINTS, DEPTHWISE)
EXACT_IMAGES = 1000
# Of the fine-tuning that the trained bits and their float rival get alike: images of the 45,000, then the schedule.
TUNED = {"resnet20": 16_000, "resnet56": 16_000}
TUNING = {
    name: TrainSettings(epochs=1, learning_rate=rate, batch_size=64, weight_decay=0.0)
    for name, rate in (("resnet20", 0.01), ("resnet56", 0.002))
}

Choices = Mapping[str, LayerChoice]


# ------------------------------------------------------------------------------------------------ what is measured


@cache
def simulator_of(name: str, ranges: str = "mse", equalise: bool = False) -> Simulator:
    """The calibrated network; calibration happens once."""
    if not equalise:
        return calibrated(name, ranges)
    x = calibration_images()
    graph = equalised(without_upper_ends(graph_of(name), x.split(100)))
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
    x, labels = held_out(held_out_rows()[CHOSEN][-2000:])
    return top1(partial(simulate, quantized), x, labels.numpy())


def uniform_on_test(name: str, weight_bits: int, activation_bits: int) -> dict[str, float]:
    """The same bits everywhere, without training: the file on test, and its bytes of weights."""
    simulator = simulator_of(name)
    quantized = simulator.quantized(uniform(simulator, weight_bits, activation_bits))
    return {"accuracy": on_test(to_onnxruntime.integer_model(quantized)), "bytes": weight_bytes(quantized)}


@cache
def bits_on_test(name: str, weight_bits: tuple[int, ...]) -> float:
    """Searched bits, without training: the file on test."""
    simulator = simulator_of(name)
    return on_test(to_onnxruntime.integer_model(simulator.quantized(choices_of(name, weight_bits))))


def choices_of(name: str, weight_bits: Sequence[int]) -> dict[str, LayerChoice]:
    """Weight bits in the order of the traced layers, inputs at 8."""
    from edgecompress.trace import trace

    layers = [layer.name for layer in trace(network(name), (3, 32, 32), name).network.layers]
    return {x: LayerChoice(weight_bits=b, activation_bits=8) for x, b in zip(layers, weight_bits, strict=True)}


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


def float_islands_case() -> dict[str, Any]:
    """MobileNet-V3's block (squeeze-excite, HardSwish, Sigmoid gates) with operators that ONNX Runtime runs in float."""
    from edgecompress.graph import build_graph

    torch.manual_seed(0)
    graph = build_graph(_MobileNetV3Like().eval(), (3, 32, 32), "mobilenetv3-like")
    simulator = Simulator(graph, calibrate(graph, calibration_images().split(100)))
    quantized = simulator.quantized(uniform(simulator, 8, 8))
    x, _ = held_out(held_out_rows()[:EXACT_IMAGES])
    found = run_all(OnnxRuntimeRunner(to_onnxruntime.integer_model(quantized).SerializeToString()), x.numpy())
    with torch.no_grad():
        exact = torch.cat([emulate(quantized, batch) for batch in x.split(100)]).numpy()
    step = quantized.tensors[graph.outputs[0]].scale
    steps = np.rint(np.abs(found - exact) / step)
    return {
        "difference": float(np.abs(found - exact).max()),
        "one_step": float(100 * (steps >= 1).mean()),
        "more_than_one_step": float(100 * (steps > 1).mean()),
        "float_islands": float_islands(quantized),
    }


class _MobileNetV3Like(nn.Module):
    """One block whose output is per pixel, so that every element can be compared on its own grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish())
        self.wide = nn.Sequential(nn.Conv2d(16, 48, 1), nn.SiLU())
        self.depthwise = nn.Sequential(nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.Hardswish())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 12, 1), nn.LeakyReLU(0.1), nn.Conv2d(12, 48, 1), nn.Sigmoid()
        )
        self.narrow = nn.Conv2d(48, 16, 1)
        self.last = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        y = self.depthwise(self.wide(stem))
        result: Tensor = self.last(stem + self.narrow(y * self.squeeze(y)))
        return result


def searched(name: str, seed: int) -> dict[str, Any]:
    """All arms on one seed's images."""
    judge = Judge(name, seed)
    return {arm: judge.arm(arm) for arm in ARMS}


def searched_on_test(name: str, seed: int) -> dict[str, float] | None:
    """What all arms of one seed chose, once every seed is done; None before."""
    searches = [kept(f"search-{name}-{each}") for each in range(SEEDS)]
    if None in searches:
        return None
    return {arm: bits_on_test(name, tuple(found["weight_bits"])) for arm, found in searches[seed].items()}


def tuned_float(name: str) -> float:
    """The float rival: the checkpoint after the fine-tuning that the integers get, on test."""
    from edgecompress.graph import build_graph

    model = trained(network(name), f"{name}-tuned", dataset(TUNED[name]), TUNING[name], network(name))
    return on_test(to_onnx.float_model(build_graph(model, (3, 32, 32), name)))


def tuned_integers(name: str, bits: list[int]) -> dict[str, Any]:
    """The searched bits after quantisation-aware training with distillation: the file on test, and its average bits."""
    from edgecompress.trace import trace

    simulator = simulator_of(name)
    choices = choices_of(name, bits)
    start = simulator.quantized(choices)
    module = trained(LearnedSteps(start), f"{name}-integers", dataset(TUNED[name]), TUNING[name], network(name))
    finished = module.finished()  # type: ignore[operator]
    policy = CompressionPolicy(model=name, layers=dict(choices))
    x = test_images()[0][:EXACT_IMAGES]
    return {
        "weight_bits": bits,
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
    found["islands-mobilenetv3"] = float_islands_case
    for name in CHECKPOINTS:
        for weights, inputs in ((4, 4), (4, 8), (8, 8)):
            found[f"uniform-{name}-w{weights}a{inputs}"] = partial(uniform_on_test, name, weights, inputs)
        found |= {f"search-{name}-{seed}": partial(searched, name, seed) for seed in range(SEEDS)}
        found |= {f"searched-test-{name}-{seed}": partial(searched_on_test, name, seed) for seed in range(SEEDS)}
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
    if found is None:
        return None  # what it needs is not there yet
    print(f"     {name}: {json.dumps(found)} ({time.process_time() - start:.0f} s of CPU)", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found) + "\n")
    return found


def kept(name: str) -> Any:
    """One cell if it was measured."""
    return value(name) if (KEPT / f"{name}.json").exists() else None


# ------------------------------------------------------------------------------------------------------- the page

OWED = "not measured yet: start the benchmark again, it goes on where it stopped"


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and lower end of its two-sided 95 % interval (Student's t), paired by seed."""
    from scipy.stats import t

    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - float(t.ppf(0.975, len(differences) - 1)) * error


def measure(bench: Benchmark) -> None:
    """All bars of stage 2, from the cells that are there."""
    _eight_bits(bench)
    for name in CHECKPOINTS:
        _policies(bench, name)
    for name in CHECKPOINTS:
        _training(bench, name)
    _exact(bench)
    if (ratio := kept("time-resnet20")) is None:
        bench.not_run("resnet20: CPU time of an evaluation / plain channels_last network", 1.3, "x", OWED)
    else:
        bench.at_most("resnet20: CPU time of an evaluation / plain channels_last network", ratio, 1.3, "x")
    ways = {name.removeprefix("held-out-resnet20-"): kept(name) for name in cells() if name.startswith("held-out-")}
    bench.details["ResNet-20 without training: accuracy on held-out images, float fake quantisation"] = [
        {"bits, ranges, help": name, "accuracy, %": found} for name, found in ways.items()
    ]
    bench.details["How it was measured"] = [{"": text} for text in NOTES]


NOTES = (
    "Every cell is measured once and kept; the seconds above are those of the last call, which only reads them. The whole takes "
    "about three hours of one core here: 27 minutes of searches for ResNet-20, 75 for ResNet-56, 35 of fine-tuning, 18 for the "
    "depthwise network.",
    "Test accuracy is that of the exported file in ONNX Runtime, with exact kernels, on all 10,000 test images.",
    "Searches: {} evaluations each. ResNet-20 is asked {} held-out images, ResNet-56 {}, others for every seed. Of every arm's "
    "policies the ten that follow the float network most closely are measured on {} and {} others, and the one of least loss "
    "there meets the test split, after the last search.".format(
        EFFORT["resnet20"].evaluations,
        *(EFFORT[name].images for name in CHECKPOINTS),
        *(EFFORT[name].compared for name in CHECKPOINTS),
    ),
    "Every arm ranks policies by their divergence from the float network's answers, as the product does: from few images it orders "
    "policies better than accuracy or cross-entropy do (benchmarks/ranking_signals.py).",
    "The searched bits and integer programming pay for their table of divergences per layer and bit-width (32 images) with "
    "evaluations; greedy measures its sensitivities with evaluations, at several bit-widths.",
    "Tried before, on 2,000 held-out images, ResNet-20, two seeds of 66 evaluations of 400 images: ranking by counted accuracy gave "
    "86.60 and 85.50 % (searched), 86.55 twice (greedy), 86.65 and 86.55 (integer programming). Ranking by divergence took the worst "
    "seed away. What is left on ResNet-20 is small: the arms' policies differ in two or three layers and by some ten of 10,000 "
    "test images, and integer programming returned one and the same policy for four seeds; the search's follow the "
    "float network more closely on the images that were asked, and are no better on others.",
    "The ResNet-56 checkpoint has seen all training images: its accuracy on the images that are held out here is too high, "
    "and differences between policies are too small. Its test figures are not touched by that.",
    "Fine-tuning: one epoch over 16,000 of the 45,000 images, crops and flips, SGD at 0.01 (ResNet-20) or 0.002 (ResNet-56) under a "
    "cosine, distillation from the checkpoint; the float rival and the integers get the same. Tried first on ResNet-56: 8,000 images "
    "at 0.01, which took its integers from 88.57 to 88.05 % on test: without BatchNorm, which is folded, 56 layers do not bear "
    "that rate. On 1,000 held-out images 0.002 halved the divergence from the float network within 25 steps.",
)


def _eight_bits(bench: Benchmark) -> None:
    for name in NETWORKS:
        as_float, plain = kept(f"test-{name}-fp32"), kept(f"test-{name}-w8a8")
        helped = kept(f"test-{name}-w8a8-equalised") if name == DEPTHWISE else None
        figure = f"{name}: test accuracy lost by w8a8 without training"
        limit = 1.0 if name == DEPTHWISE else 0.2
        integer = plain if helped is None else helped
        if as_float is None or integer is None:
            bench.not_run(figure, limit, "points", OWED)
            continue
        bench.at_most(figure, as_float - integer, limit, "points")
        found = {"fp32": as_float, "w8a8": plain} | ({"w8a8, equalised": helped} if helped is not None else {})
        bench.details[f"{name}: test accuracy, exported file"] = [
            {"file": file, "accuracy, %": accuracy} for file, accuracy in found.items()
        ]


def _policies(bench: Benchmark, name: str) -> None:
    """The searched policies against uniform bits and the other arms, all as files on test."""
    tested = [found for seed in range(SEEDS) if (found := kept(f"searched-test-{name}-{seed}")) is not None]
    uniforms = {
        bits: found for bits in ("w4a4", "w4a8", "w8a8") if (found := kept(f"uniform-{name}-{bits}")) is not None
    }
    for bits in ("w4a4", "w4a8"):
        figure = f"{name}: searched bits above uniform {bits} on test, equal bytes, before training"
        if len(tested) < SEEDS or len(uniforms) < 3:
            bench.not_run(figure, 1.0, "points", OWED)
            continue
        gain = statistics.mean(found["ddpg"] for found in tested) - uniforms[bits]["accuracy"]
        room = uniforms["w8a8"]["accuracy"] - uniforms[bits]["accuracy"]
        if gain >= 1.0:
            bench.at_least(figure, gain, 1.0, "points")
        else:
            why = f"uniform w8a8, at twice the bytes, is {room:.2f} points above it"
            bench.misses(figure, gain, 1.0, "points", why)
    for rival in ARMS[1:]:
        figure = f"{name}: searched bits against {rival} on test, {SEEDS} seeds"
        if len(tested) < SEEDS:
            bench.not_run(f"{figure}: mean difference", 0.0, "points", OWED)
            bench.not_run(f"{figure}: lower end of the 95 % interval", -0.3, "points", OWED)
            continue
        mean, low = interval([found["ddpg"] - found[rival] for found in tested])
        bench.at_least(f"{figure}: mean difference", mean, 0.0, "points")
        bench.at_least(f"{figure}: lower end of the 95 % interval", low, -0.3, "points")
    rows = _searched_rows(name)
    rows += [
        {"arm": f"uniform {bits}", "test accuracy, %": found["accuracy"], "bytes": found["bytes"]}
        for bits, found in uniforms.items()
    ]
    columns = list(rows[0]) if rows else []
    bench.details[f"{name}: policies at the bytes of uniform 4-bit weights, files on test"] = [
        dict.fromkeys(columns) | row for row in rows
    ]


def _searched_rows(name: str) -> list[dict[str, Any]]:
    rows = []
    for seed in range(SEEDS):
        tested = kept(f"searched-test-{name}-{seed}") or {}
        for arm, found in (kept(f"search-{name}-{seed}") or {}).items():
            rows.append({
                "arm": arm,
                "seed": seed,
                "test accuracy, %": tested.get(arm),
                "held-out accuracy, %": found["accuracy"],
                "found by": found["found_by"],
                "policies within the budget": found["evaluations"],
                "bytes": found["bytes"],
                "weight bits": " ".join(map(str, found["weight_bits"])),
            })  # fmt: skip
    return rows


def _training(bench: Benchmark, name: str) -> None:
    rival, found = kept(f"tuned-{name}-float"), kept(f"tuned-{name}-integers")
    figure = f"{name}: test accuracy lost at 4 weight bits on average, after training"
    if rival is None or found is None:
        bench.not_run(figure, 0.5, "points", OWED)
        return
    bench.at_most(figure, rival - found["after"], 0.5, "points")
    bench.details[f"{name}: trained integers, test accuracy of the files"] = [
        {
            "float, untouched, %": kept(f"test-{name}-fp32"),
            "float, same fine-tuning, %": rival,
            "integers before, %": found["before"],
            "integers after, %": found["after"],
            "average weight bits": round(found["average_weight_bits"], 3),
            "bytes of weights": found["weight_bytes"],
            "emulator answers otherwise than the float simulation, %": found["disagreement"],
        }
    ]


def _exact(bench: Benchmark) -> None:
    rows = []
    for name in NETWORKS:
        for bits in ("w8a8", "w4a4", "mixed"):
            found = kept(f"exact-{name}-{bits}")
            figure = f"{name} {bits}: emulator against ONNX Runtime, {EXACT_IMAGES} images"
            if found is None:
                bench.not_run(figure, 0, "", OWED)
                continue
            bench.at_most(figure, found["difference"], 0, "")
            rows.append({
                "network": name, "bits": bits, "largest difference": found["difference"],
                "float islands": ", ".join(found["float_islands"]) or "none",
                "emulator answers otherwise than the float simulation, %": round(found["disagreement"], 2),
            })  # fmt: skip
    found = kept("islands-mobilenetv3")
    figure = "MobileNet-V3-like blocks with float islands: elements off by more than one step"
    if found is None:
        bench.not_run(figure, 0.1, "%", OWED)
    else:
        bench.at_most(figure, found["more_than_one_step"], 0.1, "%")
        bench.at_most(figure.replace("more than one step", "a step"), found["one_step"], 0.1, "%")
        rows.append({
            "network": "MobileNet-V3-like", "bits": "w8a8", "largest difference": found["difference"],
            "float islands": ", ".join(found["float_islands"]),
            "emulator answers otherwise than the float simulation, %": None,
        })  # fmt: skip
    bench.details["Two simulators"] = rows


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short cell; nothing is written")
    parser.add_argument("--only", default="", help="a pattern of cells to measure; no page")
    parser.add_argument(
        "--render", action="store_true", help="the page from the cells that are there, nothing is measured"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.quick:
        quick()
        return
    for name in () if arguments.render else cells():
        if re.fullmatch(arguments.only or ".*", name):
            value(name)
    if not arguments.only:
        bench = Benchmark("quantize_cifar10", quick=False)
        measure(bench)
        bench.write()


def quick() -> None:
    """ResNet-20 at w8a8 on 50 images: emulator and file agree, and both nearly with the float network."""
    simulator = simulator_of("resnet20")
    quantized = simulator.quantized(uniform(simulator, 8, 8))
    x, labels = held_out(held_out_rows()[:50])
    found = run_all(OnnxRuntimeRunner(to_onnxruntime.integer_model(quantized).SerializeToString()), x.numpy())
    with torch.no_grad():
        exact = emulate(quantized, x).numpy()
    bench = Benchmark("quantize_cifar10", quick=True)
    bench.at_most("resnet20 w8a8: emulator against ONNX Runtime, 50 images", float(np.abs(found - exact).max()), 0, "")
    bench.at_least(
        "resnet20 w8a8: accuracy on 50 held-out images",
        float(100 * (found.argmax(1) == labels.numpy()).mean()),
        70,
        "%",
    )
    bench.write()


if __name__ == "__main__":
    main()
