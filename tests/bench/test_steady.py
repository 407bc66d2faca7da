"""Steadiness, on runs whose state is known. How often it errs is in tests/study/test_coverage.py."""

import numpy as np
import pytest

from headrace.bench import steady

N = 1000
SCHEDULED = np.arange(N, dtype=np.int64) * 1_000_000  # one each millisecond
NOISE = np.random.default_rng(0).exponential(5e6, N).astype(np.int64)


def test_response_times_without_a_trend_are_steady():
    verdict = steady.is_steady(SCHEDULED, NOISE)
    assert verdict.steady is True
    assert verdict.reason.startswith("no growth beyond chance (")


def test_a_growing_backlog_is_not_steady():
    verdict = steady.is_steady(SCHEDULED, NOISE + SCHEDULED // 20)  # 5 % more asked than served
    assert verdict.steady is False
    assert verdict.growth > 1
    assert verdict.p < 1e-3
    assert "more was asked than was served" in verdict.reason


def test_growth_is_relative_to_the_mean_response_time():
    verdict = steady.is_steady(SCHEDULED, 1_000_000_000 + SCHEDULED)  # from 1 s to 2 s
    assert verdict.growth == pytest.approx(1 / 1.5, rel=2e-3)


def test_growth_that_is_certain_and_small_is_steady():
    verdict = steady.is_steady(SCHEDULED, 1_000_000_000 + SCHEDULED // 10)  # from 1.0 s to 1.1 s
    assert (verdict.steady, verdict.p < 1e-5) == (True, True)


def test_a_falling_response_time_is_no_backlog():
    assert steady.is_steady(SCHEDULED, SCHEDULED[::-1] + 1).steady is True


def test_requests_are_judged_in_the_order_of_the_plan():
    order = np.random.default_rng(1).permutation(N)
    assert steady.is_steady(SCHEDULED[order], (NOISE + SCHEDULED // 20)[order]).steady is False


def test_a_burst_cannot_be_judged():
    verdict = steady.is_steady(np.full(N, 7), SCHEDULED + 1)
    assert (verdict.steady, verdict.growth) == (None, None)
    assert "scheduled at once" in verdict.reason


def test_few_requests_cannot_be_judged():
    verdict = steady.is_steady(SCHEDULED[:199], NOISE[:199])
    assert (verdict.steady, verdict.reason) == (None, "199 requests are too few; it takes 200")


def test_the_chance_of_an_order_is_counted_out():
    cases = (([1, 2, 3, 4], 1 / 24), ([4, 3, 2, 1], 1), ([1, 3, 2], 3 / 6), ([2, 1], 1), ([1, 2], 1 / 2))
    for values, chance in cases:
        assert steady.growth_p_value(np.array(values, dtype=float)) == pytest.approx(chance)
