"""The trt dialect: right numbers, right placement, a linter that bites, and NVIDIA's parser agrees."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.exporters.check_tensorrt import MENDS, check_builds, mend_for, two_four_layers
from edgecompress.exporters.runners import OnnxRuntimeRunner
from edgecompress.exporters.simulate_tensorrt import engine_limits, node_errors, simulate
from edgecompress.exporters.to_tensorrt import integer_model, lint, opset_for, symmetric_scale
from edgecompress.graph import Graph, build_graph
from edgecompress.models import CifarVgg, build_model
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, Simulator, TensorRange, calibrate
from edgecompress.spec import LayerChoice

IMAGES = 40


@dataclass(frozen=True)
class Case:
    model: nn.Module
    graph: Graph
    simulator: Simulator
    images: Tensor

    def quantized(self, weight_bits: int = 8, activation_bits: int = 8) -> QuantizedGraph:
        return self.simulator.quantized(self.choices(weight_bits, activation_bits))

    def choices(self, weight_bits: int = 8, activation_bits: int = 8) -> dict[str, LayerChoice]:
        choice = LayerChoice(weight_bits=weight_bits, activation_bits=activation_bits)
        return {layer.name: choice for layer in self.graph.layers}


def _images() -> tuple[Tensor, Tensor]:
    """Ten smooth patterns plus noise, so that a class mean classifies them with a margin."""
    generator = torch.Generator().manual_seed(3)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=32, mode="bilinear")
    labels = torch.arange(4 * IMAGES) % 10
    noise = F.interpolate(torch.randn(len(labels), 3, 8, 8, generator=generator), size=32)
    return patterns[labels] + 0.1 * noise, labels


def make_case(model: nn.Module, name: str) -> Case:
    """Seeded weights, BatchNorm statistics of the images, and a last layer that knows the class means."""
    images, labels = _images()
    fitting = range(0, 3 * IMAGES, IMAGES)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # a plain average of the batches below
        model.train()
        for start in fitting:
            model(images[start : start + IMAGES])
        model.eval()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        seen: list[Tensor] = []
        hook = last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        for start in fitting:
            model(images[start : start + IMAGES])
        hook.remove()
        features = torch.cat(seen)
        means = torch.stack([features[labels[: len(features)] == k].mean(0) for k in range(10)])
        centre = features.mean(0)
        last.weight.copy_(means - centre)
        last.bias.copy_(-((means - centre) * (means + centre)).sum(1) / 2)
    graph = build_graph(model, (3, 32, 32), name)
    return Case(model, graph, Simulator(graph, calibrate(graph, [images[:IMAGES]], samples=4000)), images[-IMAGES:])


@cache
def zoo_case(name: str) -> Case:
    torch.manual_seed(0)
    return make_case(CifarVgg((1, 1, 1, 1, 1), 10) if name == "small_vgg" else build_model(name, 10), name)


@pytest.fixture(params=["resnet8", "small_vgg", "mobilenet_cifar"])
def case(request: pytest.FixtureRequest) -> Case:
    return zoo_case(request.param)


@pytest.fixture
def resnet8() -> Case:
    return zoo_case("resnet8")


def run_as_written(quantized: QuantizedGraph, images: Tensor) -> np.ndarray:
    model = integer_model(quantized, batch=None)
    return OnnxRuntimeRunner(model.SerializeToString(), optimise=False).run(images.numpy())


def relative(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    return float((first.argmax(1) == second.argmax(1)).mean())


# --- the file ---------------------------------------------------------------------------------------------------------


def test_file_is_valid_and_of_the_dialect(case: Case) -> None:
    model = integer_model(case.quantized(), metadata={"policy": "abc"})
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []
    assert model.opset_import[0].version == 17
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert [(p.key, p.value) for p in model.metadata_props] == [("edgecompress.policy", "abc")]
    names = [n.name for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert names == [layer.name for layer in case.graph.layers]
    relus = sum(n.op == "Relu" for n in case.graph.nodes)
    assert relus == sum(n.op_type == "Relu" for n in model.graph.node) > 0


def test_weights_are_int8_per_channel_and_biases_float(case: Case) -> None:
    quantized = case.quantized(weight_bits=4)
    model = integer_model(quantized)
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    producer = {n.output[0]: n for n in model.graph.node}
    for layer in case.graph.layers:
        written = next(n for n in model.graph.node if n.name == layer.name)
        integers = constants[producer[written.input[1]].input[0]]
        assert integers.dtype == np.int8
        np.testing.assert_array_equal(integers, quantized.weights[layer.name].values)
        np.testing.assert_array_equal(constants[written.input[2]], case.graph.constants[layer.inputs[2]])
        assert constants[written.input[2]].dtype == np.float32
        assert producer[written.input[0]].op_type == "DequantizeLinear"


def test_one_scale_per_weight_tensor_is_a_scalar_of_the_same_dialect(resnet8: Case) -> None:
    simulator = Simulator(resnet8.graph, resnet8.simulator.calibration, "tensor")
    quantized = simulator.quantized(resnet8.choices(4, 8))
    model = integer_model(quantized)
    constants = {constant.name: constant for constant in model.graph.initializer}
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    assert len(weights) == len(quantized.weights) and not any(constants[n.input[1]].dims for n in weights)
    assert lint(model) == []
    assert max(node_errors(model, quantized, resnet8.images.numpy()).values()) < 1


def test_agrees_with_the_float_network_and_the_simulator(case: Case) -> None:
    outputs = run_as_written(case.quantized(), case.images)
    with torch.no_grad():
        network = case.model(case.images).numpy()
        simulated = case.simulator(case.images, case.choices()).numpy()
    # Measured 0.016, 0.008 and 0.09: untrained depthwise layers amplify rounding, for the simulator (0.06) as well.
    limit = 0.15 if any(n.attributes.get("group", 1) > 1 for n in case.graph.nodes) else 0.025
    assert relative(outputs, network) < limit
    assert agreement(outputs, network) >= 0.95
    # The simulator keeps 8 unsigned bits behind a ReLU and quantises a few more places; this dialect has 7.
    assert relative(outputs, simulated) < limit
    assert agreement(outputs, simulated) >= 0.95


@pytest.mark.parametrize(("bits", "clips"), [(8, 0), (7, 1), (4, 8), (2, 8)])
def test_computes_what_the_ranges_say(resnet8: Case, bits: int, clips: int) -> None:
    """Eight values that layers read have these bits; at 7, only the signed input needs a Clip. The shortcuts keep 8."""
    quantized = resnet8.quantized(weight_bits=max(bits, 3), activation_bits=bits)
    expected = simulate(quantized, resnet8.images).detach().numpy()
    outputs = run_as_written(quantized, resnet8.images)
    assert relative(outputs, expected) < 0.02  # float sums in another order flip single roundings
    assert sum(n.op_type == "Clip" for n in integer_model(quantized).graph.node) == clips


def test_unsigned_8_bit_ranges_become_signed() -> None:
    assert symmetric_scale(TensorRange(0.5, 8, False)) == 0.5 * 255 / 127
    assert symmetric_scale(TensorRange(0.5, 7, False)) == symmetric_scale(TensorRange(0.5, 8, True)) == 0.5


def test_layers_without_integers_stay_float(resnet8: Case) -> None:
    choices = resnet8.choices()
    choices["conv1"] = LayerChoice(weight_bits=32, activation_bits=32)
    choices["fc"] = LayerChoice(weight_bits=32, activation_bits=32)
    model = integer_model(resnet8.simulator.quantized(choices))
    written = {n.name: n for n in model.graph.node if n.name}
    floats = {c.name for c in model.graph.initializer if c.data_type == TensorProto.FLOAT}
    assert written["conv1"].input[0] == "input"
    assert {written["conv1"].input[1], written["fc"].input[1]} <= floats
    assert written["layer1.0.conv1"].input[1] not in floats
    assert lint(model) == []


def test_wrong_opset_is_refused(resnet8: Case) -> None:
    with pytest.raises(UsageError, match="Opset 9"):
        integer_model(resnet8.quantized(), opset=9)


# --- placement --------------------------------------------------------------------------------------------------------


def test_only_the_skip_input_of_an_add_is_quantised(resnet8: Case) -> None:
    model = integer_model(resnet8.quantized())
    producer = {n.output[0]: n for n in model.graph.node}
    found = {}
    for add in (n for n in model.graph.node if n.op_type == "Add"):
        before = [producer[name] for name in add.input]
        assert sorted(n.op_type for n in before) == ["Conv", "DequantizeLinear"]
        main = next(n for n in before if n.op_type == "Conv")
        skip = next(n for n in before if n.op_type == "DequantizeLinear")
        found[main.name] = producer[producer[skip.input[0]].input[0]]
    assert found.keys() == {"layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"}
    assert found["layer1.0.conv2"].op_type == "Relu"
    assert [found[f"layer{n}.0.conv2"].name for n in (2, 3)] == ["layer2.0.shortcut.0", "layer3.0.shortcut.0"]


def test_one_pair_per_value(resnet8: Case) -> None:
    """8 values that layers read (an identity skip and both convs of a stage share theirs) and two shortcuts."""
    model = integer_model(resnet8.quantized())
    quantised = [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantised) == len(set(quantised)) == 10
    assert "output" not in quantised


class _Branches(nn.Module):
    """Two branches that are concatenated, and an Add without a convolution to fuse with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 16, 3, 1, 1)
        self.merge = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        left, right = F.relu(self.left(x)), 3 * F.relu(self.right(x))
        y = F.relu(self.merge(F.max_pool2d(torch.cat([left, right], 1), 2)))
        result: Tensor = self.fc((y + F.relu(y - 1)).mean((2, 3)))
        return result


