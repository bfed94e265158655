"""The device script on a fake TensorRT of every generation and a fake CUDA whose device memory is the host's."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeCudaLibrary, fake_engine, fake_tensorrt

from edgecompress.errors import BadFileError, GoalMissedError, MissingBackendError
from edgecompress.exporters import build_on_device
from edgecompress.exporters.build_on_device import Cuda, Problem, parse_arguments, version_of
from edgecompress.exporters.check_tensorrt import build_engine_here
from edgecompress.exporters.onnx_writing import metadata_of, say
from edgecompress.spec import Preprocessing


def test_script_is_old_python_and_helps_without_tensorrt(tmp_path: Path) -> None:
    source = Path(build_on_device.__file__).read_text()
    ast.parse(source, feature_version=(3, 7))
    copy = tmp_path / "build_on_device.py"  # alone in a folder, as on the device: it must not import edgecompress
    copy.write_text(source)
    blocked = "import sys; sys.modules['tensorrt'] = sys.modules['edgecompress'] = None; import runpy; "
    run = f"sys.argv = ['x', '--help']; runpy.run_path({str(copy)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked + run], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--fp16" in done.stdout and "reference.npz" in done.stdout


@pytest.mark.parametrize(
    ("version", "capability", "quantized", "options", "expected"),
    [
        ("8.2.1.8", (5, 3), False, ["--fp16"], (False, ["FP16"])),
        ("8.5.2", (7, 2), True, [], (False, ["INT8"])),
        ("10.3.0", (8, 7), True, ["--fp16"], (False, ["INT8", "FP16"])),
        ("10.3.0", (8, 7), True, ["--strongly-typed"], (True, [])),
        ("11.4.1", (8, 7), True, [], (True, [])),
        ("8.2.1.8", (5, 3), True, [], "no INT8 kernels.*Jetson Nano.*--fp16.*ONNX Runtime"),
        ("8.2.1.8", (6, 2), True, [], "no INT8 kernels"),
        ("8.0.1", (7, 2), True, [], "too old"),
        ("11.4.1", (8, 7), True, ["--fp16"], "no FP16 flag any more"),
        ("10.3.0", (8, 7), True, ["--fp16", "--strongly-typed"], "Leave --fp16 out"),
        ("8.6.2", (8, 7), True, ["--strongly-typed"], "no strongly typed"),
        ("10.3.0", (8, 7), True, ["--sparse"], (False, ["INT8", "SPARSE_WEIGHTS"])),
        ("11.4.1", (8, 7), True, ["--sparse"], (True, ["SPARSE_WEIGHTS"])),
        ("8.5.2", (7, 2), True, ["--sparse"], "no sparse kernels"),
        ("8.5.2", (7, 2), False, ["--fp16", "--dla-core", "0"], (False, ["FP16", "GPU_FALLBACK"])),
        ("11.4.1", (8, 7), True, ["--dla-core", "1"], (True, ["GPU_FALLBACK"])),
        ("10.3.0", (8, 7), True, ["--fp16", "--dla-core", "0"], "takes no model with QuantizeLinear.*--format onnx"),
        ("10.3.0", (8, 7), False, ["--dla-core", "0"], "Add --fp16"),
        ("10.13.3", (8, 7), False, ["--fp16", "--dla-core", "0"], "10.13 has no DLA"),
        ("10.3.0", (8, 6), False, ["--fp16", "--dla-core", "0"], "no DLA beside it"),
    ],
)
def test_version_gates(
    version: str, capability: tuple[int, int], quantized: bool, options: list[str], expected: object
) -> None:
    args = parse_arguments(options)
    if isinstance(expected, str):
        with pytest.raises(Problem, match=expected):
            build_on_device.choose_flags(version_of(version), capability, quantized, args)
    else:
        assert build_on_device.choose_flags(version_of(version), capability, quantized, args) == expected


def test_statistics_and_comparison() -> None:
    times = build_on_device.summary(range(1, 102))
    assert times == {"median_us": 51.0, "p90_us": 91.0, "p99_us": 100.0, "runs": 101}
    expected = np.float32([[0, 4], [3, 0]])
    result = build_on_device.compare(np.float32([[0, 4], [0, 3]]), expected)
    assert result["top1_agreement"] == 0.5
    assert result["relative_error"] == pytest.approx(18**0.5 / 5)


def test_layer_precisions_of_old_and_new_inspectors() -> None:
    int8, fp16 = (
        {"Format/Datatype": "Thirty-two wide channel Int8"},
        {"Format/Datatype": "Row major linear FP16 format"},
    )
    new = {"Format": "Row major", "Datatype": "Float"}
    layers = [
        {"Name": "conv1", "LayerType": "CaskConvolution", "Inputs": [int8], "Outputs": [fp16]},
        {"Name": "fc", "LayerType": "gemm", "Inputs": [new], "Outputs": [new]},
        "only a name",
    ]
    table = build_on_device.layer_precisions(json.dumps({"Layers": layers}))
    assert [row["precision"] for row in table] == ["INT8 -> FP16", "FP32", "unknown"]
    assert table[2]["name"] == "only a name"
    assert build_on_device.layer_precisions("not json") == []


def test_clock_state(tmp_path: Path) -> None:
    for number, low in (("17000000.ga10b", "306000000"), ("15340000.vic", "1")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "min_freq").write_text(low + "\n")
        (tmp_path / number / "max_freq").write_text("1300500000\n")
    assert build_on_device.power_state(str(tmp_path))["gpu_clock_locked"] is False
    (tmp_path / "17000000.ga10b" / "min_freq").write_text("1300500000\n")
    assert build_on_device.power_state(str(tmp_path))["gpu_clock_locked"] is True
    assert build_on_device.power_state(str(tmp_path / "none"))["gpu_clock_locked"] is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An export folder with three images for an engine of batch 2, and a GPU."""
    (tmp_path / "net.onnx").write_bytes(b"...DequantizeLinear...")
    images = np.ones((3, 1, 2, 2), np.float32) * np.float32([0, 1, 3]).reshape(3, 1, 1, 1)
    np.savez(tmp_path / "reference.npz", inputs=images, outputs=np.eye(4, dtype=np.float32)[[0, 1, 3]])
    monkeypatch.setattr(build_on_device, "_load_cuda", FakeCudaLibrary)
    monkeypatch.setattr(build_on_device, "WARMUP_S", 0.0)
    return tmp_path


