"""The ort dialect: ONNX Runtime fuses all of it, and computes what the integer emulator computes, bit for bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from sample_networks import NETWORKS, OPERATOR_NETWORKS, integer_case

from edgecompress.cost import kernels
from edgecompress.errors import BadModelError
from edgecompress.exporters import to_tensorrt
from edgecompress.exporters.check_onnxruntime import FLOAT_OPS, check_ort, fusion_report, operators_of, optimised
from edgecompress.exporters.emulate import emulate, float_islands
from edgecompress.exporters.onnx_writing import Names
from edgecompress.exporters.packing import Held, store
from edgecompress.exporters.quantized_file import load_quantized, save_graph, save_quantized
from edgecompress.exporters.runners import OnnxRuntimeRunner, is_x86
from edgecompress.exporters.saturation import without_saturation
from edgecompress.exporters.sizes import CHANNEL_BYTES, FileSize, PlannedSize, stored_bytes
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import gate_steps, grid, int32_bias, integer_model
from edgecompress.exporters.verify import agreement
from edgecompress.graph import build_graph
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.learned_steps import LearnedSteps
from edgecompress.prune import prune
from edgecompress.quantize import QuantizedGraph, Simulator, calibrate, find_points, simulate
from edgecompress.rounding import learned_rounding
from edgecompress.spec import CompressionPolicy, LayerChoice, Target, WeightScales
from edgecompress.trace import trace

CASES = (*NETWORKS, *OPERATOR_NETWORKS, "resnet8")
BITS = ("w8a8", "w4a4", "w2a8", "w8a2", "w3a5", "random0", "random1")
needs_x86 = pytest.mark.skipif(not is_x86(), reason="ONNX Runtime is only known to be exact on x86")


def fused(model: onnx.ModelProto) -> Counter[str]:
    """What ONNX Runtime really runs of a file, as its proof counts it."""
    return operators_of(optimised(model.SerializeToString()))


def quantized_case(name: str, bits: str, weight_scales: WeightScales = "channel") -> QuantizedGraph:
    case = integer_case(name, weight_scales)
    if bits.startswith("random"):
        return case.simulator.quantized(case.random_choices(int(bits[-1])))
    return case.quantized(int(bits[1]), int(bits[3]))


def in_onnxruntime(quantized: QuantizedGraph, images: torch.Tensor, **options) -> np.ndarray:
    model = integer_model(quantized, **options)
    onnx.checker.check_model(model, full_check=True)
    return OnnxRuntimeRunner(model.SerializeToString()).run(images.numpy())


@needs_x86
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CASES)
def test_emulator_equals_onnx_runtime_bit_for_bit(name, bits):
    quantized = quantized_case(name, bits)
    images = integer_case(name).images
    found = in_onnxruntime(quantized, images)
    with torch.no_grad():
        wanted = emulate(quantized, images).numpy()
    assert float_islands(quantized) == []
    assert np.unique(wanted.round(6)).size > 10  # no network that died at few bits
    np.testing.assert_array_equal(found, wanted)


@needs_x86
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "random0"])
@pytest.mark.parametrize("name", ["residual", "mobile", "concat", "flat"])
def test_one_scale_per_weight_tensor_is_written_as_a_scalar_and_computed_bit_for_bit(name, bits):
    case = integer_case(name, "tensor")
    quantized = quantized_case(name, bits, "tensor")
    model = integer_model(quantized)
    constants = {constant.name: constant for constant in model.graph.initializer}
    dequantized = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert all(not constants[node.input[1]].dims for node in dequantized)
    assert all(weight.scale.ndim == 0 for weight in quantized.weights.values())
    operators = fused(model)
    assert operators["QLinearConv"] + operators["QGemm"] == len(quantized.graph.layers)
    with torch.no_grad():
        wanted, simulated = emulate(quantized, case.images).numpy(), simulate(quantized, case.images).numpy()
    np.testing.assert_array_equal(in_onnxruntime(quantized, case.images), wanted)
    assert np.abs(wanted - simulated).mean() < 0.1 * np.abs(wanted).max()
    assert model.ByteSize() < integer_model(quantized_case(name, bits)).ByteSize()


@needs_x86
def test_one_scale_per_tensor_lasts_through_training_files_and_seven_bits(tmp_path):
    """What changes integers keeps what has a step of its own, and the emulator still equals ONNX Runtime."""
    case = integer_case("residual", "tensor")
    rounded = learned_rounding(case.quantized(4, 8), [case.images], steps=20)
    module = LearnedSteps(rounded)
    module(case.images).square().mean().backward()
    with torch.no_grad():
        for step in module.steps.values():
            step -= 0.01 * step.grad.sign()
    save_graph(tmp_path / "graph.onnx", case.graph)
    save_quantized(tmp_path / "q.safetensors", module.finished())
    loaded = load_quantized(tmp_path / "q.safetensors", tmp_path / "graph.onnx")
    for quantized in (rounded, loaded, without_saturation(case.quantized(8, 8))):
        assert {weight.scales for weight in quantized.weights.values()} == {"tensor"}
        with torch.no_grad():
            wanted = emulate(quantized, case.images).numpy()
        np.testing.assert_array_equal(in_onnxruntime(quantized, case.images), wanted)
    assert any(float(loaded.weights[name].scale) != float(weight.scale) for name, weight in rounded.weights.items())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "random0"])
@pytest.mark.parametrize("name", CASES)
def test_no_float_layer_is_left_in_the_optimised_graph(name, bits):
    quantized = quantized_case(name, bits)
    operators = fused(integer_model(quantized))
    assert not {op for op in FLOAT_OPS if operators[op]}
    assert operators["QLinearConv"] + operators["QGemm"] == len(quantized.graph.layers)
    assert operators["Relu"] == 0


@pytest.mark.parametrize("name", CASES)
def test_eight_bits_are_close_to_the_float_network(name):
    case = integer_case(name)
    quantized = case.quantized(8, 8)
    found = in_onnxruntime(quantized, case.images)
    with torch.no_grad():
        wanted, simulated = case.model(case.images).numpy(), simulate(quantized, case.images).numpy()
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert np.abs(found - simulated).max() < 0.03 * np.abs(wanted).max()
    assert agreement(found, simulated) >= 0.95


def test_a_static_batch_and_an_unpacked_file_give_the_same_numbers():
    case = integer_case("residual")
    quantized = case.quantized(3, 6)
    dynamic = in_onnxruntime(quantized, case.images[:1])
    np.testing.assert_array_equal(in_onnxruntime(quantized, case.images[:1], batch=1), dynamic)
    np.testing.assert_array_equal(in_onnxruntime(quantized, case.images[:1], unpack=False), dynamic)
    np.testing.assert_array_equal(in_onnxruntime(quantized, case.images[:1], max_opset=17), dynamic)
    assert integer_model(quantized, max_opset=17).opset_import[0].version == 17


def test_layer_left_in_float_stays_float_and_still_agrees():
    case = integer_case("vgg")
    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in case.graph.layers}
    choices["fc"] = LayerChoice()
    quantized = case.simulator.quantized(choices)
    assert "fc" not in quantized.weights
    found = in_onnxruntime(quantized, case.images)
    with torch.no_grad():
        assert np.abs(found - emulate(quantized, case.images).numpy()).max() < 1e-4


def test_bias_rounds_half_to_even_and_saturates():
    scale_w = np.float32([1.0, 1.0, 1.0, 1e-9])
    assert int32_bias(np.float32([0.5, 1.5, -2.4, 100.0]), 1.0, scale_w).tolist() == [0, 2, -2, 2**31 - 1]


@pytest.mark.parametrize("target", ["x86", "x86-avx2", "raspberry-pi-4", "jetson"])
@pytest.mark.parametrize("name", ["residual", "mobile", "resnet8"])
def test_file_size_of_mixed_bits_is_predicted_within_one_percent(name, target):
    """And never below what is written for ONNX Runtime, so that a budget spent to its last byte is kept."""
    case, device = integer_case(name), target_by_name(target)
    network = trace(case.model, tuple(case.images.shape[1:]), name).network
    size = FileSize(case.simulator, written(case.quantized(8, 8), device), device)
    for seed in range(4):
        choices = {layer: within(choice, device) for layer, choice in case.random_choices(seed).items()}
        built = kernels(network, CompressionPolicy(model="", layers=choices))
        file = written(case.simulator.quantized(choices), device)
        assert abs(size(built, 0) - file) <= 0.01 * file + 64  # a few names and Clips weigh much in files of 3 KB
        assert size(built, 0) >= file or device.dialect == "trt"
    small = {layer.name: LayerChoice(weight_bits=2, activation_bits=2) for layer in case.graph.layers}
    low, high = (size(kernels(network, CompressionPolicy(model="", layers=choice)), 0) for choice in (small, {}))
    assert low < high or device.dialect == "trt"


@pytest.mark.parametrize("zeros", [0.3, 0.8])
def test_file_size_of_pruned_weights_is_an_upper_bound_that_training_cannot_break(zeros):
    """Weights that round to zero count as if they were not: the file after training that moved all of them is no larger."""
    case, device = integer_case("resnet8"), target_by_name("x86")
    network, generator = trace(case.model, (3, 32, 32), "resnet8").network, np.random.default_rng(0)
    constants = dict(case.graph.constants)
    for layer in case.graph.layers:
        weight = constants[layer.inputs[1]]
        constants[layer.inputs[1]] = (weight * (generator.random(weight.shape) >= zeros)).astype(np.float32)
    graph = replace(case.graph, constants=constants)
    simulator = Simulator(graph, case.simulator.calibration)
    choices = case.random_choices(1)
    eight = {name: LayerChoice(weight_bits=8, activation_bits=8) for name in choices}
    size = FileSize(simulator, written(simulator.quantized(eight), device), device)
    believed = size(kernels(network, CompressionPolicy(model="", layers=choices)), 0)
    quantized = simulator.quantized(choices)
    moved = {
        layer.name: replace(
            quantized.weights[layer.name],
            values=np.where(constants[layer.inputs[1]] == 0, 0, np.where(weight.values == 0, 1, weight.values)),
        )
        for layer in graph.layers
        if (weight := quantized.weights[layer.name])
    }
    trained, file = written(replace(quantized, weights=moved), device), written(quantized, device)
    assert file < trained <= believed <= 1.02 * trained and believed <= 1.08 * file


@pytest.mark.parametrize("zeros", [0.5, 0.85])
@pytest.mark.parametrize("name", ["residual", "concat", "dense", "resnet8"])
def test_file_size_of_sparse_layers_between_dense_ones_of_few_bits_is_never_too_small(name, zeros):
    """Layers share the tables that unpack them, so that each is stored as is smallest beside those before it. The BatchNorms
    that stand alone in ``dense`` are none of the network's own layers: no policy names them."""
    case, device = integer_case(name), target_by_name("x86")
    network, seen = trace(case.model, tuple(case.images.shape[1:]), name).network, set[str]()
    for seed in range(4 if name == "resnet8" else 12):
        generator = np.random.default_rng(seed)
        constants = dict(case.graph.constants)
        for number, layer in enumerate(case.graph.layers):
            shape = constants[layer.inputs[1]].shape  # of the weights that stay none rounds to zero, whatever its bits
            weight = generator.uniform(0.7, 1, shape) * generator.choice((-0.1, 0.1), shape)
            kept = generator.random(shape) >= (zeros if (number + seed) % 2 else 0)
            constants[layer.inputs[1]] = (weight * kept).astype(np.float32)
        simulator = Simulator(replace(case.graph, constants=constants), case.simulator.calibration)
        size = FileSize(simulator, written(all_eight(simulator), device), device)
        bits = generator.integers(5 if seed % 2 else 2, 8, len(network.layers))
        choices = {
            layer.name: LayerChoice(weight_bits=int(few), activation_bits=8)
            for layer, few in zip(network.layers, bits, strict=True)
        }
        quantized = simulator.quantized(choices)
        believed, file = (
            size(kernels(network, CompressionPolicy(model="", layers=choices)), 0),
            written(quantized, device),
        )
        assert file <= believed <= 1.002 * file + 64
        seen |= kinds_of(quantized, device)
    assert {"sparse", "dense", "int"} <= seen or name != "resnet8"


