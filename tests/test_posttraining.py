"""Range setting, equalisation and bias correction: what they leave alone, and that they help where they should."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sample_networks import NETWORKS, conv_bn, integer_case, patterns, settled
from torch import Tensor, nn

from edgecompress.bit_stage import pinned_bits
from edgecompress.errors import BadDataError, BadFileError, UsageError
from edgecompress.files import write_document
from edgecompress.graph import Graph, build_graph
from edgecompress.interpret import float_constants, run
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.posttraining import bias_corrected, equalisable, equalised, without_upper_ends
from edgecompress.prepare import calibration_warnings, validation_warnings
from edgecompress.quantize import Simulator, calibrate, simulate
from edgecompress.ranges import RANGES
from edgecompress.rounding import learned_rounding
from edgecompress.run_exports import check_built
from edgecompress.runs import RunFolder
from edgecompress.spec import Architecture, CompressionPolicy, LayerChoice, Preprocessing
from edgecompress.splits import Split
from edgecompress.trace import trace


def every_layer(graph: Graph, bits: int) -> dict[str, LayerChoice]:
    return {layer.name: LayerChoice(weight_bits=bits, activation_bits=bits) for layer in graph.layers}


def outputs(graph: Graph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(graph, x, float_constants(graph))


def error_at(graph: Graph, images: Tensor, wanted: Tensor, bits: int = 8) -> float:
    simulator = Simulator(graph, calibrate(graph, [images], samples=4000))
    with torch.no_grad():
        return float((simulator(images, every_layer(graph, bits)) - wanted).pow(2).mean())


# ------------------------------------------------------------------------------------------------------ ranges


def heavy_tailed() -> tuple[Tensor, Tensor]:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0
    return values, torch.linspace(0.05, 1.0, 60) * 40 / 127


def test_ranges_order_as_their_names_say() -> None:
    values, steps = heavy_tailed()
    found = {name: float(choose(values, steps, -128, 127)) for name, choose in RANGES.items()}
    assert found["minmax"] == float(steps[-1])
    assert 3.8 <= 127 * found["percentile"] < 0.2 * 40
    assert found["entropy"] < 0.5 * found["minmax"] and found["mse"] < found["minmax"]
    clipped = (values.abs() > 127 * found["percentile"] * (1 + 1e-5)).sum()
    assert int(clipped) <= 2


@pytest.mark.parametrize("name", RANGES)
def test_ranges_by_name_quantise_a_network(name: str) -> None:
    case = integer_case("residual")
    wanted = outputs(case.graph, case.images)
    calibration = calibrate(case.graph, [case.images], samples=2000, ranges=name)
    with torch.no_grad():
        found = Simulator(case.graph, calibration)(case.images, every_layer(case.graph, 8))
    error = float((found - wanted).norm() / wanted.norm())
    assert error < (0.3 if name == "entropy" else 0.1)  # entropy clips much where the values are few


def test_entropy_does_not_clip_what_is_even() -> None:
    values = torch.linspace(0, 1, 10_000)
    steps = torch.linspace(0.05, 1.0, 60) / 15
    assert float(RANGES["entropy"](values, steps, 0, 15)) > 0.9 / 15


# ------------------------------------------------------------------------------------------------ equalisation


def unbalanced(name: str = "mobile") -> tuple[Graph, Tensor, Tensor]:
    """A network whose channels were scaled apart without changing what it computes."""
    case = integer_case(name)
    constants = dict(case.graph.constants)
    random = np.random.default_rng(0)
    for pair in equalisable(case.graph):
        weight, read = constants[pair.first.inputs[1]], constants[pair.second.inputs[1]]
        factor = (10 ** random.uniform(-1.5, 1.5, len(weight))).astype(np.float32)
        constants[pair.first.inputs[1]] = weight * factor.reshape(-1, 1, 1, 1)
        constants[pair.first.inputs[2]] = constants[pair.first.inputs[2]] * factor
        depthwise = read.shape[1] == 1
        shape = (-1, *(1,) * (read.ndim - 1)) if depthwise else (1, -1, *(1,) * (read.ndim - 2))
        constants[pair.second.inputs[1]] = read / factor.reshape(shape)
    return replace(case.graph, constants=constants), case.images, outputs(case.graph, case.images)


def test_pairs_of_a_depthwise_network_and_of_one_with_residuals() -> None:
    pairs = [(pair.first.name, pair.second.name) for pair in equalisable(integer_case("mobile").graph)]
    layers = [layer.name for layer in integer_case("mobile").graph.layers]
    assert pairs == list(pairwise(layers))
    found = {(pair.first.name, pair.second.name) for pair in equalisable(integer_case("residual").graph)}
    assert found == {("a1.0", "a2.0"), ("b1.0", "b2.0")}  # what an addition or two layers read stays


@pytest.mark.parametrize("name", NETWORKS)
def test_equalisation_leaves_the_float_network_alone(name: str) -> None:
    graph, images, wanted = unbalanced(name)
    found = outputs(equalised(graph), images)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_equalisation_brings_a_planted_imbalance_back() -> None:
    graph, images, wanted = unbalanced()
    before, after = error_at(graph, images, wanted), error_at(equalised(graph), images, wanted)
    assert after < 0.2 * before
    natural = error_at(integer_case("mobile").graph, images, wanted)
    assert after < 3 * natural


class Capped(nn.Module):
    """A depthwise layer between ReLU6s."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.fc = conv_bn(3, 8), conv_bn(8, 8, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.deep(nn.functional.relu6(self.stem(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def test_a_relu6_is_no_pair_because_its_end_does_not_scale() -> None:
    graph = build_graph(settled(Capped()), (3, 8, 8), "capped")
    assert equalisable(graph) == ()
    assert all(np.array_equal(value, graph.constants[key]) for key, value in equalised(graph).constants.items())


