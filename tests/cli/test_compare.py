"""compare: one line per run, every latency with its evidence, and a warning where numbers must not be compared."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import call

from edgecompress.comparison import QUANTITIES, Compared, as_dicts, markdown, read_runs, remarks
from edgecompress.files import write_document
from edgecompress.report_spec import RunReport
from edgecompress.runs import RunFolder
from edgecompress.spec import Config


@pytest.fixture(scope="module")
def base(tiny_run: Path) -> RunReport:
    return RunFolder(tiny_run).report()


@pytest.fixture
def runs(tiny_run, base, tmp_path) -> list[Path]:
    """The tiny run and one that differs from it in everything."""
    cost = base.compressed.cost.model_copy(
        update={
            "macs": 4_400_000, "params": 31_650, "size_bytes": 36_730, "latency_us": 655.0, "kernels_estimated": 0,
            "kernels_measured": 10, "kernels_interpolated": 0,
        }
    )  # fmt: skip
    column = base.compressed.model_copy(
        update={"accuracy": 0.9375, "cost": cost, "average_weight_bits": 5.87, "host_latency_us": 214.0}
    )
    other = base.model_copy(
        update={
            "name": "other", "compressed": column, "found_by": {"prune": "greedy-loss", "quantize": "ddpg"},
            "original": base.original.model_copy(update={"accuracy": 0.9412}),
            "goals": tuple(goal.model_copy(update={"holds": False}) for goal in base.goals[:1]),
        }
    )  # fmt: skip
    shutil.copytree(tiny_run, tmp_path / "first")
    (tmp_path / "second").mkdir()
    write_document(tmp_path / "second" / "report.json", other)
    return [tmp_path / "first", tmp_path / "second"]


def test_table_shows_every_run_with_its_evidence(runs):
    called = call("compare", *runs)
    assert called.code == 0 and called.err == ""
    for wanted in (
        "tiny", "other", "93.75 %", "-0.37 points", "36,730 B", "655 µs", "measured", "estimated", "214 µs", "4.400 M",
        "31,650", "5.87", "greedy-loss, ddpg", "1 of 1 goals missed",
        "stand on different evidence (estimated, measured)",
    ):  # fmt: skip
        assert wanted in called.out, wanted
    assert max(map(len, called.out.splitlines())) <= 160


def test_json_is_the_numbers_in_their_own_units(runs, base):
    called = call("compare", *runs, "--json")
    first, second = json.loads(called.out)["runs"]
    assert (second["accuracy"], second["size_bytes"], second["latency_us"]) == (0.9375, 36_730, 655.0)
    assert (second["latency_source"], second["host_latency_us"], second["macs"]) == ("measured", 214.0, 4_400_000)
    assert second["found_by"] == {"prune": "greedy-loss", "quantize": "ddpg"}
    assert second["goals_missed"] == [base.goals[0].goal] and first["params"] == base.compressed.cost.params
    assert first["latency_source"] == "estimated"


def test_markdown_is_one_square_table_that_names_cannot_break(runs, base):
    called = call("compare", *runs, "--format", "md")
    lines = [line for line in called.out.splitlines() if line.startswith("|")]
    assert len(lines) == 4 and {line.count("|") for line in lines} == {len(QUANTITIES) + 2}
    assert "655 µs (measured)" in lines[3] and "93.75 % (-0.37 points)" in lines[3]
    evil = Compared("a|b<script>*x*", base)
    line = markdown([evil]).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(QUANTITIES) + 2 and "<script" not in line


def test_runs_that_differ_in_what_they_measured_are_marked(base):
    def with_config(**update: object) -> Compared:
        values = base.config.model_dump() | update
        return Compared(str(update), base.model_copy(update={"config": Config.model_validate(values)}))

    same = Compared("a", base)
    assert remarks([same, Compared("b", base)]) == []
    assert remarks([same, with_config(data="other")]) == [
        "The runs differ in data (digits, other): accuracies are not comparable."
    ]
    assert "ratios are to different originals" in remarks([same, with_config(model="resnet20")])[0]
    elsewhere = base.model_copy(update={"provenance": base.provenance | {"machine": "another"}})
    assert "latencies on the host are not comparable" in remarks([same, Compared("b", elsewhere)])[0]
    target = base.target.model_copy(update={"name": "x86"})
    assert "latencies on the device" in remarks([same, Compared("b", base.model_copy(update={"target": target}))])[0]


def test_runs_of_one_name_are_told_apart_by_their_paths(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    names = [run.name for run in read_runs([tiny_run, tmp_path / "tiny"])]
    assert names == [str(tiny_run), str(tmp_path / "tiny")]
    assert [run["run"] for run in as_dicts(read_runs([tiny_run]))] == ["tiny"]


def test_run_without_latency_model_is_shown(base):
    cost = base.compressed.cost.model_copy(update={"latency_us": None, "latency_low_us": None, "latency_high_us": None})
    run = Compared("a", base.model_copy(update={"compressed": base.compressed.model_copy(update={"cost": cost})}))
    assert as_dicts([run])[0]["latency_us"] is None and as_dicts([run])[0]["latency_source"] is None
    assert "None" not in markdown([run])


def test_bad_input(tiny_run, tmp_path):
    called = call("compare", tiny_run, tmp_path / "none")
    assert called.code == 2 and str(tmp_path / "none") in called.err and called.out == ""
    called = call("compare", tiny_run, tiny_run.parent / "." / "tiny")
    assert called.code == 2 and "is named twice" in called.err
    assert call("compare").code == 2
    (tmp_path / "unfinished").mkdir()
    called = call("compare", tiny_run, tmp_path / "unfinished")
    assert called.code == 2 and "report.json" in called.err
