"""Measuring on this machine: the right kernel runs, its time is positive, and what is there is not measured again."""

import numpy as np
import pytest
from sample_tables import conv_key

from edgecompress.latency_tables import measure
from edgecompress.latency_tables.onelayer import one_layer
from edgecompress.latency_tables.table import KernelKey, open_table, read_table

DEPTHWISE = KernelKey("depthwise", 16, 16, 3, 3, 2, 2, 16, 15, 15, 8, 8, "int8", "int8")
LINEAR = KernelKey("linear", 32, 10, 1, 1, 1, 1, 1, 1, 1, 1, 1, "int8", "int8")
CAP_S = 0.01


@pytest.mark.parametrize(
    ("key", "kernels"),
    [
        (conv_key(16, 16), {"QLinearConv"}),
        (conv_key(16, 16, "fp32"), {"Conv", "FusedConv"}),
        (DEPTHWISE, {"QLinearConv"}),
        (LINEAR, {"QGemm"}),
        (LINEAR._replace(weight_dtype="fp32", activation_dtype="fp32"), {"Gemm", "FusedGemm"}),
    ],
)
def test_one_kernel_is_timed_and_it_is_the_one_that_was_meant(key, kernels):
    row = measure.measure_kernel(key, time_cap_s=CAP_S)
    assert row.actual_kernel in kernels and row.status == "ok" and row.key == key
    assert 0 < row.median_us < 1e5 and row.p10_us <= row.p90_us and row.n_runs >= 5


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [(32, 1, 3), (32, 2, 3), (15, 2, 3), (32, 2, 1), (224, 2, 7), (14, 1, 5)]
)
def test_padding_is_found_from_the_sizes(size, stride, kernel):
    out = -(-size // stride)
    key = KernelKey("conv", 3, 4, kernel, kernel, stride, stride, 1, size, size, out, out, "fp32", "fp32")
    pad = one_layer(key).nodes[0].attributes["pads"][0]
    assert (size + 2 * pad - kernel) // stride + 1 == out


def test_a_kind_without_a_graph_is_recorded_as_unsupported():
    row = measure.measure_kernel(conv_key(8, 8)._replace(kind="transposed"))
    assert row.status == "unsupported" and row.n_runs == 0


def test_median_of_whole_microseconds_is_refined():
    row = measure.row_of(conv_key(8, 8), np.array([3, 3, 4, 4, 4, 4, 5, 90]), "node_time", "Conv")
    assert 3.5 < row.median_us < 5


def test_resume_skips_what_is_there_and_measures_the_rest(tmp_path, monkeypatch):
    calls = []
    real = measure.measure_kernel

    def counted(key, **options):
        calls.append(key)
        return real(key, **options)

    monkeypatch.setattr(measure, "measure_kernel", counted)
    monkeypatch.setattr(measure, "ANCHOR_S", CAP_S)
    monkeypatch.setattr(measure, "DRIFT", 1e9)
    setting = measure.this_setting()
    table = open_table(tmp_path / "t.csv", measure.provenance("x86", setting))
    first = measure.measure_points([conv_key(8, 8), conv_key(8, 16)], table, time_cap_s=CAP_S)
    assert (first.measured, first.skipped) == (2, 0)
    calls.clear()
    seen = []
    again = measure.measure_points(
        [conv_key(8, 8), conv_key(8, 16), conv_key(16, 16)], read_table(table.path, setting), time_cap_s=CAP_S,
        progress=lambda done, total, left: seen.append((done, total)),
    )  # fmt: skip
    assert (again.measured, again.skipped, seen) == (1, 2, [(1, 1)])
    assert set(calls) == {conv_key(16, 16), measure.ANCHOR}
    assert set(read_table(table.path).usable) == {conv_key(8, 8), conv_key(8, 16), conv_key(16, 16)}


def test_points_beside_a_slow_anchor_are_measured_again_and_marked(tmp_path, monkeypatch):
    times = iter([100.0, 200.0, 200.0])

    def fake(key, **_):
        return measure.row_of(key, np.full(9, next(times) if key == measure.ANCHOR else 50.0), "node_time", "Conv")

    monkeypatch.setattr(measure, "measure_kernel", fake)
    monkeypatch.setattr(measure, "ANCHOR_EVERY", 1)
    table = open_table(tmp_path / "t.csv", measure.provenance("x86", measure.this_setting()))
    done = measure.measure_points([conv_key(8, 8), conv_key(8, 16)], table, time_cap_s=CAP_S)
    statuses = sorted(row.status for row in read_table(table.path).rows.values())
    assert statuses == ["contended", "ok"] and done.drift == pytest.approx(1.0)
