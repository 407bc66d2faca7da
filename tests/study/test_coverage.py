"""Intervals hold the truth as often as they claim to, on simulated queues; a small form of benchmarks/coverage.py.

The bounds follow from the binomial law of the number of trials: an interval that holds the truth in 95 % of all cases
passes but for one seed in 10,000. Seeds are fixed, so that no run fails by chance; the committed table has the digits.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

FILE = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
SPEC = importlib.util.spec_from_file_location("headrace_coverage", FILE)  # `coverage` is a package of others
coverage = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = coverage
SPEC.loader.exec_module(coverage)

TRIALS = 300
MOST_MISSES = int(binom.ppf(1 - 1e-4, TRIALS, 0.05))
FEWEST_MISSES = int(binom.ppf(1e-4, TRIALS, 0.05))
QUANTITIES = (coverage.MEAN, coverage.P50, coverage.P99, coverage.THROUGHPUT, coverage.GOODPUT)


def misses(share):
    return round((1 - share) * TRIALS)


@pytest.mark.parametrize(("law", "load", "runs"), [("M/M/1", 0.8, 5), ("M/D/1", 0.5, 10)])
def test_ratios_hold_the_truth_as_often_as_they_claim(law, load, runs):
    row = coverage.ratio_row(np.random.default_rng(0), TRIALS, law, load, runs, 2000)
    for name in QUANTITIES:
        assert FEWEST_MISSES <= misses(row.shares[name]) <= MOST_MISSES, name


def test_the_same_bound_refuses_requests_taken_as_independent():
    rng, held = np.random.default_rng(1), 0
    for _ in range(TRIALS):
        times = coverage.two_sides(rng, "M/M/1", 0.8, 5, 2000).responses
        low, high = coverage.of_requests_as_independent(rng, times)
        held += low <= np.log(coverage.FASTER) <= high
    assert TRIALS - held > 3 * MOST_MISSES


def test_the_p99_of_one_run_is_within_its_interval_and_not_within_that_of_independent_requests():
    row = coverage.single_row(np.random.default_rng(2), TRIALS, "M/M/1", 0.5, 20_000)
    assert row.shares["refused"] == 0
    assert misses(row.shares["covers"]) <= MOST_MISSES
    assert misses(row.shares["as if independent"]) > 3 * MOST_MISSES


def test_a_run_at_high_load_that_is_too_short_is_refused():
    assert coverage.single_row(np.random.default_rng(3), 20, "M/M/1", 0.9, 20_000).shares["refused"] == 1


@pytest.mark.parametrize(("runs", "blocks"), [(5, 0.0), (5, 2.0), (10, 1.0)])
def test_pairing_where_it_narrows_costs_no_coverage(runs, blocks):
    row = coverage.pairing_row(np.random.default_rng(4), 1000, runs, blocks)
    assert round((1 - row.shares["covers"]) * 1000) <= binom.ppf(1 - 1e-4, 1000, 0.06)


def test_steady_queues_are_rarely_called_otherwise_and_overloaded_ones_mostly():
    rng, called = np.random.default_rng(5), "called not steady"
    steady = coverage.steady_row(rng, 200, "M/D/1", 0.8, 5000).shares[called]
    assert round(steady * 200) <= binom.ppf(1 - 1e-4, 200, 0.01)
    assert coverage.steady_row(rng, 50, "M/D/1", 1.2, 5000).shares[called] == 1


def test_of_two_tests_of_overload_one_is_seldom_wrong_and_the_other_sees_more():
    steady, latency = "response times: not steady", "number in the system: no latency exists"
    rng = np.random.default_rng(7)
    stable = coverage.empty_row(rng, 400, "M/M/1", 0.9, 400).shares
    assert stable[latency] < stable[steady], "what takes latencies away errs less often in short runs"
    overloaded = coverage.empty_row(rng, 100, "M/D/1", 1.05, 4000).shares
    assert overloaded[steady] > overloaded[latency], "what warns sees slighter overload"
    assert coverage.empty_row(rng, 50, "M/M/1", 4.0, 50).shares == {steady: 0.0, latency: 1.0}


def test_the_simulated_queue_is_the_one_of_the_textbook():
    rng = np.random.default_rng(6)
    exponential = coverage.responses(rng, "M/M/1", 0.5, (50, 20_000))
    assert exponential.mean() == pytest.approx(1 / (1 - 0.5), rel=0.02)
    assert np.quantile(exponential, 0.99) == pytest.approx(-np.log(0.01) / (1 - 0.5), rel=0.03)
    fixed = coverage.responses(rng, "M/D/1", 0.5, (50, 20_000))
    assert fixed.mean() == pytest.approx(1 + 0.5 / (2 * (1 - 0.5)), rel=0.01)  # Pollaczek and Khinchine


def test_rows_that_were_kept_are_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(
        coverage, "TABLES", {"Pairing": ((coverage.pairing_row, (5, 0.0)), (coverage.pairing_row, (5, 1.0)))}
    )
    kept = tmp_path / "rows.json"
    *_, done = coverage.compute(20, 4, 1, kept)
    first, second = done["Pairing"]
    held = json.loads(kept.read_text())
    held["rows"][0]["what"] = "as it was kept"
    kept.write_text(json.dumps(held))
    (once,) = coverage.compute(20, 4, 1, kept)
    again = once["Pairing"]
    assert [row.what for row in again] == ["as it was kept", second.what]
    assert [row.shares for row in again] == [first.shares, second.shares]
    with pytest.raises(SystemExit, match="made with seed 20 and 4 trials"):
        next(coverage.compute(21, 4, 1, kept))


def test_a_page_has_a_line_per_row_and_says_how_it_was_made():
    rows = [coverage.pairing_row(np.random.default_rng(0), 4, 5, 0.0)]
    page = coverage.render({"Pairing": rows}, 20, 4, "python benchmarks/coverage.py")
    assert "`python benchmarks/coverage.py`; Python 3." in page
    assert "seed 20, 4 trials a row" in page
    assert "| 5 blocks, their spread 0.0 of that within | " in page
    assert f"Not computed yet: {sum(map(len, coverage.TABLES.values())) - 1} of" in page
