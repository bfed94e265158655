"""LiteRT files: written by us, read back by LiteRT's own schema, run in LiteRT, and equal to the integer emulator."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import call
from sample_networks import NETWORKS, OPERATOR_NETWORKS, conv_bn, integer_case, patterns, settled
from test_formats_contract import files, make_source
from torch import nn

from edgecompress.errors import BadFileError, GoalMissedError, UsageError
from edgecompress.evaluation import evaluate_artifact
from edgecompress.exporters import litert_integers, to_litert
from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.formats import EXPORTERS, export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.operator_proof import operator_differences
from edgecompress.exporters.runners import is_x86, measure_latency_us, run_all
from edgecompress.exporters.to_litert import integer_model
from edgecompress.exporters.verify import agreement
from edgecompress.graph import build_graph
from edgecompress.quantize import Simulator, calibrate
from edgecompress.spec import LayerChoice, Preprocessing

pytestmark = pytest.mark.skipif(
    find_spec("ai_edge_litert") is None or find_spec("flatbuffers") is None, reason="LiteRT is not installed"
)
ALL = (*NETWORKS, *OPERATOR_NETWORKS)
HALF_A_STEP = 0.51  # of the 16 bits of the scores


def quantized_network(model, shape=(3, 12, 12), bits=8):
    """A network of a test's own, at the same bits everywhere, and images."""
    return next(quantized_networks(model, shape, (bits,)))


def quantized_networks(model, shape=(3, 12, 12), bits=(8,), seed=3):
    """The same at several numbers of bits."""
    images = torch.randn(24, *shape, generator=torch.Generator().manual_seed(seed))
    graph = build_graph(settled(model, seed), shape, "network")
    simulator = Simulator(graph, calibrate(graph, [images], samples=4000))
    for number in bits:
        choice = LayerChoice(weight_bits=number, activation_bits=number)
        yield simulator.quantized({layer.name: choice for layer in graph.layers}), images


def answers(quantized, images, interface=None):
    """The file, what LiteRT answers, and what the emulator does."""
    from edgecompress.exporters.more_runners import LiteRtRunner

    with torch.no_grad():
        exact = emulate(quantized, images).numpy()
    model = integer_model(quantized, largest_score=float(np.abs(exact).max()), interface=interface or Interface())
    return model, run_all(LiteRtRunner(model.data), images.numpy()), exact


def check_equal(quantized, images, interface=None):
    """Equal to the emulator but for the rounding of the scores; on other CPUs XNNPACK has other kernels."""
    model, found, exact = answers(quantized, images, interface)
    assert found.shape == exact.shape
    if is_x86():
        assert np.abs(found - exact).max() <= HALF_A_STEP * model.step
    assert agreement(found, exact) >= 0.95
    return model


# ------------------------------------------------------------------------------------------------------ whole exports


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_networks_are_written_proven_and_recorded(name, tmp_path):
    source = make_source(name)
    artifact = export(source, "litert", tmp_path)
    checks = artifact.checks
    assert files(tmp_path) == ["export.json", "model.tflite"]
    assert checks["integer_layers"] == len(source.quantized.weights)
    assert checks["float_operators"] == 0 and checks["float_islands"] == "none"
    assert checks["emulator_agreement"] == 1.0 and checks["emulator_error"] < 1e-3
    assert checks["operator_difference"].endswith("of the values") and checks["operators_compared"] > 6
    if is_x86():
        assert checks["emulator_max_difference_steps"] <= HALF_A_STEP
        assert checks["operator_difference"].startswith("0.") and " at 0 of " in checks["operator_difference"]
    assert checks["weight_bytes"] == sum(weight.values.size for weight in source.quantized.weights.values())
    assert artifact.inputs == {"input": [1, 3, 16, 16]} and artifact.outputs == {"output": [1, 4]}
    assert (artifact.opset, artifact.oldest_runtime) == (0, "TensorFlow Lite 2.14.0")
    opened = open_artifact(tmp_path / "model.tflite")
    assert opened.preprocessing == source.preprocessing and not opened.pixels
    assert json.loads(opened.runner.metadata["edgecompress.labels"]) == list("abcd")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in ALL if name != "gated"])
def test_every_mix_of_bits_is_equal_to_the_emulator(name, seed):
    case = integer_case(name)
    check_equal(case.simulator.quantized(case.random_choices(seed)), case.images)


