"""``edgecompress tables``: what it says about one table and two, what it unites, and every bad line it refuses."""

import json
import re
from dataclasses import replace

import pytest
from command_line import call
from sample_tables import SETTING, conv_key, row, write_table

from edgecompress.errors import BadFileError
from edgecompress.latency_tables.measure import this_setting
from edgecompress.latency_tables.predict import find_table, latency_model
from edgecompress.latency_tables.table import read_table
from edgecompress.latency_tables.targets import target_by_name

ROWS = [row(conv_key(8, 8), 10.0), row(conv_key(8, 16), 20.0), row(conv_key(16, 16), 30.0, "contended")]
PI = target_by_name("raspberry-pi-5")


def test_show_tells_rows_setting_provenance_and_holes(tmp_path):
    write_table(tmp_path / "t.csv", [*ROWS, row(conv_key(3, 8), 0.0, "failed")])
    shown = call("tables", "show", tmp_path / "t.csv")
    assert shown.code == 0, shown.err
    for text in (
        "2 conv",
        "contended",
        "test-cpu",
        "Test CPU",
        "1 kernels are failed",
        "1 kernels were measured while",
    ):
        assert text in shown.out
    facts = json.loads(call("tables", "show", tmp_path / "t.csv", "--json").out)
    assert {"kind": "conv", "precision": "int8", "status": "ok", "rows": 2} in facts["rows"]
    assert facts["holes"] == {"without": {"failed": 1}, "contended": 1, "single": 0}


def test_compare_joins_on_the_kernels_whatever_the_setting(tmp_path):
    write_table(tmp_path / "a.csv", ROWS)
    other = SETTING.model_copy(update={"threads": 2})
    write_table(tmp_path / "b.csv", [row(conv_key(8, 8), 10.1), row(conv_key(8, 16), 40.0)], other)
    facts = json.loads(call("tables", "compare", tmp_path / "a.csv", tmp_path / "b.csv", "--json").out)
    assert facts["setting"] == "threads = 2 instead of 1" and facts["only_first"] == 1 and facts["only_second"] == 0
    assert facts["ratio"]["int8"]["pairs"] == 2 and facts["ratio"]["int8"]["median"] == pytest.approx(1.505)
    assert facts["worst"][0]["kernel"].startswith("conv 8 -> 16") and facts["worst"][0]["ratio"] == 2
    assert facts["disagreeing"] == 1
    assert "2.000" in call("tables", "compare", tmp_path / "a.csv", tmp_path / "b.csv").out
    write_table(tmp_path / "c.csv", [row(conv_key(4, 4), 1.0)])
    refused = call("tables", "compare", tmp_path / "a.csv", tmp_path / "c.csv")
    assert refused.code == 2 and "no kernel in common" in refused.err


def test_merge_is_the_union_and_more_runs_win(tmp_path):
    write_table(tmp_path / "a.csv", ROWS)
    steadier = replace(row(conv_key(8, 8), 10.0), n_runs=500)
    write_table(tmp_path / "b.csv", [steadier, row(conv_key(32, 32), 50.0)])
    done = call("tables", "merge", tmp_path / "a.csv", tmp_path / "b.csv", "--out", tmp_path / "m.csv")
    assert done.code == 0 and "4 kernels of 2 tables" in done.out
    table = read_table(tmp_path / "m.csv")
    assert table.rows[conv_key(8, 8)] == steadier and set(table.rows) == {r.key for r in ROWS} | {conv_key(32, 32)}
    assert table.provenance.machine["merged_from"] == "a.csv b.csv"
    refused = call("tables", "merge", tmp_path / "a.csv", "--out", tmp_path / "m.csv")
    assert refused.code == 2 and "exists" in refused.err


def test_merge_refuses_what_disagrees_or_was_measured_otherwise(tmp_path):
    write_table(tmp_path / "a.csv", ROWS)
    write_table(tmp_path / "b.csv", [row(conv_key(4, 4), 1.0), row(conv_key(8, 8), 15.0)])
    write_table(tmp_path / "c.csv", ROWS, SETTING.model_copy(update={"runtime_version": "1.31.0"}))
    write_table(tmp_path / "d.csv", ROWS, target="raspberry-pi-5")
    for name, message in (
        ("b", r"Line 3 of .*b.csv says 15.0 us where line 2 of .*a.csv says 10.0 us"),
        ("c", "runtime_version = 1.31.0 instead of 1.32.0"),
        ("d", "'raspberry-pi-5'"),
    ):
        refused = call("tables", "merge", tmp_path / "a.csv", tmp_path / f"{name}.csv", "--out", tmp_path / "m.csv")
        assert refused.code == 2
        assert re.search(message, refused.err), refused.err
    assert not (tmp_path / "m.csv").exists()