def run_main(folder: Path, *options: str) -> int:
    return build_on_device.main(["--onnx", str(folder / "net.onnx"), "--seconds", "0.01", *options])


@pytest.mark.parametrize(
    ("version", "options", "network", "flags"),
    [
        ("8.2.1.8", ["--fp16"], 1, ["int8", "fp16"]),
        ("8.6.2", [], 1, ["int8"]),
        ("10.3.0", ["--fp16"], 1, ["int8", "fp16"]),
        ("10.3.0", ["--strongly-typed"], 2, []),
        ("11.4.1", [], 2, []),
    ],
)
def test_main_on_every_generation(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    options: list[str],
    network: int,
    flags: list[str],
) -> None:
    trt = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert run_main(folder, *options) == 0
    assert (trt.made.network, trt.made.flags) == (network, flags)
    config = trt.made.config
    assert config.max_workspace_size == 512 << 20 if version == "8.2.1.8" else config.made == {"workspace": 512 << 20}
    record = json.loads((folder / "engine.json").read_text())
    assert (folder / "model.engine").read_bytes() == b"engine"
    assert record["check"] == {"relative_error": 0.0, "top1_agreement": 1.0, "images": 3}
    assert record["latency"]["gpu"]["median_us"] == 250.0 and record["latency"]["batch"] == 2
    assert (record["gpu"], record["compute_capability"], record["tensorrt"]) == ("Fake Orin", "8.7", version)
    assert record["onnx_sha256"] == hashlib.sha256((folder / "net.onnx").read_bytes()).hexdigest()
    assert [layer["precision"] for layer in record["layers"]] == ["INT8 -> FP16"]
    assert "INT8 -> FP16" in capsys.readouterr().out
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("version", ["8.2.1.8", "8.6.2", "10.3.0", "11.4.1"])
def test_open_batch_gets_a_profile(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    trt = fake_tensorrt(version, batch=-1)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert run_main(folder, "--batch", "4", "--max-batch", "8") == 0
    assert trt.made.shapes == {"input": ((1, 1, 2, 2), (4, 1, 2, 2), (8, 1, 2, 2))}
    record = json.loads((folder / "engine.json").read_text())
    assert record["batch"] == record["latency"]["batch"] == 4
    assert record["check"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("options", [["--batch", "0"], ["--batch", "4", "--max-batch", "2"]])
def test_batches_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(options)
    assert "--max-batch" in capsys.readouterr().err


def test_timing_cache_is_kept_and_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = folder / "timing.cache"
    for version, content in (("10.3.0", b"(10, 3)+"), ("10.3.0", b"(10, 3)++"), ("10.7.0", b"(10, 7)+")):
        monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
        assert run_main(folder) == 0
        assert kept.read_bytes() == b"cache of " + content  # one of another version is begun anew
    kept.unlink()
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
    assert run_main(folder, "--no-timing-cache") == 0
    assert not kept.exists()


def test_settings_reach_the_builder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.onnx").write_bytes(b"float")
    trt = fake_tensorrt("8.6.2")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert run_main(folder, "--fp16", "--sparse", "--dla-core", "1", "--optimization-level", "5") == 0
    config = trt.made.config
    assert config.flags == ["fp16", "sparse", "fallback"]
    assert (config.default_device_type, config.DLA_core, config.builder_optimization_level) == ("dla", 1, 5)
    assert trt.made.runtime.DLA_core == 1
    assert json.loads((folder / "engine.json").read_text())["dla_core"] == 1
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("8.6.2", dla_cores=0))  # an Orin Nano
    assert run_main(folder, "--fp16", "--dla-core", "0") == 2
    assert "no DLA core 0 here: this device has 0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("8.5.2"))
    assert run_main(folder, "--optimization-level", "5") == 2
    assert "8.6 or later" in capsys.readouterr().err


def test_tensorrt_rtx_checks_and_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt("1.7.1", rtx=True))
    assert run_main(folder) == 0
    assert "thrown away" in capsys.readouterr().out
    assert json.loads((folder / "check.json").read_text())["product"] == "TensorRT-RTX"
    assert {path.name for path in folder.iterdir()} == {"net.onnx", "reference.npz", "check.json"}


