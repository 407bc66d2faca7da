"""Intervals and the number of runs, against answers computed otherwise."""

import math

import numpy as np
import pytest
from scipy import stats as reference
from scipy.signal import lfilter

from headrace.errors import InvalidOption
from headrace.study import intervals, power
from headrace.study.intervals import Runs
from headrace.study.welch import Moments

BASE = (10.0, 20.0, 40.0, 15.0, 30.0, 25.0)
BLOCKS = tuple(range(6))
JITTER = (1.11, 1.09, 1.10, 1.12, 1.08, 1.10)
CANDIDATE = tuple(value * factor for value, factor in zip(BASE, JITTER, strict=True))


def test_runs_of_the_same_blocks_are_paired_where_that_narrows_the_interval():
    ratio = intervals.compare_runs(Runs(values=BASE, repeats=BLOCKS), Runs(values=CANDIDATE, repeats=BLOCKS))
    expected = reference.ttest_1samp(np.log(JITTER), 0).confidence_interval(0.95)
    assert ratio.paired
    assert math.log(ratio.interval.low) == pytest.approx(expected.low)
    assert math.log(ratio.interval.high) == pytest.approx(expected.high)


def test_pairs_are_found_by_block_and_not_by_place():
    backwards = Runs(values=CANDIDATE[::-1], repeats=BLOCKS[::-1])
    ratio = intervals.compare_runs(Runs(values=BASE, repeats=BLOCKS), backwards)
    assert ratio.interval.high / ratio.interval.low < 1.05


def test_runs_are_not_paired_where_it_narrows_little():
    level = Runs(values=(99.0, 101.0, 100.0, 98.0, 102.0, 100.0), repeats=BLOCKS)
    other = Runs(values=(100.0, 99.0, 102.0, 101.0, 98.0, 100.0), repeats=BLOCKS)
    assert not intervals.compare_runs(level, other).paired


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param((), (), id="unknown blocks"),
        pytest.param(BLOCKS, (1, 2, 3, 4, 5, 6), id="other blocks"),
        pytest.param((0, 0, 1, 2, 3, 4), (0, 0, 1, 2, 3, 4), id="a block twice"),
        pytest.param((None, 1, 2, 3, 4, 5), (None, 1, 2, 3, 4, 5), id="a run of no block"),
    ],
)
def test_runs_that_are_no_pairs_are_not_paired(ours, theirs):
    ratio = intervals.compare_runs(Runs(values=BASE, repeats=ours), Runs(values=CANDIDATE, repeats=theirs))
    expected = reference.ttest_ind(np.log(CANDIDATE), np.log(BASE), equal_var=False).confidence_interval(0.95)
    assert not ratio.paired
    assert math.log(ratio.interval.high) == pytest.approx(expected.high)


def test_four_pairs_are_too_few_to_choose():
    sides = (Runs(values=side[:4], repeats=BLOCKS[:4]) for side in (BASE, CANDIDATE))
    assert not intervals.compare_runs(*sides).paired


def test_halves_alternate_by_block_or_else_by_order():
    plain, blocked = Runs(values=BASE[:5]), Runs(values=BASE[:5], repeats=(4, 3, 2, 1, 0))
    assert [half.values for half in plain.halves()] == [(10.0, 40.0, 30.0), (20.0, 15.0)]
    assert [half.values for half in blocked.halves()] == [(30.0, 40.0, 10.0), (15.0, 20.0)]


def test_a_percentile_of_independent_values_has_nearly_the_binomial_interval():
    widths, exact = [], []
    for seed in range(40):
        values = np.random.default_rng(seed).exponential(size=10_000)
        found = intervals.percentile_interval(values, 90)
        assert found.value == np.percentile(values, 90)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
        low, high = np.sort(values)[reference.binom.ppf((0.025, 0.975), 10_000, 0.9).astype(int)]
        exact.append(high - low)
    # Wider by Student's factor of 16 batches (9 %), and since no run is worth more values than it has.
    assert 1.05 < np.mean(widths) / np.mean(exact) < 1.25


def test_values_that_follow_from_each_other_widen_a_percentiles_interval():
    noise = np.random.default_rng(0).normal(size=200_000)
    alone, slow = np.exp(noise), np.exp(lfilter([math.sqrt(1 - 0.9**2)], [1, -0.9], noise))
    widths = [
        math.log(found.high / found.low) for found in (intervals.percentile_interval(v, 99) for v in (alone, slow))
    ]
    assert widths[1] > 1.5 * widths[0]


def test_a_run_too_short_for_its_p99_is_told_how_long_it_must_be():
    slow = np.exp(lfilter([1.0], [1, -0.9], np.random.default_rng(0).normal(size=5000)))
    with pytest.raises(
        InvalidOption, match=r"p99 of 5000 requests: 9 successive ones are worth one, .* about 9\d\d\d;"
    ):
        intervals.percentile_interval(slow, 99)


def test_a_runs_own_variance_is_that_of_its_mean_and_percentile():
    rng = np.random.default_rng(0)
    runs = rng.gamma(4, 1, (300, 2000))
    for percentile, values in ((None, runs.mean(axis=1)), (90.0, np.percentile(runs, 90, axis=1))):
        estimates = [intervals.own_variance(run, percentile) for run in runs]
        assert np.mean(estimates) == pytest.approx(np.log(values).var(ddof=1), rel=0.25)


def spread(n, std=0.05):
    return Moments(mean=0.0, std=std, n=n)


def test_as_many_more_runs_as_it_takes_and_no_more():
    found = power.more_runs([spread(5), spread(5)], 0.02).likely
    assert found is not None

    def half(n):
        return reference.t.ppf(0.975, 2 * n - 2) * 0.05 * math.sqrt(2 / n)

    assert half(5 + found) <= math.log(1.02) < half(5 + found - 1)


def test_pairs_count_as_pairs():
    found = power.more_runs([spread(5)], 0.02).likely
    half = [reference.t.ppf(0.975, 5 + more - 1) * 0.05 / math.sqrt(5 + more) for more in (found, found - 1)]
    assert half[0] <= math.log(1.02) < half[1]


def test_the_cautious_number_takes_the_spread_at_its_upper_limit():
    upper = 0.05 * math.sqrt(4 / reference.chi2.ppf(0.2, 4))
    found = power.more_runs([spread(5), spread(5)], 0.05)
    assert found.cautious == power.more_runs([spread(5, upper), spread(5, upper)], 0.05).likely
    assert found.cautious > found.likely


def test_advice_in_words():
    assert str(power.more_runs([spread(5), spread(5)], 0.001)) == "more than 200 more runs"
    assert str(power.more_runs([spread(5, 0.0), spread(5, 0.0)], 0.02)) == "0 more runs"
    assert str(power.MoreRuns(likely=14, cautious=38)) == "14 more runs (up to 38)"
    assert str(power.MoreRuns(likely=180, cautious=None)) == "180 more runs (up to 200 and above)"
