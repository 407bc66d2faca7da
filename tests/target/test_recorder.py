"""What generators wrote becomes one file in order of time, in memory that does not grow with it."""

import os
import resource
import time

import numpy as np
import pytest

from headrace.bench import stats
from headrace.bench.record import PHASES, empty_records, read_records
from headrace.target.recorder import OK, SENT_DTYPE, Recorder, join

MILLION = 1_000_000


def written(folder, number, generators, count):
    sent = np.zeros(count, dtype=SENT_DTYPE)
    sent["scheduled_ns"] = 1000 + np.arange(number, count * generators, generators) * 100_000
    sent["issued_ns"] = sent["scheduled_ns"] + 7
    sent["completed_ns"] = sent["issued_ns"] + 2_000_000
    sent["payload"] = np.arange(count) % 4
    sent["status"] = OK
    np.save(folder / f"{number}.npy", sent)
    return folder / f"{number}.npy"


def test_generators_are_joined_in_order_of_time(tmp_path):
    before = empty_records(3)
    paths = [written(tmp_path, number, 3, 50) for number in range(3)]
    rows = np.array([1, 2, 3, 4], dtype=np.int32)
    slim = join(before, paths, rows, tmp_path / "requests.parquet")
    records = read_records(tmp_path / "requests.parquet")
    assert records["index"].tolist() == list(range(153))
    measured = records[records["phase"] == PHASES.index("measured")]
    assert measured["generator"].tolist() == [0, 1, 2] * 50
    assert (np.diff(measured["scheduled_ns"]) == 100_000).all()
    assert measured["rows"].tolist() == rows[measured["batch"]].tolist()
    for name in slim.dtype.names:
        assert slim[name].tolist() == records[name].tolist()
    assert stats.compute(slim) == stats.compute(records)


def test_a_recorder_keeps_what_it_is_told(tmp_path):
    recorder = Recorder(3)
    for number in range(2):
        recorder.scheduled[number], recorder.issued[number], recorder.completed[number] = number, number + 1, number + 2
        recorder.status[number] = OK
    recorder.save(tmp_path / "0.npy", 2, np.array([5, 6], dtype=np.int32))
    assert np.load(tmp_path / "0.npy").tolist() == [(0, 1, 2, 5, OK), (1, 2, 3, 6, OK)]


def test_a_closed_loop_has_room_for_all_that_a_run_may_send_and_takes_memory_as_it_goes():
    before = resident_bytes()
    recorder = Recorder(None)
    recorder.issued[recorder.capacity - 1] = 1
    assert resident_bytes() - before < 64 * MILLION


def resident_bytes():
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_requests_take_bounded_memory(tmp_path):
    """As many as HEADRACE_MANY_REQUESTS says (10 million: 1.4 GB at most), 300,000 without."""
    count = int(os.environ.get("HEADRACE_MANY_REQUESTS", "300000"))
    paths = [written(tmp_path, number, 2, count // 2) for number in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    slim = join(empty_records(1), paths, np.ones(4, dtype=np.int32), tmp_path / "requests.parquet")
    joined_s = time.perf_counter() - began
    metrics = stats.compute(slim)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - peak
    size = (tmp_path / "requests.parquet").stat().st_size
    print(  # noqa: T201  for whoever asks for the real number
        f"{count:,} requests: joined in {joined_s:.1f} s, all in {time.perf_counter() - began:.1f} s,"
        f" {grown / MILLION:,.0f} MB more memory, {size / MILLION:,.1f} MB of Parquet"
    )
    assert metrics.requests == count
    assert metrics.service_time.p99 == pytest.approx(0.002)
    assert grown < 400 * MILLION + 250 * count
