"""Measuring on this machine: the right kernel runs, its time is positive, and what is there is not measured again."""

import pytest
from sample_tables import conv_key

from edgecompress.latency_tables import agent, measure
from edgecompress.latency_tables.onelayer import one_layer
from edgecompress.latency_tables.table import USABLE, KernelKey

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
    assert row.actual_kernel in kernels and row.status in USABLE and row.key == key
    assert 0 < row.median_us < 1e5 and row.p10_us <= row.p90_us and row.n_runs >= 5


@pytest.mark.parametrize(
    ("size", "stride", "kernel"), [(32, 1, 3), (32, 2, 3), (15, 2, 3), (32, 2, 1), (224, 2, 7), (14, 1, 5)]
)
def test_padding_is_found_from_the_sizes(size, stride, kernel):
    out = -(-size // stride)
    key = KernelKey("conv", 3, 4, kernel, kernel, stride, stride, 1, size, size, out, out, "fp32", "fp32")
    pad = one_layer(key).nodes[0].attributes["pads"][0]
    assert (size + 2 * pad - kernel) // stride + 1 == out


EDGE = KernelKey("add", 16, 16, 1, 1, 1, 1, 1, 14, 14, 14, 14, "int8", "int8")


@pytest.mark.parametrize(
    ("key", "method", "kernel"),
    [
        (EDGE, "node_time", "QLinearAdd"),
        (EDGE._replace(weight_dtype="fp32", activation_dtype="fp32"), "fused", "Conv"),
        (EDGE._replace(kind="max_pool", kernel_h=2, kernel_w=2, stride_h=2, stride_w=2, out_h=7, out_w=7), "node_time",
         "NhwcMaxPool"),
        (EDGE._replace(kind="concat"), "node_time", "QLinearConcat"),
        (EDGE._replace(kind="global_pool", out_h=1, out_w=1), "node_time", "QLinearGlobalAveragePool"),
        (EDGE._replace(kind="input"), "node_time", "QuantizeLinear"),
        (EDGE._replace(kind="output"), "node_time", "DequantizeLinear"),
    ],
)  # fmt: skip
def test_an_operator_without_weights_is_timed_between_layers(key, method, kernel):
    row = measure.measure_kernel(key, time_cap_s=CAP_S)
    assert row.method == method and kernel in row.actual_kernel
    assert 0 <= row.median_us < 1e4 and (row.median_us > 0 or method == "fused")


def test_weights_out_of_the_cache_take_longer():
    key = KernelKey("conv", 256, 256, 3, 3, 1, 1, 1, 2, 2, 2, 2, "fp32", "fp32")
    warm, cold = (measure.measure_kernel(k, time_cap_s=0.1) for k in (key, key._replace(working_set="cold")))
    assert cold.median_us > warm.median_us


def test_disturbed_batches_do_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(agent.time, "perf_counter", lambda: clock[0])
    calls = []

    def run():
        calls.append(0)
        clock[0] += 0.0015 if 60 < len(calls) <= 80 else 0.001

    runs = agent.run_until_steady(run, 0.1)
    assert runs.wall_us[runs.quiet] == pytest.approx(1000) and (~runs.quiet).sum() >= 15 and not runs.contended


def test_a_kind_without_a_graph_is_recorded_as_unsupported():
    row = measure.measure_kernel(conv_key(8, 8)._replace(kind="transposed"))
    assert row.status == "unsupported" and row.n_runs == 0


@pytest.mark.parametrize(("times", "median"), [([7.0], 7.0), ([4.0, 8.0], 6.0), ([4.0, 5.0, 9.0], 5.0)])
def test_a_point_of_few_runs_has_a_number(times, median):
    """Between the quartiles of two times there is nothing; a mean of nothing went into the table as nan."""
    assert agent.statistics(times)["median_us"] == median
