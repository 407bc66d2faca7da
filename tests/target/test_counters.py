"""The counters that the display reads: latencies land in buckets near enough, and an interval is what is new."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.target.counters import (
    ANSWERED,
    BUCKETS,
    FAILED,
    FIRST_BUCKET,
    Interval,
    Reader,
    bucket,
    shared_words,
    words_of,
)

MS = 1_000_000


@given(st.integers(0, 10**12))
def test_a_latency_is_read_back_within_an_eighth(latency_ns):
    shared = shared_words(1)
    words_of(shared, 0)[bucket(latency_ns)] += 1
    shown_s = Reader(shared, 1).interval(1).p50_s
    assert latency_ns / 1e9 <= shown_s <= max(latency_ns * 1.126, 2048) / 1e9 + 1.1e-6


@given(st.integers(0, 2**62))
def test_every_latency_has_a_bucket(latency_ns):
    assert FIRST_BUCKET <= bucket(latency_ns) < FIRST_BUCKET + BUCKETS


def test_an_interval_is_what_is_new_of_all_generators():
    shared = shared_words(2)
    reader = Reader(shared, 2)
    for generator, latency_ns in ((0, MS), (1, 9 * MS)):
        words = words_of(shared, generator)
        words[ANSWERED] += 1
        words[bucket(latency_ns)] += 1
    words_of(shared, 1)[FAILED] += 3
    first = reader.interval(0.5)
    assert (first.rate, first.failed) == (4.0, 3)
    assert first.p50_s == pytest.approx(0.001, rel=0.13)
    assert first.p99_s == pytest.approx(0.009, rel=0.13)
    assert reader.interval(0.5) == Interval(0.0, None, None, 0)
    assert reader.totals()[ANSWERED] == 2
