"""The snippets of the deployment page: they compute what the exporter proved, and compile where their headers are."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeCudaLibrary, fake_tensorrt
from PIL import Image
from site_pages import DOCS

from edgecompress.data import Dataset
from edgecompress.exporters import build_on_device
from edgecompress.exporters.runners import OnnxRuntimeRunner

PAGE = "guides/deploy.md"
EXAMPLES = DOCS / "examples"
needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="LiteRT is not installed")
MODELS = ("model.int8.onnx", "model.onnx")


@pytest.fixture(scope="module")
def snippet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("classify_onnxruntime", EXAMPLES / "classify_onnxruntime.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(digits: Dataset, tmp_path: Path) -> list[Path]:
    """Test images as files without loss, already at the network's size."""
    paths = []
    for number, image in enumerate(digits.test.images[:12]):
        paths.append(tmp_path / f"{number:02}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


@pytest.mark.parametrize("name", MODELS)
def test_snippet_computes_what_the_run_computed(
    snippet: ModuleType, tiny_run: Path, digits: Dataset, photos: list[Path], name: str
) -> None:
    session, how, labels = snippet.load(str(tiny_run / "exports" / name))
    assert labels == list(digits.classes)
    inputs = np.concatenate([snippet.prepare(Image.open(path), how) for path in photos])
    wanted = digits.normalise(digits.test.images[: len(photos)]).numpy()
    assert np.abs(inputs - wanted).max() < 1e-5
    found = session.run(None, {session.get_inputs()[0].name: wanted})[0]
    assert np.array_equal(found, OnnxRuntimeRunner(tiny_run / "exports" / name).run(wanted))


def test_snippet_runs_as_a_program_without_our_code(tiny_run: Path, photos: list[Path], digits: Dataset) -> None:
    model = tiny_run / "exports" / "model.int8.onnx"
    runner = OnnxRuntimeRunner(model)
    wanted = digits.normalise(digits.test.images[: len(photos)]).numpy()
    classes = [digits.classes[int(runner.run(image[None]).argmax())] for image in wanted]
    command = [sys.executable, str(EXAMPLES / "classify_onnxruntime.py"), str(model), *map(str, photos)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[2].partition(" ")[0] for line in lines] == classes
    imported = {alias.name for node in ast.walk(ast.parse((EXAMPLES / "classify_onnxruntime.py").read_text()))
                if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip
    assert imported == {"json", "sys", "numpy", "onnxruntime"}


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (40, 40)])
def test_snippet_resizes_and_cuts_as_torchvision_does(snippet: ModuleType, size: tuple[int, int]) -> None:
    import torch
    from torchvision.transforms import v2

    how = {
        "size": [24, 32],
        "resize": 36,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "channels": "RGB",
        "interpolation": "bicubic",
    }
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    cut = v2.Compose([v2.Resize(36, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop((24, 32))])(image)
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
    assert np.abs(snippet.prepare(image, how) - ((pixels - 0.5) / 0.2)[None].numpy()).max() < 1e-5


@needs_litert
def test_litert_snippet_runs_as_a_program_without_our_code(
    tiny_run: Path, photos: list[Path], digits: Dataset, tmp_path: Path
) -> None:
    from edgecompress.exporters.more_runners import LiteRtRunner
    from edgecompress.run_exports import export_run

    export_run(tiny_run, "litert", out=tmp_path / "out")
    runner = LiteRtRunner(tmp_path / "out/model.tflite")
    wanted = digits.normalise(digits.test.images[: len(photos)]).numpy()
    classes = [digits.classes[int(runner.run(image[None]).argmax())] for image in wanted]
    command = [
        sys.executable,
        str(EXAMPLES / "classify_litert.py"),
        str(tmp_path / "out/model.tflite"),
        *map(str, photos),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [line.partition(": ")[2].partition(" ")[0] for line in done.stdout.splitlines()] == classes
    assert "edgecompress import" not in (EXAMPLES / "classify_litert.py").read_text()


def test_all_python_snippets_prepare_alike() -> None:
    bodies = []
    for name in ("classify_onnxruntime.py", "classify_tensorrt.py", "classify_litert.py"):
        tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
        bodies.append(next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "prepare"))
    assert len({ast.dump(body) for body in bodies}) == 1


def test_tensorrt_snippet_compiles_and_uses_what_the_script_has(tiny_run: Path) -> None:
    source = (EXAMPLES / "classify_tensorrt.py").read_text(encoding="utf-8")
    compile(source, "classify_tensorrt.py", "exec")
    script = ast.parse((tiny_run / "exports/tensorrt/build_on_device.py").read_text(encoding="utf-8"))
    offered = {node.name for node in script.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    used = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in used if node.module == "build_on_device" for alias in node.names}
    assert names == {"Cuda", "Session", "load_engine"} and names <= offered


def test_tensorrt_snippet_reads_what_the_script_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a fake TensorRT, whose class is the mean of the image."""
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    how = {"size": [2, 2], "mean": [0.0], "std": [0.3], "channels": "L"}
    for key, value in {"preprocess": json.dumps(how), "labels": json.dumps(["black", "dark", "grey", "white"])}.items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=f"edgecompress.{key}", value=value))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr(build_on_device, "_load_cuda", FakeCudaLibrary)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.3.0"))
    monkeypatch.setitem(sys.modules, "build_on_device", build_on_device)
    assert build_on_device.main(["--onnx", str(tmp_path / "model.onnx"), "--no-check", "--seconds", "0"]) == 0
    for name, value in (("night.png", 0), ("snow.png", 255)):
        Image.new("L", (4, 4), value).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["classify_tensorrt.py", "night.png", "snow.png"])
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / "classify_tensorrt.py"), run_name="__main__")
    assert capsys.readouterr().out == "night.png: black\nsnow.png: white\n"
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.13.0", plan=b"other"))
    with pytest.raises(SystemExit, match=r"built by TensorRT 10\.3\.0 on Fake Orin"):
        runpy.run_path(str(EXAMPLES / "classify_tensorrt.py"), run_name="__main__")


def _headers() -> Path | None:
    """The folder of ONNX Runtime's C++ headers: of an unpacked release, or of the system."""
    roots = [Path(root) for root in (os.environ.get("ONNXRUNTIME_ROOT"), "/usr", "/usr/local") if root]
    folders = [root / "include" / sub for root in roots for sub in ("", "onnxruntime", "onnxruntime/core/session")]
    return next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").exists()), None)


def test_cpp_snippet_compiles() -> None:
    compiler, headers = shutil.which("g++") or shutil.which("clang++"), _headers()
    if compiler is None or headers is None:
        pytest.skip(
            "needs a C++ compiler and ONNX Runtime's C++ headers (name an unpacked release with ONNXRUNTIME_ROOT)"
        )
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        f"-I{headers}",
        str(EXAMPLES / "classify.cc"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
