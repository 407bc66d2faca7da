"""The dispatcher when something goes wrong: who is to blame is told, once, and all others are answered."""

import threading

import pytest

from headrace.errors import DeadlineExceeded, EngineStopped, InvalidRequest
from tests.pipeline.fakes import (
    BATCHING,
    BOTH_WAYS,
    SINGLES,
    WAIT_S,
    FakeClock,
    FakeLane,
    FakeSource,
    OnThreads,
    indexes_of,
    says,
)


@BOTH_WAYS
@pytest.mark.parametrize("stage", ["launch_error", "wait_error"])
def test_a_batch_that_fails_is_run_again_one_by_one_so_that_only_the_bad_one_fails(way, stage):
    source, lane = FakeSource(), FakeLane(**{stage: says("request 2 is bad", 2)})
    running = way([lane], BATCHING, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([source.ticket(1), source.ticket(2), source.ticket(3)])
    running.settle()
    lane.free()
    source.wait_until_told(4)
    running.submit([source.ticket(4)])
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1, 2, 3], [1], [2], [3], [4]]
    assert [batch.bucket for batch in lane.launched] == [1, 4, 1, 1, 1, 1]
    assert [ticket.index for ticket in source.told] == [0, 1, 2, 3, 4]
    assert {ticket.index: str(ticket.error) for ticket in source.told if ticket.error} == {2: "request 2 is bad"}


@BOTH_WAYS
def test_each_of_several_bad_requests_gets_its_own_error(way):
    errors = {1: ValueError("one"), 3: KeyError("three")}

    def wait_error(batch):
        return next((errors[ticket.index] for ticket in batch.tickets if ticket.index in errors), None)

    source, lane = FakeSource(), FakeLane(wait_error=wait_error)
    running = way([lane], BATCHING, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([source.ticket(1), source.ticket(2), source.ticket(3)])
    running.settle()
    lane.free()
    running.stop()
    assert [ticket.error for ticket in source.told] == [None, errors[1], None, errors[3]]


@BOTH_WAYS
@pytest.mark.parametrize("stage", ["launch_error", "wait_error"])
def test_a_request_that_fails_alone_is_told_and_not_run_again(way, stage):
    source, lane = FakeSource(), FakeLane(free=True, **{stage: says("bad", 1)})
    running = way([lane], SINGLES, 1)
    running.submit([source.ticket(index) for index in range(3)])
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1], [2]]
    assert [str(ticket.error) for ticket in source.told] == ["None", "bad", "None"]


class LostDevice(FakeLane):
    """Its device is lost with the batch of request 1."""

    def __init__(self, stage):
        super().__init__(**{stage: lambda batch: EngineStopped("device lost") if batch.tickets[0].index else None})


@BOTH_WAYS
@pytest.mark.parametrize("stage", ["launch_error", "wait_error"])
def test_a_lost_device_fails_everything_that_waits_and_what_comes_later(way, stage):
    source, lane = FakeSource(), LostDevice(stage)
    running = way([lane], SINGLES, 1)
    running.submit([source.ticket(index) for index in range(5)])
    lane.free()
    source.wait_until_told(5)
    assert indexes_of(lane.launched) == [[0], [1]], "nothing is launched any more"
    later = source.ticket(5)
    if way is OnThreads:
        with pytest.raises(EngineStopped, match="device lost"):
            running.submit([later])
    else:
        running.submit([later])
        source.wait_until_told(6)
        assert isinstance(later.error, EngineStopped)
    running.stop()
    assert [str(ticket.error) for ticket in source.told[:5]] == ["None", *["device lost"] * 4]
    assert sorted(ticket.index for ticket in source.told) == list(range(len(source.told))), "each once"


@BOTH_WAYS
def test_a_device_that_is_lost_with_several_requests_is_not_tried_again(way):
    source, lane = FakeSource(), LostDevice("wait_error")
    running = way([lane], BATCHING, 1)
    running.submit([source.ticket(0)])
    running.submit([source.ticket(index) for index in (1, 2, 3)])
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1, 2, 3]]
    assert [str(ticket.error) for ticket in source.told] == ["None", *["device lost"] * 3]


def with_deadline(source, index, deadline_ns):
    ticket = source.ticket(index)
    ticket.deadline_ns = deadline_ns
    return ticket


