"""Prediction from a table: exact on rows, between its neighbours elsewhere, honest about which."""

import time
from dataclasses import replace

import pytest
from sample_tables import SETTING, conv_key, row, write_table

from edgecompress.cost import Edge, Kernel
from edgecompress.errors import BadFileError, MissingBackendError
from edgecompress.latency_tables.correct import CLASSES, Correction, network_id
from edgecompress.latency_tables.estimate import Estimator
from edgecompress.latency_tables.predict import (
    TableModel,
    find_table,
    latency_model,
    table_model,
    table_path,
)
from edgecompress.latency_tables.table import edge_key, kernel_key
from edgecompress.latency_tables.targets import is_this_machine, target_by_name
from edgecompress.spec import EdgeSpec, LayerSpec

X86 = target_by_name("x86")
LAYER = LayerSpec(
    name="a", kind="conv", in_channels=64, out_channels=64, kernel=(3, 3), input_hw=(14, 14), output_hw=(14, 14),
    macs=64 * 64 * 9 * 196, params=64 * 64 * 9,
)  # fmt: skip


def kernel(in_channels, out_channels, bits=8, layer=LAYER):
    return Kernel(
        layer=layer, in_channels=in_channels, out_channels=out_channels, weight_bits=bits, activation_bits=bits
    )


@pytest.fixture
def model(tmp_path):
    pairs = {(16, 16): 10.0, (32, 32): 22.0, (64, 64): 70.0, (16, 64): 25.0, (64, 16): 28.0}
    return table_model(write_table(tmp_path / "t.csv", [row(conv_key(*p), us) for p, us in pairs.items()]), X86)


def test_key_of_a_kernel_is_its_shape_and_precision():
    assert kernel_key(kernel(16, 32), "int8") == conv_key(16, 32)
    assert conv_key(64, 64).macs == LAYER.macs


def test_a_row_is_measured_exactly(model):
    value = model.kernel(kernel(32, 32))
    assert (value.us, value.source) == (22.0, "measured")
    assert value.low_us == pytest.approx(19.8) and value.high_us == pytest.approx(26.4)


@pytest.mark.parametrize("pair", [(16, 32), (16, 48), (24, 24), (32, 16), (48, 48), (56, 64)])
def test_between_rows_it_is_interpolated_and_bounded_by_its_neighbours(model, pair):
    value = model.kernel(kernel(*pair))
    assert value.source == "interpolated"
    assert value.low_us <= value.us <= value.high_us
    below = [r.median_us for k, r in model.rows.items() if k.in_channels <= pair[0] and k.out_channels <= pair[1]]
    above = [r.median_us for k, r in model.rows.items() if k.in_channels >= pair[0] and k.out_channels >= pair[1]]
    assert max(below) <= value.us <= min(above)