def test_zero_weights_and_dead_channels_survive_equalisation() -> None:
    graph, images, _ = unbalanced()
    first = equalisable(graph)[0].first
    constants = {key: value.copy() for key, value in graph.constants.items()}
    constants[first.inputs[1]][2] = 0
    constants[first.inputs[1]][:, 0] = 0
    graph = replace(graph, constants=constants)
    found = equalised(graph)
    assert all(np.array_equal(v == 0, found.constants[k] == 0) for k, v in graph.constants.items())
    assert torch.allclose(outputs(found, images), outputs(graph, images), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------- bias correction


@pytest.mark.parametrize("bits", [3, 4])
def test_bias_correction_brings_the_means_of_the_outputs_back(bits: int) -> None:
    case = integer_case("residual")
    quantized = case.quantized(bits, 8)
    corrected = bias_corrected(quantized, [case.images[:24], case.images[24:]])
    wanted = outputs(case.graph, case.images)
    with torch.no_grad():
        shift, left = ((simulate(q, case.images) - wanted).mean(0).abs().sum().item() for q in (quantized, corrected))
    assert left < 0.2 * shift
    assert corrected.weights is quantized.weights and corrected.tensors is quantized.tensors
    moved = {key for key, value in corrected.graph.constants.items() if value is not quantized.graph.constants[key]}
    assert moved == {layer.inputs[2] for layer in case.graph.layers}


def test_bias_correction_without_an_image_is_refused() -> None:
    with pytest.raises(BadDataError, match="no image to correct"):
        bias_corrected(integer_case("flat").quantized(8, 8), [])


# ------------------------------------------------------------------------------------------ what calibrates badly


def test_few_calibration_images_and_other_normalisation_are_told() -> None:
    data = patterns(per_class=60)  # 120 images to calibrate with
    assert calibration_warnings(data) == []
    (few,) = calibration_warnings(replace(data, calibration=data.calibration.take(torch.arange(60))))
    assert "only 60 calibration images" in few
    dark = Split(data.calibration.images // 4, data.calibration.labels)
    (other,) = calibration_warnings(replace(data, calibration=dark))
    assert "normalised in another way" in other


def test_validation_images_too_few_to_tell_policies_apart_are_told_with_the_standard_error() -> None:
    data = patterns()
    enough = data.search_val.take(torch.arange(120) % 32)
    (few,) = validation_warnings(replace(data, select_val=enough))  # 8 of each of 4 classes: sqrt(0.9 x 0.1 / 32)
    assert "on 32 images" in few and "standard error of accuracy is 5.3 points" in few
    (few,) = validation_warnings(replace(data, search_val=enough, select_val=data.select_val.take(torch.arange(20))))
    assert few.startswith("the best of them is chosen on 20 images")
    assert validation_warnings(replace(data, search_val=enough, select_val=enough)) == []


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 33])
def test_bits_that_nothing_builds_are_refused(bits: int) -> None:
    with pytest.raises(ValidationError, match="expected 2 to 8"):
        LayerChoice(weight_bits=bits)
    with pytest.raises(ValidationError, match="expected 2 to 8"):
        LayerChoice(activation_bits=bits)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"layers": {"b1.0": LayerChoice(weight_bits=3)}},
            r"says 3 weight bits for 'b1\.0', but the run built 4: .*--pin-bits",
        ),
        ({"keep_channels": {"stem.0": 999}}, r"says 999 channels for 'stem\.0', but the run built 8"),
        ({"layers": {"b1.0": LayerChoice(weight_bits=4)}, "keep_channels": {"stem.0": 8}}, None),
    ],
)
def test_policy_that_was_edited_after_the_run_is_refused(said, message) -> None:
    case = integer_case("residual")
    how = Preprocessing(size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    architecture = Architecture(
        model="net", classes=4, input_shape=(3, 16, 16), keep_channels={"stem.0": 8}, preprocessing=how
    )
    arguments = (Path("policy.json"), CompressionPolicy(model="net", **said), case.quantized(4, 8), architecture)
    with pytest.raises(BadFileError, match=message) if message else nullcontext():
        check_built(*arguments)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"layers": {"b1.9": LayerChoice()}},
            r"the layer 'b1\.9', which the run's network does not have \(the nearest is 'b1\.0'\)",
        ),
        ({"keep_channels": {"nowhere": 8}}, "the channel group 'nowhere', which the run's network does not have"),
    ],
)
def test_policy_file_that_names_what_is_not_there_is_refused(tmp_path, named, message) -> None:
    traced = trace(integer_case("residual").model, (3, 16, 16), "net")
    write_document(tmp_path / "layers.json", traced.network)
    write_document(tmp_path / "policy.json", CompressionPolicy(model="net"))
    assert RunFolder(tmp_path).policy().model == "net"
    write_document(tmp_path / "policy.json", CompressionPolicy(model="net", **named))
    with pytest.raises(BadFileError, match=message):
        RunFolder(tmp_path).policy()


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_learned_rounding_answers_nearer_to_the_float_network_and_moves_by_one_step_at_most(name):
    case = integer_case(name)
    quantized = case.quantized(3, 8)
    learned = learned_rounding(quantized, [case.images], steps=60)
    with torch.no_grad():
        wanted = run(case.graph, case.images, float_constants(case.graph))
        before, after = ((simulate(found, case.images) - wanted).norm() for found in (quantized, learned))
    assert after < 0.95 * before
    moved = 0
    for layer, weight in quantized.weights.items():
        difference = np.abs(learned.weights[layer].values.astype(int) - weight.values)
        moved += int(difference.sum())
        assert difference.max() <= 1 and np.array_equal(learned.weights[layer].scale, weight.scale)
        assert np.abs(learned.weights[layer].values).max() <= 3
    assert moved > 0
    again = learned_rounding(quantized, [case.images], steps=60)
    assert all(np.array_equal(again.weights[name].values, weight.values) for name, weight in learned.weights.items())


