"""What a deployer may ask of a file is around the same proven network, and what cannot be is refused before it is written."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from sample_networks import integer_case
from test_formats_contract import files, make_source

from edgecompress.errors import GoalMissedError, UsageError
from edgecompress.exporters.formats import export
from edgecompress.exporters.interface import Interface, on_pixel_grid
from edgecompress.exporters.memory import measured_memory, planned_activation_bytes
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.graph import Graph, Node

COLOURS, NOISE = (np.random.default_rng(seed).integers(0, 128, (24, 3, size, size)) for seed, size in ((4, 1), (5, 16)))
PIXELS = (2 * COLOURS * NOISE / 128).astype(np.uint8)


@pytest.fixture(scope="module")
def source():
    made = make_source("residual")
    labels = np.arange(len(made.images)) % 4
    return replace(made, labels=labels)


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).astype(np.float32)


@pytest.fixture(scope="module")
def scores(source, tmp_path_factory):
    """Of every format, for the pixels above."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for name in ("onnx", "onnxruntime", "tensorrt"):
        runner = OnnxRuntimeRunner(folder / export(source, name, folder).path, optimise=False)
        found[name] = np.concatenate([runner.run(normalised(image[None])) for image in PIXELS])
    return found


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "tensorrt"])
def test_pixels_in_class_out(name, source, scores, tmp_path):
    interface = Interface(input="uint8", layout="nhwc", head="argmax")
    artifact = export(replace(source, interface=interface), name, tmp_path)
    assert artifact.checks["interface_agreement"] >= 0.99
    assert [shape[1:] for shape in artifact.inputs.values()] == [[16, 16, 3]]
    assert [len(shape) for shape in artifact.outputs.values()] == [1]
    runner = OnnxRuntimeRunner(tmp_path / artifact.path, optimise=False)
    assert runner.dtype == np.uint8 and runner.shape == (16, 16, 3)
    classes = run_all(runner, np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1)))
    assert classes.tolist() == scores[name].argmax(1).tolist()
    assert len(set(scores[name].argmax(1).tolist())) > 1


def test_softmax_and_folded_normalisation_on_float_pixels(source, scores, tmp_path):
    interface = Interface(pixels=True, head="softmax", batch=0)
    runner = OnnxRuntimeRunner(tmp_path / export(replace(source, interface=interface), "onnx", tmp_path).path)
    found = runner.run(PIXELS.astype(np.float32))
    exact = np.exp(scores["onnx"] - scores["onnx"].max(1, keepdims=True))
    np.testing.assert_allclose(found, exact / exact.sum(1, keepdims=True), atol=1e-4)


def test_integers_stay_integers_behind_pixels(source, tmp_path):
    interface = Interface(input="uint8", layout="nhwc")
    path = tmp_path / export(replace(source, interface=interface), "onnxruntime", tmp_path).path
    OnnxRuntimeRunner(path, optimised_path=tmp_path / "optimised.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("QLinearConv") == 6 and "Conv" not in operators


def test_bare_file_is_smaller_and_answers_the_same(source, scores, tmp_path):
    for name in ("onnx", "onnxruntime", "tensorrt"):
        usual = export(source, name, tmp_path / "usual")
        bare = export(replace(source, interface=Interface(bare=True)), name, tmp_path / "bare")
        model = onnx.load(tmp_path / "bare" / bare.path)
        assert bare.size_bytes < usual.size_bytes and not model.metadata_props
        assert max(len(found.name) for found in model.graph.initializer) <= 2
        runner = OnnxRuntimeRunner(tmp_path / "bare" / bare.path, optimise=False)
        np.testing.assert_allclose(run_all(runner, normalised(PIXELS)), scores[name], atol=1e-5)


def test_batch_opset_and_facts_are_recorded(source, tmp_path):
    artifact = export(replace(source, interface=Interface(batch=4, max_opset=17)), "onnxruntime", tmp_path)
    assert artifact.inputs["input"][0] == 4 and artifact.opset == 17
    assert artifact.oldest_runtime == "ONNX Runtime 1.16"
    assert artifact.facts["target"] == "jetson-orin-nano" and json.loads(artifact.facts["labels"]) == list("abcd")
    assert artifact.checks["scored_images"] == len(source.images)
    free = export(replace(source, interface=Interface(batch=0)), "tensorrt", tmp_path)
    assert free.inputs["input"][0] == "N"


def test_two_bits_fall_back_to_four_below_opset_25(tmp_path):
    from edgecompress.exporters.onnx_writing import oldest_onnxruntime

    quantized = integer_case("mobile").quantized(2, 8)
    new, old, plain = (integer_model(quantized, max_opset=opset) for opset in (25, 24, 17))
    kinds = [
        {t.data_type for t in m.graph.initializer} & {onnx.TensorProto.INT4, onnx.TensorProto.INT2}
        for m in (new, old, plain)
    ]
    assert kinds[1] <= {onnx.TensorProto.INT4} and not kinds[2]
    assert [oldest_onnxruntime(m) for m in (old, plain)] == ["1.23" if kinds[1] else "1.18", "1.16"]
    assert len(new.SerializeToString()) <= len(old.SerializeToString()) < len(plain.SerializeToString())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_opset": 9}, "Opset 9 cannot be written; choose 15 to 25"),
        ({"max_opset": 26}, "Opset 26"),
        ({"head": "sigmoid"}, "Unknown head 'sigmoid'; choose scores or softmax or argmax"),
        ({"input": "int8"}, "Unknown input 'int8'"),
        ({"batch": -1}, "batch of -1"),
    ],
)
def test_impossible_interface_is_one_sentence(options, words):
    with pytest.raises(UsageError, match=words):
        Interface(**options)


