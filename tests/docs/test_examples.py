"""The example scripts run as they stand, in a folder of their own, and print what their page promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from site_pages import DOCS

from edgecompress.runs import RunFolder

SCRIPTS = {"own_model.py": "own-model", "image_folder.py": "image-folder", "calibration_only.py": "calibration-only"}


def run(script: str, folder: Path) -> str:
    """What the script prints; one thread, as everything in these tests."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DOCS / "examples" / script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes where another program takes the cores
@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs(script: str, tmp_path: Path) -> None:
    printed = run(script, tmp_path)
    folder = RunFolder(tmp_path / "runs" / SCRIPTS[script])
    report = folder.report()
    assert all(goal.holds for goal in report.goals), report.goals
    shown = f"{report.compressed.accuracy:.1%}"
    assert shown in printed
    if script == "calibration_only.py":
        assert report.original.accuracy == 1.0  # the original agrees with itself
        assert "agreement with the original" in printed and report.compressed.accuracy > 0.9
        assert not (folder.path / "model.safetensors").exists()  # nothing was pruned
    if script == "own_model.py":
        (parameters,) = re.findall(r"the pruned network has ([\d,]+) parameters", printed)
        assert int(parameters.replace(",", "")) == report.compressed.cost.params < report.original.cost.params
    if script == "image_folder.py":
        assert "the file expects 32x32 RGB images" in printed


def test_every_example_is_named_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in DOCS.parent.joinpath("tests").rglob("test_*.py"))
    names = {path.name: path.stem for path in (DOCS / "examples").iterdir() if path.is_file()}
    assert [name for name, stem in names.items() if name not in tests and f'"{stem}"' not in tests] == []
