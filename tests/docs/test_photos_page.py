"""The tutorial from a folder of photos to a verified integer file, typed as it stands, on real photos: CIFAR-10 at 64x64."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from site_pages import DOCS, blocks, shell

from edgecompress.data import load_data
from edgecompress.finetune import TrainSettings, train
from edgecompress.models import build_model
from edgecompress.runs import RunFolder

PAGE = "tutorials/photos.md"
CLASSES = ("airplane", "cat", "dog", "ship")
COUNTS = {"train": 40, "test": 10}
ARCHIVE = Path(os.environ.get("EDGECOMPRESS_DATA", "")) / "cifar10-jpeg.tar.gz"


def write_photos(root: Path) -> None:
    """The first images of some classes, as a user's JPEG files of 64x64."""
    wanted = {
        f"cifar10/{split}/{name}/{i:04}.jpg": root / split / name / f"{i:04}.jpg"
        for split, count in COUNTS.items() for name in CLASSES for i in range(count)
    }  # fmt: skip
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            path = wanted.pop(member.name, None)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                Image.open(io.BytesIO(data.read())).resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=90)
            if not wanted:
                return
    raise AssertionError(f"{ARCHIVE} lacks {min(wanted)}")


def write_weights(photos: Path, path: Path) -> None:
    """The user's own training: a torchvision ResNet-18, one epoch."""
    data = load_data(str(photos), image_size=64)
    torch.manual_seed(0)
    settings = TrainSettings(epochs=1, learning_rate=0.02, batch_size=32, distill=0.0)
    model = train(build_model("resnet18", len(data.classes)), data, settings)
    torch.save(model.state_dict(), path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where another program takes the cores
@pytest.mark.skipif(not ARCHIVE.is_file(), reason="EDGECOMPRESS_DATA names no folder with cifar10-jpeg.tar.gz")
def test_tutorial_ends_with_a_verified_integer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_photos(tmp_path / "photos")
    write_weights(tmp_path / "photos", tmp_path / "resnet18.pth")
    shutil.copyfile(DOCS / "examples" / "classify_onnxruntime.py", tmp_path / "classify_onnxruntime.py")
    said = [shell(block, tmp_path, timeout_s=600) for block in blocks(PAGE, "sh")]
    listing, plan, *_, answers = said
    assert all(name in listing for name in CLASSES) and "flops" in plan
    assert len(answers.splitlines()) == COUNTS["test"]
    assert all(line.partition(": ")[2].partition(" ")[0] in CLASSES for line in answers.splitlines())

    report = RunFolder(tmp_path / "runs" / "quick").report()
    assert all(goal.holds for goal in report.goals) and report.config.model == "resnet18"
    exports = tmp_path / "runs" / "quick" / "exports"
    checks = json.loads((exports / "export.json").read_text())["onnxruntime"]["checks"]
    assert checks["float_conv_or_gemm"] == 0 and checks["emulator_agreement"] == 1.0
    assert (exports / "model.int8.onnx").stat().st_size <= 0.2 * (exports / "original.onnx").stat().st_size
