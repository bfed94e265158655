"""Files for ncnn and ExecuTorch: written, proven in their own runtime, and opened by `eval`."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sample_networks import integer_case, patterns
from test_formats_contract import files, make_source

from edgecompress.describe import network_of
from edgecompress.errors import BadFileError, EdgeCompressError, MissingBackendError, UsageError
from edgecompress.evaluation import evaluate_artifact
from edgecompress.exporters import check_executorch, conversions, to_executorch
from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.formats import export
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us
from edgecompress.exporters.to_onnx import float_model
from edgecompress.graph import build_graph
from edgecompress.quantize import Simulator, TensorRange, calibrate
from edgecompress.spec import CompressionPolicy, LayerChoice

needs_ncnn = pytest.mark.skipif(not (find_spec("ncnn") and find_spec("pnnx")), reason="ncnn or pnnx is not installed")
needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None,
    reason="executorch is not installed: it is no part of the extra 'test'; pip install 'edgecompress[executorch]'",
)


@needs_ncnn
def test_ncnn_file_answers_as_the_float_network_and_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(measure_latency_us.__kwdefaults__, "seconds", 0.02)
    monkeypatch.setitem(measure_latency_us.__kwdefaults__, "warmup_s", 0.0)
    source = make_source("residual")
    artifact = export(source, "ncnn", tmp_path)
    assert artifact.checks["ncnn_error"] < 1e-3 and artifact.oldest_runtime.startswith("ncnn ")
    assert files(tmp_path) == ["export.json", "model.ncnn.bin", "model.ncnn.param"]
    assert artifact.size_bytes == sum((tmp_path / f"model.ncnn.{kind}").stat().st_size for kind in ("bin", "param"))
    export(source, "onnx", tmp_path)
    opened = open_artifact(tmp_path / "model.ncnn.param")
    assert opened.runner.shape == (3, 16, 16) and opened.preprocessing == source.preprocessing
    wanted = OnnxRuntimeRunner(tmp_path / "model.onnx").run(source.images)
    np.testing.assert_allclose(opened.runner.run(source.images), wanted, atol=1e-4 * np.abs(wanted).max())
    found, _ = evaluate_artifact(tmp_path / "model.ncnn.param", patterns())
    assert found.runtime.startswith("ncnn") and found.median_us > 0 and found.run_peak_bytes is None


@needs_ncnn
def test_damaged_ncnn_files_are_refused(tmp_path):
    for content in (b"", b"\xff\xfe\n", b"1234\n2 2\n"):
        (tmp_path / "x.param").write_bytes(content)
        (tmp_path / "x.bin").write_bytes(b"")
        with pytest.raises(BadFileError, match=r"x\.param is no text \.param"):
            open_artifact(tmp_path / "x.param")
    (tmp_path / "x.param").write_text("7767517\n2 2\nInput in0 0 1 in0\n")
    (tmp_path / "x.bin").unlink()
    with pytest.raises(BadFileError, match=r"with x\.bin beside it"):
        open_artifact(tmp_path / "x.param")


@needs_ncnn
def test_full_disk_leaves_neither_of_two_files(tmp_path, monkeypatch):
    source, real, calls = make_source("flat"), os.replace, []

    def full_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr("os.replace", full_at_the_second)
    with pytest.raises(EdgeCompressError, match="The disk is full"):
        export(source, "ncnn", tmp_path)
    assert len(calls) == 2 and files(tmp_path) == []


@pytest.mark.parametrize("name", ["ncnn", "executorch"])
def test_front_and_head_are_refused_before_any_work(name, tmp_path):
    source = replace(make_source("flat"), interface=Interface(input="uint8"))
    with pytest.raises(UsageError, match="Leave --input"):
        export(source, name, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("suffix", "module", "extra"),
    [
        (".param", "ncnn", "ncnn"),
        (".pte", "executorch.runtime", "executorch"),
        (".tflite", "ai_edge_litert.interpreter", "litert"),
    ],
)
def test_missing_runtime_says_what_to_install(suffix, module, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / f"x{suffix}").write_bytes(b"7767517\n")
    with pytest.raises(MissingBackendError, match=rf"edgecompress\[{extra}\]"):
        open_artifact(tmp_path / f"x{suffix}")


def operators_source(name):
    """A source around one of the networks of uncommon operators."""
    case = integer_case(name)
    quantized = case.quantized(8, 8)
    return replace(
        make_source("residual"), graph=case.graph, quantized=quantized, images=case.images.numpy(),
        network=network_of(case.graph, "case"), policy=CompressionPolicy(model="case"),
    )  # fmt: skip


def test_an_integer_program_holds_no_weights_as_floats():
    """Each buffer of the module is written, read or not: the floats made the file five times as large."""
    quantized = integer_case("residual").quantized(8, 8)
    network = to_executorch.IntegerNetwork(quantized, TensorRange(0.1, 8, True))
    weights = {weight.values.shape for weight in quantized.weights.values()}
    held = list(network.buffers())
    assert {tuple(value.shape) for value in held if value.dtype == torch.int8} >= weights
    assert not any(value.is_floating_point() and tuple(value.shape) in weights for value in held)


def test_limits_of_a_clip_are_numbers_of_the_program():
    """As buffers they are data, and MobileNet-V2 cannot be lowered."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU6(), torch.nn.Flatten())
    graph, x = build_graph(module, (3, 8, 8), "clipped"), torch.randn(1, 3, 8, 8)
    assert "Clip" in [node.op for node in graph.nodes]
    program = torch.export.export(to_executorch.FloatNetwork(graph).eval(), (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@needs_executorch
def test_executorch_takes_a_layer_with_its_clip_as_one_integer_kernel():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU6(), torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU6()
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128, 4))
    images = torch.randn(8, 3, 8, 8)
    graph = build_graph(module, (3, 8, 8), "clipped")
    simulator = Simulator(graph, calibrate(graph, [images], samples=2000))
    quantized = simulator.quantized(
        {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in graph.layers}
    )
    network = to_executorch.IntegerNetwork(quantized, TensorRange(0.01, 8, True))
    assert to_executorch.program(network, images[:1])[1] == []


