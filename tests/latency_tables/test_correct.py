"""The correction by whole networks: it finds what samples were made of, and says how well it predicts others."""

import numpy as np
import pytest

from edgecompress.latency_tables.correct import CLASSES, FEWEST_NETWORKS, Sample, fit, share_cold


def samples(count, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        width = generator.uniform(0.2, 1.0)
        sums = {"kxk": 900 * width**2, "1x1": 200 * width * generator.uniform(0.7, 1.3), "edges": 80 * width}
        sums["cold"] = 600 * width**2
        weights = int(60e6 * width**2)
        us = 1.1 * sums["kxk"] + 0.9 * sums["1x1"] + sums["edges"] + share_cold(weights, 2**24) * sums["cold"] - 60
        found.append(Sample(sums, weights, us * generator.normal(1, noise)))
    return found


def test_it_predicts_networks_that_it_was_not_fitted_to():
    correction = fit("n", "fp32", samples(20))
    errors = [correction(s.sums, s.weight_bytes) / s.measured_us - 1 for s in samples(20, seed=1)]
    assert np.abs(errors).mean() < 0.02
    assert set(correction.factors) == set(CLASSES) and correction.networks == 20


def test_its_error_is_that_of_samples_left_out():
    assert fit("n", "fp32", samples(20, noise=0.05)).error == pytest.approx(0.04, abs=0.02)


def test_too_few_networks_give_no_correction():
    assert fit("n", "fp32", samples(FEWEST_NETWORKS - 1)) is None


def test_weights_beyond_the_cache_are_cold():
    shares = [share_cold(size, 1e6) for size in (1e4, 1e6, 1e8)]
    assert shares[0] < 0.01 and shares[1] == 0.5 and shares[2] > 0.99
