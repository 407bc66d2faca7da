"""The dispatcher with priorities, deadlines and clients that leave: who goes first, and who is not computed at all."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import Cancelled, DeadlineExceeded
from headrace.pipeline.batch import BatchingConfig
from headrace.pipeline.dispatch import Dispatcher
from headrace.request import DEFAULT_PRIORITY, Withdrawal
from tests.pipeline.fakes import (
    BATCHING,
    BOTH_WAYS,
    SINGLES,
    FakeClock,
    FakeLane,
    FakeSource,
    OnThreads,
    indexes_of,
)


def asked(source, index, *, priority=DEFAULT_PRIORITY, deadline_ns=0, rows=1):
    ticket = source.ticket(index, rows)
    ticket.priority, ticket.deadline_ns = priority, deadline_ns
    return ticket


def withdrawal_of(ticket):
    return Withdrawal(ticket.source, (ticket.index, ticket.first_row))


@pytest.fixture
def source():
    return FakeSource()


@BOTH_WAYS
def test_what_waits_starts_by_priority_and_then_in_order_of_arrival(way, source):
    lane = FakeLane()
    running = way([lane], SINGLES, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([asked(source, 1, priority=200), asked(source, 2), asked(source, 3, priority=1)])
    running.submit([asked(source, 4, priority=1), asked(source, 5), asked(source, 6, priority=99)])
    running.settle()
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [3], [4], [6], [2], [5], [1]]


@BOTH_WAYS
def test_a_batch_takes_high_priorities_first_and_fills_up_with_lower_ones(way, source):
    lane = FakeLane()
    running = way([lane], BATCHING, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([asked(source, index) for index in (1, 2, 3)])
    running.submit([asked(source, 4, priority=5, rows=2)])
    running.settle()
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [4, 1, 2], [3]]


DELAY_US = 1000
WITH_DELAY = BatchingConfig(buckets=(1, 2, 4), max_queue_delay_us=DELAY_US)


@BOTH_WAYS
def test_a_delay_counts_from_the_oldest_request_whatever_its_priority(way, source):
    lane, clock = FakeLane(free=True), FakeClock()
    running = way([lane], WITH_DELAY, 1, clock=clock)
    running.submit([source.ticket(0)])
    clock.now_ns = DELAY_US * 1000 - 1
    urgent = source.ticket(1, received_ns=clock.now_ns)
    urgent.priority = 1
    running.submit([urgent])
    clock.set_and_wait_until_seen(DELAY_US * 1000 - 1)
    assert lane.launched == []
    clock.now_ns = DELAY_US * 1000
    source.wait_until_told(2)
    running.stop()
    assert indexes_of(lane.launched) == [[1, 0]]


@BOTH_WAYS
def test_who_is_late_is_told_while_all_lanes_are_busy_wherever_it_waits(way, source):
    lane, clock = FakeLane(), FakeClock()
    running = way([lane], SINGLES, 1, clock=clock)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([asked(source, 1), asked(source, 2, deadline_ns=2000), asked(source, 3, deadline_ns=1000)])
    running.submit([asked(source, 4, priority=200, deadline_ns=1500)])
    running.submit([asked(source, 5, deadline_ns=2001)])
    clock.now_ns = 2001
    source.wait_until_told(3)
    assert sorted(ticket.index for ticket in source.told) == [2, 3, 4]
    assert {type(ticket.error) for ticket in source.told} == {DeadlineExceeded}
    assert indexes_of(lane.launched) == [[0]], "the lane is still held"
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1], [5]]
    assert sorted(ticket.index for ticket in source.told) == [0, 1, 2, 3, 4, 5]


@BOTH_WAYS
def test_who_is_late_is_told_by_the_real_clock(way, source):
    lane = FakeLane()
    running = way([lane], SINGLES, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    now_ns = running.dispatcher._clock()
    running.submit([asked(source, 1, deadline_ns=now_ns + 50_000_000)])
    running.submit([asked(source, 2, deadline_ns=now_ns + 1_000_000)])  # due before what has been watched for so far
    source.wait_until_told(2)
    assert [ticket.index for ticket in source.told] == [2, 1]
    lane.free()
    running.stop()


@BOTH_WAYS
def test_a_deadline_is_kept_during_a_long_delay(way, source):
    lane, clock = FakeLane(free=True), FakeClock()
    running = way([lane], BatchingConfig(buckets=(1, 2, 4), max_queue_delay_us=3_600_000_000), 1, clock=clock)
    running.submit([source.ticket(0)])
    running.submit([asked(source, 1, deadline_ns=1_000_000)])
    clock.now_ns = 1_000_001
    source.wait_until_told(1)
    assert [ticket.index for ticket in source.told] == [1]
    assert lane.launched == []
    running.submit([asked(source, index) for index in (2, 3, 4)])
    source.wait_until_told(5)
    running.stop()
    assert indexes_of(lane.launched) == [[0, 2, 3, 4]]


@BOTH_WAYS
def test_what_is_withdrawn_while_it_waits_ends_as_cancelled_and_is_not_computed(way, source):
    lane = FakeLane()
    running = way([lane], SINGLES, 1)
    tickets = [source.ticket(index) for index in range(5)]
    running.submit(tickets[:1])
    lane.wait_until_launched(1)
    running.submit(tickets[1:])
    running.withdraw([withdrawal_of(tickets[3]), withdrawal_of(tickets[1])])
    source.wait_until_told(2)
    assert [ticket.index for ticket in source.told] == [1, 3]
    assert {type(ticket.error) for ticket in source.told} == {Cancelled}
    assert "its client left" in str(tickets[1].error)
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [2], [4]]


@BOTH_WAYS
def test_what_has_been_launched_or_has_ended_cannot_be_withdrawn(way, source):
    lane = FakeLane()
    running = way([lane], SINGLES, 1)
    first, second = source.ticket(0), source.ticket(1)
    running.submit([first])
    lane.wait_until_launched(1)
    running.withdraw([withdrawal_of(first)])
    running.settle()
    assert source.told == []
    lane.end()
    source.wait_until_told(1)
    running.withdraw([withdrawal_of(first)])
    running.submit([second])
    lane.free()
    running.stop()
    assert [(ticket.index, ticket.error) for ticket in source.told] == [(0, None), (1, None)]


@BOTH_WAYS
def test_all_that_waits_of_a_client_that_is_gone_is_dropped_and_nothing_of_others(way, source):
    lane, other = FakeLane(), FakeSource()
    running = way([lane], SINGLES, 1)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([source.ticket(1), other.ticket(2), source.ticket(3), other.ticket(4)])
    running.withdraw([Withdrawal(source, None)])
    source.wait_until_told(2)
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [2], [4]]
    assert {ticket.index: type(ticket.error) for ticket in source.told} == {1: Cancelled, 3: Cancelled, 0: type(None)}
    assert [ticket.error for ticket in other.told] == [None, None]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.sampled_from([1, DEFAULT_PRIORITY, 200]), st.integers(0, 9), st.integers(1, 4)),
        st.tuples(st.just("withdraw"), st.integers(0, 30), st.none(), st.none()),
        st.tuples(st.just("end"), st.none(), st.none(), st.none()),
        st.tuples(st.just("later"), st.integers(1, 3), st.none(), st.none()),
    ),
    max_size=30,
)


class Script:
    """Arrivals for a loop on the test's own thread: one step each time that it looks; then all ends by itself."""

    def __init__(self, steps, lane, source, clock):
        self._steps, self._lane, self._source, self._clock = list(steps), lane, source, clock
        self._taken, self._words = [], []
        self.sent = []

    def ready(self):
        if not self._steps:
            self._lane.free()
            return True
        what, first, deadline_ns, rows = self._steps.pop(0)
        if what == "submit":
            self._taken = [asked(self._source, len(self.sent), priority=first, deadline_ns=deadline_ns, rows=rows)]
            self.sent += self._taken
        elif what == "withdraw":
            self._words = [withdrawal_of(ticket) for ticket in self.sent if ticket.index == first]
        elif what == "end":
            self._lane.end(self._lane.outstanding > 0)
        else:
            self._clock.now_ns += first
        return bool(self._taken or self._words)

    def take(self, timeout_s):
        while not self._taken and not self._words and self._steps:
            self.ready()
        taken, self._taken = self._taken, []
        return taken if taken or self._words else None

    def withdrawn(self):
        words, self._words = self._words, []
        return words


