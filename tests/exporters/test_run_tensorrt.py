"""An engine is run only where it was built; everything else is refused before it is deserialised. On a fake TensorRT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeCudaLibrary, fake_tensorrt

from edgecompress.errors import BadFileError, MissingBackendError
from edgecompress.exporters import build_on_device
from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.check_tensorrt import build_engine_here
from edgecompress.exporters.record import record_engine
from edgecompress.exporters.runners import measure_latency_us, run_all
from edgecompress.spec import Artifact, Preprocessing

HOW = Preprocessing(size=(2, 2), mean=(0.5,), std=(0.25,))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine of batch 2 as the script leaves it."""
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    model.metadata_props.append(onnx.StringStringEntryProto(key="edgecompress.preprocess", value=HOW.model_dump_json()))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(build_on_device, "_load_cuda", FakeCudaLibrary)
    monkeypatch.setattr(build_on_device, "WARMUP_S", 0.0)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
    assert build_on_device.main(["--onnx", str(tmp_path / "model.onnx"), "--no-check", "--seconds", "0"]) == 0
    return tmp_path / "model.engine"


@pytest.mark.parametrize("version", ["8.2.1.8", "8.6.2", "10.3.0", "11.4.1"])
def test_engine_runs_where_it_was_built(engine: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
    build_on_device.main(["--onnx", str(engine.with_name("model.onnx")), "--no-check", "--seconds", "0"])
    opened = open_artifact(engine)
    assert opened.preprocessing == HOW and not opened.as_written
    runner = opened.runner
    assert (runner.shape, runner.batch, runner.dtype, runner.runtime) == (
        (1, 2, 2),
        2,
        np.float32,
        f"TensorRT {version}",
    )
    images = np.ones((3, 1, 2, 2), np.float32) * np.float32([0, 1, 3]).reshape(3, 1, 1, 1)
    assert run_all(runner, images).argmax(1).tolist() == [0, 1, 3]
    assert measure_latency_us(runner, images[:2], seconds=0.0, warmup_s=0.0)["runs"] == 10


def change(engine: Path, **changes: Any) -> None:
    sidecar = engine.with_name("engine.json")
    record = json.loads(sidecar.read_text()) | changes
    sidecar.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def test_another_gpu_or_version_is_refused_with_both(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bytes] = []
    trt: Any = fake_tensorrt("10.13.3")
    monkeypatch.setattr(trt, "Runtime", loaded.append)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    both = r"built by TensorRT 10\.3\.0 on Fake Orin \(compute capability 8\.7\); here is TensorRT 10\.13\.3 .*--onnx model\.onnx"
    with pytest.raises(BadFileError, match=both):
        open_artifact(engine)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
    monkeypatch.setattr(build_on_device, "_load_cuda", lambda: FakeCudaLibrary((8, 6), name=b"Fake 3090"))
    with pytest.raises(BadFileError, match=r"on Fake Orin .*8\.7\); here is .*Fake 3090 \(compute capability 8\.6\)"):
        open_artifact(engine)
    assert not loaded


def test_damaged_and_foreign_engines_are_refused(engine: Path) -> None:
    plan = engine.read_bytes()
    engine.write_bytes(plan[:-1] + b"?")
    with pytest.raises(BadFileError, match=r"damaged.*build_on_device\.py"):
        open_artifact(engine)
    engine.write_bytes(plan)
    for change_it in ({"batch": "2"}, {"schema_version": 9}, {"gpu": None}, {"metadata": 3}):
        text = engine.with_name("engine.json").read_text()
        change(engine, **change_it)
        with pytest.raises(BadFileError, match="damaged"):
            open_artifact(engine)
        engine.with_name("engine.json").write_text(text)
    for broken in ("[]", "{", ""):
        engine.with_name("engine.json").write_text(broken)
        with pytest.raises(BadFileError, match="damaged"):
            open_artifact(engine)
    engine.with_name("engine.json").unlink()
    with pytest.raises(BadFileError, match=r"no engine\.json beside it"):
        open_artifact(engine)


def test_engine_that_tensorrt_refuses_all_the_same(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", plan=b"other"))
    with pytest.raises(BadFileError, match=r"TensorRT 10\.3\.0 refuses"):
        open_artifact(engine)


def test_without_tensorrt_or_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_on_device, "_load_cuda", lambda: FakeCudaLibrary(gpus=0))
    with pytest.raises(MissingBackendError, match=r"Fake Orin.*no GPU"):
        open_artifact(engine)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for rtx, words in ((None, "no Python module 'tensorrt'"), (fake_tensorrt("1.7.1", rtx=True), "Only TensorRT-RTX")):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
        with pytest.raises(MissingBackendError, match=words):
            open_artifact(engine)


def test_tensorrt_runs_engines_only(engine: Path) -> None:
    with pytest.raises(BadFileError, match="TensorRT runs engines"):
        open_artifact(engine.with_name("model.onnx"), runtime="tensorrt")
    with pytest.raises(BadFileError, match="does not read"):
        open_artifact(engine, runtime="openvino")


def test_engine_built_here_is_an_artifact(engine: Path, tmp_path: Path) -> None:
    onnx_file = Artifact(
        path="tensorrt/model.onnx", format="tensorrt", dialect="trt", sha256="a", size_bytes=1, policy_sha256="b",
        inputs={"input": [2, 1, 2, 2]}, outputs={"output": [2, 4]}, opset=17, ir_version=8, preprocessing=HOW,
    )  # fmt: skip
    images = np.ones((2, 1, 2, 2), np.float32)
    np.savez(engine.with_name("reference.npz"), inputs=images, outputs=np.eye(4, dtype=np.float32)[[1, 1]])
    built = build_engine_here(engine.with_name("model.onnx"), engine.parent, seconds=0.0)
    record_engine(tmp_path, onnx_file, built)
    found = Artifact.model_validate(json.loads((tmp_path / "export.json").read_text())["engine"])
    assert (
        found.path == "tensorrt/model.engine" and found.sha256 == built["engine_sha256"] and found.preprocessing == HOW
    )
    assert found.oldest_runtime == "TensorRT 10.3.0 on Fake Orin, no other"
    assert found.checks == {
        "engine_relative_error": 0.0, "engine_top1_agreement": 1.0, "engine_images": 2,
        "engine_precisions": "1 INT8 -> FP16", "engine_median_us": 250.0,
    }  # fmt: skip
