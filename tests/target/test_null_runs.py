"""Real generators against a null server of known law: what is measured is what happened, and what is wrong is named.

The machine may be busy with other things, so what was measured is held against the null server's own log of arrivals
and answers, and not against a clock on the wall.
"""

import signal

import numpy as np
import pyarrow.parquet as pq
import pytest

from headrace.bench import arrivals
from headrace.bench.summary import load_summary
from headrace.clock import NS_PER_S
from headrace.config import LoadConfig
from headrace.target.counters import ISSUED, Reader
from tests.target.running import Silent, answered, measure, percentiles, poisson
from tests.target.test_law import lindley

MS = 1_000_000


@pytest.mark.parametrize(
    ("law", "rate", "duration_s"),
    [
        ("null://fixed?service=20ms", 25, 3),  # M/D/1 at a load of 0.5,
        ("null://fixed?service=10ms", 80, 3),  # 0.8,
        ("null://fixed?service=10ms", 90, 3),  # and 0.9
        ("null://exponential?mean=10ms&seed=1", 70, 3),
    ],
)
def test_a_known_law_is_recovered(tmp_path, law, rate, duration_s):
    outcome = measure(tmp_path, law, poisson(rate, duration_s))
    log, seen = outcome.log, answered(outcome)
    assert outcome.summary.error is None
    assert len(seen) == len(log) == outcome.summary.target.server_success == outcome.summary.metrics.requests
    assert log["due_ns"].tolist() == lindley(log["arrived_ns"].tolist(), log["service_ns"].tolist()).tolist()
    happened = log["answered_ns"] - log["arrived_ns"]
    service = seen["completed_ns"] - seen["issued_ns"]
    # A busy machine adds to each request, never takes away. How busy it was, two other things say: how late the null
    # server answered, and how late the generator woke for its plan.
    late = (log["answered_ns"] - log["due_ns"], seen["issued_ns"] - seen["scheduled_ns"])
    added = float(service.mean()) - float(happened.mean())
    assert 0 <= added <= 0.02 * float(happened.mean()) + 5 * sum(float(each.mean()) for each in late) + MS / 5
    p50, p99 = percentiles(service, 50, 99)
    true_p50, true_p99 = percentiles(happened, 50, 99)
    room = 5 * sum(int(each.max()) for each in late) + MS / 5
    assert true_p50 * 0.98 <= p50 <= true_p50 * 1.02 + room
    assert true_p99 * 0.98 <= p99 <= true_p99 * 1.02 + room


def test_a_plan_is_kept_by_several_generators(tmp_path):
    load = poisson(100, 2)
    outcome = measure(tmp_path, "null://fixed?service=2ms", load, generators=2)
    seen = answered(outcome)
    offsets = arrivals.planned(load)
    assert (seen["scheduled_ns"] - seen["scheduled_ns"][0]).tolist() == (offsets - offsets[0]).tolist()
    assert seen["generator"].tolist() == [number % 2 for number in range(len(offsets))]
    assert (seen["issued_ns"] >= seen["scheduled_ns"]).all()


def test_a_stall_shows_in_response_times_whole(tmp_path):
    """200 requests/s and a stall of 2 s: p99 is near 2 s, where a tool that stamps at sending shows milliseconds."""
    load = LoadConfig(kind="constant", rate=200, duration_s=4)
    outcome = measure(tmp_path, "null://fixed?service=2ms&stall=2s&stall_at=1s", load, connections=16)
    seen = answered(outcome)
    response = seen["completed_ns"] - seen["scheduled_ns"]
    late = response > 1000 * MS
    assert late.sum() >= 190  # all that were due in its first second
    assert percentiles(response, 99)[0] > 1900 * MS
    service_p99 = percentiles(seen["completed_ns"] - seen["issued_ns"], 50)[0]
    assert service_p99 < percentiles(response, 50)[0], "16 connections: most of the wait is before sending"
    assert any("the client was late" in mark for mark in outcome.summary.marks)


class Freezer(Silent):
    """Stops generator 0 for a second when it has sent 20 requests, as a busy machine might."""

    def __init__(self):
        self.reader = None
        self.frozen_at = None
        self.thawed = False

    def watch(self, counters, generators, planned):
        self.reader = Reader(counters, generators)

    def look(self):
        if self.reader is None or self.thawed:
            return
        import psutil  # noqa: PLC0415  for one test

        if self.frozen_at is None and self.reader.totals()[ISSUED] >= 20:
            self.process = next(
                child for child in psutil.Process().children() if "memfd" in " ".join(map(str, _maps(child)))
            )
            self.process.send_signal(signal.SIGSTOP)
            self.frozen_at = _now()
        elif self.frozen_at is not None and _now() - self.frozen_at > NS_PER_S:
            self.process.send_signal(signal.SIGCONT)
            self.thawed = True


def _maps(process):
    with open(f"/proc/{process.pid}/maps") as file:  # noqa: PTH123
        return file.readlines()


def _now():
    from headrace.clock import now_ns  # noqa: PLC0415

    return now_ns()


