"""What is true of a law under each load, against values worked out by hand."""

import pytest

from headrace.config import LoadConfig
from headrace.referee.truth import truth
from headrace.target.law import parse_law


def of(url, samples=1, **load):
    return truth(parse_law(url), LoadConfig(**load), samples)


def test_one_at_a_time_takes_the_service_time():
    found = of("null://fixed?service=2ms", kind="closed", concurrency=1, duration_s=1)
    assert found.requests == 500
    assert found.throughput == pytest.approx(500)
    assert found.from_schedule.p99 == found.from_send.min == 0.002


def test_rows_of_a_request_are_samples():
    assert of("null://fixed?service=2ms", 8, kind="closed", concurrency=1, num_iters=10).throughput == pytest.approx(
        4000
    )


def test_many_in_flight_queue_behind_each_other():
    found = of("null://fixed?service=2ms", kind="closed", concurrency=8, num_iters=100)
    assert found.from_send.max == 0.016
    assert found.throughput == pytest.approx(500)


def test_a_burst_is_answered_one_by_one():
    found = of("null://fixed?service=2ms", kind="burst", num_iters=100)
    assert found.from_schedule.max == 0.2
    assert found.from_schedule.p50 == pytest.approx(0.101)


def test_a_stall_meets_one_request_of_a_closed_loop_and_many_of_a_schedule():
    stall = "null://fixed?service=2ms&stall=2s&stall_at=1s"
    closed = of(stall, kind="closed", concurrency=1, duration_s=4)
    planned = of(stall, kind="constant", rate=200, duration_s=4)
    assert closed.from_send.p99 == 0.002
    assert closed.from_send.max == pytest.approx(2.0, abs=0.003)
    assert planned.from_schedule.p99 > 1.9
