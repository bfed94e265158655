"""The examples of the guide to tasks run as they stand: segmentation, and a detector with a score of its own."""

from __future__ import annotations

import runpy
import sys

import pytest
from site_pages import DOCS

from edgecompress.runs import RunFolder


@pytest.fixture
def example(quick, tmp_path, monkeypatch, capsys):
    """Run one of ``docs/examples`` in an empty folder; gives what it printed and the report of its run."""

    def run(name: str, made: str):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(DOCS / "examples"))
        monkeypatch.delitem(sys.modules, name, raising=False)
        runpy.run_path(str(DOCS / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, RunFolder(tmp_path / "runs" / made).report()

    return run


def test_segmentation(example):
    printed, report = example("segmentation", "segmentation")
    assert report.score.name == "mean IoU" and printed.startswith("mean IoU ")
    assert report.original.accuracy > 0.7 and report.compressed.accuracy > 0.5
    integers = next(row for row in report.artifacts if row.name == "model.int8.onnx")
    assert integers.checks["float_conv_or_gemm"] == 0 and integers.checks["emulator_agreement"] > 0.99
    assert report.compressed.cost.macs <= 0.6 * report.original.cost.macs


def test_own_task(example):
    printed, report = example("own_task", "own-task")
    assert report.score.name == "boxes found" and printed.startswith("boxes found ")
    assert report.original.accuracy > 0.7 and report.compressed.accuracy > 0.5
    assert report.compressed.cost.macs <= 0.6 * report.original.cost.macs
