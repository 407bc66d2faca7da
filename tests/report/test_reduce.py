"""What is made small enough to draw keeps its extremes; labels and ticks lie where they can be read."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.report.reduce import POINTS, VALUES_NEEDED, envelope, tail
from headrace.report.svg import Chart, Label, Scale, linear_ticks, log_ticks, shorten, spread_labels
from headrace.report.words import digits, duration, short

times = st.lists(st.integers(1, 10**12), min_size=1, max_size=300)


@given(times)
def test_a_tail_ends_at_the_longest_and_never_falls(values):
    found = tail(np.array(values))
    assert found.max_s == max(values) / 1e9
    assert (np.diff(found.at_s) >= 0).all()
    assert (np.diff(found.share_above) < 0).all()
    assert set(found.percentiles) == {name for name, needed in VALUES_NEEDED.items() if len(values) >= needed}


def test_nothing_has_no_tail():
    assert tail(np.empty(0, np.int64)) is None


@given(st.integers(0, 2**32 - 1), st.integers(POINTS + 1, 4 * POINTS))
def test_an_envelope_keeps_the_extremes_and_holds_every_value(seed, count):
    random = np.random.default_rng(seed)
    at_ns = random.integers(0, 10**10, count)
    values = random.lognormal(10, 2, count).astype(np.int64) + 1
    found = envelope(at_ns, values, 0)
    assert found.is_reduced
    assert found.count == count
    assert found.low.min() == values.min() / 1e9
    assert found.high.max() == values.max() / 1e9
    assert (found.low <= found.middle).all()
    assert (found.middle <= found.high).all()


def test_a_stall_is_a_gap_and_what_waited_stands_out():
    at_ns = np.concatenate([np.arange(0, 10**9, 10**6), np.arange(3 * 10**9, 4 * 10**9, 10**6)])
    values = np.full(len(at_ns), 10**6)
    values[1000] = 2 * 10**9
    found = envelope(at_ns, values, 0)
    assert np.diff(found.at_s).max() > 1.9
    assert found.high.max() == 2.0


def test_few_values_are_kept_one_by_one():
    found = envelope(np.array([5, 1, 3]), np.array([50, 10, 30]), 1)
    assert not found.is_reduced
    np.testing.assert_allclose(found.middle, [10e-9, 30e-9, 50e-9])
    np.testing.assert_allclose(found.at_s, [0, 2e-9, 4e-9])


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_labels_are_moved_apart_and_stay_within(ys):
    placed = spread_labels([Label(y, "x", "") for y in ys], 10, 300)
    assert all(below.y - above.y >= 14.999 for above, below in pairwise(placed))
    assert all(10 - 1e-9 <= label.y <= 300 for label in placed)


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e4))
def test_ticks_lie_within_the_bounds_and_are_enough(low, factor):
    high = low * factor
    for found in (log_ticks(low, high), linear_ticks(low, high)):
        assert len(found) >= 2
        assert all(low * 0.998 <= tick <= high * 1.002 for tick in found)


@pytest.mark.parametrize("log", [False, True])
def test_a_scale_maps_its_bounds_to_its_ends(log):
    scale = Scale(2.0, 200.0, 50.0, 450.0, log)
    assert (scale(2.0), scale(200.0)) == pytest.approx((50.0, 450.0))
    assert scale(20.0) == pytest.approx(250.0 if log else 50 + 400 * 18 / 198)


def test_a_long_text_is_cut_with_an_ellipsis():
    assert shorten("four", 100) == "four"
    assert shorten("a" * 50, 70).endswith("…")
    assert len(shorten("a" * 50, 70)) == 10


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(None, "–"), (0, "0 s"), (12.34, "12.3 s"), (0.0123, "12.3 ms"), (1.5e-5, "15.0 µs"), (999e-6, "999 µs")],  # noqa: RUF001
)
def test_times_have_the_unit_that_fits(value_s, text):
    assert duration(value_s) == text


def test_numbers_have_three_digits():
    assert [digits(value) for value in (83131.2, 99.96, 9.996, 1.234, 0.12345)] == [
        "83,131",
        "100",
        "10.0",
        "1.23",
        "0.123",
    ]
    assert [short(value) for value in (20000, 1.5e6, 250)] == ["20k", "1.5M", "250"]


def test_texts_in_a_chart_are_escaped():
    chart = Chart('a "title" & <more>')
    chart.text(1, 2, "<b>")
    chart.dot(1, 2, "f0", "<i>")
    done = chart.done()
    assert "<b>" not in done
    assert "<i>" not in done
    assert "&quot;title&quot; &amp; &lt;more&gt;" in done
