"""The fit behind the estimators: planted coefficients come back, and the public table still gives the shipped ones."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgecompress.latency_tables import fit_estimators, fit_models, rebuild
from edgecompress.latency_tables.estimate import read_estimators
from edgecompress.latency_tables.features import Features
from edgecompress.latency_tables.fit_models import Sample, featured, fit, fit_features, loo_errors
from edgecompress.latency_tables.recipes import RECIPES, Group


def test_fit_recovers_floor_slope_and_offset():
    plain, yolo = Group("d", "r", "p", "f", "s"), Group("e", "r", "p", "f", "s2", "o")
    samples = [Sample(f"n{m}", m, 300 + 2 * m, plain) for m in (5, 50, 400, 900, 3000)]
    samples += [Sample(f"y{m}", m, 1000 + 300 + 0.5 * m, yolo) for m in (100, 1000, 9000)]
    found = fit(samples).values
    assert found["floor f"] == pytest.approx(300, rel=0.02)
    assert found["slope s"] == pytest.approx(2, rel=0.02) and found["slope s2"] == pytest.approx(0.5, rel=0.02)
    assert found["offset o"] == pytest.approx(1000, rel=0.02)
    assert max(error.floor for error in loo_errors(samples).values()) < 0.05


PRICES = Features(
    pointwise_mmacs=20, spatial_mmacs=10, depthwise_mmacs=90, activation_melements=300, weight_melements=200, kernels=15
)


def planted(number, group, generator, floor=500.0):
    """Networks of random work, each timed at the floor and the prices above."""
    samples = []
    for index in range(number):
        scale = float(np.exp(generator.uniform(2, 8)))
        shares = generator.uniform(0, 1, 6) * (1, 1, 0.1, 0.02, 0.02, 0.05)
        work = Features(**dict(zip(Features.model_fields, (scale * shares).tolist(), strict=True)))
        us = floor + work.dot(PRICES)
        samples.append(Sample(f"n{index}", work.mmacs, us, group, f"n{index}@224x224", work))
    return samples


def test_fit_on_features_recovers_planted_prices_where_the_data_are_many(monkeypatch):
    samples = planted(200, Group("d", "r", "p", "f", "s"), np.random.default_rng(0))
    prior = fit(samples)
    monkeypatch.setattr(fit_models, "PULL", 1e-9)
    found = fit_features(samples, prior)
    assert found.us_per.values == pytest.approx(PRICES.values, rel=0.02)
    assert found.floor_us == pytest.approx(500, rel=0.02)


def test_fit_on_few_networks_is_better_than_macs_and_floor_and_never_negative():
    samples = planted(14, Group("d", "r", "p", "f", "s"), np.random.default_rng(1))
    error = loo_errors(samples)["s"]
    assert error.features < error.floor < error.macs and error.best == "features"
    assert min(fit_features(samples, fit(samples)).us_per.values) >= 0


def test_what_no_network_shows_keeps_the_price_of_macs_and_floor():
    samples = planted(12, Group("d", "r", "p", "f", "s"), np.random.default_rng(2))
    blind = [replace(s, features=s.features.model_copy(update={"depthwise_mmacs": 0.0})) for s in samples]
    prior = fit(blind)
    assert fit_features(blind, prior).us_per.depthwise_mmacs == prior.values["slope s"]


def test_fewer_than_eight_buildable_networks_keep_macs_and_floor():
    samples = planted(9, Group("d", "r", "p", "f", "s"), np.random.default_rng(3))
    some = [replace(s, features=None) if index < 2 else s for index, s in enumerate(samples)]
    assert loo_errors(some)["s"].features is None and loo_errors(some)["s"].best == "MACs + floor"
    assert featured(samples, "s") == samples and featured(some, "s") == []


def test_builds_of_one_network_leave_together():
    samples = planted(8, Group("d", "r", "p", "f", "s"), np.random.default_rng(4))
    odd = replace(samples[0], us=samples[0].us * 5)  # beside its twin it would be predicted well
    twins = [odd, replace(odd, network="n0 again"), *samples[1:]]
    assert loo_errors(twins)["s"].floor > (2 * 0.5) / 9


def test_a_network_is_rebuilt_only_where_its_multiply_adds_agree():
    assert rebuild.build_id("vgg16_bn", "224x224") == rebuild.build_id("vgg16", "224x224") == "vgg16@224x224"
    assert rebuild.build_id("yolov8n", "640x640") == ""
    known = rebuild.read_features()["resnet18@224x224"]
    assert rebuild.same_network(known, 1814) and not rebuild.same_network(known, 2100)
    assert not rebuild.same_network(None, 1814)


def test_shipped_features_are_those_of_the_networks():
    assert rebuild.traced_features("resnet8@32x32") == rebuild.read_features()["resnet8@32x32"]


@pytest.mark.parametrize(("name", "precision"), [("raspberry-pi-5", "fp32"), ("raspberry-pi-4", "int8")])
def test_public_table_still_gives_the_shipped_coefficients(name, precision):
    folder = os.environ.get("EDGECOMPRESS_DATA")
    if not folder:
        pytest.skip("EDGECOMPRESS_DATA is not set: the public measurements are not here")
    rows = fit_estimators.read_rows(Path(folder))
    recipe = RECIPES[name][precision]
    step = fit_estimators.scale_errors(rows)[recipe.check]
    samples = fit_estimators.samples_of(rows, recipe.pool, rebuild.read_features())
    assert all(sample.us > 0 and sample.mmacs > 0 for sample in samples)
    anew = fit_estimators.coefficients(samples, recipe, step, fit_estimators.PUBLIC)
    shipped = read_estimators().classes[name][precision]
    assert anew.model == shipped.model and anew.rows == shipped.rows
    assert anew.us_per.values == pytest.approx(shipped.us_per.values, rel=0.01, abs=1e-3)
    assert anew.errors.floor == pytest.approx(shipped.errors.floor, rel=0.01)
    assert anew.band == pytest.approx(shipped.band, rel=0.01)


def test_every_build_that_the_recipes_read_is_in_the_shipped_file():
    folder = os.environ.get("EDGECOMPRESS_DATA")
    if not folder:
        pytest.skip("EDGECOMPRESS_DATA is not set: the public measurements are not here")
    needed = set(fit_estimators.builds(fit_estimators.read_rows(Path(folder)))) - {""}
    assert needed == set(rebuild.read_features())
