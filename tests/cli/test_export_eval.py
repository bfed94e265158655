"""`edgecompress export` and `eval` with what a deployer asks for."""

from __future__ import annotations

import csv
import io
import json

import pytest
from command_line import Called, call

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
