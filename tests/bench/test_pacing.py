"""Paces: a plan is kept whatever comes back, and a closed loop sends when it is answered."""

import threading

import numpy as np
import pytest

from headrace.bench import pacing
from headrace.bench.loadgen import Generator, plan_phases
from headrace.bench.pacing import Closed, Planned
from headrace.bench.record import PHASES
from headrace.config import LoadConfig
from headrace.errors import RunFailed
from tests.bench.test_loadgen import EchoSender

MS = 1_000_000


class Time:
    """A clock that sleeping moves on."""

    def __init__(self):
        self.now = 5 * MS
        self.slept = []

    def __call__(self):
        self.now += 100  # looking takes a moment, so that spinning ends
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += int(seconds * 1e9)


@pytest.fixture
def time(monkeypatch):
    moments = Time()
    monkeypatch.setattr(pacing.time, "sleep", moments.sleep)
    return moments


def test_a_planned_request_is_due_at_its_moment_and_not_before(time):
    pace = Planned(np.array([0, 3 * MS, 3 * MS, 50 * MS]), time)
    pace.start()
    start = time.now
    stop = threading.Event()
    assert pace.wait(0, stop)
    assert pace.due(0) == 1
    assert pace.wait(1, stop)
    assert start + 3 * MS <= time.now < start + 3 * MS + 1000
    assert pace.due(1) == 3
    assert not pace.over(3)
    assert pace.wait(3, stop)
    assert pace.due(3) == 4
    assert pace.over(4)
    assert not pace.wait(4, stop)
    assert sum(time.slept) < 0.05, "the last stretch is not slept"


def test_a_late_sender_finds_all_that_was_due_meanwhile_and_the_plan_unchanged(time):
    pace = Planned(np.arange(10) * MS, time)
    pace.start()
    start = time.now
    time.now += 6 * MS
    assert pace.due(0) == 7
    assert pace.scheduled(np.zeros(10)).tolist() == [start + k * MS for k in range(10)]


def test_a_plan_that_is_stopped_has_nothing_more_due(time):
    pace = Planned(np.array([3600 * 10**9]), time)
    pace.start()
    stop = threading.Event()
    stop.set()
    assert not pace.wait(0, stop)


def test_in_a_closed_loop_each_answer_makes_one_more_due():
    pace = Closed(6, 2, None, lambda: 100)
    pace.start()
    assert pace.wait(0, threading.Event())
    assert pace.due(0) == 6
    assert pace.scheduled(np.array([400, 300, 500, 700, 600, 900])).tolist() == [100, 100, 300, 400, 500, 600]


def test_a_closed_loop_ends_after_its_duration(time):
    pace = Closed(100, 2, 1.0, time)
    pace.start()
    assert pace.wait(3, threading.Event())
    assert pace.due(3) == 100
    time.now += 10**9
    assert pace.due(3) == 3
    assert pace.over(3)
    assert not pace.wait(3, threading.Event())


@pytest.fixture(params=[False, True], ids=["two threads", "one that spins"])
def run(request):
    return lambda sender, load, pace: measured(sender, load, pace, spin=request.param)


def measured(sender, load, pace, *, spin):
    generator = Generator(plan_phases(load), sender, 60.0, [0, 0])
    generator.spin = spin
    generator.run(100, lambda edge: None, pace)
    return generator.records[: generator.sent][PHASES.index("measured") :]


def test_a_closed_loop_keeps_no_more_than_its_number_in_flight(run):
    sender = EchoSender(at_once=100)
    load = LoadConfig(kind="closed", concurrency=3, num_iters=30, warmup_iters=1)
    records = run(sender, load, Closed(30, 3, None))
    assert sender.most_waiting <= 3
    assert len(records) == 30
    assert (records["scheduled_ns"] <= records["issued_ns"]).all()


def test_what_a_duration_left_unsent_is_not_in_the_records(run):
    class Ending(Closed):
        def over(self, sent):
            return sent >= 5

    load = LoadConfig(kind="closed", concurrency=2, num_iters=30, warmup_iters=1)
    records = run(EchoSender(), load, Ending(30, 2, None))
    assert 5 <= len(records) <= 6
    assert (records["completed_ns"] > 0).all()


def test_planned_requests_are_scheduled_as_planned_however_late_the_answers(run):
    load = LoadConfig(kind="constant", rate=1000.0, num_iters=20, warmup_iters=1)
    records = run(EchoSender(), load, Planned(np.arange(20) * MS))
    assert (np.diff(records["scheduled_ns"]) == MS).all()
    assert (records["issued_ns"] >= records["scheduled_ns"]).all()


def test_silence_ends_a_spinning_run_too():
    class Silent(EchoSender):
        def receive(self, timeout_s):
            return super().receive(timeout_s) if self.waiting[:1] in ([0], [1]) else None

    generator = Generator(plan_phases(LoadConfig(num_iters=3)), Silent(), 0.05, [0, 0])
    generator.spin = True
    with pytest.raises(RunFailed, match="3 of 3 requests unanswered"):
        generator.run(100, lambda edge: None, Planned(np.zeros(3, np.int64)))