def test_engine_json_keeps_what_the_engine_loses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("11.4.1"))
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="x" * 300)
    how, classes = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.25,) * 3), ["käse, alt", 'a "b"', *"cdef" * 50]
    say(model, metadata_of(how, classes))  # as every exported file has it
    model.metadata_props.append(onnx.StringStringEntryProto(key="empty", value=""))
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    assert run_main(folder) == 0
    record = json.loads((folder / "engine.json").read_text())
    assert json.loads(record["metadata"].pop("edgecompress.labels")) == classes
    assert Preprocessing.model_validate_json(record["metadata"].pop("edgecompress.preprocess")) == how
    assert record["metadata"] == {"empty": ""}
    assert record["precisions"] == {"INT8 -> FP16": 1}
    assert json.loads((folder / "layers.json").read_text())["Layers"][0]["Inputs"][0]["DataType"] == "Int8"
    assert record["engine_sha256"] == hashlib.sha256((folder / "model.engine").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("version", "to", "flags"),
    [
        ("10.3.0", "FLOAT16", ["fp16"]),
        ("8.6.2", "FLOAT16", ["fp16"]),
        ("10.3.0", "FLOAT", []),
        ("11.4.1", "FLOAT16", []),
    ],
)
def test_files_with_fp16_layers_switch_the_flag_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, to: str, flags: list[str]
) -> None:
    relu, cast = (
        onnx.helper.make_node("Relu", ["x"], ["y"]),
        onnx.helper.make_node("Cast", ["y"], ["z"], to=getattr(onnx.TensorProto, to)),
    )
    graph = onnx.helper.make_graph([relu, cast], "g", [], [])
    (folder / "net.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    trt = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert run_main(folder) == 0
    assert trt.made.flags == flags


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\x72\xff\xff", b"....", b"\x72\x02\x0a\x7f", b"\x72\x03\x08\xff\x7f", b"8\x7f"]
)
def test_properties_of_what_is_no_onnx(data: bytes) -> None:
    assert not build_on_device.casts_to_half(data)
    assert set(build_on_device.properties(data)) <= {"", "\x7f"}


def test_class_numbers_are_compared_as_such() -> None:
    result = build_on_device.compare(np.int64([1, 2, 3, 4]), np.int64([1, 2, 3, 0]))
    assert result == {"relative_error": None, "top1_agreement": 0.75, "images": 4}


