"""Metric definitions, against cases computed by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench import stats
from headrace.bench.record import PHASES, STATUSES, empty_records, measured, read_records, write_records

SECOND = 1_000_000_000
MEASURED = PHASES.index("measured")


def records_of(*requests, status="ok"):
    """Rows of (phase, rows, scheduled, issued, completed), times in seconds."""
    records = empty_records(len(requests))
    for index, (phase, rows, scheduled, issued, completed) in enumerate(requests):
        records["phase"][index] = PHASES.index(phase)
        records["rows"][index] = rows
        records["scheduled_ns"][index] = scheduled * SECOND
        records["issued_ns"][index] = issued * SECOND
        records["completed_ns"][index] = completed * SECOND
        records["status"][index] = STATUSES.index(status)
    return records


HAND = records_of(
    ("first", 4, 1, 1, 6),
    ("warm_up", 4, 7, 7, 9),
    ("measured", 4, 10, 10, 12),
    ("measured", 4, 10, 11, 14),
    ("measured", 2, 10, 12, 15),
)


def test_published_definitions_by_hand():
    metrics = stats.compute(HAND)
    assert metrics.warmup_latency_s == 5.0
    assert metrics.window_s == 5.0  # from 10 to 15
    assert metrics.rows == 10
    assert metrics.throughput_samples_per_s == 10 / 5
    assert metrics.response_time.mean == pytest.approx((2 + 4 + 5) / 3)
    assert (metrics.response_time.min, metrics.response_time.p50, metrics.response_time.max) == (2, 4, 5)
    assert metrics.service_time.mean == pytest.approx((2 + 3 + 3) / 3)
    assert metrics.issue_delay.mean == pytest.approx(1.0)
    assert (metrics.requests, metrics.errors, metrics.wrong, metrics.unanswered) == (3, 0, 0, 0)


def test_percentiles_interpolate_between_order_statistics():
    distribution = stats.Distribution.of(np.arange(1, 101, dtype=np.int64) * SECOND)
    assert distribution.p50 == pytest.approx(50.5)
    assert distribution.p90 == pytest.approx(90.1)
    assert distribution.p99 == pytest.approx(99.01)


@pytest.mark.parametrize(
    ("status", "count"),
    [("error", "errors"), ("wrong", "wrong"), ("unanswered", "unanswered")],
)
def test_one_bad_request_leaves_no_throughput_and_is_counted(status, count):
    records = HAND.copy()
    records["status"][3] = STATUSES.index(status)
    metrics = stats.compute(records)
    assert getattr(metrics, count) == 1
    assert metrics.throughput_samples_per_s is None
    assert metrics.response_time is None
    assert metrics.warmup_latency_s == 5.0


def test_a_bad_first_request_leaves_no_warmup_latency():
    records = HAND.copy()
    records["status"][0] = STATUSES.index("error")
    assert stats.compute(records).warmup_latency_s is None


def test_nothing_answered_has_no_window():
    metrics = stats.compute(records_of(("measured", 1, 1, 1, 0), status="unanswered"))
    assert (metrics.window_s, metrics.throughput_samples_per_s) == (None, None)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_laws_that_hold_for_every_run(delays):
    """Response = service + issue delay on average; the mean lies between the extremes; rows are conserved."""
    rows = [("measured", 3, 10, 10 + issue, 10 + issue + service) for issue, service in delays]
    metrics = stats.compute(records_of(*rows))
    assert metrics.rows == 3 * len(delays)
    assert metrics.response_time.mean == pytest.approx(metrics.service_time.mean + metrics.issue_delay.mean)
    for distribution in (metrics.response_time, metrics.service_time, metrics.issue_delay):
        values = dataclasses.astuple(distribution)
        assert min(values) == distribution.min
        assert max(values) == distribution.max
    if metrics.window_s:
        assert metrics.throughput_samples_per_s * metrics.window_s == pytest.approx(metrics.rows)
    else:
        assert metrics.throughput_samples_per_s is None


def test_records_survive_the_file(tmp_path):
    records = HAND.copy()
    records["status"][4] = STATUSES.index("wrong")
    records["worker"] = [0, 1, 2, 1, 0]
    write_records(records, tmp_path / "requests.parquet")
    read = read_records(tmp_path / "requests.parquet")
    assert (read == records).all()
    assert stats.compute(read) == stats.compute(records)
    assert len(measured(read)) == 3