def test_learned_rounding_without_images_is_refused():
    with pytest.raises(BadDataError, match="no image to learn the rounding"):
        learned_rounding(integer_case("flat").quantized(4, 8), [])


def test_pins_are_read_by_name_and_wrong_ones_refused():
    target, layers = target_by_name("x86"), ["conv1", "body.conv", "fc"]
    assert pinned_bits("first=8, last=8,body.conv=3", layers, target) == {"conv1": 8, "fc": 8, "body.conv": 3}
    assert pinned_bits("", layers, target) == {}
    for text, message in (("conv9=8", "names 'conv9'"), ("fc=9", "expected LAYER=BITS"), ("fc", "expected LAYER=BITS")):
        with pytest.raises(UsageError, match=message):
            pinned_bits(text, layers, target)


def test_relu6_that_hardly_ever_clips_becomes_a_relu_that_equalisation_passes():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU6(), nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ReLU6())
    model = nn.Sequential(*body, nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[2].bias += 50.0  # this one clips everywhere
    graph = build_graph(model, (3, 8, 8), "relu6")
    x = torch.randn(8, 3, 8, 8)
    opened = without_upper_ends(graph, [x])
    assert [node.op for node in opened.nodes if node.op in ("Relu", "Clip")] == ["Relu", "Clip"]
    torch.testing.assert_close(outputs(opened, x), outputs(graph, x))
    assert (len(equalisable(graph)), len(equalisable(opened))) == (1, 2)  # the last two layers always


def test_a_pinned_layer_that_does_not_exist_is_told_before_any_training(tmp_path):
    from sample_networks import Residual, patterns

    from edgecompress import compress

    with pytest.raises(UsageError, match="--pin-bits names 'bodi', which is no layer that can be quantised: "):
        compress(Residual(4), patterns(), "x86", "flops=0.6x", runs=tmp_path, pin_bits="bodi=4")
    assert not list(tmp_path.rglob("trials.jsonl")) and not list(tmp_path.rglob("checkpoints/*"))
