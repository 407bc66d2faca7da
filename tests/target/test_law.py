"""The null server's law is what it says, and its queue is Lindley's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import InvalidOption
from headrace.target.law import DRAWS, Fate, Law, Queue, parse_law

MS = 1_000_000


def lindley(arrivals, services):
    """W(n+1) = max(0, W(n) + S(n) - T(n)): waiting times of a single server (Lindley, 1952)."""
    waits = [0]
    for service, gap in zip(services, np.diff(arrivals), strict=False):
        waits.append(max(0, waits[-1] + service - int(gap)))
    return np.asarray(arrivals) + np.asarray(waits) + np.asarray(services)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=60),
    st.lists(st.integers(0, 15), min_size=60, max_size=60),
)
def test_one_server_follows_lindleys_recursion(gaps, services):
    arrivals = np.cumsum(gaps).tolist()
    services = services[: len(arrivals)]
    queue = Queue(Law())
    due = [queue.due_ns(at, service) for at, service in zip(arrivals, services, strict=True)]
    assert due == lindley(arrivals, services).tolist()


def test_several_servers_take_the_next_in_line_as_soon_as_one_is_free():
    queue = Queue(Law(servers=2))
    assert [queue.due_ns(0, 10), queue.due_ns(0, 4), queue.due_ns(1, 5), queue.due_ns(1, 1)] == [10, 4, 9, 10]


@pytest.mark.parametrize(
    ("arrival", "service", "due"),
    [
        (0, 5, 5),  # done before the stall
        (8, 5, 33),  # 2 of 5 done before, 3 after
        (12, 5, 35),  # begins when it is over
        (30, 5, 35),
        (40, 5, 45),
    ],
)
def test_work_stands_still_during_a_stall(arrival, service, due):
    queue = Queue(Law(stall_ns=20, stall_at_ns=10))
    queue.due_ns(0, 0)
    assert queue.due_ns(arrival, service) == due


def test_a_stall_is_counted_from_the_first_request():
    queue = Queue(Law(stall_ns=20, stall_at_ns=10))
    assert [queue.due_ns(1000, 5), queue.due_ns(1012, 5)] == [1005, 1035]


def test_the_mean_of_exponential_times_is_the_laws():
    times = Law(kind="exponential", service_ns=2 * MS, seed=1).service_times_ns()
    assert np.mean(times) == pytest.approx(2 * MS, rel=0.02)
    assert np.std(times) == pytest.approx(2 * MS, rel=0.02)
    assert times == Law(kind="exponential", service_ns=2 * MS, seed=1).service_times_ns()
    assert times != Law(kind="exponential", service_ns=2 * MS, seed=2).service_times_ns()


def test_fates_have_exactly_their_shares():
    fates = Law(shed=0.02, wrong=0.01, drop=0.001).fates()
    counts = [fates.count(fate) for fate in (Fate.SHED, Fate.WRONG, Fate.DROP)]
    assert counts == [round(share * DRAWS) for share in (0.02, 0.01, 0.001)]
    assert fates[: len(fates) // 2].count(Fate.SHED) > 0 < fates[len(fates) // 2 :].count(Fate.SHED)


def test_a_law_is_read_from_a_url():
    assert parse_law("null://fixed?service=2ms&servers=3&stall=2s&stall_at=1s&shed=0.02&bytes=4096") == Law(
        service_ns=2 * MS, servers=3, stall_ns=2000 * MS, stall_at_ns=1000 * MS, shed=0.02, input_bytes=4096
    )
    assert parse_law("null://exponential?mean=0.5ms&seed=7&cached=1") == Law(
        kind="exponential", service_ns=MS // 2, seed=7, cached=True
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("null://uniform", "no law"),
        ("null://fixed?service=2", "a number and a unit"),
        ("null://fixed?mean=2ms", "mean is no word of law fixed"),
        ("null://fixed?shed=2", "a share from 0 to 1"),
        ("null://fixed?shed=0.7&drop=0.7", "together at most 1"),
        ("null://fixed?servers=0", "at least 1"),
        ("null://fixed?service", "NAME=VALUE"),
    ],
)
def test_what_is_no_law_is_refused(url, words):
    with pytest.raises(InvalidOption, match=words):
        parse_law(url)
