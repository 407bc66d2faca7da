"""Which rate comes next."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.search.bisection import LEAST, MOST, Bisection


def found(capacity: float, guess: float, resolution: float = 0.05) -> tuple[Bisection, list[float]]:
    bisection, tried = Bisection(guess, resolution), []
    while (rate := bisection.next()) is not None:
        tried.append(rate)
        bisection.tell(rate, holds=rate <= capacity)
        assert len(tried) < 40
    return bisection, tried


@given(st.floats(0.01, 50), st.sampled_from([0.01, 0.05, 0.3]))
def test_any_capacity_is_found_within_the_resolution(capacity, resolution):
    bisection, _ = found(capacity, guess=1.0, resolution=resolution)
    assert bisection.held <= capacity < bisection.failed <= bisection.held * (1 + resolution)


def test_a_good_guess_needs_few_rates():
    assert len(found(capacity=77, guess=100)[1]) <= 6


def test_a_rate_above_the_guess_is_tried_only_if_all_below_hold():
    _, tried = found(capacity=0.9, guess=1.0)
    assert max(tried) <= 1.0
    _, tried = found(capacity=1.5, guess=1.0)
    assert tried[0] < 1.0 < max(tried)


@pytest.mark.parametrize(("capacity", "end"), [(0.0, "nothing holds"), (1e9, "anything holds")])
def test_a_search_ends_where_there_is_no_bracket(capacity, end):
    bisection, tried = found(capacity, guess=1.0)
    assert (bisection.held is None) == (end == "nothing holds")
    assert (bisection.failed is None) == (end == "anything holds")
    assert all(LEAST <= rate <= MOST for rate in tried)


def test_a_verdict_that_is_taken_back_moves_the_search_down():
    bisection, _ = found(capacity=0.8, guess=1.0)
    lucky = bisection.held
    bisection.tell(lucky, holds=False)
    assert bisection.failed == lucky
    assert bisection.held < lucky
    assert bisection.held < bisection.next() < lucky


def test_what_held_above_what_did_not_is_not_believed():
    bisection = Bisection(1.0, 0.05)
    bisection.tell(0.9, holds=True)
    bisection.tell(0.5, holds=False)
    assert bisection.held is None