def test_gates_are_integers_and_sigmoids_close():
    """HardSwish and HardSigmoid are exact; a Sigmoid is rounded to LiteRT's own 1/256 first."""

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.squeeze, self.fc = conv_bn(3, 8, stride=2), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x):
            x = F.hardswish(self.stem(x))
            x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
            return self.fc(x.mean((2, 3)))

    for quantized, images in quantized_networks(Gates(), bits=(8, 5)):
        assert not check_equal(quantized, images).floats
    case = integer_case("gated")
    model, found, exact = answers(case.quantized(8, 8), case.images)
    assert not model.floats and agreement(found, exact) >= 0.95
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_networks_of_torchvision_are_right_operator_by_operator(name):
    """Their answers are equal only by luck: kernels of some CPUs (AVX512-VNNI) round one value in a thousand otherwise."""
    from edgecompress.exporters.check_litert import check_litert, runs
    from edgecompress.models import build_model

    quantized, images = quantized_network(build_model(name, 10), (3, 64, 64))
    model, found, exact = answers(quantized, images)
    assert found.shape == exact.shape and not model.floats
    assert check_litert(model, quantized, images.numpy(), exact).failures == []
    differences = operator_differences(quantized, runs(model, quantized, images[:2].numpy()), model.step)
    once = {value: found for value, found in differences.items() if value not in model.rounded_twice}
    assert len(once) > 0.5 * len(differences) and max(found.share for found in once.values()) <= 0.005


# ------------------------------------------------------------------------------------------------- single operators


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 8, 5, stride=3, padding=2),
        nn.Conv2d(3, 8, (3, 1), padding=(1, 0)), nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(3, 3, 3, stride=2, padding=1, groups=3),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4)),
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, stride=2)),
        nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 2, 1)), nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6()), nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.ReLU()),
    ],
    ids=str,
)  # fmt: skip
def test_windows_groups_and_pools(layer):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fc = layer, nn.Linear(layer(torch.zeros(1, 3, 12, 12)).shape[1], 4)

        def forward(self, x):
            return self.fc(self.layer(x).mean((2, 3)))

    for quantized, images in quantized_networks(Network(), bits=(8, 3)):
        assert not check_equal(quantized, images).floats


def test_flattened_pixels_scores_per_pixel_and_bare_pools():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 6 * 6, 4)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1))

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x):
            return F.relu(self.conv(x)).mean((2, 3))

    for network in (Flattened(), Squeezed(), nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 1))):
        check_equal(*quantized_network(network))


# ------------------------------------------------------------------------------------------------------------- bits


def test_int4_is_taken_where_it_costs_no_time_or_as_asked(tmp_path):
    case = integer_case("mobile")
    quantized, images = case.quantized(4, 8), case.images
    never = check_equal(quantized, images, Interface(int4="never"))
    fast = check_equal(quantized, images)
    model, found, exact = answers(quantized, images, Interface(int4="always"))
    assert (never.int4, fast.int4, model.int4) == (0, 2, 5)  # the two pointwise ones; all but the scores' layer
    assert len(model.data) < len(fast.data) < len(never.data)
    assert agreement(found, exact) >= 0.9  # kernels without XNNPACK round twice
    assert (len(fast.rounded_twice), len(model.rounded_twice)) == (0, 3)
    assert to_litert.oldest_runtime(never) != to_litert.oldest_runtime(fast) == "LiteRT 1.2.0"


def test_narrow_activations_are_clipped_at_both_ends():
    """3 bits signed: -4 to 3 steps, and nothing beyond."""
    from ai_edge_litert.interpreter import Interpreter

    quantized, images = quantized_network(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 144, 4)), bits=3
    )
    model = check_equal(quantized, 3 * images)
    interpreter = Interpreter(model_content=model.data, experimental_preserve_all_tensors=False)
    by_name = {entry["name"]: entry for entry in interpreter.get_tensor_details()}
    grid = by_name["input.clipped"]["quantization_parameters"]
    assert grid["zero_points"].tolist() == [124]  # the largest of 3 steps is 127
    assert by_name["input.clipped"]["dtype"] is np.int8


# -------------------------------------------------------------------------------------------------------- interfaces


