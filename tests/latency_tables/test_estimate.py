"""The estimator: monotone, with a floor and a band, never called measured. Its fit is tested in test_fit_estimators."""

import pytest

from edgecompress.cost import Edge, Kernel
from edgecompress.latency_tables.estimate import Estimator, errors, estimator_for, read_estimators
from edgecompress.latency_tables.features import Features, features_of
from edgecompress.latency_tables.targets import all_targets, target_by_name
from edgecompress.spec import ChannelTerm, EdgeSpec, LayerSpec


def kernel(channels, bits=8, full=256, inside=True, kind="conv", size=3):
    term = (ChannelTerm(group="g", per_channel=1),)
    inputs = 1 if kind == "depthwise" else full
    layer = LayerSpec(
        name="a", kind=kind, in_channels=full, out_channels=full, kernel=(size, size), input_hw=(14, 14),
        output_hw=(14, 14), macs=full * inputs * size**2 * 196, params=full * inputs * size**2,
        groups=full // inputs, in_terms=term if inside else (), out_terms=term,
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
    assert features_of([kernel(33)], (), 32) == features_of([kernel(64)], (), 32)
    assert features_of([kernel(33)], (), 32).mmacs > features_of([kernel(32)], (), 32).mmacs
    stem = kernel(3, inside=False)
    padded = features_of([stem], (), 32).mmacs * 1e6
    assert padded == stem.layer.macs * 3 * 32 // 256**2  # the input of the network is not padded


def test_features_count_each_kind_of_multiply_add_every_element_and_every_kernel():
    add = EdgeSpec(name="add", kind="add", channels=64, input_hw=(14, 14), output_hw=(14, 14))
    end = EdgeSpec(name="input", kind="input", channels=3, input_hw=(99, 99), output_hw=(99, 99))
    built = [kernel(64, full=64), kernel(64, full=64, kind="depthwise"), kernel(64, full=64, size=1)]
    found = features_of(built, [Edge(end, 3, 8), Edge(add, 64, 8)])
    pixel = 64 * 196 / 1e6
    weights = (64 * 64 * 9 + 64 * 9 + 64 * 64) / 1e6
    assert found.values == pytest.approx((64 * pixel, 64 * 9 * pixel, 9 * pixel, 8 * pixel, weights, 4))


def test_each_feature_is_paid_at_its_own_price_and_precision():
    target = target_by_name("raspberry-pi-5")
    known = {
        precision: read_estimators().classes["raspberry-pi-5"][precision].model_copy(
            update={"floor_us": 0.0, "us_per": Features(kernels=price, spatial_mmacs=1000.0 * price)}
        )
        for precision, price in (("fp32", 2.0), ("int8", 1.0))
    }  # fmt: skip
    add = EdgeSpec(name="add", kind="add", channels=64, input_hw=(14, 14), output_hw=(14, 14))
    eight, float32 = kernel(64), kernel(64, bits=32)
    macs = features_of([eight]).mmacs * 1000
    # The addition runs in integers, as does the whole network that holds one integer layer.
    mixed = Estimator(target, known)([eight, float32], [Edge(add, 64, 8)])
    assert mixed.us == pytest.approx(macs + 1 + 2 * macs + 2 + 1)


def test_a_depthwise_convolution_costs_more_per_multiply_add_where_the_data_say_so():
    estimator = estimator_for(target_by_name("raspberry-pi-5"))
    assert estimator.coefficients["fp32"].model == "features"

    def rate(*layers):
        one, twenty = (estimator([*layers] * times).us for times in (500, 1000))
        return (twenty - one) / (features_of(layers).mmacs * 500)

    depthwise = rate(kernel(256, bits=32, kind="depthwise"))
    assert depthwise > 1.5 * rate(kernel(256, bits=32))


def test_errors_of_all_models_are_shown_and_the_smallest_allowed_is_taken():
    rows = errors()
    assert {(row.target_class, row.precision) for row in rows} == {
        (name, precision) for name, fits in read_estimators().classes.items() for precision in fits
    }
    for row in rows:
        known = read_estimators().classes[row.target_class][row.precision]
        allowed = {"MACs": row.errors.macs, "MACs + floor": row.errors.floor, "features": row.errors.features}
        allowed = {name: error for name, error in allowed.items() if error is not None}
        assert row.chosen == min(allowed, key=allowed.get) and row.error == allowed[row.chosen] == known.loo_error
        assert row.errors.macs > 0 and (row.errors.features is None or row.networks >= 8)
        plain = {known.us_per.spatial_mmacs, known.us_per.depthwise_mmacs, known.us_per.pointwise_mmacs}
        assert (len(plain) == 1 and known.us_per.kernels == 0) or row.chosen == "features"
        assert known.floor_us > 0 or row.chosen != "MACs + floor"
    assert {row.chosen for row in rows} == {"MACs", "MACs + floor", "features"}


def test_description_names_the_model_and_its_band():
    estimator = estimator_for(target_by_name("raspberry-pi-5"))
    known = estimator.coefficients[estimator.target.precision]
    assert f"by {known.model} from" in estimator.description
    assert f"within a factor {1 + known.band:.1f} " in estimator.description
    assert f"leave-one-network-out error {known.loo_error:.0%}" in estimator.description


def test_storage_of_few_bits_buys_no_time_where_there_is_no_kernel():
    estimator = estimator_for(target_by_name("jetson-nano"))
    assert estimator([kernel(64, bits=2)]).us == estimator([kernel(64, bits=16)]).us


def test_shipped_file_says_what_each_fit_stands_on():
    for name, fits in read_estimators().classes.items():
        for precision, known in fits.items():
            assert known.networks >= 2 and sum(known.rows.values()) >= 2, (name, precision)
            assert known.band == pytest.approx(known.loo_error + known.scale_error, abs=1e-3) and known.why
