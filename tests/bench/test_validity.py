"""Each way in which a run does not count is found, and named; a sound run has none."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.bench import stats, validity
from headrace.bench.calibration import Calibration, Ceiling, Slip
from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.config import LoadConfig

MS = 1_000_000
CALIBRATION = Calibration(
    schema_version=1,
    machine="m",
    made_at="",
    headrace="0",
    generators=1,
    recovered=(),
    slip=Slip(p50=0, p90=0, p99=0, max=0),
    ceilings=(
        Ceiling(payload_bytes=1000, requests_per_s=10_000, p50_s=1e-4, p99_s=2e-4),
        Ceiling(payload_bytes=1_000_000, requests_per_s=1000, p50_s=1e-3, p99_s=2e-3),
    ),
)


def sound(count=400, gap=10 * MS, service=5 * MS):
    records = empty_records(count)
    records["phase"] = PHASES.index("measured")
    records["status"] = STATUSES.index("ok")
    records["rows"] = 1
    records["scheduled_ns"] = MS + np.arange(count) * gap
    records["issued_ns"] = records["scheduled_ns"] + 1000
    records["completed_ns"] = records["issued_ns"] + service
    return records


OPEN = LoadConfig(kind="poisson", rate=100.0, num_iters=400)
LOOP = LoadConfig(kind="closed", concurrency=1, num_iters=400)


def judged(records, load=OPEN, server=None):
    return validity.judge(records, load, server).verdict


def overloaded(count=400):
    """Requests every 10 ms, each answered 20 ms after the one before it."""
    records = sound(count)
    records["completed_ns"] = records["issued_ns"][0] + (1 + np.arange(count)) * 20 * MS
    return records


def test_a_sound_run_has_no_reason_against_it():
    assert judged(sound(), server=400) == validity.Verdict()


def test_requests_that_ended_nowhere_are_missed():
    metrics = stats.compute(sound())
    (reason,) = validity.conserved(metrics, 399)
    assert "400 requests were issued and 399 ended" in reason


@pytest.mark.parametrize("count", [399, 401])
def test_a_server_that_counted_otherwise_voids_the_run(count):
    (reason,) = judged(sound(), server=count).voids
    assert f"the server counted {count} answers and 400 arrived" in reason


def test_wrong_answers_are_answers_to_the_server():
    records = sound()
    records["status"][:3] = STATUSES.index("wrong")
    assert judged(records, server=400).voids == ()


def test_a_request_sent_before_it_was_due_voids_the_run():
    records = sound()
    records["issued_ns"][7] = records["scheduled_ns"][7] - 1
    assert any("1 requests were sent before they were due" in reason for reason in judged(records).voids)


def test_stages_that_do_not_sum_to_the_latency_void_the_run():
    records = sound()
    records["received_ns"] = records["issued_ns"] + MS
    records["started_ns"] = records["issued_ns"] + 2 * MS
    assert validity.ordered(records) == []
    records["started_ns"][3] = records["issued_ns"][3]
    (reason,) = validity.ordered(records)
    assert "started_ns before the stage in front of it" in reason


def test_a_mean_outside_of_its_values_voids_the_run():
    times = stats.Distribution.of(np.array([MS, 2 * MS]))
    assert validity.mean_between("response time", times) == []
    assert "outside of" in validity.mean_between("response time", replace(times, mean=24.0))[0]


def test_littles_law_holds_for_any_requests_and_fails_for_a_mean_that_is_not_theirs():
    generator = np.random.default_rng(0)
    issued = np.sort(generator.integers(0, 10**10, 500))
    completed = issued + generator.integers(MS, 10**9, 500)
    mean_s = float((completed - issued).mean()) / 1e9
    assert validity.little(issued, completed, mean_s) == []
    assert validity.little(issued, completed, mean_s * 1.005) == []
    (reason,) = validity.little(issued, completed, mean_s * 1.02)
    assert "Little's law does not hold" in reason


@pytest.mark.parametrize("rate_share", [0.5, 0.8, 0.9])
def test_the_backlog_of_a_stable_queue_is_chance(rate_share):
    """M/D/1 up to a load of 0.9, 60 seeds of 40 s: at most one of them looks like overload."""
    found = sum(bool(backlog_of(rate_share, seed)) for seed in range(60))
    assert found <= 1


@pytest.mark.parametrize(("rate_share", "least"), [(1.1, 50), (1.2, 60), (4, 60)])
def test_the_backlog_of_overload_is_seen(rate_share, least):
    """By 10 % in most runs of 4,000 requests, by 20 % in all 60."""
    assert sum(bool(backlog_of(rate_share, seed)) for seed in range(60)) >= least


def backlog_of(rate_share, seed):
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(10 * MS / rate_share, 4000)).astype(np.int64)
    starts = np.maximum.accumulate(arrivals - np.arange(4000) * 10 * MS) + np.arange(4000) * 10 * MS
    return validity.backlog(arrivals, starts + 10 * MS)


def test_requests_without_an_answer_stay_in_the_backlog():
    records = sound()
    records["completed_ns"][records["index"] % 2 == 1] = 0
    assert len(validity.backlog(records["scheduled_ns"], records["completed_ns"])) == 1


def test_a_late_client_is_marked():
    records = sound()
    records["issued_ns"][100:120] += 3 * MS
    assert "the client was late: issue delay p99 3" in judged(records).marks[0]
    assert judged(records, load=LOOP).marks == ()


def test_what_overload_measured_is_no_latency_and_all_else_stays():
    found = validity.judge(overloaded(), OPEN)
    assert found.metrics == replace(stats.compute(overloaded()), response_time=None, service_time=None)
    assert found.metrics.throughput_samples_per_s is not None
    assert "no latency exists" in found.verdict.overload
    assert found.verdict.overload in found.verdict.marks


@pytest.mark.parametrize(("records", "load"), [(sound(), OPEN), (overloaded(), LOOP)], ids=["kept up", "a loop"])
def test_a_run_that_its_server_kept_up_with_or_that_waited_for_it_has_latencies(records, load):
    found = validity.judge(records, load)
    assert found.metrics == stats.compute(records)
    assert found.verdict.overload == ""


def test_overload_that_left_requests_unanswered_is_overload():
    records = overloaded()
    records["completed_ns"][-100:], records["status"][-100:] = 0, STATUSES.index("unanswered")
    assert judged(records).overload


def test_a_run_near_the_harnesss_ceiling_is_client_limited():
    times = stats.Distribution.of(np.full(10, 100 * MS))
    assert validity.client_limited(4999, times, 1000, CALIBRATION) == []
    (reason,) = validity.client_limited(5001, times, 1000, CALIBRATION)
    assert "client-limited: 5,001 requests/s are 50% of the 10,000" in reason


def test_a_latency_near_the_harnesss_own_is_client_limited():
    times = stats.Distribution.of(np.full(10, MS))
    assert validity.client_limited(10, times, 1000, CALIBRATION) == []
    (reason,) = validity.client_limited(10, times, 1_000_000, CALIBRATION)
    assert "p99 1 ms is less than 5 times the harness's own, 2 ms" in reason


def test_a_machine_without_calibration_is_told_so():
    assert "headrace calibrate" in validity.client_limited(10, None, 1000, None)[0]
