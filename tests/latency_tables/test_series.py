"""A series of points: what is there is not measured again, and what was disturbed is."""

import pytest
from sample_tables import conv_key, row

from edgecompress.latency_tables import agent, measure, series
from edgecompress.latency_tables.table import open_table, read_table

CAP_S = 0.01


def test_resume_skips_what_is_there_and_measures_the_rest(tmp_path, monkeypatch):
    calls = []
    real = series.measure_kernel

    def counted(key, **options):
        calls.append(key)
        return real(key, **options)

    monkeypatch.setattr(series, "measure_kernel", counted)
    monkeypatch.setattr(series, "ANCHOR_S", CAP_S)
    monkeypatch.setattr(agent, "DRIFT", 1e9)
    monkeypatch.setattr(agent, "QUIET", 1e9)
    monkeypatch.setattr(series, "SUSPECT", 1e9)
    monkeypatch.setattr(agent, "WORST_SHARE", 0)
    setting = measure.this_setting()
    table = open_table(tmp_path / "t.csv", measure.provenance("x86", setting))
    first = series.measure_points([conv_key(8, 8), conv_key(8, 16)], table, time_cap_s=CAP_S)
    assert (first.measured, first.skipped) == (2, 0)
    calls.clear()
    seen = []
    again = series.measure_points(
        [conv_key(8, 8), conv_key(8, 16), conv_key(16, 16)], read_table(table.path, setting), time_cap_s=CAP_S,
        progress=lambda done, total, left: seen.append((done, total)),
    )  # fmt: skip
    assert (again.measured, again.skipped, seen) == (1, 2, [(1, 1)])
    assert set(calls) == {conv_key(16, 16), series.ANCHOR}
    assert set(read_table(table.path).usable) == {conv_key(8, 8), conv_key(8, 16), conv_key(16, 16)}


def test_points_beside_a_slow_anchor_are_measured_again_and_marked(tmp_path, monkeypatch):
    times = iter([100.0, 200.0, 200.0, 200.0, 200.0, 200.0])

    def fake(key, **_):
        return row(key, next(times) if key == series.ANCHOR else 50.0)

    monkeypatch.setattr(series, "measure_kernel", fake)
    monkeypatch.setattr(agent, "ANCHOR_EVERY", 1)
    table = open_table(tmp_path / "t.csv", measure.provenance("x86", measure.this_setting()))
    done = series.measure_points([conv_key(8, 8), conv_key(8, 16)], table, time_cap_s=CAP_S)
    statuses = sorted(row.status for row in read_table(table.path).rows.values())
    assert statuses == ["contended", "contended"] and done.drift == pytest.approx(1.0)


def test_a_point_far_above_its_family_is_measured_again_and_the_shorter_time_stays(tmp_path, monkeypatch):
    asked = []

    def fake(key, **_):
        asked.append(key)
        slow = key == conv_key(32, 32) and asked.count(key) == 1
        us = 300.0 if slow else 0.01 * key.in_channels * key.out_channels + 5
        return row(key, us)

    monkeypatch.setattr(series, "measure_kernel", fake)
    table = open_table(tmp_path / "t.csv", measure.provenance("x86", measure.this_setting()))
    points = [conv_key(i, o) for i in (16, 32, 48, 64) for o in (16, 32, 64)]
    series.measure_points(points, table, time_cap_s=CAP_S)
    assert read_table(table.path).rows[conv_key(32, 32)].median_us == pytest.approx(15.24)
    assert asked.count(conv_key(32, 32)) == 2 and asked.count(conv_key(16, 32)) == 1


@pytest.mark.parametrize("block", [4, 8, 16])
def test_the_divisor_of_a_staircase_is_its_step(block):
    times = {width: float(-(-width // block) * block) ** 2 for width in series.SWEEP}
    assert series.divisor_of(times) == block


def test_a_smooth_device_has_no_divisor():
    assert series.divisor_of({width: float(width**2) for width in series.SWEEP}) == 1