def all_eight(simulator: Simulator) -> QuantizedGraph:
    choice = LayerChoice(weight_bits=8, activation_bits=8)
    return simulator.quantized({layer.name: choice for layer in simulator.graph.layers})


def kinds_of(quantized: QuantizedGraph, target: Target) -> set[str]:
    """How layers are stored, as `packing.store` calls it, without the number of bits."""
    names, held = Names(), Held()
    stored = (
        store(weight.values, weight.bits, names, max_opset=target.max_opset, held=held)
        for weight in quantized.weights.values()
    )
    return {found.kind.rstrip("0123456789") for found in stored}


def written(quantized: QuantizedGraph, target: Target) -> int:
    """Bytes of the target's own file."""
    if target.dialect == "trt":
        return to_tensorrt.integer_model(quantized, opset=to_tensorrt.opset_for(quantized, target.max_opset)).ByteSize()
    return integer_model(quantized, max_opset=target.max_opset).ByteSize()


def within(choice: LayerChoice, target: Target) -> LayerChoice:
    return choice.model_copy(update={"weight_bits": min(choice.weight_bits, max(target.weight_bits))})


def test_a_target_that_stores_int8_only_is_charged_for_int8():
    case = integer_case("residual")
    weights = sum(case.graph.constants[layer.inputs[1]].size for layer in case.graph.layers)
    assert sum(stored_bytes(case.quantized(2, 8), target_by_name("jetson")).values()) == weights
    assert sum(stored_bytes(case.quantized(2, 8), target_by_name("x86")).values()) < weights