def test_concat_inputs_share_one_scale() -> None:
    torch.manual_seed(2)
    branches = make_case(_Branches(), "branches")
    quantized = branches.quantized()
    model = integer_model(quantized)
    producer = {n.output[0]: n for n in model.graph.node}
    concat = next(n for n in model.graph.node if n.op_type == "Concat")
    behind = producer[next(n for n in model.graph.node if n.name == "merge").input[0]]
    scales = {producer[name].input[1] for name in concat.input} | {behind.input[1]}
    assert len(scales) == 1
    adds = [n for n in model.graph.node if n.op_type == "Add"]
    assert all(producer[name].op_type != "DequantizeLinear" for add in adds for name in add.input if name in producer)
    assert lint(model) == []
    expected = simulate(quantized, branches.images).detach().numpy()
    assert relative(run_as_written(quantized, branches.images), expected) < 0.02
    assert max(node_errors(model, quantized, branches.images.numpy()).values()) < 0.05


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_every_node_of_a_right_file_is_right(case: Case, bits: int) -> None:
    quantized = case.quantized(bits, bits)
    errors = node_errors(integer_model(quantized), quantized, case.images.numpy())
    assert len(errors) == len(case.graph.nodes)
    assert max(errors.values()) < 0.05  # of what is allowed; found: 0.002