@pytest.mark.parametrize(
    ("interface", "shape", "kind"),
    [
        (Interface(layout="nhwc"), [1, 16, 16, 3], np.float32),
        (Interface(input="uint8", layout="nhwc"), [1, 16, 16, 3], np.uint8),
        (Interface(pixels=True), [1, 3, 16, 16], np.float32),
        (Interface(input="uint8", head="argmax"), [1, 3, 16, 16], np.uint8),
        (Interface(layout="nhwc", head="softmax", batch=3, bare=True), [3, 16, 16, 3], np.float32),
    ],
    ids=str,
)
def test_interfaces_are_part_of_the_file_and_evaluated(interface, shape, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(measure_latency_us.__kwdefaults__, "seconds", 0.02)
    monkeypatch.setitem(measure_latency_us.__kwdefaults__, "warmup_s", 0.0)
    source = make_source("residual")
    plain = export(source, "litert", tmp_path / "plain")
    artifact = export(replace(source, interface=interface), "litert", tmp_path)
    assert artifact.inputs == {"input": shape} and artifact.checks["interface_agreement"] >= 0.99
    heads = {"scores": "none", "softmax": "softmax head", "argmax": "argmax head"}
    assert artifact.checks["float_islands"] == heads[interface.head]
    opened = open_artifact(tmp_path / "model.tflite")
    assert opened.runner.dtype == kind and opened.runner.batch == shape[0]
    assert opened.pixels == interface.takes_pixels and bool(opened.runner.metadata) != interface.bare
    found, mine = evaluate_artifact(tmp_path / "model.tflite", patterns())
    _, wanted = evaluate_artifact(tmp_path / "plain" / plain.path, patterns())
    assert found.runtime.startswith("LiteRT ") and found.median_us > 0 and found.batch == shape[0]
    assert (mine == wanted).mean() >= 0.98
    with pytest.raises(UsageError, match="has a fixed batch, no opset"):
        export(replace(source, interface=Interface(batch=0)), "litert", tmp_path / "dynamic")


# ------------------------------------------------------------------------------------------- what LiteRT does not take


class Attention(nn.Module):
    """A Softmax over the channels, in the middle of the network."""

    def __init__(self, axis=1):
        super().__init__()
        self.stem, self.blocks, self.fc = conv_bn(3, 8, stride=2), nn.Sequential(nn.Softmax(axis)), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.fc((x * self.blocks(x)).mean((2, 3)))


def test_an_operator_without_integers_is_refused_by_name_or_alone_in_float():
    quantized, images = quantized_network(Attention())
    with pytest.raises(
        UsageError, match=r"no Softmax at 'blocks\.0.*' as integers\. .*--allow-float .* no other, in float"
    ):
        integer_model(quantized, largest_score=1)
    model = check_equal(quantized, images, Interface(allow_float=True))
    assert len(model.floats) == 1 and model.floats[0].startswith("Softmax blocks.0")
    kinds = contents_of(model).floats
    assert dict(kinds) == {"SOFTMAX": 1}


def test_what_litert_has_not_even_in_float_is_refused():
    with pytest.raises(UsageError, match=r"no Softmax at .* over other axes than the channels"):
        integer_model(quantized_network(Attention(2))[0], largest_score=1, interface=Interface(allow_float=True))

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 6, 4)

        def forward(self, x):
            return self.fc(self.stem(x).mean(3).flatten(1))

    with pytest.raises(UsageError, match=r"no ReduceMean at .* we know how to write\. Known: .*Softmax"):
        integer_model(quantized_network(Rows())[0], largest_score=1, interface=Interface(allow_float=True))


def test_a_constant_operand_a_division_and_leaky_relu():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2), nn.Linear(8, 4)

        def forward(self, x):
            x = (F.leaky_relu(self.a(x), 0.1) - self.b(x)) / (1 + F.relu(self.b(x)))
            return self.fc(x[:, :, 1:4].mean((2, 3)))

    from edgecompress.exporters.check_litert import check_litert

    quantized, images = quantized_network(Network())
    with pytest.raises(UsageError, match=r"no Add at 'add.*' as integers"):
        integer_model(quantized, largest_score=1)
    model, _, exact = answers(quantized, images, Interface(allow_float=True))
    assert [name.split()[0] for name in model.floats] == ["Add", "Div"]
    assert dict(contents_of(model).floats) == {"ADD": 1, "DIV": 1}
    assert check_litert(model, quantized, images.numpy(), exact).failures == []


def test_layers_that_keep_floats_stay_float_and_are_named():
    case = integer_case("residual")
    quantized = case.quantized(8, 8)
    weights = {name: weight for name, weight in quantized.weights.items() if name != "a1.0"}
    float_layer = replace(quantized, weights=weights)
    with pytest.raises(UsageError, match=r"no Conv at 'a1\.0' as integers"):
        integer_model(float_layer, largest_score=1)
    model, found, exact = answers(float_layer, case.images, Interface(allow_float=True))
    assert model.floats == ("Conv a1.0",) and dict(contents_of(model).floats) == {"CONV_2D": 1}
    assert agreement(found, exact) >= 0.95