def test_planned_size_is_the_file_where_nothing_is_pruned_and_falls_with_channels():
    case = integer_case("residual")
    network = trace(case.model, (3, 16, 16), "residual").network
    base = integer_model(case.quantized(8, 8)).ByteSize()
    planned = PlannedSize.from_file(base, network.layers, 8)
    whole = planned(kernels(network, CompressionPolicy(model="")), 0)
    assert whole == base
    half = CompressionPolicy(model="", keep_channels={group.id: group.width // 2 for group in network.prunable_groups})
    assert planned(kernels(network, half), 0) < whole
    assert PlannedSize.from_file(base, network.layers, 4)(kernels(network, CompressionPolicy(model="")), 0) < whole


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_planned_size_of_fewer_channels_is_that_of_the_pruned_file(scales):
    case = integer_case("residual", scales)
    traced = trace(case.model, (3, 16, 16), "residual")
    keep = {group.id: group.width // 2 for group in traced.network.prunable_groups}
    graph = build_graph(prune(case.model, traced, keep), (3, 16, 16), "residual")
    simulator = Simulator(graph, calibrate(graph, [case.images]), scales)
    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in graph.layers}
    written = integer_model(simulator.quantized(choices)).ByteSize()
    base = integer_model(case.quantized(8, 8)).ByteSize()
    planned = PlannedSize.from_file(base, traced.network.layers, 8, channel_bytes=CHANNEL_BYTES["ort", scales])
    assert planned(kernels(traced.network, CompressionPolicy(model="", keep_channels=keep)), 0) == pytest.approx(
        written, abs=10
    )


@pytest.mark.parametrize(("bits", "keep"), [(8, 0.25), (8, 0.5), (4, 0.25), (4, 0.9), (8, 0.9)])
def test_planned_size_of_single_weights_is_that_of_the_written_file(bits, keep):
    """Zeros are charged as the writer stores them: as a bitmask where that is smaller, else like all others."""
    case = integer_case("resnet8")
    network = trace(case.model, (3, 16, 16), "resnet8").network
    quantized = case.quantized(bits, 8)
    random = np.random.default_rng(0)
    sparse = {
        name: replace(weight, values=_thinned(weight.values, keep, random))
        for name, weight in quantized.weights.items()
    }
    written = integer_model(replace(quantized, weights=sparse)).ByteSize()
    base = integer_model(case.quantized(8, 8)).ByteSize()
    choice = LayerChoice(keep_elements=keep, weight_bits=bits)
    built = kernels(network, CompressionPolicy(model="", layers={layer.name: choice for layer in network.layers}))
    planned = PlannedSize.from_file(base, network.layers, bits, sparse=True)(built, 0)
    assert planned == pytest.approx(written, rel=0.05)
    assert PlannedSize.from_file(base, network.layers, bits)(built, 0) >= planned


def _thinned(values, keep, random):
    """All but ``keep`` of the weights at zero, the others at what no storage below their bits could hold."""
    flat = np.where(values == 0, 1, values).ravel()
    flat[random.permutation(flat.size)[round(keep * flat.size) :]] = 0
    return flat.reshape(values.shape)


def test_operators_are_named_after_the_module_that_calls_them():
    names = {node.name for node in integer_case("gated").graph.nodes}
    assert len(names) == len(integer_case("gated").graph.nodes)

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.block = torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.GELU())

        def forward(self, x):
            return self.block(self.conv(x)).mean((2, 3))

    graph = build_graph(Odd(), (3, 8, 8), "odd")
    with pytest.raises(BadModelError, match=r"The operator Gelu at 'block\.0\.gelu'"):
        calibrate(graph, [torch.zeros(1, 3, 8, 8)])


def test_gate_is_exact_and_never_a_float_island():
    """HardSigmoid of every integer of its input's grid, computed in float, is what the file's Clip yields."""
    case = integer_case("gated")
    quantized = case.quantized(8, 8)
    gates = [node for node in case.graph.nodes if node.op == "HardSigmoid"]
    assert len(gates) == 3
    for node in gates:
        how, (scale, zero) = quantized.tensors[node.inputs[0]], grid(quantized, node.outputs[0])
        steps = gate_steps(quantized, node)
        codes = np.arange(256)
        exact = np.clip((codes - 128) * np.float64(how.scale) / 6 + 0.5, 0, 1)
        np.testing.assert_allclose((codes.clip(128 - steps, 128 + steps) - zero) * float(scale), exact, atol=1e-6)


@needs_x86
def test_trained_steps_of_a_gates_input_still_meet_its_ends():
    module = LearnedSteps(integer_case("gated").quantized(6, 7))
    generator = torch.Generator().manual_seed(1)
    images = integer_case("gated").images
    with torch.no_grad():
        for step in module.steps.values():
            step.add_(0.05 * torch.randn(step.shape, generator=generator))
        trained, finished = module(images), module.finished()
        reach = find_points(finished.graph).reach
        assert len(reach) == 3
        for owner, end in reach.items():
            steps = end / finished.tensors[owner].scale
            assert abs(steps - round(steps)) < 1e-4 * steps
        np.testing.assert_array_equal(in_onnxruntime(finished, images), emulate(finished, images).numpy())
        assert (simulate(finished, images) - trained).abs().max() < 0.02 * trained.abs().max()


def test_float_operators_are_named_in_the_report_and_silent_ones_refused():
    case = integer_case("gated")
    quantized = case.quantized(8, 8)
    operators = fused(integer_model(quantized))
    text, short = fusion_report(quantized, operators)
    assert short == "" and "QLinearMul 5 of 5" in text and "QLinearSigmoid 2 of 2" in text
    lost = {**operators, "QLinearMul": 3}
    assert fusion_report(quantized, lost)[1] == "QLinearMul 3 of 5"
    choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in case.graph.layers}
    partly = case.simulator.quantized(choices | {"fc": LayerChoice()})
    assert float_islands(partly) == ["Gemm fc"]


