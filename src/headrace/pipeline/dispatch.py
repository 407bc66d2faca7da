"""The dispatcher: takes waiting requests to the lanes, and their answers back to where they came from.

It works in one of two ways. `serve` is a single loop for a process that does nothing else: it takes requests, launches
them, looks which launched batches are done, and answers those together; while anything is under way it never sleeps.
`start` is for a process that others share: whoever submits also launches, and one thread waits for the oldest launched
batch, answers it, and launches what has waited for the room. A launch only hands work to a lane and never waits for it.

What waits is taken by priority, then in order of arrival. A request whose deadline passes, or whose client leaves,
before it is launched is told so and never computed; what has been launched is computed in any case.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

from headrace.clock import NS_PER_S, Clock, now_ns
from headrace.errors import DeadlineExceeded, EngineStopped, InvalidRequest
from headrace.pipeline.batch import BatchingConfig, bucket_of, may_start, take
from headrace.pipeline.waiting import Waiting
from headrace.request import Batch, Ticket, Withdrawal

_log = logging.getLogger(__name__)

LINGER_NS = 500_000
IDLE_POLL_S = 1.0  # how often an idle loop looks up; work wakes it at once


class Lane(Protocol):
    """Runs batches in order, beside the other lanes."""

    def launch(self, batch: Batch) -> None:
        """Begin: copies in, model, copies out. Does not wait. Raises what went wrong."""

    def done(self, batch: Batch) -> bool:
        """Tell whether a launched batch has ended, well or not. Does not wait."""

    def wait(self, batch: Batch) -> None:
        """Return when the outputs of a launched batch lie in its tables. Raises what went wrong."""


class Arrivals(Protocol):
    """Where the loop's requests come from."""

    def ready(self) -> bool:
        """Tell cheaply whether `take` would return at once."""

    def take(self, timeout_s: float) -> Sequence[Ticket] | None:
        """Return what has come, nothing after `timeout_s`; None when no more will come."""

    def withdrawn(self) -> Sequence[Withdrawal]:
        """Return which of what was taken before is no longer wanted, as far as `take` has learnt since."""


class _Busy:
    """A lane and how many batches it has."""

    __slots__ = ("lane", "launched", "number")

    def __init__(self, number: int, lane: Lane) -> None:
        self.number = number
        self.lane = lane
        self.launched = 0


