"""The generator against a client and a clock of known behaviour."""

import itertools
import types

import numpy as np
import pytest
import torch

from headrace.bench.loadgen import Generator, plan_phases
from headrace.bench.record import PHASES, STATUSES
from headrace.bench.stats import compute
from headrace.config import LoadConfig
from headrace.errors import RunFailed
from headrace.request import Response, Timeline

MS = 1_000_000


class EchoClient:
    """Answers each request with twice its batch, when asked to receive; `behaviour` may change an answer."""

    def __init__(self, behaviour=None):
        self.waiting: list[tuple[int, torch.Tensor]] = []
        self.most_waiting = 0
        self.behaviour = behaviour or (lambda index, response: response)

    def send(self, index, batch):
        self.waiting.append((index, batch))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def receive(self, timeout_s):
        if not self.waiting:
            return None
        index, batch = self.waiting.pop(0)
        return self.behaviour(index, Response(index, Timeline(worker=index % 2), output=batch * 2))

    def close(self):
        pass


def inputs_of(count, rows=2):
    batches = [torch.full((rows, 3), float(number)) for number in range(count)]
    row_index = np.arange(count * rows).reshape(count, rows)
    return types.SimpleNamespace(batches=batches, row_index=row_index, note=None)


def generator_for(client, *, num_iters=6, warmup_iters=2, batches=4, clock=None, stall=60.0):
    plan = plan_phases(LoadConfig(num_iters=num_iters, warmup_iters=warmup_iters))
    kwargs = {"clock": clock} if clock else {}
    return Generator(plan, inputs_of(batches), client, stall, [0, 0], **kwargs)


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


def test_every_request_is_sent_answered_and_stamped_once():
    marks = []
    generator = generator_for(EchoClient())
    generator.run(max_in_flight=100, mark_window=marks.append)
    records = generator.records
    assert marks == ["open", "close"]
    assert (records["status"] == STATUSES.index("ok")).all()
    assert (records["scheduled_ns"] <= records["issued_ns"]).all()
    assert (records["issued_ns"] <= records["completed_ns"]).all()
    assert records["batch"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    for record in records:
        assert (generator.answers[record["index"]] == 2 * record["batch"]).all()


def test_the_measured_requests_share_one_scheduled_moment():
    generator = generator_for(EchoClient(), clock=ticking())
    generator.run(100, lambda edge: None)
    measured = generator.records[generator.records["phase"] == PHASES.index("measured")]
    assert len(set(measured["scheduled_ns"])) == 1
    assert compute(generator.records).throughput_samples_per_s > 0


def test_no_phase_begins_before_the_one_before_it_is_answered():
    generator = generator_for(EchoClient())
    generator.run(100, lambda edge: None)
    records = generator.records
    for earlier, later in itertools.pairwise(range(len(PHASES))):
        assert (
            records["completed_ns"][records["phase"] == earlier].max()
            <= records["issued_ns"][records["phase"] == later].min()
        )


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed(limit):
    client = EchoClient()
    generator_for(client, num_iters=30).run(limit, lambda edge: None)
    assert 1 <= client.most_waiting <= limit


def failing(index_to_fail):
    def behaviour(index, response):
        if index != index_to_fail:
            return response
        return Response(index, Timeline(), error="ValueError: bad")

    return behaviour


def test_a_failed_measured_request_is_recorded_and_the_others_go_on():
    generator = generator_for(EchoClient(failing(5)))
    generator.run(100, lambda edge: None)
    statuses = [STATUSES[code] for code in generator.records["status"]]
    assert statuses.count("ok") == 8
    assert statuses[5] == "error"
    assert generator.first_error == "ValueError: bad"
    assert compute(generator.records).throughput_samples_per_s is None


@pytest.mark.parametrize(("index", "words"), [(0, "a first request failed"), (2, "a warm-up request failed")])
def test_a_failed_request_before_the_measured_ones_ends_the_run(index, words):
    with pytest.raises(RunFailed, match=f"{words}: ValueError: bad"):
        generator_for(EchoClient(failing(index))).run(100, lambda edge: None)


def test_silence_ends_the_run_and_says_how_many_were_missing():
    class Silent(EchoClient):
        def receive(self, timeout_s):
            return super().receive(timeout_s) if len(self.waiting) != 2 else None

    client = Silent(lambda index, response: response)
    generator = generator_for(client, num_iters=2, warmup_iters=0, clock=ticking(1000 * MS), stall=5.0)
    with pytest.raises(RunFailed, match=r"no answer for 5 s, with [12] of [12] requests unanswered"):
        generator.run(100, lambda edge: None)


def test_an_answer_that_comes_twice_is_refused():
    class Twice(EchoClient):
        def receive(self, timeout_s):
            response = super().receive(timeout_s)
            if response and response.index == 1:
                self.waiting.insert(0, (1, torch.zeros(2, 3)))
            return response

    with pytest.raises(RunFailed, match="request 1 was answered twice"):
        generator_for(Twice()).run(100, lambda edge: None)


def test_workers_that_answered_before_the_measured_requests_are_counted():
    generator = generator_for(EchoClient(), warmup_iters=1)
    generator.run(100, lambda edge: None)
    assert generator.workers_warmed() == 2