def test_the_fake_has_what_each_version_has() -> None:
    old, ten, eleven = (fake_tensorrt(version) for version in ("8.2.1", "10.3.0", "11.4.1"))
    assert not hasattr(old.made.config, "set_memory_pool_limit") and not hasattr(old, "TensorIOMode")
    for trt in (ten, eleven):
        with pytest.raises(AttributeError, match="max_workspace_size"):
            trt.made.config.max_workspace_size = 1
        assert not hasattr(fake_engine(version_of(trt.__version__), 0.0), "num_bindings")
    assert hasattr(ten.BuilderFlag, "FP16") and not hasattr(eleven.BuilderFlag, "FP16")
    assert not hasattr(fake_engine((11, 4), 0.0), "device_memory_size")


def test_wrong_outputs_write_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", error=0.2))
    assert run_main(folder) == 3
    assert "differ from reference.npz" in capsys.readouterr().err
    assert not (folder / "model.engine").exists() and not (folder / "engine.json").exists()
    assert run_main(folder, "--max-error", "0.25") == 0
    with np.load(folder / "reference.npz") as data:
        known = dict(data)
    np.savez(folder / "reference.npz", **known, max_error=np.float64(0.3), min_agreement=np.float64(0.9))
    assert run_main(folder) == 0
    assert run_main(folder, "--max-error", "0.15") == 3
    assert "--max-error 0.15 or agree on less than --min-agreement 0.9" in capsys.readouterr().err


def test_clear_errors(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(expected: int, *options: str) -> str:
        assert run_main(folder, *options) == expected
        return capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "python3-libnvinfer" in error_of(4)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", plan=None))
    assert "no INT8 kernel for X" in error_of(1)
    monkeypatch.setattr(build_on_device, "_load_cuda", lambda: FakeCudaLibrary((5, 3)))
    assert "Jetson Nano" in error_of(1)
    monkeypatch.setattr(build_on_device, "_load_cuda", lambda: FakeCudaLibrary(gpus=0))
    assert "no GPU" in error_of(4)
    monkeypatch.setattr(build_on_device, "_load_cuda", FakeCudaLibrary)
    (folder / "net.onnx").write_bytes(b"broken")
    assert "node X is wrong" in error_of(1)
    (folder / "reference.npz").unlink()
    assert "--no-check" in error_of(2)
    (folder / "net.onnx").unlink()
    assert "There is no file" in error_of(2)


def test_the_only_onnx_is_found(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="found none"):
        build_on_device.find_onnx(None, str(tmp_path))
    (tmp_path / "a.onnx").touch()
    assert build_on_device.find_onnx(None, str(tmp_path)).endswith("a.onnx")
    (tmp_path / "b.onnx").touch()
    with pytest.raises(Problem, match=r"a\.onnx, b\.onnx"):
        build_on_device.find_onnx(None, str(tmp_path))


def test_cuda_errors_are_named() -> None:
    library: Any = FakeCudaLibrary()
    library.cudaStreamSynchronize = lambda stream: 700
    with pytest.raises(Problem, match="cudaStreamSynchronize failed with CUDA error 700"):
        Cuda(library).call("cudaStreamSynchronize", None)


def test_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(np.arange(0, 1000, 0.01))
    monkeypatch.setattr(build_on_device, "WARMUP_S", 10.0)
    session: Any = types.SimpleNamespace(cuda=Cuda(FakeCudaLibrary()), stream=None, shape=(1,), enqueue=lambda: None)
    result = build_on_device.measure(session, 3.0, clock=lambda: float(next(ticks)))
    assert result["host"]["median_us"] == pytest.approx(10_000)
    assert 95 <= result["host"]["runs"] <= 110  # 3 s of iterations that read a 10 ms clock three times


def test_build_engine_here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "net.onnx"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for rtx in (None, fake_tensorrt("1.7.1", rtx=True)):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
        with pytest.raises(MissingBackendError, match=r"run build_on_device\.py there"):
            build_engine_here(model, folder / "out")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", plan=None))
    with pytest.raises(BadFileError, match="could not build"):
        build_engine_here(model, folder / "out")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", error=0.5))
    with pytest.raises(GoalMissedError):
        build_engine_here(model, folder / "out")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
    record = build_engine_here(model, folder / "out", seconds=0.01)
    assert (folder / "out" / "model.engine").exists() and record["check"]["top1_agreement"] == 1.0
    assert capsys.readouterr() == ("", "")