def test_place_that_cannot_be_written_is_refused_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UsageError, match=r"model\.onnx: it is a folder"):
        export(source, "onnx", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is no folder that you may write to"):
        export(source, "onnx", tmp_path / "file")
    assert files(tmp_path) == ["file"]


def test_planned_peak_is_the_widest_moment():
    shapes = {"x": (4,), "a": (8,), "b": (8,), "y": (2,)}
    nodes = (
        Node("1", "Relu", ("x",), ("a",), {}),
        Node("2", "Relu", ("a",), ("b",), {}),
        Node("3", "Add", ("b", "x"), ("y",), {}),
    )
    graph = Graph(("x",), ("y",), nodes, {}, shapes)
    assert planned_activation_bytes(graph) == 4 * (4 + 8 + 8)
    assert planned_activation_bytes(graph, {"a"}) == 4 * 4 + 8 + 4 * 8
    assert planned_activation_bytes(graph, batch=3) == 3 * 4 * (4 + 8 + 8)


def test_plan_over_the_targets_memory_is_a_missed_goal(source, tmp_path, monkeypatch):
    monkeypatch.setattr("edgecompress.exporters.formats.planned_activation_bytes", lambda *values, **more: 9 << 30)
    with pytest.raises(GoalMissedError, match=r"planned to take 9216 MiB, the target has 8192") as caught:
        export(source, "onnxruntime", tmp_path)
    assert caught.value.exit_code == 3 and files(tmp_path) == []
    host = source.target.model_copy(update={"memory_mb": 0})
    assert export(replace(source, target=host), "onnxruntime", tmp_path).checks["activation_peak_bytes"] == 9 << 30


def test_memory_is_measured_in_a_fresh_process(source, tmp_path):
    path = tmp_path / export(source, "onnxruntime", tmp_path).path
    found = measured_memory(path, batch=8)
    assert found["runtime_bytes"] > 2**20 and found["run_peak_bytes"] >= found["load_peak_bytes"] >= 0


def test_size_audit_adds_up(source, tmp_path):
    checks = export(source, "onnxruntime", tmp_path).checks
    weights = sum(weight.values.size * weight.bits / 8 for weight in source.quantized.weights.values())
    assert checks["weight_bytes_exact"] == round(weights)
    assert weights <= checks["weight_bytes"] < 1.5 * weights
    channels = {name: len(weight.scale) for name, weight in source.quantized.weights.items()}
    assert checks["channel_bytes"] == 12 * sum(channels.values()) + 5 * channels["fc"]
    assert 0 < checks["other_bytes_per_node"] < 100


def test_pixel_grid_is_where_pixels_are(source):
    on_grid = on_pixel_grid(normalised(PIXELS) + 1e-4, source.preprocessing)
    np.testing.assert_array_equal(on_grid, normalised(PIXELS))