def _scale_of_a_read(model: onnx.ModelProto) -> None:
    name = _first(model, "QuantizeLinear").input[1]
    _replace(model, name, numpy_helper.to_array(_constant(model, name)) * np.float32(1.01))


def _scale_of_a_channel(model: onnx.ModelProto) -> None:
    name = _first(model, "DequantizeLinear", weight=True).input[1]
    scales = numpy_helper.to_array(_constant(model, name)).copy()
    scales[scales.argmax()] *= 1.01
    _replace(model, name, scales)


def _one_weight(model: onnx.ModelProto) -> None:
    name = _first(model, "DequantizeLinear", weight=True).input[0]
    values = numpy_helper.to_array(_constant(model, name)).copy()
    values[0].flat[0] = -100 if values[0].flat[0] > 0 else 100
    _replace(model, name, values)


def _no_activation(model: onnx.ModelProto) -> None:
    found = _first(model, "Relu")
    found.op_type = "Identity"


def _no_bias(model: onnx.ModelProto) -> None:
    del next(n for n in model.graph.node if n.op_type == "Conv").input[2:]


@pytest.mark.parametrize("break_it", [_scale_of_a_read, _scale_of_a_channel, _one_weight, _no_activation, _no_bias])
def test_a_small_fault_in_one_layer_is_found(resnet8: Case, break_it: object) -> None:
    """A scale that is off by 1 % changes the outputs less than right roundings do in an untrained network."""
    quantized = resnet8.quantized()
    model = integer_model(quantized)
    assert callable(break_it)
    break_it(model)
    errors = node_errors(model, quantized, resnet8.images.numpy())
    assert 1 <= sum(not error < 1 for error in errors.values()) <= 2, errors