# ------------------------------------------------------------------------------------------------------ proof and eval


def contents_of(model):
    from edgecompress.exporters.check_litert import contents

    return contents(model.data)


def test_the_proof_finds_changed_weights_and_unnamed_floats():
    from edgecompress.exporters.check_litert import check_contents, check_litert

    case = integer_case("concat")
    quantized = case.quantized(3, 8)
    model = integer_model(quantized, largest_score=1)
    assert not check_contents(model, quantized).failures
    other = dict(quantized.weights)
    values = other["left.0"].values.copy()
    values[0, 0] += 1
    other["left.0"] = replace(other["left.0"], values=values)
    assert check_contents(model, replace(quantized, weights=other)).failures == [
        "the integers of left.0 are not in the file"
    ]
    unseen = replace(model, values={name: held for name, held in model.values.items() if name != "relu_1"})
    failed = check_litert(unseen, quantized, case.images.numpy(), emulate(quantized, case.images).numpy()).failures
    assert failed == ["1 values are not what their operators make of their inputs (relu_1)"]
    attention = integer_model(quantized_network(Attention())[0], largest_score=1, interface=Interface(allow_float=True))
    hidden = check_contents(replace(attention, floats=()), quantized_network(Attention())[0])
    assert hidden.failures == ["it computes in float: 1 SOFTMAX; meant to: nothing"]


def test_a_file_that_answers_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(litert_integers, "int32_bias", lambda bias, *scales: np.zeros(len(bias), np.int32))
    with pytest.raises(
        GoalMissedError, match=r"litert export failed its proof: \d+ values are not what .* \(relu: \d+ steps"
    ):
        export(make_source("concat"), "litert", tmp_path)
    assert files(tmp_path) == []


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.tflite"
    export(make_source("flat"), "litert", tmp_path)
    whole = path.read_bytes()
    for content in (b"", b"no file", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BadFileError, match=r"LiteRT .* refuses .*model\.tflite"):
            open_artifact(path)


def test_writing_twice_gives_the_same_bytes():
    case = integer_case("concat")
    first, second = (integer_model(case.quantized(5, 6), largest_score=2.0).data for _ in range(2))
    assert first == second and first[4:8] == b"TFL3"


def test_buffers_are_aligned_and_equal_constants_written_once():
    from ai_edge_litert.schema_py_generated import Model

    data = integer_model(integer_case("dense").quantized(8, 8), largest_score=2.0).data
    model = Model.GetRootAs(data, 0)
    found = [model.Buffers(number).DataAsNumpy() for number in range(model.BuffersLength())]
    filled = [array for array in found if isinstance(array, np.ndarray) and array.size]
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    offsets = [array.__array_interface__["data"][0] - start for array in filled]
    assert len(filled) > 10 and all(offset % 16 == 0 for offset in offsets)
    assert len({array.tobytes() for array in filled}) == len(filled)


def test_command_line_exports_and_evaluates(tiny_run, tmp_path, quick):
    called = call("export", tiny_run, "--format", "litert", "--out", tmp_path, "--layout", "nhwc", "--int4", "never")
    assert called.code == 0, called.err
    assert "litert dialect, runs from TensorFlow Lite 2.14.0" in called.out and "float_operators: 0" in called.out
    record = json.loads((tmp_path / "export.json").read_text())["litert"]
    assert record["inputs"] == {"input": [1, 8, 8, 1]} or record["inputs"]["input"][3] in (1, 3)
    assert "accuracy" in record["checks"]
    called = call("eval", tmp_path / "model.tflite", "--data", "digits", "--against", tiny_run, "--json")
    assert called.code == 0, called.err
    row = json.loads(called.out)
    assert row["runtime"].startswith("LiteRT ") and row["comparison"]["agreement"] > 0.9
    assert EXPORTERS["litert"].file_name == "model.tflite"


def test_preprocessing_with_uneven_channels_is_folded_exactly(tmp_path):
    how = Preprocessing(size=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    source = replace(make_source("residual"), preprocessing=how, interface=Interface(input="uint8", layout="nhwc"))
    artifact = export(source, "litert", tmp_path)
    assert artifact.checks["interface_agreement"] == 1.0