def test_a_family_that_grows_by_blocks_is_predicted_between_its_rows(tmp_path):
    def us(inputs, outputs):
        return 2 + 0.02 * (-(-inputs // 16) * 16) * (-(-outputs // 16) * 16)

    held = [(c, c) for c in (16, 32, 64, 96, 128)] + [(c, 128) for c in (16, 48, 96)] + [(128, c) for c in (16, 40, 80)]
    rows = [row(conv_key(*pair), us(*pair)) for pair in held]
    model = table_model(write_table(tmp_path / "t.csv", rows), X86)
    for pair in [(48, 80), (96, 32), (24, 24), (112, 64), (56, 120)]:
        assert model.kernel(kernel(*pair)).us == pytest.approx(us(*pair), rel=0.03), pair


def test_outside_of_the_rows_it_is_estimated(model):
    value = model.kernel(kernel(128, 64))
    assert value.source == "estimated" and 100 < value.us < 180
    other = model.kernel(kernel(64, 64, layer=LAYER.model_copy(update={"kernel": (5, 5), "macs": 64 * 64 * 25 * 196})))
    assert other.source == "estimated" and other.us == pytest.approx(70 * 25 / 9)


def test_few_bits_take_the_int8_row_and_a_missing_precision_is_refused(model):
    assert model.kernel(kernel(32, 32, bits=2)) == model.kernel(kernel(32, 32, bits=8))
    with pytest.raises(BadFileError, match="--precision fp32"):
        model.kernel(kernel(32, 32, bits=32))


def edge(channels, kind="add"):
    return Edge(EdgeSpec(name="e", kind=kind, channels=channels, input_hw=(14, 14), output_hw=(14, 14)), channels, 8)


def test_a_network_is_the_sum_of_its_layers_and_what_lies_between(tmp_path, model):
    kernels = [kernel(16, 16), kernel(16, 64), kernel(64, 32)]
    alone = model(kernels)
    assert alone.us == pytest.approx(10 + 25 + model.kernel(kernels[2]).us)
    assert alone.counts == {"measured": 2, "interpolated": 1, "estimated": 0}
    add = edge_key(edge(64), "int8")
    table = table_model(write_table(tmp_path / "u.csv", [*model.rows.values(), row(add, 4.0)]), X86)
    assert table(kernels, [edge(64)]).us == pytest.approx(alone.us + 4)
    assert table(kernels, [edge(64, "max_pool")]).us == pytest.approx(alone.us)


def test_a_correction_belongs_to_its_network_and_precision(tmp_path, model):
    kernels = [kernel(16, 16), kernel(16, 64)]
    factors = dict.fromkeys(CLASSES, 1.0) | {"kxk": 1.5}
    correction = Correction(
        network=network_id(kernels), dtype="int8", factors=factors, constant_us=7.0, cache_bytes=1e6, networks=20,
        error=0.01, spread=0.02,
    )  # fmt: skip
    corrected = replace(model, corrections={(correction.network, "int8"): correction})
    answer = corrected(kernels)
    assert answer.us == pytest.approx(1.5 * (10 + 25) + 7)
    assert answer.high_us == pytest.approx(answer.us * (1 + 1.645 * 0.02))
    assert corrected([*kernels, kernel(16, 16)]).us == pytest.approx(10 + 25 + 10)


def test_a_repeated_question_takes_under_5_us(model):
    asked = kernel(16, 48)
    model.kernel(asked)
    best = min(_seconds(lambda: [model.kernel(asked) for _ in range(200)]) for _ in range(20)) / 200
    assert best < 5e-6


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_without_a_table_it_is_estimated_or_refused(tmp_path):
    jetson = target_by_name("jetson")
    found, description = latency_model(jetson, tables=tmp_path)
    assert isinstance(found, Estimator) and description.startswith("ESTIMATED")
    with pytest.raises(MissingBackendError, match="edgecompress profile --target jetson-orin-nano"):
        latency_model(jetson, tables=tmp_path, require_measured=True)


def test_a_table_of_the_target_is_found_and_described(tmp_path):
    pi = target_by_name("raspberry-pi-5")
    assert not is_this_machine(pi)
    write_table(table_path(pi, SETTING, tmp_path), [row(conv_key(16, 16), 10.0)], target=pi.name)
    found, description = latency_model(pi, tables=tmp_path, require_measured=True)
    assert isinstance(found, TableModel) and description.startswith("measured on Test CPU")
    assert find_table(pi, tmp_path, threads=2) is None


def test_a_table_of_another_target_or_machine_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    write_table(path, [row(conv_key(16, 16), 10.0)], target="raspberry-pi-4")
    with pytest.raises(BadFileError, match="of target 'raspberry-pi-4'"):
        find_table(target_by_name("raspberry-pi-5"), path)
    if is_this_machine(X86):
        with pytest.raises(BadFileError, match="device = test-cpu"):
            find_table(X86, path)


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(BadFileError, match="no measured kernel"):
        table_model(write_table(tmp_path / "t.csv", []), X86)
