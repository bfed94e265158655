"""The search of stage 2 against greedy and integer programming: the same images, evaluations and choice of the winner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import graph_of, held_out_rows, images, network, normalised, seen_rows
from torch import Tensor

from edgecompress.baselines import Tables, programs
from edgecompress.cost import Kernel, count
from edgecompress.exporters.onnx_writing import Names
from edgecompress.exporters.packing import store
from edgecompress.fidelity import QUANTIZED, divergence
from edgecompress.interpret import run
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.quantize import QuantizedGraph, Simulator, calibrate, channels_last
from edgecompress.reward import accuracy_only
from edgecompress.search import SearchSettings, search
from edgecompress.sensitivity import Sensitivities, sensitivities
from edgecompress.spaces import Choice, Limit, Outcome, SearchSpace
from edgecompress.spec import CompressionPolicy, LayerChoice, Trial, parse_budgets
from edgecompress.stage_spaces import bitwidth_space
from edgecompress.trace import trace

ARMS = ("ddpg", "greedy", "milp")
SEEDS = 5
LEADERS = 10
BATCH = 64
CALIBRATION = 500
SENSITIVITY_IMAGES = 32
# Of the held-out 5,000: the images that a search asks are drawn from the first, its best are compared on the second.
ASKED, CHOSEN = slice(0, 2000), slice(2000, 5000)


@dataclass(frozen=True)
class Effort:
    """What one search may spend: evaluations of so many images, and images on which its best are compared."""

    evaluations: int
    images: int
    compared: int


EFFORT = {"resnet20": Effort(120, 500, 1500), "resnet56": Effort(120, 400, 1000)}


def held_out(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Normalised images and labels of the training files at ``rows``."""
    pixels, labels = images("train")
    return normalised(pixels[rows]), torch.from_numpy(labels[rows])


def simulator_of(name: str, ranges: str = "mse") -> Simulator:
    """The calibrated network."""
    graph = graph_of(name)
    x = normalised(images("train")[0][seen_rows()[:CALIBRATION]])
    return Simulator(graph, calibrate(graph, x.split(100), ranges=ranges))


def weight_bytes(quantized: QuantizedGraph) -> int:
    """Bytes of all weight initialisers as they are stored in the file."""
    return sum(_initializer_bytes(weight.values, weight.bits) for weight in quantized.weights.values())


def _initializer_bytes(values: np.ndarray, bits: int) -> int:
    return sum(len(found.raw_data) for found in store(values, bits, Names(), max_opset=25).initializers)


@dataclass
class WeightBytes:
    """The size that the searches are held to: weight initialisers of every layer, nothing else."""

    simulator: Simulator
    known: dict[tuple[str, int], int] = field(default_factory=dict)

    def __call__(self, kernels: Any, params: int) -> int:
        return sum(self.of(kernel) for kernel in kernels)

    def of(self, kernel: Kernel) -> int:
        key = (kernel.layer.name, kernel.weight_bits)
        if key not in self.known:
            layer = next(layer for layer in self.simulator.graph.layers if layer.name == key[0])
            self.known[key] = _initializer_bytes(self.simulator.weight(layer, key[1]).values, key[1])
        return self.known[key]


def uniform(simulator: Simulator, weight_bits: int, activation_bits: int) -> dict[str, LayerChoice]:
    """The same bits everywhere."""
    choice = LayerChoice(weight_bits=weight_bits, activation_bits=activation_bits)
    return {layer.name: choice for layer in simulator.graph.layers}


def space_of(name: str, simulator: Simulator) -> SearchSpace:
    """Weight bits of every layer at no more bytes than 4 bits everywhere; activations at most 8 bits."""
    traced = trace(network(name), (3, 32, 32), name)
    size = WeightBytes(simulator)
    points = simulator.points
    shared = [points.layers_of(owner) for owner in dict.fromkeys(points.layer_input.values())]
    limit = Limit(parse_budgets("size=1x")[0], weight_bytes(simulator.quantized(uniform(simulator, 4, 8))))
    pruned = CompressionPolicy(model=name)
    return bitwidth_space(
        traced.network, pruned, shared, target_by_name("x86"),
        lambda policy: count(traced.network, policy, None, size), [limit],
    )  # fmt: skip


def outcome(
    simulator: Simulator, choices: Mapping[str, LayerChoice], x: Tensor, labels: Tensor, wanted: Tensor | None = None
) -> Outcome:
    """Accuracy and loss by float fake quantisation; ``wanted``, the float network's answers, give the estimate."""
    forward = simulator.forward(choices)
    scores = torch.cat([forward(part) for part in x.split(BATCH)])
    accuracy = float((scores.argmax(1) == labels).float().mean())
    loss = float(F.cross_entropy(scores, labels))
    if wanted is None:
        return Outcome(accuracy, loss)
    as_float = float((wanted.argmax(1) == labels).float().mean())
    return Outcome(accuracy, loss, estimate=QUANTIZED.expected(as_float, divergence([wanted], [scores])))


