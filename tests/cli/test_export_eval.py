"""`edgecompress export` and `eval` with what a deployer asks for."""

from __future__ import annotations

import csv
import io
import json

import pytest
from command_line import Called, call
from onnx import TensorProto, helper

pytestmark = pytest.mark.usefixtures("quick")


def refused(called: Called, words: str) -> None:
    assert called.code == 2 and words in called.err and "Traceback" not in called.err, called.err


def test_export_as_a_deployer_wants_it_and_eval_of_that_file(tiny_run, tmp_path):
    options = ("--input", "uint8", "--layout", "nhwc", "--head", "argmax", "--batch", "2", "--max-opset", "21")
    called = call("export", tiny_run, *options, "--out", tmp_path, "--json")
    assert called.code == 0, called.err
    record = json.loads(called.out)
    assert record["inputs"]["input"] == [2, 32, 32, 3] and record["opset"] <= 21
    assert record["facts"]["input"] == "uint8" and record["oldest_runtime"].startswith("ONNX Runtime 1.")
    file = tmp_path / record["path"]
    called = call("eval", file, "--against", tiny_run, "--csv")
    assert called.code == 0, called.err
    mine, other = csv.DictReader(io.StringIO(called.out))
    assert mine["file"] == str(file) and mine["batch"] == "2" and other["batch"] == "1"
    assert abs(float(mine["accuracy"]) - float(other["accuracy"])) < 0.01
    called = call("eval", file, "--against", tiny_run, "--json")
    assert json.loads(called.out)["comparison"]["agreement"] > 0.99
    assert "% of the answers are the same" in call("eval", file, "--against", tiny_run).out


def test_export_refuses_what_cannot_be(tiny_run, tmp_path):
    refused(call("export", tiny_run, "--max-opset", "9"), "Opset 9 cannot be written; choose 15 to 25")
    refused(call("export", tiny_run, "--batch", "many"), "--batch many is no batch size")
    (tmp_path / "a file").write_text("")
    refused(call("export", tiny_run, "--out", tmp_path / "a file"), "is no folder that you may write to")
    refused(call("export", tiny_run, "--out", tmp_path / "a file" / "deep"), "is no folder that you may write to")
    refused(call("export", tiny_run, "--format", "ncn"), "Did you mean 'ncnn'")
    (tmp_path / "model.int8.onnx").mkdir()
    refused(call("export", tiny_run, "--out", tmp_path), "it is a folder")
    refused(call("eval", tiny_run, "--csv", "--json"), "exclude each other")
    refused(call("eval", tiny_run, "--runtime", "onxruntime"), "Did you mean 'onnxruntime'")


def test_bare_file_that_takes_pixels_is_measured_as_the_plain_one(tiny_run, tmp_path):
    """Nothing in it says that it takes pixels; export.json beside it does."""
    options = ("--format", "onnx", "--json", "--out")
    assert call("export", tiny_run, *options, tmp_path / "plain").code == 0
    called = call("export", tiny_run, "--fold-normalisation", "--strip-metadata", *options, tmp_path / "bare")
    assert called.code == 0, called.err
    bare = tmp_path / "bare" / "model.onnx"
    called = call("eval", bare, "--against", tmp_path / "plain" / "model.onnx", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    assert found["comparison"]["agreement"] > 0.99 and abs(found["comparison"]["accuracy_points"]) < 1
    bare.with_name("export.json").write_text("[1, 2]")
    refused(call("eval", bare), "export.json is broken")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("ReduceMean", ["x"], {"keepdims": 0})], "outputs of shape [] for 64 images"),
        ([("Relu", ["x"], {})], "gives float32 (3, 32, 32) for one image"),
        ([("GlobalAveragePool", ["x"], {}), ("Flatten", [], {})], "gives float32 (3,) for one image"),
        ([("Add", ["x", "five"], {})], "cannot run"),
    ],
)
def test_eval_of_a_foreign_file_is_one_sentence(nodes, words, tmp_path):
    chain = [
        helper.make_node(op, inputs or [f"v{number}"], [f"v{number + 1}"], **attributes)
        for number, (op, inputs, attributes) in enumerate(nodes)
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 32, 32])
    output = helper.make_tensor_value_info(f"v{len(nodes)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(chain, "g", [image], [output], [helper.make_tensor("five", 1, [5, 1, 1, 1], [0.0] * 5)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    refused(call("eval", tmp_path / "x.onnx"), words)