@given(steps=STEPS, depth=st.integers(1, 2))
def test_in_whatever_order_each_request_is_told_once_and_computed_or_not(steps, depth):
    source, lane, clock = FakeSource(), FakeLane(), FakeClock()
    script = Script(steps, lane, source, clock)
    dispatcher = Dispatcher([lane], BATCHING, depth, clock=clock)
    dispatcher.serve(script)
    computed = [ticket.index for batch in lane.launched for ticket in batch.tickets]
    assert sorted(ticket.index for ticket in source.told) == [ticket.index for ticket in script.sent]
    assert sorted(computed) == [ticket.index for ticket in script.sent if ticket.error is None], "once, or not at all"
    assert {type(ticket.error) for ticket in script.sent} <= {type(None), Cancelled, DeadlineExceeded}
    assert all(ticket.started_ns <= ticket.deadline_ns for ticket in script.sent if ticket.deadline_ns)
    assert [len(lanes) for lanes in dispatcher._levels] == [1] + [0] * depth, "the lane is free"
    assert dispatcher._open_tickets == 0


def test_a_dispatcher_whose_last_request_is_withdrawn_stops(source):
    before = set(threading.enumerate())
    lane = FakeLane()
    running = OnThreads([lane], WITH_DELAY, 1)
    ticket = source.ticket(0, received_ns=running.dispatcher._clock() + 3_600_000_000_000)  # its delay never ends
    running.submit([ticket])
    running.withdraw([withdrawal_of(ticket)])
    source.wait_until_told(1)
    running.stop()
    assert lane.launched == []
    assert set(threading.enumerate()) == before
