"""What a few hundred images can tell of policies: python benchmarks/ranking_signals.py [--quick]

Needs EDGECOMPRESS_DATA with cifar10-jpeg.tar.gz and the ResNet-20 checkpoint. Policies of both stages are measured on held-out
images; each signal, on some of the images, is compared with the accuracy on all others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from harness import RESULTS, Benchmark
from prune_lab import Lab
from quantize_arms import float_answers, held_out, held_out_rows, kl_tables, simulator_of, space_of
from torch import Tensor

from edgecompress.baselines import programs
from edgecompress.fidelity import PRUNED, QUANTIZED, Yardstick, divergences
from edgecompress.mutations import changed
from edgecompress.spaces import Choice, SearchSpace

NETWORK, BUDGET = "resnet20", "flops=0.5x"
ASKED, SPLITS = 250, 150
TEMPERATURES = (1.0, 2.0, 4.0)
COUNTS = {"pruned": 40, "quantised": 45}
IMAGES = {"pruned": 4000, "quantised": 3500}


def quantised(count: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of policies ``[policies, images, classes]``, of the float network, and labels: a third are integer programs, a
    third lie around those, a third around uniform bits; all at the bytes of 4-bit weights."""
    simulator = simulator_of(NETWORK)
    space = space_of(NETWORK, simulator)
    random = np.random.default_rng(7)
    best = list(dict.fromkeys(islice(programs(space, kl_tables(simulator, space), 3), 10 * count)))[: count // 3]

    def near() -> Choice:
        wishes = space.wishes(best[random.integers(len(best))])
        return space.project((wishes + random.normal(0, 0.12, len(wishes))).clip(0, 1))

    def anywhere() -> Choice:
        return space.project((0.5 + 0.2 * random.standard_normal(len(space.levels))).clip(0, 1))

    chosen = _more(_more(best, near, 2 * count // 3), anywhere, count)
    x, labels = held_out(held_out_rows()[:images])
    found = []
    for choice in chosen:
        forward = simulator.forward(space.to_policy(choice).layers)
        found.append(torch.cat([forward(part) for part in x.split(64)]))
    return torch.stack(found), float_answers(simulator, x), labels


def pruned(count: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of networks of half the multiply-adds, not trained again: what searches found, and mutations of it."""
    lab = Lab(NETWORK)
    space, _ = lab.space(BUDGET)
    random = np.random.default_rng(7)
    leaders = list(_leaders(space))
    chosen = _more([], lambda: changed(space, leaders[random.integers(len(leaders))], random), count)
    x, labels = (values[:images] for values in lab.inputs("all"))
    x = x.contiguous(memory_format=torch.channels_last)
    networks = (lab.pruned(choice) for choice in chosen)
    found = torch.stack([lab.answers(model, x) for model in networks])
    return found, lab.answers(lab.model.to(memory_format=torch.channels_last), x), labels


def _leaders(space: SearchSpace) -> Iterator[Choice]:
    """The best of every committed search under the budget."""
    for name, cell in json.loads((RESULTS / "prune_cifar10_cells.json").read_text())["cells"].items():
        if name.startswith(f"search/{BUDGET}/"):
            yield from (tuple(choice) for choice, *_ in cell["leaders"] if space.fits(tuple(choice)))


def _more(chosen: list[Choice], draw: Callable[[], Choice], count: int) -> list[Choice]:
    """``chosen`` and new ones, until there are ``count``."""
    result = list(chosen)
    while len(result) < count:
        choice = draw()
        if choice not in result:
            result.append(choice)
    return result


def signals(outputs: Tensor, wanted: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Per policy and image, the larger the better: ``[policies, images]``; the first is the accuracy."""
    likelihood = outputs.log_softmax(2).gather(2, labels.view(1, -1, 1).expand(len(outputs), -1, 1)).squeeze(2)
    found = {"accuracy": (outputs.argmax(2) == labels).double(), "cross-entropy": likelihood.double()}
    for temperature in TEMPERATURES:
        found[f"divergence, T = {temperature:g}"] = torch.stack([
            -divergences(wanted, policy, temperature) for policy in outputs
        ])  # fmt: skip
    return {name: values.numpy() for name, values in found.items()}


def ranks(found: dict[str, np.ndarray], asked: int, best_half: bool) -> dict[str, float]:
    """Spearman's rank correlation of every signal on ``asked`` images with the accuracy on the others, mean over splits.

    best_half: of the policies whose accuracy on all images is above the median.
    """
    from scipy.stats import spearmanr

    accuracy = found["accuracy"]
    policies = np.argsort(-accuracy.mean(1))[: len(accuracy) // 2 if best_half else None]
    random = np.random.default_rng(0)
    total = dict.fromkeys(found, 0.0)
    for _ in range(SPLITS):
        order = random.permutation(accuracy.shape[1])
        truth = accuracy[policies][:, order[asked:]].mean(1)
        for name, values in found.items():
            total[name] += float(spearmanr(values[policies][:, order[:asked]].mean(1), truth)[0])
    return {name: value / SPLITS for name, value in total.items()}


def slope(found: dict[str, np.ndarray], original: float, yardstick: Yardstick) -> float:
    """Accuracy lost per nat, by least squares through the origin."""
    lost = original - found["accuracy"].mean(1)
    nats = -found[f"divergence, T = {yardstick.temperature:g}"].mean(1)
    return float((lost * nats).sum() / (nats**2).sum())


def main() -> None:
    """Measure, or on a few policies and images with --quick."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten policies, 500 images; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    bench = Benchmark("ranking_signals", quick)
    table: dict[str, dict[str, object]] = {}
    for name, measured, yardstick in (("pruned", pruned, PRUNED), ("quantised", quantised, QUANTIZED)):
        count, images = (10, 500) if quick else (COUNTS[name], IMAGES[name])
        outputs, wanted, labels = measured(count, images)
        found = signals(outputs, wanted, labels)
        used = f"divergence, T = {yardstick.temperature:g}"
        for title, half in (("all", False), ("better half", True)):
            column = ranks(found, ASKED, half)
            gain = column[used] - column["accuracy"]
            bench.at_least(f"{name}, {title}: rank correlation of {used} less that of the accuracy", gain, 0.0, "")
            for signal, value in column.items():
                table.setdefault(signal, {"ranked by": signal})[f"{name}, {title}"] = round(value, 2)
        original = float((wanted.argmax(1) == labels).double().mean())
        bench.details[f"{name}: policies"] = {
            "policies": count,
            "images": images,
            "accuracy of the original": round(original, 4),
            "accuracies": [round(float(value), 4) for value in np.sort(found["accuracy"].mean(1))],
            f"accuracy lost per nat at T = {yardstick.temperature:g}": round(slope(found, original, yardstick), 3),
            "the factor that searches use": yardstick.lost_per_nat,
        }
    bench.details[f"Rank correlation of {ASKED} images with the accuracy on all others"] = list(table.values())
    bench.write()


if __name__ == "__main__":
    main()