def test_limits_for_an_engine_follow_the_networks_own_spread(case: Case) -> None:
    """A right engine, such as one with FP16 between its integers, stays inside; one with a wrong layer does not."""
    images = case.images.numpy()
    quantized = case.quantized()
    limits = engine_limits(quantized, images)
    expected = simulate(quantized, case.images).numpy()
    outputs = simulate(quantized, case.images, all_half=True).numpy()
    assert (
        relative(outputs, expected) <= limits["max_error"] and agreement(outputs, expected) >= limits["min_agreement"]
    )
    layer = case.graph.layers[2]
    scale = quantized.weights[layer.name].scale * np.float32(2)
    weights = dict(quantized.weights) | {layer.name: QuantizedWeight(quantized.weights[layer.name].values, scale, 8)}
    wrong = simulate(QuantizedGraph(quantized.graph, quantized.tensors, weights), case.images).numpy()
    assert relative(wrong, expected) > limits["max_error"] or agreement(wrong, expected) < limits["min_agreement"]


def test_refusals_name_a_mend() -> None:
    assert "16 bits" in mend_for("builder: Cannot compile '/fc/Gemm' for Turing: FP32 GEMM is not supported")
    assert mend_for("builder: something new") == MENDS[""]


def test_two_four_sparsity(resnet8: Case) -> None:
    quantized = resnet8.quantized()
    values = quantized.weights["layer1.0.conv1"].values.copy()
    values[:, 1::4] = values[:, 2::4] = 0
    first = quantized.weights["conv1"].values.copy()  # three input channels
    first[:, 0] = 0
    weights = dict(quantized.weights)
    for name, integers in (("layer1.0.conv1", values), ("conv1", first)):
        weights[name] = QuantizedWeight(integers, weights[name].scale, 8)
    found = two_four_layers(QuantizedGraph(quantized.graph, quantized.tensors, weights))
    assert {name for name, holds in found.items() if holds} == {"layer1.0.conv1", "conv1"}


# --- FP16 and INT4 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def half(resnet8: Case) -> QuantizedGraph:
    """Two layers in FP16, and a last one of 4-bit weights with FP16 inputs."""
    choices = resnet8.choices()
    for name in ("conv1", "layer2.0.conv2"):
        choices[name] = LayerChoice(weight_bits=16, activation_bits=16)
    choices["fc"] = LayerChoice(weight_bits=4, activation_bits=16)
    return resnet8.simulator.quantized(choices)


