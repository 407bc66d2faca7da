"""The generator against a sender and a clock of known behaviour."""

import itertools
import threading
import types

import numpy as np
import pytest
import torch

from headrace.bench.jobs import Go
from headrace.bench.loadgen import Generator, _make_sender, plan_phases
from headrace.bench.record import PHASES, STATUSES
from headrace.bench.senders import CopyingSender, InPlaceSender, QueueSender, Received
from headrace.bench.stats import compute
from headrace.config import LoadConfig
from headrace.errors import RunFailed
from headrace.tensors import TensorSpec
from headrace.transport.descriptors import ANSWER, DESCRIPTOR_DTYPE, ERROR
from headrace.transport.layout import Layout
from headrace.transport.pair import QueuePair, RingPair

MS = 1_000_000
PATIENCE_S = 20.0
BATCHES = 4
ROWS = 2


class EchoSender:
    """Answers each request with twice the number of its batch, up to `together` at a time, when asked to receive.

    It sends at most `at_once` of what it is given. `errors` are the requests that fail, and how.
    """

    def __init__(self, at_once=1, together=1, errors=None):
        self.waiting: list[int] = []
        self.most_waiting = 0
        self.at_once = at_once
        self.together = together
        self.errors = errors or {}

    def send(self, indexes):
        sent = indexes[: self.at_once]
        self.waiting += sent
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return [index % BATCHES for index in sent]

    def ready(self):
        return bool(self.waiting)

    def receive(self, timeout_s):
        taken, self.waiting = self.waiting[: self.together], self.waiting[self.together :]
        return self.received(taken) if taken else None

    def received(self, indexes):
        descriptors = np.zeros(len(indexes), DESCRIPTOR_DTYPE)
        descriptors["request"] = indexes
        descriptors["lane"] = descriptors["request"] % 2
        descriptors["batch_rows"] = ROWS + descriptors["request"]
        for number, name in enumerate(("received_ns", "started_ns", "computed_ns", "responded_ns")):
            descriptors[name] = descriptors["request"] * 10 + number
        failed = [index in self.errors for index in indexes]
        descriptors["kind"] = np.where(failed, ERROR, ANSWER)
        good = [np.full((ROWS, 3), 2.0 * (index % BATCHES)) for index in indexes if index not in self.errors]
        first_error = next((self.errors[index] for index in indexes if index in self.errors), None)
        return Received(descriptors, np.array(good) if good else None, first_error)

    def close(self):
        pass


SENDERS = {
    "one by one": {},
    "sent together": {"at_once": 3},
    "answered together": {"together": 4},
    "all together": {"at_once": 100, "together": 100},
}
ALL_SENDERS = pytest.mark.parametrize("options", SENDERS.values(), ids=SENDERS.keys())


def generator_for(sender, *, num_iters=6, warmup_iters=2, clock=None, stall=60.0):
    plan = plan_phases(LoadConfig(num_iters=num_iters, warmup_iters=warmup_iters))
    kwargs = {"clock": clock} if clock else {}
    generator = Generator(plan, sender, stall, [0, 0], **kwargs)
    generator.records["rows"] = ROWS
    return generator


def ticking(step_ns=MS):
    """A clock that moves on by one step whenever somebody looks."""
    ticks = itertools.count(step_ns, step_ns)
    return lambda: next(ticks)


def test_the_plan_is_first_then_warm_up_then_measured():
    plan = plan_phases(LoadConfig(num_iters=3, warmup_iters=2))
    assert [PHASES[code] for code in plan] == [
        "first",
        "warm_up",
        "warm_up",
        "measured",
        "measured",
        "measured",
    ]


