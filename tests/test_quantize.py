"""Fake quantisation: values lie on their grid, ranges come from data, learned steps begin where calibration ended."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_networks import integer_case, patterns
from torch import nn

from edgecompress.errors import BadDataError, BadModelError
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.graph import build_graph, read_graph
from edgecompress.interpret import float_constants, run
from edgecompress.learned_steps import LearnedSteps, _RoundToGrid
from edgecompress.quantize import (
    BITS,
    Simulator,
    TensorRange,
    calibrate,
    dequantize,
    fake_quantize,
    find_points,
    quantize_weight,
    simulate,
)
from edgecompress.spec import LayerChoice

NAMES = ("residual", "vgg", "mobile", "concat", "flat")


@pytest.mark.parametrize("name", NAMES)
def test_graph_computes_what_the_network_computes(name):
    case = integer_case(name)
    with torch.no_grad():
        wanted = case.model(case.images)
        found = run(case.graph, case.images, float_constants(case.graph))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    layers = {name for name, module in case.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {layer.name for layer in case.graph.layers} == layers


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantised_values_lie_on_the_grid_within_its_limits(bits, signed):
    how = TensorRange(0.037, bits, signed)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(bits)) * 3
    steps = fake_quantize(x, how) / how.scale
    low, high = how.limits
    assert high - low == 2**bits - 1 and low == (-(2 ** (bits - 1)) if signed else 0)
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert int(steps.min().round()) == low and int(steps.max().round()) == high
    inside = (x > low * how.scale) & (x < high * how.scale)
    assert float((fake_quantize(x, how) - x)[inside].abs().max()) <= how.scale / 2 + 1e-6
    assert torch.equal(fake_quantize(x, None), x)


@pytest.mark.parametrize("bits", BITS)
def test_quantised_weights_fit_their_bits_and_are_no_worse_than_the_plain_range(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 6).view(
        -1, 1, 1, 1
    )
    found = quantize_weight(weight, bits)
    high = 2 ** (bits - 1) - 1
    assert found.values.dtype == np.int8 and np.abs(found.values).max() <= high and found.scale.shape == (6,)
    plain = (weight.abs().amax((1, 2, 3), keepdim=True) / high).clamp(min=1e-9)
    error_plain = ((weight / plain).round() * plain - weight).pow(2).sum((1, 2, 3))
    error = (dequantize(found) - weight).pow(2).sum((1, 2, 3))
    assert bool((error <= error_plain + 1e-9).all())


def test_zero_weights_stay_zero_and_a_dead_channel_gets_a_sane_step():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    weight[:, ::2] = 0
    weight[3] = 0
    for bits in BITS:
        found = quantize_weight(weight, bits)
        assert not found.values[:, ::2].any() and not found.values[3].any()
        assert np.isfinite(found.scale).all() and (found.scale > 0).all()
    found = quantize_weight(torch.zeros(3, 4), 4)
    assert not found.values.any() and (found.scale > 0).all()


def test_points_of_a_residual_graph():
    graph = integer_case("residual").graph
    points = find_points(graph)
    relu = {node.outputs[0] for node in graph.nodes if node.op == "Relu"}
    adds = [node for node in graph.nodes if node.op == "Add"]
    assert len(adds) == 2
    for node in adds:  # the sum sits inside the fused ReLU; both of its inputs are quantised
        assert node.outputs[0] not in points.owner and set(node.inputs) <= set(points.owner)
    assert not any(points.signed[value] for value in relu)
    signed = {value for value, is_signed in points.signed.items() if is_signed}
    convs_before_add = {value for node in adds for value in node.inputs} - relu
    assert signed == {graph.inputs[0]} | convs_before_add
    assert graph.outputs[0] not in points.owner
    assert points.layer_input["b1.0"] == points.layer_input["shortcut.0"]
    assert set(points.layers_of(points.layer_input["b1.0"])) == {"b1.0", "shortcut.0"}


def test_pooling_passes_the_range_through_and_a_mean_gets_its_own():
    graph = integer_case("vgg").graph
    points = find_points(graph)
    pools = [node for node in graph.nodes if node.op == "MaxPool"]
    assert len(pools) == 2
    for node in pools:
        assert points.owner[node.outputs[0]] == points.owner[node.inputs[0]] == node.inputs[0]
    (mean,) = [node for node in graph.nodes if node.op == "GlobalAveragePool"]
    assert points.owner[mean.outputs[0]] == mean.outputs[0] and not points.signed[mean.outputs[0]]
    flatten = next(node for node in graph.nodes if node.op == "Flatten")
    assert points.owner[flatten.outputs[0]] == mean.outputs[0] == points.layer_input["fc"]


def test_concatenation_of_rectified_values_is_unsigned_and_owns_its_range():
    graph = integer_case("concat").graph
    points = find_points(graph)
    (node,) = [node for node in graph.nodes if node.op == "Concat"]
    assert points.owner[node.outputs[0]] == node.outputs[0] and not points.signed[node.outputs[0]]
    assert points.layer_input["after.0"] == node.outputs[0]
    assert all(points.owner[value] == value for value in node.inputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_concatenated_values_are_on_the_grid_of_the_result_so_that_integers_are_copied(bits):
    case = integer_case("concat")
    (node,) = [node for node in case.graph.nodes if node.op == "Concat"]
    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=bits) for layer in case.graph.layers}
    quantized = case.simulator.quantized(choices)
    assert quantized.tensors[node.outputs[0]].bits == bits
    assert {quantized.tensors[value] for value in node.inputs} == {replace(quantized.tensors[node.outputs[0]], bits=8)}
    learned = LearnedSteps(quantized)
    with torch.no_grad():
        for step in learned.steps.values():
            step.mul_(1.1)
    trained = learned.finished().tensors
    assert trained[node.outputs[0]].scale != quantized.tensors[node.outputs[0]].scale
    assert {trained[value].scale for value in node.inputs} == {trained[node.outputs[0]].scale}


def test_only_values_that_nothing_else_reads_or_clips_join_a_concat():
    class Joins(nn.Module):
        """Two concatenations: of what a ReLU6 clips and what is read twice with a plain one; of that and a signed one."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 4, 1) for _ in range(4))
            self.e, self.fc = nn.Conv2d(12, 4, 1), nn.Linear(8, 4)

        def forward(self, x):
            a, b, c = F.relu6(self.a(x)), F.relu(self.b(x)), F.relu(self.c(x))
            inner = F.relu(self.e(torch.cat([a, b, c], 1)))
            outer = torch.cat([inner + b, self.d(x)], 1)
            return self.fc(outer.mean((2, 3)))

    graph = build_graph(Joins().eval(), (3, 8, 8), "joins")
    points = find_points(graph)
    inner, outer = [node for node in graph.nodes if node.op == "Concat"]
    assert points.joined == {inner.inputs[2]: inner.outputs[0], outer.inputs[1]: outer.outputs[0]}


