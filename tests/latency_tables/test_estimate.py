"""The estimator: monotone, with a floor and a band, never called measured; and the fit behind its coefficients."""

import os
from pathlib import Path

import pytest

from edgecompress.cost import Kernel
from edgecompress.latency_tables import fit_estimators
from edgecompress.latency_tables.estimate import estimator_for, padded_macs, read_estimators
from edgecompress.latency_tables.recipes import RECIPES, Group
from edgecompress.latency_tables.targets import all_targets, target_by_name
from edgecompress.spec import ChannelTerm, LayerSpec


def kernel(channels, bits=8, full=256, inside=True):
    term = (ChannelTerm(group="g", per_channel=1),)
    layer = LayerSpec(
        name="a", kind="conv", in_channels=full, out_channels=full, kernel=(3, 3), input_hw=(14, 14),
        output_hw=(14, 14), macs=full * full * 9 * 196, params=full * full * 9,
        in_terms=term if inside else (), out_terms=term,
    )  # fmt: skip
    return Kernel(layer=layer, in_channels=channels, out_channels=channels, weight_bits=bits, activation_bits=bits)


@pytest.mark.parametrize("name", sorted(all_targets()))
def test_every_target_is_estimated_with_bounds_that_hold_it(name):
    estimator = estimator_for(target_by_name(name))
    small, large = estimator([kernel(64)]), estimator([kernel(256)])
    assert 0 < small.us < large.us
    assert small.low_us < small.us < small.high_us
    assert large.counts == {"estimated": 1}
    assert "ESTIMATED" in estimator.description and "not measured" in estimator.description
    band = estimator.coefficients[estimator.target.precision].band
    assert band >= 0.05 and large.high_us == pytest.approx(large.us * (1 + band))


def test_floor_makes_a_small_network_cost_more_than_its_macs():
    estimator = estimator_for(target_by_name("jetson"))
    small, large = estimator([kernel(32)]).us, estimator([kernel(256)]).us
    assert large / small < 64 / 4  # 64 times the MACs
    assert small > estimator.coefficients["int8"].floor_us > 100


def test_a_cpu_has_no_launch_floor_below_its_smallest_network():
    estimator = estimator_for(target_by_name("raspberry-pi-4"))
    assert estimator([kernel(128)]).us == pytest.approx(4 * estimator([kernel(64)]).us)


def test_channels_are_priced_at_the_padded_width():
    assert padded_macs(kernel(33), 32) == padded_macs(kernel(64), 32) > padded_macs(kernel(32), 32)
    stem = kernel(3, inside=False)
    assert padded_macs(stem, 32) == stem.layer.macs * 3 * 32 // 256**2  # the input of the network is not padded


def test_storage_of_few_bits_buys_no_time_where_there_is_no_kernel():
    estimator = estimator_for(target_by_name("jetson-nano"))
    assert estimator([kernel(64, bits=2)]).us == estimator([kernel(64, bits=16)]).us


def test_shipped_file_says_what_each_fit_stands_on():
    for name, fits in read_estimators().classes.items():
        for precision, known in fits.items():
            assert known.networks >= 2 and sum(known.rows.values()) >= 2, (name, precision)
            assert known.band == pytest.approx(known.loo_error + known.scale_error, abs=1e-3) and known.why


def test_fit_recovers_floor_slope_and_offset():
    plain, yolo = Group("d", "r", "p", "f", "s"), Group("e", "r", "p", "f", "s2", "o")
    samples = [fit_estimators.Sample(f"n{m}", m, 300 + 2 * m, plain) for m in (5, 50, 400, 900, 3000)]
    samples += [fit_estimators.Sample(f"y{m}", m, 1000 + 300 + 0.5 * m, yolo) for m in (100, 1000, 9000)]
    found = fit_estimators.fit(samples).values
    assert found["floor f"] == pytest.approx(300, rel=0.02)
    assert found["slope s"] == pytest.approx(2, rel=0.02) and found["slope s2"] == pytest.approx(0.5, rel=0.02)
    assert found["offset o"] == pytest.approx(1000, rel=0.02)
    assert max(fit_estimators.loo_errors(samples).values()) < 0.05


def test_public_table_still_gives_the_shipped_coefficients():
    folder = os.environ.get("EDGECOMPRESS_DATA")
    if not folder:
        pytest.skip("EDGECOMPRESS_DATA is not set: the public measurements are not here")
    rows = fit_estimators.read_rows(Path(folder))
    recipe = RECIPES["raspberry-pi-5"]["fp32"]
    step = fit_estimators.scale_errors(rows)[recipe.check]
    samples = fit_estimators.samples_of(rows, recipe.pool)
    assert all(sample.us > 0 and sample.mmacs > 0 for sample in samples)
    anew = fit_estimators.coefficients(samples, recipe, step, fit_estimators.PUBLIC)
    shipped = read_estimators().classes["raspberry-pi-5"]["fp32"]
    assert anew.us_per_mmac == pytest.approx(shipped.us_per_mmac, rel=0.01)
    assert anew.band == pytest.approx(shipped.band, rel=0.01)