def float_answers(simulator: Simulator, x: Tensor) -> Tensor:
    """What the network says before it is quantised."""
    with torch.no_grad():
        return torch.cat([run(simulator.graph, channels_last(part), simulator.floats) for part in x.split(BATCH)])


class Judge:
    """Answers policies on one seed's images; what one arm asked costs the others an evaluation, but no time."""

    def __init__(self, name: str, seed: int) -> None:
        self.simulator = simulator_of(name)
        self.space = space_of(name, self.simulator)
        rows = held_out_rows()[ASKED]
        chosen = np.random.default_rng(seed).permutation(rows)[: EFFORT[name].images]
        self.asked, self.chosen = held_out(chosen), held_out(held_out_rows()[CHOSEN][: EFFORT[name].compared])
        self.wanted = float_answers(self.simulator, self.asked[0])
        self.known: dict[tuple[int, ...], Outcome] = {}
        self.name, self.seed = name, seed

    def __call__(self, policy: CompressionPolicy) -> Outcome:
        key = tuple(choice.weight_bits for choice in policy.layers.values())
        if key not in self.known:
            self.known[key] = outcome(self.simulator, policy.layers, *self.asked, self.wanted)
        return self.known[key]

    def arm(self, name: str) -> dict[str, Any]:
        """One arm's policy: its ten nearest to the float network on the asked images, of these the one of least loss on others.

        Accuracy on a few hundred images is too coarse to choose by: one point is five of them.
        """
        trials = {"ddpg": self._search, "greedy": self._greedy, "milp": self._program}[name]()
        leaders = sorted(trials, key=lambda trial: -trial.believed)[:LEADERS]
        again = {t.choice: outcome(self.simulator, self._layers(t.choice), *self.chosen) for t in leaders}
        best = min(leaders, key=lambda trial: again[trial.choice].loss)
        return {
            "accuracy": 100 * again[best.choice].accuracy,
            "loss": again[best.choice].loss,
            "evaluations": len(trials),
            "found_by": best.arm,
            "bytes": self.space.price(best.choice).size_bytes,
            "weight_bits": list(best.choice[::2]),
        }

    def _layers(self, choice: Choice) -> Mapping[str, LayerChoice]:
        return self.space.to_policy(choice).layers

    @cached_property
    def tables(self) -> Tables:
        """KL divergence of every layer at every bit-width; an arm that looks at them pays `price_of_tables`."""
        return kl_tables(self.simulator, self.space)

    @property
    def price_of_tables(self) -> int:
        """Their images, in evaluations."""
        looks = sum(len(table) for action, table in self.tables.items() if action % 2 == 0)
        return round(looks * SENSITIVITY_IMAGES / EFFORT[self.name].images)

    def _searched(self, agent: str, episodes: int, tables: Callable[[], Tables] | None = None) -> list[Trial]:
        settings = SearchSettings(stage="quantize", agent=agent, episodes=episodes, seed=self.seed)
        original = self.space.price(self.space.largest)
        return search(self.space, self, accuracy_only, original, settings, tables=tables)

    def _search(self) -> list[Trial]:
        return self._searched("ddpg", EFFORT[self.name].evaluations - self.price_of_tables, lambda: self.tables)

    def _greedy(self) -> list[Trial]:
        # A third of what it is told goes into sensitivities: that third is here the whole of what the others get.
        return self._searched("greedy", 3 * EFFORT[self.name].evaluations)

    def _program(self) -> list[Trial]:
        """The program over KL divergences, then over the same ones blurred: as many solutions as it has evaluations left."""
        left = EFFORT[self.name].evaluations - self.price_of_tables
        trials: dict[Choice, Trial] = {}
        for number, choice in enumerate(programs(self.space, self.tables, self.seed)):
            if choice not in trials:
                found = self(self.space.to_policy(choice))
                trials[choice] = Trial(
                    stage="quantize", episode=len(trials), arm="milp", choice=choice, accuracy=found.accuracy,
                    loss=found.loss, reward=found.believed, cost=self.space.price(choice), estimate=found.estimate,
                )  # fmt: skip
            if len(trials) >= left or number > 4 * left:
                break
        return list(trials.values())


def kl_tables(simulator: Simulator, space: SearchSpace) -> dict[int, dict[int, float]]:
    """Sensitivities of the weights; activations stay at 8 bits and take no part."""
    x = normalised(images("train")[0][seen_rows()[:SENSITIVITY_IMAGES]])
    found: Sensitivities = sensitivities(simulator, [x], what=("weight",))
    return {
        action: found.table("weight", name.rpartition(":")[0]) if name.endswith(":weight") else {8: 0.0}
        for action, name in enumerate(space.names)
    }