@pytest.mark.parametrize("opset", [17, 21])
def test_layers_of_16_bits_are_cast(resnet8: Case, half: QuantizedGraph, opset: int) -> None:
    model = integer_model(half, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert lint(model) == []
    constants = {c.name: c for c in model.graph.initializer}
    producer = {n.output[0]: n for n in model.graph.node}
    layers = {n.name: n for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    for name in ("conv1", "layer2.0.conv2"):
        assert {constants[value].data_type for value in layers[name].input[1:]} == {TensorProto.FLOAT16}
        assert producer[layers[name].input[0]].op_type == "Cast"
    assert producer[layers["layer1.0.conv1"].input[0]].op_type == "DequantizeLinear"
    assert producer["output"].op_type == "Cast"  # logits stay FP32
    weight = layers["fc"].input[1]
    stored = constants[weight if opset == 17 else producer[weight].input[0]]
    assert stored.data_type == (TensorProto.FLOAT16 if opset == 17 else TensorProto.INT4)
    assert max(node_errors(model, half, resnet8.images.numpy()).values()) < 1
    expected = simulate(half, resnet8.images).numpy()
    outputs = OnnxRuntimeRunner(integer_model(half, opset=opset, batch=None).SerializeToString(), optimise=False)
    assert relative(outputs.run(resnet8.images.numpy()), expected) < 0.02


def test_int4_asks_for_opset_21(resnet8: Case, half: QuantizedGraph) -> None:
    assert (opset_for(half, 25), opset_for(half, 20), opset_for(resnet8.quantized(), 25)) == (21, 17, 17)


def test_tensorrt_rtx_builds_fp16_and_int4(half: QuantizedGraph) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    for opset in (17, 21):
        result = check_builds(integer_model(half, opset=opset).SerializeToString())
        assert (result["SM86"], result["SM89"]) == ("built", "built")


# --- the linter -------------------------------------------------------------------------------------------------------


def _constant(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(c for c in model.graph.initializer if c.name == name)


def _replace(model: onnx.ModelProto, name: str, values: np.ndarray) -> None:
    _constant(model, name).CopyFrom(numpy_helper.from_array(values, name))


def _first(model: onnx.ModelProto, op: str, *, weight: bool = False) -> onnx.NodeProto:
    constants = {c.name for c in model.graph.initializer}
    return next(n for n in model.graph.node if n.op_type == op and (n.input[0] in constants) == weight)


def _zero_point(model: onnx.ModelProto) -> None:
    _replace(model, _first(model, "QuantizeLinear").input[2], np.int8(3))


def _unsigned(model: onnx.ModelProto) -> None:
    _replace(model, _first(model, "QuantizeLinear").input[2], np.uint8(0))


def _no_zero_point(model: onnx.ModelProto) -> None:
    del _first(model, "QuantizeLinear").input[2:]


def _int32_bias(model: onnx.ModelProto) -> None:
    name = _first(model, "DequantizeLinear", weight=True).input[0]
    _replace(model, name, numpy_helper.to_array(_constant(model, name)).astype(np.int32))


def _four_bits(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("small", TensorProto.INT4, [2], [1, 2]))


def _axis_1(model: onnx.ModelProto) -> None:
    _first(model, "DequantizeLinear", weight=True).attribute[0].i = 1


def _negative_scale(model: onnx.ModelProto) -> None:
    _replace(model, _first(model, "QuantizeLinear").input[1], np.float32(-1))


def _per_channel_activation(model: onnx.ModelProto) -> None:
    _replace(model, _first(model, "QuantizeLinear").input[1], np.ones(3, np.float32))


def _quantised_logits(model: onnx.ModelProto) -> None:
    _first(model, "DequantizeLinear").output[0] = "output"


def _softmax(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Softmax", [_first(model, "DequantizeLinear").output[0]], ["s"]))


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (_zero_point, "zero point that is not 0"),
        (_unsigned, "uint8 zero point"),
        (_no_zero_point, "no constant zero point"),
        (_int32_bias, "reads int32"),
        (_four_bits, "'small' is INT4"),
        (_axis_1, "axis 1"),
        (_negative_scale, "not positive"),
        (_per_channel_activation, "3 scales on an activation"),
        (_quantised_logits, "logits stay float"),
        (_softmax, "feeds a Softmax"),
    ],
)
def test_lint_catches(resnet8: Case, plant: object, words: str) -> None:
    model = integer_model(resnet8.quantized())
    assert callable(plant)
    plant(model)
    assert any(words in problem for problem in lint(model)), lint(model)


def test_lint_refuses_the_other_dialect(resnet8: Case) -> None:
    from edgecompress.exporters.to_onnxruntime import integer_model as ort_model

    problems = " ".join(lint(ort_model(resnet8.quantized())))
    assert "uint8 zero point" in problems and "reads int32" in problems


# --- NVIDIA's own opinion ---------------------------------------------------------------------------------------------


def test_tensorrt_rtx_builds_it(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    result = check_builds(integer_model(case.quantized()).SerializeToString())
    assert (result["SM86"], result["SM89"]) == ("built", "built")
    assert capfd.readouterr() == ("", "")


def test_tensorrt_rtx_builds_low_bits_and_dynamic_batch(resnet8: Case) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    model = integer_model(resnet8.quantized(4, 4), batch=None)
    assert check_builds(model.SerializeToString(), capabilities=["SM86"])["SM86"] == "built"


def test_tensorrt_rtx_refuses_the_other_dialect(resnet8: Case) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from edgecompress.exporters.to_onnxruntime import integer_model as ort_model

    result = check_builds(ort_model(resnet8.quantized(), batch=1).SerializeToString(), capabilities=["SM86"])
    assert result["SM86"].startswith("parser: ")
    assert "export --format tensorrt" in mend_for(result["SM86"])
    with pytest.raises(UnknownNameError, match="SM87"):
        check_builds(b"", capabilities=["SM87"])


def test_without_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert check_builds(b"") == {"tensorrt_rtx": "not installed"}
