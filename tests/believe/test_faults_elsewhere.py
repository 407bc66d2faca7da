"""Faults that were seen in load generators of others, each as a test that Headrace does not have it."""

import numpy as np
import pytest

from headrace.bench import stats, validity
from headrace.bench.record import PHASES, STATUSES, empty_records

S = 1_000_000_000


def test_a_mean_does_not_overflow_where_the_sum_of_nanoseconds_would():
    """One printed a mean of 24 s where half of the responses took 335."""
    long_ns = np.full(40, 2**60, dtype=np.int64)
    with np.errstate(over="ignore"):
        assert long_ns.sum() != 40 * 2**60, "the sum alone overflows"
    times = stats.Distribution.of(long_ns)
    assert times.mean == pytest.approx(2**60 / S)
    assert validity.mean_between("response time", times) == []


@pytest.mark.parametrize("count", [8, 80, 800])
def test_throughput_does_not_depend_on_how_many_requests_were_asked_for(count):
    """One printed 7.98 requests/s for a server that answered 76, when it was told how many requests to send."""
    records = empty_records(count)
    records["phase"], records["status"], records["rows"] = PHASES.index("measured"), STATUSES.index("ok"), 1
    records["scheduled_ns"] = S + (np.arange(count) * S / 76).astype(np.int64)
    records["issued_ns"] = records["scheduled_ns"]
    records["completed_ns"] = records["scheduled_ns"] + S // 76
    assert stats.compute(records).throughput_samples_per_s == pytest.approx(76, rel=1e-6)