def test_check_names_every_bad_line_and_changes_nothing(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(8, c), 10.0 * c) for c in (8, 16, 24, 32, 40, 48)])
    assert call("tables", "check", path).out.strip() == "nothing is wrong"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("80.0000", "nan", 1)
    lines[2] = lines[2].replace("160.0000", "-160.0000", 1)
    lines[3] = lines[3].replace("240.0000", "0.0000", 1)
    lines[4] = lines[4][:60]  # truncated
    lines.append(lines[5].replace("400.0000", "444.0000", 1))  # pasted: another median of line 6
    broken = "\n".join(lines) + "\nalso,torn"
    path.write_text(broken)
    found = call("tables", "check", path)
    assert found.code == 2
    for text in ("Line 2", "Line 3", "Line 4", "Line 5 of", "truncated", "Line 8", "where line 6 says", "torn"):
        assert text in found.out
    assert len(found.out.splitlines()) == 6 and path.read_text() == broken


def test_a_truncated_line_is_dropped_with_a_warning_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, ROWS)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:70]
    path.write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="Line 3 .*truncated"):
        assert set(read_table(path).rows) == {conv_key(8, 8), conv_key(16, 16)}


def test_a_silent_duplicate_that_disagrees_is_refused_and_a_repeated_measurement_is_not(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, ROWS)
    with path.open("a") as file:
        file.write(
            path.read_text().splitlines()[1].replace("10.0000", "10.9000", 1) + "\n"
        )  # within the clock's microsecond
    assert read_table(path).rows[conv_key(8, 8)].median_us == 10.9
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[1].replace("10.0000", "13.0000", 1) + "\n")
    with pytest.raises(BadFileError, match=r"Line 6 of .*t\.csv says 13\.0 us where line 5 says 10\.9 us"):
        read_table(path)
    path.write_text(path.read_text().replace("node_time,", "node_time again,"))
    assert read_table(path).rows[conv_key(8, 8)].median_us == 13.0


def test_a_named_table_of_another_thread_count_is_refused_and_carried_along_when_allowed(tmp_path):
    setting = SETTING.model_copy(update={"threads": 4})
    write_table(tmp_path / "t.csv", ROWS, setting, target="raspberry-pi-5")
    with pytest.raises(BadFileError, match=r"threads = 4 instead of 1.*--allow-mismatch"):
        find_table(PI, tmp_path / "t.csv")
    _, description = latency_model(PI, tables=tmp_path / "t.csv", allow_mismatch=True)
    assert "NOT this run's setting: threads = 4 instead of 1" in description
    _, description = latency_model(PI, tables=tmp_path / "t.csv", threads=4)
    assert "NOT" not in description


def test_validate_measures_held_out_networks_here(tmp_path):
    rows = [
        row(conv_key(8, 8, "fp32")._replace(kind="conv", in_channels=3, kernel_h=3), 5.0),
        row(conv_key(32, 4, "fp32"), 9.0),
    ]
    write_table(tmp_path / "t.csv", rows, this_setting())
    arguments = [
        "tables",
        "validate",
        tmp_path / "t.csv",
        "--model",
        "sample_networks:two_layers",
        "--data-shape",
        "3,8,8",
    ]
    done = call(*arguments, "--count", "3", "--seconds", "0.005", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)["fp32"]
    assert len(facts["networks"]) == 3 and min(n["measured_us"] for n in facts["networks"]) > 0
    assert facts["mape"] >= 0 and 0 <= facts["within_10"] <= 1 and facts["spearman"] is not None
    write_table(tmp_path / "u.csv", rows, SETTING)
    refused = call("tables", "validate", tmp_path / "u.csv", *arguments[3:])
    assert refused.code == 2 and "device = test-cpu instead of" in refused.err