@BOTH_WAYS
def test_a_request_that_waits_beyond_its_deadline_is_told_and_not_computed(way):
    source, lane, clock = FakeSource(), FakeLane(), FakeClock()
    running = way([lane], SINGLES, 1, clock=clock)
    running.submit([source.ticket(0), with_deadline(source, 1, 5_000_000), with_deadline(source, 2, 5_000_001)])
    lane.wait_until_launched(1)
    clock.now_ns = 5_000_001
    lane.free()
    running.stop()
    assert sorted(ticket.index for ticket in source.told) == [0, 1, 2]
    assert indexes_of(lane.launched) == [[0], [2]]
    (late,) = (ticket for ticket in source.told if ticket.error)
    assert (late.index, type(late.error)) == (1, DeadlineExceeded)
    assert "waited 5.0 ms, longer than its deadline allows" in str(late.error)


@BOTH_WAYS
def test_a_deadline_that_has_passed_before_a_request_comes_is_told_at_once(way):
    source, lane, clock = FakeSource(), FakeLane(free=True), FakeClock()
    clock.now_ns = 10
    running = way([lane], SINGLES, 1, clock=clock)
    running.submit([with_deadline(source, 0, 9)])
    source.wait_until_told(1)
    running.stop()
    assert lane.launched == []
    assert [type(ticket.error) for ticket in source.told] == [DeadlineExceeded]


class NarrowLane(FakeLane):
    """Notes when it is launched by two threads at once, which would mix up what lies in its buffers.

    It lingers in the launch of a request that is run again, until another launch begins or that has had its chance.
    """

    def __init__(self):
        super().__init__(wait_error=lambda batch: ValueError("bad") if len(batch.tickets) == 4 else None)
        self.lingers, self.another = threading.Event(), threading.Event()
        self.overlapped = False

    def launch(self, batch):
        super().launch(batch)
        if batch.rows != batch.tickets[0].batch_rows and not self.lingers.is_set():
            self.lingers.set()
            self.overlapped = self.another.wait(0.2)
        elif self.lingers.is_set():
            self.another.set()


def test_a_lane_is_never_launched_by_two_threads_at_once():
    source, lane = FakeSource(), NarrowLane()
    running = OnThreads([lane], BATCHING, 2)
    running.submit([source.ticket(0)])
    running.submit([source.ticket(index) for index in (1, 2, 3, 4)])
    lane.free()
    assert lane.lingers.wait(WAIT_S)
    running.submit([source.ticket(index) for index in (5, 6, 7, 8)])
    running.stop()
    assert len(source.told) == 9
    assert not lane.overlapped


class TriesAgain(FakeSource):
    """Submits a failed request once more, as a caller may who hears of it in a callback."""

    def __init__(self):
        super().__init__()
        self.dispatcher = None
        self.refused = threading.Semaphore(0)

    def finish(self, tickets):
        super().finish(tickets)
        for ticket in tickets:
            if ticket.error:
                try:
                    self.dispatcher.submit([ticket])
                except EngineStopped:
                    self.refused.release()


def test_who_hears_that_the_device_is_lost_may_submit_again_and_is_refused():
    source, lane = TriesAgain(), LostDevice("wait_error")
    running = OnThreads([lane], SINGLES, 1)
    source.dispatcher = running.dispatcher
    running.submit([source.ticket(index) for index in range(3)])
    lane.free()
    assert source.refused.acquire(timeout=WAIT_S)
    assert source.refused.acquire(timeout=WAIT_S)
    running.stop()


def test_a_request_larger_than_a_batch_is_told_and_holds_up_nobody():
    source, lane = FakeSource(), FakeLane(free=True)
    running = OnThreads([lane], BATCHING, 2)
    running.submit([source.ticket(0), source.ticket(1, rows=5), source.ticket(2, rows=4)])
    running.stop()
    errors = {ticket.index: ticket.error for ticket in source.told}
    assert errors.keys() == {0, 1, 2}
    assert isinstance(errors[1], InvalidRequest)
    assert errors[0] is errors[2] is None


class Deaf(FakeSource):
    """Fails when it is told anything."""

    def finish(self, tickets):
        super().finish(tickets)
        raise OSError("gone")


def test_a_source_that_cannot_be_told_is_no_trouble_for_the_others(caplog):
    deaf, source = Deaf(), FakeSource()
    running = OnThreads([FakeLane(free=True)], BATCHING, 2)
    running.submit([deaf.ticket(0), source.ticket(1)])
    running.submit([source.ticket(2)])
    running.stop()
    assert [ticket.index for ticket in source.told] == [1, 2]
    assert len(deaf.told) == 1
    assert "1 requests could not be answered" in caplog.text
