"""The device script on a fake TensorRT of every generation and a fake CUDA whose device memory is the host's."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress.errors import BadFileError, GoalMissedError, MissingBackendError
from edgecompress.exporters import build_on_device
from edgecompress.exporters.build_on_device import Cuda, Problem, parse_arguments, version_of
from edgecompress.exporters.check_tensorrt import build_engine_here


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
        ("8.2.1.8", (5, 3), True, [], "no INT8 kernels.*Jetson Nano.*--fp16"),
        ("8.2.1.8", (6, 2), True, [], "no INT8 kernels"),
        ("8.0.1", (7, 2), True, [], "too old"),
        ("11.4.1", (8, 7), True, ["--fp16"], "no FP16 flag any more"),
        ("10.3.0", (8, 7), True, ["--fp16", "--strongly-typed"], "Leave --fp16 out"),
        ("8.6.2", (8, 7), True, ["--strongly-typed"], "no strongly typed"),
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


class FakeCudaLibrary:
    """libcudart with the host's memory: an address is a real one, an elapsed time is always 0.25 ms."""

    def __init__(self, capability: tuple[int, int] = (8, 7), gpus: int = 1) -> None:
        self.capability, self.gpus, self.buffers = capability, gpus, []

    def cudaGetDeviceCount(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def cudaGetDeviceProperties(self, buffer: Any, device: Any) -> int:
        buffer.value = b"Fake Orin"
        return 0

    def cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        value._obj.value = self.capability[attribute.value - 75]
        return 0

    def cudaMalloc(self, made: Any, size: Any) -> int:
        self.buffers.append(ctypes.create_string_buffer(size.value))
        made._obj.value = ctypes.addressof(self.buffers[-1])
        return 0

    def cudaMemcpy(self, to: Any, source: Any, size: Any, kind: Any) -> int:
        ctypes.memmove(to, source, size.value)
        return 0

    def cudaEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        milliseconds._obj.value = 0.25
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0


SHAPES = {"input": (2, 1, 2, 2), "output": (2, 4)}


class FakeContext:
    """Gives the class ``int(mean)`` of each image, times ``1 + error``."""

    def __init__(self, error: float) -> None:
        self.error, self.addresses = error, {}

    def set_input_shape(self, key: str, shape: tuple[int, ...]) -> bool:
        return shape == SHAPES[key]

    def get_tensor_shape(self, key: str) -> tuple[int, ...]:
        return SHAPES[key]

    def set_tensor_address(self, key: str, address: int) -> None:
        self.addresses[key] = address

    def execute_async_v3(self, stream: object) -> bool:
        source, target = self.addresses["input"], self.addresses["output"]
        images = np.frombuffer((ctypes.c_float * 8).from_address(source), np.float32).reshape(2, 4)
        result = np.frombuffer((ctypes.c_float * 8).from_address(target), np.float32).reshape(2, 4)
        result[:] = np.eye(4)[images.mean(1).astype(int)] * (1 + self.error)
        return True


class FakeOldContext:
    """Before TensorRT 8.5: bindings by number."""

    def __init__(self, error: float) -> None:
        self.new = FakeContext(error)

    def set_binding_shape(self, number: int, shape: tuple[int, ...]) -> bool:
        return shape == self.get_binding_shape(number)

    def get_binding_shape(self, number: int) -> tuple[int, ...]:
        return list(SHAPES.values())[number]

    def execute_async_v2(self, bindings: list[int], stream: object) -> bool:
        self.new.addresses = {"input": bindings[0], "output": bindings[1]}
        return self.new.execute_async_v3(stream)


def fake_engine(version: tuple[int, ...], error: float) -> types.SimpleNamespace:
    ends = {"Inputs": [{"Format/Datatype": "Int8"}], "Outputs": [{"Format/Datatype": "Half"}]}
    information = json.dumps({"Layers": [{"Name": "conv1", "LayerType": "conv", **ends}]})
    inspector = types.SimpleNamespace(get_engine_information=lambda kind: information)
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    if version >= (8, 5):
        engine.num_io_tensors, engine.get_tensor_name = 2, lambda number: list(SHAPES)[number]
        engine.get_tensor_mode = lambda key: key
        engine.create_execution_context = lambda: FakeContext(error)
    else:
        engine.num_bindings, engine.binding_is_input = 2, lambda number: number == 0
        engine.create_execution_context = lambda: FakeOldContext(error)
    return engine


def fake_tensorrt(text: str, *, error: float = 0.0, plan: bytes | None = b"engine") -> types.ModuleType:
    """A ``tensorrt`` with what version ``text`` has and no more. ``made`` records what it was asked."""
    trt: Any = types.ModuleType("tensorrt")
    version, new = version_of(text), types.SimpleNamespace
    made = trt.made = new(flags=[], network=None, config=new(set_flag=lambda flag: made.flags.append(flag)))
    if version >= (8, 4):
        made.config.set_memory_pool_limit = lambda pool, size: setattr(made.config, pool, size)
        trt.MemoryPoolType = new(WORKSPACE="workspace")
    if version >= (8, 5):
        trt.TensorIOMode = new(INPUT="input")
    trt.NetworkDefinitionCreationFlag = new()
    if version < (11,):
        trt.BuilderFlag = new(INT8="int8", FP16="fp16")
        trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH = 0
    if version >= (10,):
        trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1

    def create_network(flags: int) -> object:
        made.network = flags
        return new(get_input=lambda number: new(name="input", shape=SHAPES["input"]))

    trt.__version__ = text
    trt.Logger = lambda severity: None
    trt.Logger.WARNING = 1
    trt.Builder = lambda logger: new(
        create_network=create_network,
        create_builder_config=lambda: made.config,
        build_serialized_network=lambda network, config: plan,
    )
    trt.OnnxParser = lambda network, logger: new(
        parse=lambda data: b"broken" not in data, num_errors=1, get_error=lambda number: "node X is wrong"
    )
    trt.Runtime = lambda logger: new(deserialize_cuda_engine=lambda data: fake_engine(version, error))
    trt.ProfilingVerbosity = new(DETAILED="detailed")
    trt.LayerInformationFormat = new(JSON="json")
    return trt


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
    assert getattr(trt.made.config, "max_workspace_size" if version == "8.2.1.8" else "workspace") == 512 << 20
    record = json.loads((folder / "engine.json").read_text())
    assert (folder / "model.engine").read_bytes() == b"engine"
    assert record["check"] == {"relative_error": 0.0, "top1_agreement": 1.0, "images": 3}
    assert record["latency"]["gpu"]["median_us"] == 250.0 and record["latency"]["batch"] == 2
    assert (record["gpu"], record["compute_capability"], record["tensorrt"]) == ("Fake Orin", "8.7", version)
    assert record["onnx_sha256"] == hashlib.sha256((folder / "net.onnx").read_bytes()).hexdigest()
    assert [layer["precision"] for layer in record["layers"]] == ["INT8 -> FP16"]
    assert "INT8 -> FP16" in capsys.readouterr().out
    assert not list(folder.glob("*.part"))


def test_wrong_outputs_write_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0", error=0.2))
    assert run_main(folder) == 3
    assert "differ from reference.npz" in capsys.readouterr().err
    assert not (folder / "model.engine").exists() and not (folder / "engine.json").exists()
    assert run_main(folder, "--max-error", "0.25") == 0


def test_clear_errors(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(expected: int, *options: str) -> str:
        assert run_main(folder, *options) == expected
        return capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "tensorrt", None)
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
