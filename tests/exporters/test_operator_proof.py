"""The proofs that go operator by operator: a deliberately wrong operator is caught, and so is a file that shows another graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from sample_networks import integer_case
from torch import Tensor, nn

from edgecompress.exporters import check_executorch, check_onnxruntime, to_executorch
from edgecompress.exporters.check_onnxruntime import check_ort
from edgecompress.exporters.emulate import emulate, float_islands
from edgecompress.exporters.operator_proof import OUTPUT, Difference, require_operators
from edgecompress.exporters.runners import is_x86
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.exporters.verify import Checks
from edgecompress.graph import build_graph
from edgecompress.quantize import QuantizedGraph, Simulator, TensorRange, calibrate
from edgecompress.spec import LayerChoice

needs_x86 = pytest.mark.skipif(not is_x86(), reason="with float islands the operators are compared on x86 only")
IMAGES = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))
Wrong = Callable[[QuantizedGraph], QuantizedGraph]


class Halved(nn.Module):
    """``x * 0.5`` between layers, which is a float island: no integer kernel takes a float constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(0.5 * torch.relu(self.first(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


@dataclass(frozen=True)
class Islands:
    """A network with a float island, and images whose classes are so clear that a slightly wrong file has them right too."""

    quantized: QuantizedGraph
    images: np.ndarray

    def checked(self, model: onnx.ModelProto) -> Checks:
        return check_ort(model.SerializeToString(), self.quantized, self.images)


@pytest.fixture(scope="module")
def islands() -> Islands:
    torch.manual_seed(3)
    module = Halved()
    with torch.no_grad():
        module.fc.bias -= module(IMAGES).mean(0)
        first, second = module(IMAGES).topk(2).values.T
    graph = build_graph(module, (3, 12, 12), "halved")
    simulator = Simulator(graph, calibrate(graph, [IMAGES], samples=4000))
    choice = LayerChoice(weight_bits=8, activation_bits=8)
    quantized = simulator.quantized({layer.name: choice for layer in graph.layers})
    assert [name.split()[0] for name in float_islands(quantized)] == ["Mul"]
    return Islands(quantized, IMAGES[(first - second).topk(16).indices].numpy())


def other_weights(layer: str, by: int = 1) -> Wrong:
    """Every weight of a layer ``by`` steps larger or, at the end of the grid, smaller."""

    def changed(quantized: QuantizedGraph) -> QuantizedGraph:
        weight = quantized.weights[layer]
        moved = np.where(weight.values > 100, weight.values - by, weight.values + by).astype(np.int8)
        return replace(quantized, weights={**quantized.weights, layer: replace(weight, values=moved)})

    return changed


def other_factor(quantized: QuantizedGraph) -> QuantizedGraph:
    """0.51 in the place of 0.5."""
    constants = {
        name: (value * np.float32(1.02) if value.size == 1 else value)
        for name, value in quantized.graph.constants.items()
    }
    assert sum(value.size == 1 for value in constants.values()) == 1
    return replace(quantized, graph=replace(quantized.graph, constants=constants))


def value_of(quantized: QuantizedGraph, called: str) -> str:
    """The value that an operator, by its name or type, is compared by: its own, or that of the activation behind it."""
    graph = quantized.graph
    node = next(node for node in graph.nodes if called in (node.name, node.op))
    values = [node.outputs[0], *(reader.outputs[0] for reader in graph.consumers(node.outputs[0]))]
    return next((value for value in values if value in quantized.tensors), OUTPUT)


@needs_x86
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_islands_are_proven_in_a_file_that_answers_as_the_real_one_to_the_bit(islands, batch):
    checks = islands.checked(integer_model(islands.quantized, batch=batch))
    assert not checks.failures and checks.values["shown_file_agrees"] is True
    assert checks.values["operators_compared"] == len(islands.quantized.tensors) + 1  # and the output


@needs_x86
@pytest.mark.parametrize("wrong", [other_factor, other_weights("second"), other_weights("fc")])
def test_a_file_that_is_not_the_one_whose_operators_were_compared_is_refused(islands, wrong):
    """Each of its classes is right and the operators of the graph are: only its answers say that it is another."""
    checks = islands.checked(integer_model(wrong(islands.quantized)))
    assert checks.failures == ["the file that shows its values answers otherwise: its operators prove nothing"]
    assert checks.values["shown_file_agrees"] is False and checks.values["emulator_agreement"] == 1


@needs_x86
@pytest.mark.parametrize(
    ("wrong", "operator"),
    [
        (other_factor, "Mul"),
        (other_weights("first"), "first"),
        (other_weights("second"), "second"),
        (other_weights("fc"), "fc"),
    ],
)
def test_a_wrong_operator_beside_an_island_is_named(islands, wrong, operator, monkeypatch):
    """The file and the one that shows its values are wrong alike, and each class is right."""
    real = check_onnxruntime.showing_values
    monkeypatch.setattr(check_onnxruntime, "showing_values", lambda quantized, **how: real(wrong(quantized), **how))
    checks = islands.checked(integer_model(wrong(islands.quantized)))
    assert checks.values["shown_file_agrees"] is True and checks.values["emulator_agreement"] == 1
    (failure,) = checks.failures
    place = value_of(islands.quantized, operator)
    assert failure.startswith(f"1 values are not what their operators make of their inputs ({place}: ")


@needs_x86
def test_a_value_that_the_file_does_not_show_is_a_failure(islands, monkeypatch):
    real, lost = check_onnxruntime.showing_values, value_of(islands.quantized, "second")

    def without_one(quantized, **how):
        model, names = real(quantized, **how)
        place = names.index(lost)
        del model.graph.output[1 + place]
        return model, names[:place] + names[place + 1 :]

    monkeypatch.setattr(check_onnxruntime, "showing_values", without_one)
    assert islands.checked(integer_model(islands.quantized)).failures == [
        f"1 values are not what their operators make of their inputs ({lost})"
    ]


def test_a_difference_fails_by_its_steps_and_by_its_share(islands):
    right, one = {name: Difference(0, 0) for name in islands.quantized.tensors}, value_of(islands.quantized, "first")
    for found, holds in (
        (Difference(1, 0.01), True),
        (Difference(2, 0.001), False),
        (Difference(1, 0.02), False),
        (Difference(float("nan"), 0), False),
    ):
        checks = Checks()
        require_operators(checks, islands.quantized, right | {one: found}, lambda name: Difference(1, 0.01))
        assert bool(checks.failures) != holds
        assert holds or f"({one}: " in checks.failures[0]


# ---------------------------------------------------------------------- ExecuTorch, whose programs PyTorch runs here


class Eager:
    """A program of ExecuTorch as PyTorch computes it: the same quantise and dequantise operators, without its wheel."""

    runtime, batch = "PyTorch", 0

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.run_whole(images)[0]

    def run_whole(self, images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            found = self._network(torch.from_numpy(images))
        return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


@pytest.fixture
def executorch(monkeypatch):
    """The proof of a program, where ``wrong`` is done to every one and ``shown`` to the one that shows its values."""
    case = integer_case("residual")
    quantized, scores, images = case.quantized(8, 8), TensorRange(0.1, 8, True), case.images[:8]
    exact = emulate(quantized, images).numpy()

    def proof(wrong: Wrong = lambda graph: graph, shown: Wrong = lambda graph: graph) -> Checks:
        def program(network: to_executorch.IntegerNetwork, image: Tensor) -> tuple[bytes, list[str]]:
            lowered.append(to_executorch.IntegerNetwork(shown(wrong(quantized)), scores, show=bool(network.shown)))
            return bytes([len(lowered) - 1]), []

        lowered: list[nn.Module] = [to_executorch.IntegerNetwork(wrong(quantized), scores)]
        monkeypatch.setattr(to_executorch, "program", program)
        monkeypatch.setattr(check_executorch, "_loaded", lambda data: Eager(lowered[data[0]]))
        checks = check_executorch.check_integer_program(bytes([0]), quantized, scores, images.numpy(), exact)
        assert len(lowered) == 1 + ("operators_compared" in checks.values)
        return checks

    return proof


def test_a_program_that_answers_right_is_not_lowered_a_second_time(executorch):
    checks = executorch()
    assert not checks.failures and checks.values["executorch_agreement"] == 1
    assert "shown_program_agrees" not in checks.values


def test_a_program_whose_answers_show_nothing_is_proven_by_its_operators(executorch, monkeypatch):
    monkeypatch.setattr(check_executorch, "INTEGER_ERROR", 0.0)
    checks = executorch()
    assert not checks.failures and checks.values["shown_program_agrees"] is True
    assert checks.values["operators_compared"] > 5


@pytest.mark.parametrize("layer", ["stem.0", "shortcut.0", "fc"])
def test_a_wrong_operator_of_a_program_is_named(executorch, layer, monkeypatch):
    monkeypatch.setattr(check_executorch, "INTEGER_ERROR", 0.0)
    checks = executorch(other_weights(layer, by=20))
    assert checks.values["shown_program_agrees"] is True
    (failure,) = checks.failures
    place = value_of(integer_case("residual").quantized(8, 8), layer)
    assert failure.startswith(f"1 values are not what their operators make of their inputs ({place}: ")


def test_a_wrong_operator_is_found_where_the_answers_are_wrong_too(executorch):
    checks = executorch(other_weights("b2.0", by=100))
    assert checks.values["executorch_error"] > check_executorch.INTEGER_ERROR
    assert len(checks.failures) == 1 and "1 values are not what their operators make" in checks.failures[0]


def test_a_program_that_shows_another_network_is_refused_and_recorded_as_such(executorch, monkeypatch):
    monkeypatch.setattr(check_executorch, "INTEGER_ERROR", 0.0)
    checks = executorch(shown=other_weights("fc", by=20))
    assert "the program that shows its values answers otherwise: its operators prove nothing" in checks.failures
    assert checks.values["shown_program_agrees"] is False
