"""Correlation within a series, against processes whose truth is known."""

import numpy as np
import pytest
from scipy.signal import lfilter

from headrace.bench import correlation

N = 20_000


def autoregressive(phi, seed, n=N):
    return lfilter([1.0], [1.0, -phi], np.random.default_rng(seed).normal(size=n))


def test_autocovariances_are_those_of_the_definition():
    series = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    centred = series - 4
    expected = [centred @ centred / 5, centred[1:] @ centred[:-1] / 5, centred[2:] @ centred[:-2] / 5]
    assert correlation.autocovariances(series, 2) == pytest.approx(expected)


def test_the_block_length_is_near_the_best_one_of_an_autoregression():
    for phi in (0.3, 0.5, 0.8):
        best = (1.5 * (2 * phi / (1 - phi**2)) ** 2 * N) ** (1 / 3)
        lengths = [correlation.block_length(autoregressive(phi, seed)) for seed in range(20)]
        assert np.median(lengths) == pytest.approx(best, rel=0.15)


def test_independent_values_need_hardly_a_block():
    lengths = [correlation.block_length(autoregressive(0.0, seed)) for seed in range(20)]
    assert np.median(lengths) <= 5


def test_the_correlation_time_is_that_of_an_autoregression():
    times = [correlation.correlation_time(autoregressive(0.5, seed)) for seed in range(20)]
    assert np.mean(times) == pytest.approx((1 + 0.5) / (1 - 0.5), rel=0.05)


def test_the_variance_of_a_mean_is_that_of_an_autoregression():
    estimates = [correlation.variance_of_mean(autoregressive(0.5, seed)) for seed in range(20)]
    assert np.mean(estimates) == pytest.approx(1 / (1 - 0.5) ** 2 / N, rel=0.1)


def test_a_constant_series_depends_on_nothing():
    constant = np.full(100, 3.0)
    assert (correlation.block_length(constant), correlation.correlation_time(constant)) == (1, 1.0)
    assert correlation.variance_of_mean(constant) == 0.0
