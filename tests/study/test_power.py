"""How small a difference some runs could tell."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_ind

from headrace.study.power import smallest_ratio
from headrace.study.welch import Moments, detectable

TEN = Moments(mean=100.0, std=5.0, n=10)


@pytest.mark.parametrize(("n", "sigmas"), [(10, 1.3249), (20, 0.9091), (64, 0.4991)])
def test_the_detectable_difference_is_the_one_of_the_tables(n, sigmas):
    """Cohen's d of a two-sided t-test at 5 % and 80 %, as power tables have it."""
    side = Moments(mean=0.0, std=1.0, n=n)
    assert detectable((side, side), 0.8) == pytest.approx(sigmas, rel=1e-3)


@pytest.mark.parametrize("spreads", [(0.05, 0.05), (0.02, 0.15)], ids=["like spreads", "unlike spreads"])
def test_a_ratio_of_that_size_is_told_in_eight_experiments_of_ten(spreads):
    base, candidate = (Moments(mean=100.0, std=100 * spread, n=10) for spread in spreads)
    effect = math.log(smallest_ratio(base, candidate))
    rng = np.random.default_rng(0)
    sigmas = [math.sqrt(math.log1p(spread**2)) for spread in spreads]
    ours, theirs = rng.normal(0, sigmas[0], (4000, 10)), rng.normal(effect, sigmas[1], (4000, 10))
    told = ttest_ind(theirs, ours, axis=1, equal_var=False).pvalue < 0.05
    assert told.mean() == pytest.approx(0.8, abs=0.03)


def test_more_runs_less_spread_and_less_power_tell_smaller_ratios():
    usual = smallest_ratio(TEN, TEN)
    assert usual > 1
    assert smallest_ratio(Moments(mean=100.0, std=5.0, n=40), TEN) < usual
    assert smallest_ratio(Moments(mean=100.0, std=1.0, n=10), TEN) < usual
    assert smallest_ratio(TEN, TEN, power=0.5) < usual
    assert smallest_ratio(Moments(mean=1000.0, std=50.0, n=10), TEN) == pytest.approx(usual), "sizes do not matter"