def test_activation_bits_of_a_shared_input_are_the_largest_asked_for():
    case = integer_case("residual")
    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=3) for layer in case.graph.layers}
    choices["shortcut.0"] = LayerChoice(weight_bits=8, activation_bits=6)
    ranges = case.simulator.ranges(choices)
    shared = case.simulator.points.layer_input["shortcut.0"]
    assert ranges[shared].bits == 6
    assert {ranges[value].bits for value in case.simulator.points.layer_input.values() if value != shared} == {3}
    assert case.simulator.quantized(choices).tensors == ranges


def test_more_bits_come_closer_to_the_float_network():
    case = integer_case("residual")
    with torch.no_grad():
        wanted = case.model(case.images)
        errors = [float((simulate(case.quantized(b, b), case.images) - wanted).pow(2).mean()) for b in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


def test_search_simulator_and_finished_simulation_agree():
    case = integer_case("concat")
    choices = case.random_choices(3)
    with torch.no_grad():
        assert torch.equal(
            case.simulator(case.images, choices), simulate(case.simulator.quantized(choices), case.images)
        )


def test_calibration_is_deterministic_and_follows_the_data():
    case = integer_case("vgg")
    first = calibrate(case.graph, [case.images[:16]], samples=500, seed=3)
    assert first == calibrate(case.graph, [case.images[:16]], samples=500, seed=3)
    louder = calibrate(case.graph, [case.images[:16] * 4], samples=500, seed=3)
    name = case.graph.inputs[0]
    for bits in BITS:
        assert louder.scales[name, bits] == pytest.approx(4 * first.scales[name, bits], rel=0.05)
        assert first.scales[name, bits] <= float(case.images[:16].abs().max()) / (2 ** (bits - 1) - 1) * 1.001


def test_all_zero_activations_calibrate_to_a_finite_step():
    case = integer_case("flat")
    calibration = calibrate(case.graph, [torch.zeros(4, 3, 16, 16)])
    assert all(np.isfinite(scale) and scale > 0 for scale in calibration.scales.values())
    simulator = Simulator(case.graph, calibration)
    choices = {layer.name: LayerChoice(weight_bits=4, activation_bits=4) for layer in case.graph.layers}
    with torch.no_grad():
        assert torch.isfinite(simulator(torch.zeros(2, 3, 16, 16), choices)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_name(value):
    images = torch.zeros(2, 3, 16, 16)
    images[0, 0, 0, 0] = value
    with pytest.raises(BadDataError, match="The activation 'input' is not finite"):
        calibrate(integer_case("flat").graph, [images])


def test_no_calibration_image_is_refused():
    with pytest.raises(BadDataError, match="no calibration image"):
        calibrate(integer_case("flat").graph, [])


def sparse_quantized(bits: int):
    """A quantised network a third of whose float weights are zero."""
    case = integer_case("residual")
    constants = dict(case.graph.constants)
    for layer in case.graph.layers:
        weight = constants[layer.inputs[1]].copy()
        weight[np.random.default_rng(0).random(weight.shape) < 1 / 3] = 0
        constants[layer.inputs[1]] = weight
    graph = type(case.graph)(case.graph.inputs, case.graph.outputs, case.graph.nodes, constants, case.graph.shapes)
    simulator = Simulator(graph, calibrate(graph, [case.images], samples=2000))
    choices = {layer.name: LayerChoice(weight_bits=bits, activation_bits=bits) for layer in graph.layers}
    return graph, simulator.quantized(choices), case.images


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_steps_begin_at_the_calibrated_network(bits):
    _, quantized, images = sparse_quantized(bits)
    with torch.no_grad():
        wanted, found = simulate(quantized, images), LearnedSteps(quantized)(images)
    difference = (found - wanted).abs().amax(1)
    # a value on the border between two codes may fall on the other side: 2 of 48 images may differ
    assert int((difference > 1e-3 * float(wanted.abs().max())).sum()) <= 2


@pytest.mark.parametrize("bits", [2, 5])
def test_learned_steps_train_keep_zeros_and_finish_within_their_bits(bits):
    graph, quantized, images = sparse_quantized(bits)
    data = patterns()
    module = LearnedSteps(quantized)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    train(module, data, TrainSettings(epochs=1, learning_rate=0.02, batch_size=16, weight_decay=0.0))
    moved = {n for n, p in module.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert any(name.startswith("steps") for name in moved) and any(name.startswith("constants") for name in moved)
    finished = module.finished()
    high = 2 ** (bits - 1) - 1
    for layer in graph.layers:
        weight = finished.weights[layer.name]
        zeros = graph.constants[layer.inputs[1]] == 0
        assert zeros.mean() > 0.2
        assert not weight.values[zeros].any() and not finished.graph.constants[layer.inputs[1]][zeros].any()
        assert np.abs(weight.values).max() <= high and weight.bits == bits and (weight.scale > 0).all()
    assert all(how.scale > 0 and how.bits == bits for how in finished.tensors.values() if how.bits != 8)
    with torch.no_grad():
        trained, saved = module(images), simulate(finished, images)
    assert float((trained - saved).abs().median()) < 1e-3 * float(trained.abs().max())


def test_learned_steps_round_in_float32_under_autocast():
    """What convolutions read lies on the grid as well as bfloat16 can say: rounded in bfloat16, steps would be missing."""
    _, quantized, images = sparse_quantized(8)
    module = LearnedSteps(quantized)
    rounded, apply = [], _RoundToGrid.apply

    def watched(value, step, *rest):
        rounded.append((value.dtype, step.dtype, apply(value, step, *rest)))
        return rounded[-1][-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patch.setattr(_RoundToGrid, "apply", watched)
        outputs = module(images)
    assert outputs.dtype == torch.bfloat16 and len(rounded) > len(quantized.weights)
    assert {dtype for found in rounded for dtype in (found[0], found[1], found[2].dtype)} == {torch.float32}
    with torch.no_grad():
        wide = module(images)
    assert (outputs.argmax(1) == wide.argmax(1)).float().mean() > 0.9


def test_quantisation_aware_training_in_bfloat16_learns_the_steps():
    data = patterns()
    trained = []
    for precision in ("fp32", "bf16"):
        module = LearnedSteps(sparse_quantized(4)[1])
        before = accuracy_and_loss(module, data, data.train)[1]
        settings = TrainSettings(epochs=1, learning_rate=0.02, batch_size=16, weight_decay=0.0, precision=precision)
        trained.append(accuracy_and_loss(train(module, data, settings), data, data.train)[1])
        assert trained[-1] < before
    assert trained[0] != trained[1] and abs(trained[0] - trained[1]) < 0.5 * trained[0]


def test_learned_steps_move_as_a_whole_to_another_device():
    """The meta device refuses any tensor that was left behind, as a GPU would."""
    _, quantized, images = sparse_quantized(4)
    outputs = LearnedSteps(quantized).to("meta")(images.to("meta"))
    assert outputs.device.type == "meta" and outputs.shape == (len(images), 4)


def test_pruned_weights_get_no_gradient():
    graph, quantized, images = sparse_quantized(4)
    module = LearnedSteps(quantized)
    module(images).square().sum().backward()
    for name, value in graph.constants.items():
        gradient = module.constants[module._names[name]].grad
        if gradient is not None and value.ndim > 1:
            assert not gradient[torch.from_numpy(value == 0)].any() and gradient.any()


def test_learned_steps_leave_the_quantised_graph_alone():
    _, quantized, _ = sparse_quantized(4)
    before = {name: value.copy() for name, value in quantized.graph.constants.items()}
    train(LearnedSteps(quantized), patterns(), TrainSettings(epochs=1, learning_rate=0.02, weight_decay=0.0))
    assert all(np.array_equal(value, before[name]) for name, value in quantized.graph.constants.items())


def test_learned_steps_work_on_a_graph_that_was_read_from_a_file(tmp_path):
    """What the pipeline does: the constants of a file are read-only arrays."""
    from edgecompress.exporters.quantized_file import save_graph

    case = integer_case("flat")
    save_graph(tmp_path / "graph.onnx", case.graph)
    graph = read_graph(tmp_path / "graph.onnx")
    simulator = Simulator(graph, calibrate(graph, [case.images], samples=1000))
    choices = {layer.name: LayerChoice(weight_bits=4, activation_bits=4) for layer in graph.layers}
    with torch.no_grad():
        assert LearnedSteps(simulator.quantized(choices))(case.images).shape == (48, 4)


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(nn.functional.conv2d(x, torch.ones(4, 3, 16, 16))).flatten(1)


def test_operator_that_cannot_be_quantised_is_refused_by_name():
    graph = build_graph(Unknown(), (3, 16, 16), "unknown")
    with pytest.raises(BadModelError, match=r"The operator Erf at .* is not one that can be quantised yet"):
        calibrate(graph, [torch.zeros(1, 3, 16, 16)])


def test_network_that_cannot_be_exported_is_refused():
    class DataDependent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) if float(x.sum()) > 0 else x.flatten(1)[:, :3]

    with pytest.raises(
        BadModelError, match=r"dependent cannot be exported to ONNX: (?!Failed).*\(.*test_quantize"
    ) as caught:
        build_graph(DataDependent(), (3, 4, 4), "dependent")
    assert str(caught.value).isprintable()  # one line, no colours of a terminal
    with pytest.raises(BadModelError, match="cannot be read as an ONNX model"):
        read_graph(__file__)


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_in_place_changes_neither_its_images_nor_its_constants(name):
    case = integer_case(name)
    simulator = Simulator(case.graph, calibrate(case.graph, [case.images]))
    choices = {layer.name: LayerChoice(weight_bits=4, activation_bits=5) for layer in case.graph.layers}
    images, forward = case.images.clone(), simulator.forward(choices)
    first = forward(case.images)
    assert torch.equal(case.images, images) and torch.equal(forward(case.images), first)
    floats = float_constants(case.graph)
    assert all(torch.equal(simulator.floats[key], value) for key, value in floats.items())
    ranges, constants = simulator.ranges(choices), simulator.constants(choices)
    with torch.no_grad():  # the plain way: every activation runs, every value is rounded
        plain = run(case.graph, images, constants, lambda key, value: fake_quantize(value, ranges.get(key)))
    assert (first - plain).abs().max() < 0.05 * plain.abs().max()
