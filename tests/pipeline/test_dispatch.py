"""The dispatcher with lanes that end when they are told to: each request answered once, rightly, and in time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import EngineStopped
from headrace.pipeline.batch import BatchingConfig, bucket_of
from headrace.pipeline.dispatch import Dispatcher, tell
from tests.pipeline.fakes import (
    BATCHING,
    BOTH_WAYS,
    SINGLES,
    WAIT_S,
    FakeClock,
    FakeLane,
    FakeSource,
    InALoop,
    OnThreads,
    indexes_of,
    says,
)


class Script:
    """Arrivals for a loop on the test's own thread: each time that it looks, one step happens.

    A step is a list, which are requests of so many rows that come together, or a number, from 0 on: the lane whose
    oldest batch ends. After the last step every batch ends by itself.
    """

    def __init__(self, steps, lanes, source, sent):
        self._steps = list(steps)
        self._lanes = lanes
        self._source = source
        self._sent = sent  # every request, in order
        self._next = []

    def ready(self):
        if not self._steps:
            for lane in self._lanes:
                lane.free()
            return True
        step = self._steps.pop(0)
        if isinstance(step, int):
            lane = self._lanes[step % len(self._lanes)]
            lane.end(lane.outstanding > 0)
            return False
        self._next = [self._source.ticket(len(self._sent) + number, rows) for number, rows in enumerate(step)]
        self._sent += self._next
        return True

    def take(self, timeout_s):
        while not self._next and self._steps:
            self.ready()
        taken, self._next = self._next, []
        return taken or None

    def withdrawn(self):
        return ()


class StrictLane(FakeLane):
    """Notes in `started` the requests that come for the first time, and in `broken` every rule that was."""

    def __init__(self, depth, sent, started, bad):
        super().__init__(wait_error=says("bad", *bad))
        self.broken = []
        self._depth = depth
        self._sent = sent
        self._started = started

    def launch(self, batch):
        first_time = batch.tickets[0].batch_rows == batch.rows
        following = self._sent[batch.tickets[-1].index + 1 :]
        is_full = batch.rows + (following[0].rows if following else 0) > BATCHING.max_batch_size
        for rule, kept in {
            "no more batches than its depth": not first_time or self.outstanding < self._depth,
            "one request alone, if not for the first time": first_time or len(batch.tickets) == 1,
            "no part of a batch on a busy lane": not first_time or is_full or not self.outstanding or batch.rows == 4,
            "the rows are the requests'": batch.rows == sum(ticket.rows for ticket in batch.tickets),
            "the smallest bucket that holds them": batch.bucket == bucket_of(batch.rows, BATCHING),
        }.items():
            if not kept:
                self.broken.append((rule, batch))
        if first_time:
            self._started += batch.tickets
        super().launch(batch)

    def wait(self, batch):
        if not self.done(batch):  # nobody waits for a batch that runs, only for a request that is run again
            assert len(batch.tickets) == 1
            self.end(batch.token + 1 - self._allowed)
        super().wait(batch)


STEPS = st.lists(st.integers(0, 2) | st.lists(st.integers(1, 4), min_size=1, max_size=6), max_size=25)


@given(steps=STEPS, lanes=st.integers(1, 3), depth=st.integers(1, 3), bad=st.sets(st.integers(0, 30), max_size=4))
def test_in_whatever_order_things_come_and_end_each_request_is_told_once(steps, lanes, depth, bad):
    source, sent, started = FakeSource(), [], []
    all_lanes = [StrictLane(depth, sent, started, bad) for _ in range(lanes)]
    Dispatcher(all_lanes, BATCHING, depth).serve(Script(steps, all_lanes, source, sent))
    everyone = list(range(sum(len(step) for step in steps if isinstance(step, list))))
    assert [lane.broken for lane in all_lanes] == [[]] * lanes
    assert [ticket.index for ticket in started] == everyone, "first come, first started"
    assert sorted(ticket.index for ticket in source.told) == everyone
    assert {ticket.index for ticket in source.told if ticket.error} == bad & set(everyone)
    for number, lane in enumerate(all_lanes):
        assert {ticket.lane for batch in lane.launched for ticket in batch.tickets} <= {number}


@BOTH_WAYS
@pytest.mark.parametrize("lanes", [1, 3], ids=["one lane", "three lanes"])
def test_requests_of_several_threads_are_told_once_each_and_start_in_their_order(way, lanes):
    source, all_lanes = FakeSource(), [FakeLane(free=True) for _ in range(lanes)]
    running = way(all_lanes, BATCHING, 2)

    def submit(begin):
        for index in range(begin, begin + 300, 3):
            running.submit([source.ticket(index + number, 1 + (index + number) % 4) for number in range(3)])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(submit, range(0, 1200, 300)))
    running.stop()
    assert sorted(ticket.index for ticket in source.told) == list(range(1200))
    assert all(ticket.error is None for ticket in source.told)
    assert all(batch.rows <= 4 for lane in all_lanes for batch in lane.launched)
    for begin in range(0, 1200, 300):
        started = [ticket.index for ticket in source.told if begin <= ticket.index < begin + 300]
        assert started == sorted(started)


@BOTH_WAYS
def test_a_lane_has_no_more_batches_than_its_depth(way):
    source, lanes = FakeSource(), [FakeLane(), FakeLane()]
    running = way(lanes, SINGLES, 2)
    running.submit([source.ticket(index) for index in range(7)])
    for lane in lanes:
        lane.wait_until_launched(2)
    running.settle()
    assert [indexes_of(lane.launched) for lane in lanes] == [[[0], [2]], [[1], [3]]], "lanes take turns"
    lanes[0].end()
    lanes[0].wait_until_launched(3)
    running.settle()
    assert [len(lane.launched) for lane in lanes] == [3, 2]
    for lane in lanes:
        lane.free()
    running.stop()
    assert [ticket.index for ticket in source.told] == list(range(7))


def test_of_several_idle_lanes_the_one_that_has_waited_longest_is_next():
    source, lanes = FakeSource(), [FakeLane() for _ in range(3)]
    steps = [[1], 0, [1], 1, [1], 2, [1, 1]]
    Dispatcher(lanes, SINGLES, 2).serve(Script(steps, lanes, source, []))
    assert [ticket.lane for ticket in source.told] == [0, 1, 2, 0, 1]


@BOTH_WAYS
def test_what_waits_for_a_busy_lane_grows_into_one_batch(way):
    source, lane = FakeSource(), FakeLane()
    running = way([lane], BATCHING, 3)
    running.submit([source.ticket(0)])
    lane.wait_until_launched(1)
    for index in (1, 2, 3):
        running.submit([source.ticket(index)])
        running.settle()
    assert indexes_of(lane.launched) == [[0]]
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1, 2, 3]]
    assert [ticket.batch_rows for ticket in source.told] == [1, 3, 3, 3]
    assert [batch.bucket for batch in lane.launched] == [1, 4]


@BOTH_WAYS
def test_a_full_batch_starts_behind_one_that_still_runs(way):
    source, lane = FakeSource(), FakeLane()
    running = way([lane], BATCHING, 2)
    running.submit([source.ticket(0)])
    running.submit([source.ticket(index) for index in range(1, 6)])
    lane.wait_until_launched(2)
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1, 2, 3, 4], [5]]


@BOTH_WAYS
def test_batches_that_end_out_of_order_are_all_told(way):
    source, lanes = FakeSource(), [FakeLane(), FakeLane()]
    running = way(lanes, SINGLES, 1)
    running.submit([source.ticket(index) for index in range(4)])
    lanes[1].free()
    running.settle()
    lanes[0].free()
    running.stop()
    assert sorted(ticket.index for ticket in source.told) == [0, 1, 2, 3]


DELAY_US = 1000
WITH_DELAY = BatchingConfig(buckets=(1, 2, 4), max_queue_delay_us=DELAY_US)


@BOTH_WAYS
def test_a_part_of_a_batch_starts_after_the_delay_and_not_before(way):
    source, lane, clock = FakeSource(), FakeLane(free=True), FakeClock()
    running = way([lane], WITH_DELAY, 1, clock=clock)
    running.submit([source.ticket(0, received_ns=0)])
    running.submit([source.ticket(1, received_ns=5)])
    clock.set_and_wait_until_seen(DELAY_US * 1000 - 1)
    assert lane.launched == []
    clock.now_ns = DELAY_US * 1000
    source.wait_until_told(2)
    running.stop()
    assert indexes_of(lane.launched) == [[0, 1]], "counted from the oldest"


@BOTH_WAYS
def test_a_full_batch_does_not_wait_for_the_delay(way):
    source, lane, clock = FakeSource(), FakeLane(free=True), FakeClock()
    running = way([lane], WITH_DELAY, 1, clock=clock)
    for index in range(4):
        running.submit([source.ticket(index)])
    source.wait_until_told(4)
    running.stop()
    assert indexes_of(lane.launched) == [[0, 1, 2, 3]]


def submit_until_refused(running, tickets_of, begin=0):
    """Submit one time after the other until nothing more is taken; return the index of the first that was not."""
    for index in range(begin, begin + 1_000_000):
        try:
            running.submit(tickets_of(index))
        except EngineStopped as error:
            assert "takes no more requests" in str(error)  # noqa: PT017  raised sooner or later
            return index
    pytest.fail("was never refused")


def test_stopping_ends_what_is_there_takes_no_more_and_leaves_no_thread():
    before = set(threading.enumerate())
    source, lanes = FakeSource(), [FakeLane(), FakeLane()]
    running = OnThreads(lanes, SINGLES, 2)
    running.submit([source.ticket(index) for index in range(9)])
    with ThreadPoolExecutor(1) as caller:
        stopping = caller.submit(running.stop)
        try:
            accepted = submit_until_refused(running, lambda index: [source.ticket(index)], begin=9)
            assert not stopping.done()
        finally:
            for lane in lanes:
                lane.free()
        stopping.result(WAIT_S)
    assert [ticket.index for ticket in source.told] == list(range(accepted))
    assert all(ticket.error is None for ticket in source.told)
    assert set(threading.enumerate()) == before


def test_a_part_of_a_batch_that_waits_for_its_delay_is_answered_before_a_stop():
    source, lane, clock = FakeSource(), FakeLane(free=True), FakeClock()
    running = OnThreads([lane], WITH_DELAY, 1, clock=clock)
    running.submit([source.ticket(0), source.ticket(1)])
    stopping = threading.Thread(target=running.stop, daemon=True)
    stopping.start()
    submit_until_refused(running, lambda index: [])
    clock.now_ns = DELAY_US * 1000
    source.wait_until_told(2)
    stopping.join(WAIT_S)
    assert not stopping.is_alive()


def test_a_dispatcher_with_nothing_to_do_stops():
    before = set(threading.enumerate())
    for batching in (SINGLES, WITH_DELAY):
        OnThreads([FakeLane()], batching, 1).stop()
    assert set(threading.enumerate()) == before


def test_the_loop_ends_what_is_under_way_when_no_more_will_come():
    source, lane = FakeSource(), FakeLane()
    running = InALoop([lane], SINGLES, 1)
    running.submit([source.ticket(0), source.ticket(1)])
    running.submit(None)
    lane.wait_until_launched(1)
    lane.free()
    running.stop()
    assert [ticket.index for ticket in source.told] == [0, 1]


def test_the_loop_waits_for_requests_only_while_nothing_is_under_way():
    source, lane = FakeSource(), FakeLane()
    waits = []

    class Arrivals:
        """One request; then nothing until it has ended; then the end."""

        def ready(self):
            if lane.launched and not source.told:
                lane.end()
            return True

        def take(self, timeout_s):
            waits.append((timeout_s > 0, len(lane.launched), len(source.told)))
            if source.told:
                return None
            return [] if lane.launched else [source.ticket(0)]

        def withdrawn(self):
            return ()

    Dispatcher([lane], SINGLES, 1).serve(Arrivals())
    assert waits == [(True, 0, 0), (False, 1, 0), (True, 1, 1)]


def test_the_loop_tells_what_ended_meanwhile_together():
    source, lanes = FakeSource(), [FakeLane(), FakeLane()]
    Dispatcher(lanes, SINGLES, 1).serve(Script([[1, 1], 1, 0], lanes, source, []))
    assert [[ticket.index for ticket in call] for call in source.calls] == [[0, 1]]


@BOTH_WAYS
def test_requests_are_stamped_with_when_and_where_they_ran(way):
    source, lanes, clock = FakeSource(), [FakeLane(free=True), FakeLane(free=True)], FakeClock()
    clock.now_ns = 7
    running = way(lanes, SINGLES, 1, clock=clock)
    running.submit([source.ticket(0), source.ticket(1)])
    running.stop()
    assert [(ticket.started_ns, ticket.computed_ns) for ticket in source.told] == [(7, 7), (7, 7)]
    assert [(ticket.lane, ticket.batch_rows) for ticket in source.told] == [(0, 1), (1, 1)]


def test_each_source_is_told_of_its_own_requests_and_of_neighbours_together():
    first, second = FakeSource(), FakeSource()
    tell([first.ticket(0), first.ticket(1), second.ticket(2), first.ticket(3)])
    assert [[ticket.index for ticket in call] for call in first.calls] == [[0, 1], [3]]
    assert [[ticket.index for ticket in call] for call in second.calls] == [[2]]


@BOTH_WAYS
def test_requests_of_several_sources_run_together_and_go_back_each_to_its_own(way):
    first, second, lane = FakeSource(), FakeSource(), FakeLane()
    running = way([lane], BATCHING, 1)
    running.submit([first.ticket(0)])
    lane.wait_until_launched(1)
    running.submit([second.ticket(1), first.ticket(2), second.ticket(3)])
    lane.free()
    running.stop()
    assert indexes_of(lane.launched) == [[0], [1, 2, 3]]
    assert [ticket.index for ticket in first.told] == [0, 2]
    assert [ticket.index for ticket in second.told] == [1, 3]


def test_stopping_does_not_wait_for_a_delay():
    source = FakeSource()
    running = OnThreads([FakeLane(free=True)], BatchingConfig(buckets=(1, 2, 4), max_queue_delay_us=3_600_000_000), 2)
    running.submit([source.ticket(0)])
    running.stop()
    assert [ticket.index for ticket in source.told] == [0]