@ALL_SENDERS
def test_every_request_is_sent_answered_and_stamped_once(options):
    marks = []
    generator = generator_for(EchoSender(**options))
    generator.run(max_in_flight=100, mark_window=marks.append)
    records = generator.records
    assert marks == ["open", "close"]
    assert (records["status"] == STATUSES.index("ok")).all()
    assert (records["scheduled_ns"] <= records["issued_ns"]).all()
    assert (records["issued_ns"] <= records["completed_ns"]).all()
    assert records["batch"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert records["batch_rows"].tolist() == [ROWS + index for index in range(9)]
    assert records["worker"].tolist() == [index % 2 for index in range(9)]
    assert records["started_ns"].tolist() == [10 * index + 1 for index in range(9)]
    assert generator._progress == [9, 9]
    for record in records:
        assert (generator.kept.all[record["index"]] == 2 * record["batch"]).all()


def test_the_measured_requests_share_one_scheduled_moment():
    generator = generator_for(EchoSender(), clock=ticking())
    generator.run(100, lambda edge: None)
    measured = generator.records[generator.records["phase"] == PHASES.index("measured")]
    assert len(set(measured["scheduled_ns"])) == 1
    assert compute(generator.records).throughput_samples_per_s > 0


@ALL_SENDERS
def test_no_phase_begins_before_the_one_before_it_is_answered(options):
    generator = generator_for(EchoSender(**options))
    generator.run(100, lambda edge: None)
    records = generator.records
    for earlier, later in itertools.pairwise(range(len(PHASES))):
        assert (
            records["completed_ns"][records["phase"] == earlier].max()
            <= records["issued_ns"][records["phase"] == later].min()
        )


@ALL_SENDERS
@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed(limit, options):
    sender = EchoSender(**options)
    generator_for(sender, num_iters=30).run(limit, lambda edge: None)
    assert 1 <= sender.most_waiting <= limit


class PatientSender(EchoSender):
    """Answers the first request at once, and the others when three of them are in flight."""

    def __init__(self, at_once):
        super().__init__(at_once=at_once, together=3)
        self.changed = threading.Condition()

    def send(self, indexes):
        with self.changed:
            self.changed.notify()
            return super().send(indexes)

    def receive(self, timeout_s):
        with self.changed:
            self.changed.wait_for(lambda: 0 in self.waiting or len(self.waiting) == 3, PATIENCE_S)
            return super().receive(timeout_s) if 0 in self.waiting or len(self.waiting) == 3 else None


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_as_many_requests_are_in_flight_as_are_allowed_all_the_time(at_once):
    generator = generator_for(PatientSender(at_once), warmup_iters=0, num_iters=30, stall=PATIENCE_S / 2)
    generator.run(3, lambda edge: None)
    assert (generator.records["status"] == STATUSES.index("ok")).all()


class NarrowSender(EchoSender):
    """Has room for two requests at once, and sends what fits."""

    def send(self, indexes):
        return super().send(indexes[: 2 - len(self.waiting)])


def test_what_a_sender_has_no_room_for_is_sent_when_it_has():
    sender = NarrowSender(at_once=100, together=2)
    generator = generator_for(sender, num_iters=30)
    generator.run(100, lambda edge: None)
    assert (generator.records["status"] == STATUSES.index("ok")).all()
    assert sender.most_waiting == 2


def test_answers_in_any_order_are_kept_with_their_requests():
    class Backwards(EchoSender):
        def received(self, indexes):
            return super().received(indexes[::-1])

    generator = generator_for(Backwards(at_once=100, together=5, errors={5: "ValueError: bad"}), num_iters=20)
    generator.run(100, lambda edge: None)
    ok = generator.records["status"] == STATUSES.index("ok")
    assert np.flatnonzero(~ok).tolist() == [5]
    assert (generator.kept.all[ok] == 2 * generator.records["batch"][ok, None, None]).all()
    assert np.isnan(generator.kept.all[5]).all()


@ALL_SENDERS
def test_a_failed_measured_request_is_recorded_and_the_others_go_on(options):
    generator = generator_for(EchoSender(**options, errors={5: "ValueError: bad", 7: "ValueError: later"}))
    generator.run(100, lambda edge: None)
    statuses = [STATUSES[code] for code in generator.records["status"]]
    assert statuses.count("ok") == 7
    assert statuses[5] == statuses[7] == "error"
    assert generator.first_error == "ValueError: bad"
    assert compute(generator.records).throughput_samples_per_s is None


@pytest.mark.parametrize(("index", "words"), [(0, "a first request failed"), (2, "a warm-up request failed")])
def test_a_failed_request_before_the_measured_ones_ends_the_run(index, words):
    with pytest.raises(RunFailed, match=f"{words}: ValueError: bad"):
        generator_for(EchoSender(errors={index: "ValueError: bad"})).run(100, lambda edge: None)


def test_silence_ends_the_run_and_says_how_many_were_missing():
    class Silent(EchoSender):
        def receive(self, timeout_s):
            return super().receive(timeout_s) if 0 in self.waiting else None

    generator = generator_for(Silent(), num_iters=2, warmup_iters=0, clock=ticking(1000 * MS), stall=5.0)
    with pytest.raises(RunFailed, match=r"no answer for 5 s, with [12] of 2 requests unanswered"):
        generator.run(100, lambda edge: None)


def test_an_answer_that_comes_again_is_refused():
    class Again(EchoSender):
        def receive(self, timeout_s):
            if self.waiting and self.waiting[0] == 2:
                self.waiting.insert(0, 1)
            return super().receive(timeout_s)

    with pytest.raises(RunFailed, match="request 1 was answered twice"):
        generator_for(Again()).run(100, lambda edge: None)


class TwiceAtOnce(EchoSender):
    def __init__(self):
        super().__init__(at_once=100, together=3)

    def received(self, indexes):
        return super().received([4, 5, 5] if 5 in indexes else indexes)


def test_an_answer_that_comes_twice_at_once_is_refused():
    with pytest.raises(RunFailed, match="was answered twice"):
        generator_for(TwiceAtOnce()).run(100, lambda edge: None)


def test_the_request_that_was_answered_twice_at_once_is_named():
    with pytest.raises(RunFailed, match="request 5 was answered twice"):
        generator_for(TwiceAtOnce()).run(100, lambda edge: None)


@pytest.mark.parametrize(("warmup_iters", "workers"), [(0, 1), (1, 2)], ids=["the first alone", "and another"])
def test_workers_that_answered_before_the_measured_requests_are_counted(warmup_iters, workers):
    generator = generator_for(EchoSender(), warmup_iters=warmup_iters)
    generator.run(100, lambda edge: None)
    assert generator.workers_warmed() == workers


@pytest.mark.parametrize(
    ("ring", "client", "kind"),
    [(False, "copy", QueueSender), (True, "copy", CopyingSender), (True, "zero-copy", InPlaceSender)],
    ids=["queue", "ring", "ring, zero-copy"],
)
def test_the_run_decides_how_requests_are_sent(ring, client, kind):
    spec = TensorSpec(name="tensor", dtype="float32", features=(3,))
    pair = RingPair.create(Layout(rows=8, inputs=(spec,), outputs=(spec,)))
    job = types.SimpleNamespace(queues=QueuePair(None, None), client=client)
    inputs = types.SimpleNamespace(batches=[torch.ones(ROWS, 3)])
    assert isinstance(_make_sender(job, Go(None, pair if ring else None), inputs), kind)
    pair.close()
