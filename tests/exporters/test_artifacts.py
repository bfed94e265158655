"""Every artifact is measured by the runtime that reads it; files that are damaged, foreign or reach out are refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from sample_networks import integer_case, patterns

from edgecompress.errors import BadDataError, BadFileError, MissingBackendError, UnknownNameError
from edgecompress.evaluation import artifact_at, compared, evaluate_artifact
from edgecompress.exporters import runners
from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.interface import Interface, adapt
from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us, run_all
from edgecompress.exporters.to_onnx import float_model
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.exporters.to_tensorrt import integer_model as trt_model

DATA = patterns()


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure_latency_us.__kwdefaults__, "seconds", 0.02)
        patch.setitem(measure_latency_us.__kwdefaults__, "warmup_s", 0.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same network in several files."""
    path, case = tmp_path_factory.mktemp("artifacts"), integer_case("gated")
    quantized = case.quantized(8, 8)
    how = DATA.preprocessing
    models = {
        "float": float_model(case.graph),
        "int8": integer_model(quantized),
        "fixed": integer_model(quantized, batch=4),
        "trt": trt_model(quantized),
        "pixels": adapt(integer_model(quantized), Interface(input="uint8", layout="nhwc", head="argmax"), how),
        "float pixels": adapt(float_model(case.graph), Interface(pixels=True, head="softmax"), how),
    }
    for name, model in models.items():
        (path / f"{name}.onnx").write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def answers(folder):
    images = DATA.normalise(DATA.test.images)
    with torch.no_grad():
        return integer_case("gated").model(images).numpy().argmax(1)


def test_every_file_answers_as_the_network(folder, answers):
    for name in ("float", "float pixels"):
        assert evaluate_artifact(folder / f"{name}.onnx", DATA)[1].tolist() == answers.tolist(), name
    plain = evaluate_artifact(folder / "int8.onnx", DATA)[1]
    for name in ("pixels", "fixed"):
        found, classes = evaluate_artifact(folder / f"{name}.onnx", DATA)
        assert (classes == plain).mean() > 0.98, name
        assert found.accuracy == (classes == DATA.test.labels.numpy()).mean() and found.images == len(DATA.test)


def test_times_and_memory_are_of_the_batch(folder):
    found, _ = evaluate_artifact(folder / "int8.onnx", DATA, batch=3, threads=2)
    assert (found.batch, found.threads) == (3, 2) and found.runtime.startswith("ONNX Runtime")
    assert found.p10_us <= found.median_us <= found.p90_us <= found.p99_us
    assert found.images_per_second == pytest.approx(3e6 / found.median_us)
    assert found.run_peak_bytes >= found.load_peak_bytes >= 0
    assert evaluate_artifact(folder / "fixed.onnx", DATA, batch=3)[0].batch == 4


def test_trt_dialect_is_run_as_written_and_not_timed(folder, answers):
    found, classes = evaluate_artifact(folder / "trt.onnx", DATA)
    assert found.median_us is None and found.images_per_second is None
    assert (classes == answers).mean() > 0.9


def test_comparison_of_two_files(folder):
    first, second = (evaluate_artifact(folder / f"{name}.onnx", DATA) for name in ("int8", "float"))
    found = compared(first, second)
    assert found["speed"] == second[0].median_us / first[0].median_us
    assert found["size"] == first[0].size_bytes / second[0].size_bytes < 1
    assert found["agreement"] == (first[1] == second[1]).mean()
    assert compared(first, evaluate_artifact(folder / "trt.onnx", DATA))["speed"] is None


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_reads_the_integer_file(folder):
    found, classes = evaluate_artifact(folder / "int8.onnx", DATA, runtime="openvino")
    assert found.runtime.startswith("OpenVINO") and found.median_us > 0 and found.run_peak_bytes is None
    assert (classes == evaluate_artifact(folder / "int8.onnx", DATA)[1]).mean() > 0.98
    runner = runners.OpenVinoRunner(folder / "int8.onnx")
    assert runner.integer_layers() == len(integer_case("gated").graph.layers)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_refuses_in_one_sentence(tmp_path):
    (tmp_path / "x.xml").write_text("<net>")
    with pytest.raises(BadFileError, match=r"OpenVINO \S+ refuses .*x\.xml"):
        open_artifact(tmp_path / "x.xml")