def test_scores_that_are_a_moved_value_keep_its_grid():
    """SqueezeNet ends in a mean: XNNPACK refuses to load a program that flattens onto another grid."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    images = torch.randn(8, 3, 8, 8)
    graph = build_graph(module, (3, 8, 8), "pooled")
    simulator = Simulator(graph, calibrate(graph, [images], samples=2000))
    quantized = simulator.quantized(
        {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in graph.layers}
    )
    network = to_executorch.IntegerNetwork(quantized, TensorRange(99.0, 8, True))
    assert network.scores.scale < 1


@needs_executorch
def test_executorch_is_proven_operator_by_operator_where_answers_do_not_show_it(monkeypatch):
    case = integer_case("residual")
    quantized, scores = case.quantized(8, 8), TensorRange(0.1, 8, True)
    images = case.images[:2].numpy()
    data = to_executorch.program(to_executorch.IntegerNetwork(quantized, scores), case.images[:1])[0]
    monkeypatch.setattr(check_executorch, "INTEGER_ERROR", 0.0)
    exact = emulate(quantized, case.images[:2]).numpy()
    checks = check_executorch.check_integer_program(data, quantized, scores, images, exact)
    assert not checks.failures and checks.values["operators_compared"] > 5
    weights = {name: replace(weight, values=-weight.values) for name, weight in list(quantized.weights.items())[:1]}
    wrong = replace(quantized, weights={**quantized.weights, **weights})
    failures = check_executorch.check_integer_program(data, wrong, scores, images, exact).failures
    assert any("answers otherwise" in failure for failure in failures)


@needs_executorch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "floats"), [("gated", {"HardSigmoid", "Sigmoid"}), ("dense", {"AveragePool"}), ("shuffled", set())]
)
def test_executorch_computes_single_operators_in_float_where_allowed(name, floats):
    source = operators_source(name)
    model = float_model(source.graph, batch=1).SerializeToString()
    allowed = replace(source, interface=Interface(allow_float=bool(floats)))
    checks = conversions.executorch(allowed, model, True).checks
    assert not checks.failures and checks.values["integers"] and checks.values["left_to_portable_kernels"] == "nothing"
    named = checks.values["float_islands"].split(", ") if floats else []
    assert {island.split()[0] for island in named} == floats and checks.values["executorch_error"] < 0.05


@needs_executorch
@pytest.mark.filterwarnings("ignore")  # its interface calls itself experimental
@pytest.mark.slow
def test_executorch_program_computes_integers_or_says_why_not(tmp_path, monkeypatch):
    artifact = export(make_source("residual"), "executorch", tmp_path)
    assert artifact.checks["integers"] is True and artifact.checks["executorch_error"] < 0.1
    opened = open_artifact(tmp_path / "model.pte")
    assert opened.runner.shape == (3, 16, 16) and opened.runner.batch == 1
    real = to_executorch.program

    def takes_floats_only(network, image):
        if isinstance(network, to_executorch.IntegerNetwork):
            raise UsageError("ExecuTorch cannot lower the network as it is: an operator has no kernel.")
        return real(network, image)

    monkeypatch.setattr(to_executorch, "program", takes_floats_only)
    source = make_source("flat")
    with pytest.raises(UsageError, match=r"has no kernel.* Export with --allow-float"):
        export(source, "executorch", tmp_path / "float")
    allowed = replace(source, interface=Interface(allow_float=True))
    assert export(allowed, "executorch", tmp_path / "float").checks["integers"] is False
    gated = operators_source("gated")
    with pytest.raises(UsageError, match=r"no integer kernel for HardSigmoid .*, and nothing else, in float"):
        conversions.executorch(gated, float_model(gated.graph, batch=1).SerializeToString(), True)
    (tmp_path / "x.pte").write_bytes(b"no program")
    with pytest.raises(BadFileError, match="refuses"):
        open_artifact(tmp_path / "x.pte")