@pytest.mark.parametrize(
    ("before", "pools_integers"),
    [
        (["QuantizeLinear"], True),
        (["QuantizeLinear", "Clip", "Transpose"], True),
        (["QuantizeLinear", "QLinearSigmoid"], True),
        ([], False),
        (["Relu"], False),
        (["QuantizeLinear", "DequantizeLinear"], False),
        (["QuantizeLinear", "DequantizeLinear", "Relu"], False),
        (["QuantizeLinear", "DequantizeLinear", "Transpose"], False),
        (["QuantizeLinear", "Cast"], False),
    ],
)
def test_a_max_pool_counts_as_integer_only_where_it_reads_integers(before, pools_integers):
    nodes = [onnx.helper.make_node(op, [str(number)], [str(number + 1)]) for number, op in enumerate(before)]
    nodes.append(onnx.helper.make_node("MaxPool", [str(len(before))], ["pooled"], kernel_shape=[2, 2]))
    entry = onnx.helper.make_tensor_value_info("0", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])
    counted = operators_of(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [entry], [])))
    assert counted["MaxPool"] == pools_integers and counted.total() == len(before) + pools_integers


@pytest.mark.parametrize(("quantised", "counted"), [(True, 1), (False, 0)])
def test_a_product_with_a_float_result_makes_its_max_pool_float(quantised, counted):
    """ONNX Runtime's QGemm answers floats where nothing says how its result is quantised."""
    inputs = ["x", "", "", "w", "", "", "bias", *(["scale", "zero"] if quantised else [])]
    made = onnx.helper.make_node
    nodes = [made("QGemm", inputs, ["y"]), made("MaxPool", ["y"], ["pooled"], kernel_shape=[2])]
    entry = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["N", 8])
    assert operators_of(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [entry], [])))["MaxPool"] == counted