def test_a_frozen_generator_shows_in_response_times_and_is_named(tmp_path):
    load = LoadConfig(kind="constant", rate=100, duration_s=3)
    freezer = Freezer()
    outcome = measure(tmp_path, "null://fixed?service=2ms", load, watcher=freezer)
    assert freezer.thawed
    seen = answered(outcome)
    assert len(seen) == 300
    assert (seen["completed_ns"] - seen["scheduled_ns"]).max() > 900 * MS
    assert outcome.summary.metrics.issue_delay.max > 0.9
    assert any("the client was late" in mark for mark in outcome.summary.marks)


def test_what_a_server_refuses_is_counted_and_leaves_no_throughput(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=100us&shed=0.02", poisson(400, 2))
    metrics = outcome.summary.metrics
    shed = int((outcome.log["fate"] == 1).sum())
    assert metrics.shed == shed > 0
    assert (metrics.errors, metrics.wrong, metrics.unanswered) == (0, 0, 0)
    assert metrics.throughput_samples_per_s is None
    assert f"refused {shed} of" in outcome.summary.error


def test_wrong_answers_are_found_one_by_one(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=100us&wrong=0.03", poisson(300, 2), rows=3)
    wrong = int((outcome.log["fate"] == 2).sum())
    assert outcome.summary.metrics.wrong == wrong > 0
    assert outcome.summary.answers.wrong_rows == 3 * wrong
    assert outcome.summary.metrics.throughput_samples_per_s is None
    assert f"{wrong} of" in outcome.summary.error
    assert "answers are wrong" in outcome.summary.error


def test_dropped_requests_are_unanswered_and_named(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=100us&drop=0.02", poisson(300, 1), request_timeout_s=0.7)
    dropped = int((outcome.log["fate"] == 3).sum())
    metrics = outcome.summary.metrics
    assert metrics.unanswered >= dropped > 0
    assert "never answered: no answer within 0.7 s" in outcome.summary.error


def test_a_cache_is_named(tmp_path):
    # Long beside what a busy machine adds to an answer at once.
    outcome = measure(tmp_path, "null://fixed?service=100ms&cached=1", poisson(50, 1))
    assert any("the server caches" in mark for mark in outcome.summary.marks)
    honest = measure(tmp_path, "null://fixed?service=20ms", poisson(20, 1))
    assert not any("the server caches" in mark for mark in honest.summary.marks)


def test_overload_has_no_latency(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=20ms", poisson(100, 2))
    assert outcome.summary.metrics.response_time is None
    assert outcome.summary.metrics.throughput_samples_per_s is not None
    assert any("no latency exists" in mark for mark in outcome.summary.marks)


@pytest.mark.parametrize("generators", [1, 2])
def test_a_closed_loop_keeps_as_many_in_flight_as_asked(tmp_path, generators):
    load = LoadConfig(kind="closed", concurrency=6, num_iters=200)
    outcome = measure(tmp_path, "null://fixed?service=1ms&servers=8", load, generators=generators)
    seen = answered(outcome)
    assert len(seen) == 200
    moments = np.concatenate([seen["issued_ns"], seen["completed_ns"]])
    steps = np.repeat([1, -1], len(seen))
    assert np.cumsum(steps[np.lexsort((steps, moments))]).max() == 6


def test_a_closed_loop_ends_with_its_duration(tmp_path):
    load = LoadConfig(kind="closed", concurrency=2, duration_s=0.5)
    outcome = measure(tmp_path, "null://fixed?service=1ms", load)
    seen = answered(outcome)
    assert len(seen) == outcome.summary.metrics.requests > 2
    assert seen["scheduled_ns"].max() - seen["scheduled_ns"].min() < 0.5 * NS_PER_S


def test_a_burst_with_few_connections_counts_the_wait_for_one(tmp_path):
    load = LoadConfig(kind="burst", num_iters=40)
    outcome = measure(tmp_path, "null://fixed?service=2ms", load, connections=4)
    seen = answered(outcome)
    assert outcome.summary.target.connections == 4
    assert len(np.unique(seen["scheduled_ns"])) == 1
    assert (seen["completed_ns"] - seen["scheduled_ns"]).max() >= 80 * MS
    assert (seen["completed_ns"] - seen["issued_ns"]).max() < (seen["completed_ns"] - seen["scheduled_ns"]).max()


def test_the_folder_is_as_any_runs(tmp_path):
    outcome = measure(tmp_path, "null://fixed?service=1ms", LoadConfig(kind="burst", num_iters=10), distinct=4)
    assert load_summary(tmp_path / "run").metrics == outcome.summary.metrics
    table = pq.read_table(tmp_path / "run/requests.parquet")
    assert table.column("phase").to_pylist() == ["first"] + ["warm_up"] * 7 + ["measured"] * 10
    assert table.column("index").to_pylist() == list(range(18))
    assert table.column("batch").to_pylist()[8:] == [number % 4 for number in range(10)]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["requests.parquet", "summary.json"]


def test_the_same_input_may_be_sent_all_the_time(tmp_path):
    load = LoadConfig(kind="burst", num_iters=5)
    outcome = measure(tmp_path, "null://fixed?service=1ms", load, same_input=True)
    assert outcome.summary.target.payloads == 1
    assert set(pq.read_table(tmp_path / "run/requests.parquet").column("batch").to_pylist()) == {0}