def test_openvino_is_not_given_weights_that_it_unpacks_wrongly(folder, tmp_path):
    (tmp_path / "x.onnx").write_bytes(integer_model(integer_case("resnet8").quantized(6, 8)).SerializeToString())
    with pytest.raises(BadFileError, match="Export --format openvino"):
        open_artifact(tmp_path / "x.onnx", runtime="openvino")
    assert open_artifact(tmp_path / "x.onnx").runner.shape == (3, 32, 32)


def test_missing_runtime_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingBackendError, match=r"edgecompress\[openvino\]") as caught:
        open_artifact(folder / "int8.onnx", runtime="openvino")
    assert caught.value.exit_code == 4


def test_ort_format_is_read(folder, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "x.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(folder / "float.onnx"), options, providers=["CPUExecutionProvider"])
    classes = evaluate_artifact(tmp_path / "x.ort", DATA)[1]
    assert classes.tolist() == evaluate_artifact(folder / "float.onnx", DATA)[1].tolist()


def outside(tmp_path, location: str) -> onnx.ModelProto:
    model = float_model(integer_case("flat").graph)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    return model


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin"])
def test_paths_that_lead_out_of_the_folder_are_not_followed(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(b"0" * 4096)
    path = tmp_path / "in" / "x.onnx"
    path.parent.mkdir()
    path.write_bytes(outside(tmp_path, location).SerializeToString())
    with pytest.raises(BadFileError, match="lies outside its folder"):
        open_artifact(path)


def test_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"0" * 4096)
    path = tmp_path / "in" / "x.onnx"
    path.parent.mkdir()
    (path.parent / "weights.bin").symlink_to(tmp_path / "secret.bin")
    path.write_bytes(outside(tmp_path, "weights.bin").SerializeToString())
    with pytest.raises(BadFileError, match="lies outside its folder"):
        open_artifact(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.onnx", b"no onnx", "is no ONNX file"),
        ("x.onnx", b"", "refuses"),
        ("x.ort", b"ORTM" + b"0" * 60, "refuses"),
        ("x.pth", b"\x80\x02", "none of the files that can be measured here"),
        ("x.engine", b"ptrt", r"no engine\.json beside it"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFileError, match=words):
        open_artifact(tmp_path / name)


def test_missing_file_unknown_runtime_and_wrong_pair_are_refused(tmp_path, folder):
    with pytest.raises(BadFileError, match="There is no artifact"):
        open_artifact(artifact_at(tmp_path))
    with pytest.raises(UnknownNameError, match="Did you mean 'openvino'"):
        open_artifact(folder / "int8.onnx", runtime="opnvino")
    (tmp_path / "x.ort").write_bytes(b"")
    with pytest.raises(BadFileError, match=r"does not read \.ort files"):
        open_artifact(tmp_path / "x.ort", runtime="openvino")


def test_file_of_another_image_size_is_refused(folder):
    other = replace(DATA, test=replace(DATA.test, images=DATA.test.images[:, :, :8, :8]))
    with pytest.raises(BadDataError, match=r"takes images of shape \[3, 16, 16\].*--image-size 16"):
        evaluate_artifact(folder / "int8.onnx", other)
    with pytest.raises(BadDataError, match=r"takes images of shape \[16, 16, 3\].*--image-size 16"):
        evaluate_artifact(folder / "pixels.onnx", other)


def test_last_batch_of_a_fixed_file_is_filled_up(folder):
    images = DATA.normalise(DATA.test.images[:7]).numpy()
    found = run_all(OnnxRuntimeRunner(folder / "fixed.onnx"), images)
    np.testing.assert_array_equal(found, OnnxRuntimeRunner(folder / "int8.onnx").run(images))