class Dispatcher:
    """Owns every ticket from `submit` until its source is told that it has ended.

    `depth` is how many batches a lane may have at once: with two or more, the device finds the next one already there
    when one ends.
    """

    def __init__(self, lanes: Sequence[Lane], batching: BatchingConfig, depth: int, clock: Clock = now_ns) -> None:
        self._batching = batching
        self._max_batch_size = batching.max_batch_size
        self._delay_ns = batching.max_queue_delay_us * 1000
        self._clock = clock
        # Lanes by how many batches they have; within a level, the one that has waited longest is next.
        self._levels: list[deque[_Busy]] = [deque() for _ in range(depth + 1)]
        self._roomy = self._levels[:-1]  # those of lanes that may have one more
        self._levels[0].extend(_Busy(number, lane) for number, lane in enumerate(lanes))
        self._waiting = Waiting()
        self._dropped: list[Ticket] = []  # ended without being launched, and not told yet
        self._launched: deque[tuple[_Busy, Batch]] = deque()
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._due = threading.Condition(lock)  # apart, so that not every launch wakes the thread that watches
        self._wakes_ns = math.inf  # when that thread will look by itself
        self._open_tickets = 0
        self._failure: Exception | None = None
        self._stopping = False
        self._threads: list[threading.Thread] = []

    @property
    def max_batch_size(self) -> int:
        """Rows of the largest batch, and of the largest request."""
        return self._max_batch_size

    @property
    def failure(self) -> Exception | None:
        """Why nothing can be computed any more; None while all is well."""
        return self._failure

    def serve(self, arrivals: Arrivals) -> None:
        """Answer requests on the calling thread until no more will come and all have ended."""
        more = True
        while more or self._open_tickets:
            if more and (_has_come(arrivals, linger=not self._open_tickets) or not self._open_tickets):
                more = self._receive(arrivals, 0.0 if self._open_tickets else IDLE_POLL_S)
            self._finish_done()
            if self._waiting.rows:
                with self._changed:
                    self._pump()
            if self._dropped:
                self._tell_dropped()

    def answer(self, arrivals: Arrivals, *, spin: bool) -> None:
        """Do what `serve` does, or without spinning the same with threads that sleep."""
        if spin:
            self.serve(arrivals)
            return
        self.start()
        try:
            while self._receive(arrivals, IDLE_POLL_S):
                pass
        finally:
            self.stop()

    def _receive(self, arrivals: Arrivals, timeout_s: float) -> bool:
        """Take over what has come, and return whether more may come. Nothing of it is kept here."""
        tickets = arrivals.take(timeout_s)
        withdrawn = arrivals.withdrawn()
        if withdrawn:
            self.withdraw(withdrawn)
        if tickets:
            self.submit_or_tell(tickets)
        return tickets is not None

    def start(self) -> None:
        """Begin answering what is submitted, on threads of its own."""
        self._threads = [
            threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True)
            for target in (self._finish_in_order, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take over requests. Any thread may call it; it does not wait. Larger ones than a batch end with an error.

        Raises EngineStopped, and then owns none of them.
        """
        with self._changed:
            if self._stopping or self._failure:
                raise EngineStopped(str(self._failure or "the engine is stopping and takes no more requests"))
            for ticket in tickets:
                if ticket.rows > self._max_batch_size:
                    self._refuse(ticket)
                else:
                    self._waiting.add(ticket)
            self._open_tickets += len(tickets)
            self._pump()
            if self._threads and self._waiting.rows:
                self._alert()
        if self._dropped:
            self._tell_dropped()

    def withdraw(self, withdrawals: Sequence[Withdrawal]) -> None:
        """End, as cancelled, what is not wanted any more and has not been launched yet. Any thread may call it."""
        with self._changed:
            withdrawn = self._waiting.take_withdrawn(withdrawals)
            for ticket in withdrawn:
                ticket.cancel()
            self._dropped += withdrawn
        if self._dropped:
            self._tell_dropped()

    def stop(self) -> None:
        """Take no more, end what is there, and end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            self._due.notify_all()
        for thread in self._threads:
            thread.join()

    def submit_or_tell(self, tickets: Sequence[Ticket]) -> None:
        """Do what `submit` does; if the engine takes no more, tell each ticket's source so."""
        try:
            self.submit(tickets)
        except EngineStopped as error:
            for ticket in tickets:
                ticket.error = error
            tell(tickets)

    def _pump(self) -> None:
        """Launch whatever may be launched now. The lock is held."""
        waiting = self._waiting
        while waiting.rows:
            if waiting.deadlines:
                self._drop_late()
            level = self._freest()
            if level is None or not may_start(waiting.rows, self._batching, lane_idle=level == 0):
                return
            count = take(waiting.each_rows(), self._waited_us(), self._batching, lane_idle=level == 0)
            if not count:
                return
            self._launch(level, waiting.take(count))

    def _waited_us(self) -> float:
        """Return how long the oldest request has waited, as far as that matters."""
        if self._stopping or not self._delay_ns:
            return math.inf
        return (self._clock() - self._waiting.oldest_ns()) / 1000

    def _refuse(self, ticket: Ticket) -> None:
        limit = self._max_batch_size
        ticket.error = InvalidRequest(f"the request has {ticket.rows} rows, and a batch at most {limit}; split it")
        self._dropped.append(ticket)

    def _drop_late(self) -> None:
        """Take out, with an error, what has waited beyond its deadline. The lock is held."""
        now_ns = self._clock()
        if self._waiting.deadlines[0][0] >= now_ns:
            return
        for ticket in self._waiting.take_late(now_ns):
            waited_ms = (now_ns - ticket.received_ns) / 1e6
            ticket.error = DeadlineExceeded(
                f"the request waited {waited_ms:.1f} ms, longer than its deadline allows, and was not computed; allow"
                " more time, or send less at once"
            )
            self._dropped.append(ticket)

    def _tell_dropped(self) -> None:
        """Tell of what ended without being launched. The lock is not held: sources run their callers' code."""
        with self._changed:
            dropped, self._dropped = self._dropped, []
        tell(dropped)
        with self._changed:
            self._close(len(dropped))

    def _close(self, ended: int) -> None:
        """Count so many as told. The lock is held."""
        self._open_tickets -= ended
        if self._stopping and not self._open_tickets:
            self._changed.notify_all()
            self._due.notify_all()

    def _freest(self) -> int | None:
        """Return the smallest number of batches that a lane has; None where all have as many as they may."""
        for level, lanes in enumerate(self._roomy):
            if lanes:
                return level
        return None

    def _launch(self, level: int, tickets: list[Ticket]) -> None:
        busy = self._levels[level].popleft()
        batch = Batch.of(tickets)
        batch.bucket = bucket_of(batch.rows, self._batching)
        started_ns = self._clock()
        for ticket in tickets:
            ticket.started_ns, ticket.lane, ticket.batch_rows = started_ns, busy.number, batch.rows
        try:
            busy.lane.launch(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, its requests are told
            batch.error = error
        busy.launched += 1
        self._levels[busy.launched].append(busy)
        self._launched.append((busy, batch))
        if self._threads:
            self._changed.notify_all()

    def _finish_done(self) -> None:
        """Answer, together, the oldest launched batches that are done."""
        done = []
        while self._launched and _is_done(*self._launched[0]):
            done.append(self._launched.popleft())
        if done:
            self._finish(done)

    def _finish_in_order(self) -> None:
        while self._finish_oldest():
            pass

    def _finish_oldest(self) -> bool:
        """Wait for the oldest batch and answer it; return whether there was one before the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._launched or (self._stopping and not self._open_tickets))
            if not self._launched:
                return False
            oldest = self._launched.popleft()
        self._finish([oldest])
        return True

    def _finish(self, batches: Sequence[tuple[_Busy, Batch]]) -> None:
        ended: list[Ticket] = []
        for busy, batch in batches:
            error = batch.error or self._wait(busy.lane, batch)
            if error is not None:
                self._blame(busy.lane, batch, error)
                batch.error = batch.token = None
            ended += batch.tickets
        computed_ns = self._clock()
        for ticket in ended:
            ticket.computed_ns = computed_ns
        tell(ended)
        with self._changed:
            for busy, _ in batches:
                self._levels[busy.launched].remove(busy)
                busy.launched -= 1
                self._levels[busy.launched].append(busy)
            self._close(len(ended))
            if self._failure:
                self._abandon()
            self._pump()
        if self._dropped:
            self._tell_dropped()

    def _wait(self, lane: Lane, batch: Batch) -> Exception | None:
        try:
            lane.wait(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, its requests are told
            return error
        return None

    def _blame(self, lane: Lane, batch: Batch, error: Exception) -> None:
        """Find out whose fault it was: run each request by itself, so that only those fail that fail alone.

        No request keeps the batch's error then, nor must its traceback keep the batch: with it went the ring's memory.
        """
        if isinstance(error, EngineStopped):  # the device is lost
            self._failure = error
        for ticket in batch.tickets:
            ticket.error = error
        if self._failure or len(batch.tickets) == 1:
            return
        for ticket in batch.tickets:
            alone = Batch.of([ticket])
            alone.bucket = bucket_of(alone.rows, self._batching)
            try:
                with self._changed:  # so that nobody else launches on this lane meanwhile
                    lane.launch(alone)
                lane.wait(alone)
            except Exception as own:  # noqa: BLE001  whatever it is, its request is told
                ticket.error = own
                if isinstance(own, EngineStopped):
                    self._failure = own
            else:
                ticket.error = None
        error.__traceback__ = None

    def _abandon(self) -> None:
        """Fail all that wait: nothing can be computed any more. The lock is held."""
        abandoned = self._waiting.take_all()
        for ticket in abandoned:
            ticket.error = self._failure
        self._dropped += abandoned

    def _watch(self) -> None:
        """Do what is due while all others wait: launch what has waited for the whole delay, tell what is late."""
        while True:
            with self._changed:
                if self._stopping and not self._open_tickets:
                    return
                self._pump()
                if not self._dropped:
                    self._wakes_ns = self._next_due_ns()
                    left_ns = self._wakes_ns - self._clock()
                    self._due.wait(None if left_ns == math.inf else max(0.0, left_ns) / NS_PER_S)
            if self._dropped:
                self._tell_dropped()

    def _next_due_ns(self) -> float:
        """Return when something is to be done that nobody else may notice. The lock is held."""
        deadlines = self._waiting.deadlines
        due_ns = deadlines[0][0] + 1 if deadlines else math.inf
        if self._delay_ns and self._waiting.rows:
            now_ns = self._clock()
            waited_ns = now_ns - self._waiting.oldest_ns()
            # What is overdue waits for a lane, and whoever frees one launches it.
            due_ns = min(due_ns, now_ns + self._delay_ns - (waited_ns if waited_ns < self._delay_ns else 0))
        return due_ns

    def _alert(self) -> None:
        """Wake the watching thread if it would come too late for what waits now. The lock is held."""
        deadlines = self._waiting.deadlines
        if (deadlines and deadlines[0][0] < self._wakes_ns) or (self._delay_ns and self._wakes_ns == math.inf):
            self._wakes_ns = 0
            self._due.notify()


def _has_come(arrivals: Arrivals, *, linger: bool) -> bool:
    """Look, and go on looking before going to sleep: to be woken up costs more than most pauses between requests."""
    until_ns = now_ns() + LINGER_NS if linger else 0
    while not (come := arrivals.ready()) and linger and now_ns() < until_ns:
        pass
    return come


def _is_done(busy: _Busy, batch: Batch) -> bool:
    return batch.error is not None or busy.lane.done(batch)


def tell(tickets: Iterable[Ticket]) -> None:
    """Give ended requests back to their sources, those of one source together."""
    for _, group in groupby(tickets, key=lambda ticket: id(ticket.source)):
        ended = list(group)
        try:
            ended[0].source.finish(ended)
        except Exception:  # noqa: BLE001  one source's trouble is not the others'
            _log.exception("%d requests could not be answered", len(ended))