def test_a_max_pool_in_a_float_file_is_no_integer_kernel():
    """It stands behind a Conv or a Relu there, not behind a DequantizeLinear."""
    case = integer_case("vgg")
    assert [node.op for node in case.graph.nodes].count("MaxPool") == 2
    assert fused(float_model(case.graph))["MaxPool"] == 0
    assert fused(integer_model(case.quantized(8, 8)))["MaxPool"] == 2


def test_pooling_to_the_size_that_is_there_is_left_out():
    pool = torch.nn.AdaptiveAvgPool2d(6)
    graph = build_graph(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), pool, torch.nn.ReLU()), (3, 8, 8), "pooled")
    assert [node.op for node in graph.nodes] == ["Conv", "Relu"]


@needs_x86
def test_a_constant_in_a_sum_or_product_is_a_named_float_island():
    """``x + 1`` and ``x * 0.5``: no integer kernel takes a float constant."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.fc((0.5 * self.conv(x) + 1).mean((2, 3)))

    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    graph = build_graph(Network(), (3, 12, 12), "constants")
    simulator = Simulator(graph, calibrate(graph, [images], samples=4000))
    quantized = simulator.quantized(
        {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in graph.layers}
    )
    checks = check_ort(integer_model(quantized).SerializeToString(), quantized, images.numpy())
    assert not checks.failures and checks.values["emulator_max_difference"] == 0
    assert [island.split()[0] for island in float_islands(quantized)] == ["Mul", "Add"]
