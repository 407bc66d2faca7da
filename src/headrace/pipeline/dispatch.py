"""The dispatcher: takes waiting requests to the lanes, and their answers back to where they came from.

Two threads at work: whoever submits launches what can be launched; one more waits for the oldest launched batch, answers
it, and launches what has waited for the room. Both call `_pump`, under one lock. A launch only hands work to a lane and
never waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Protocol

from headrace.clock import Clock, now_ns
from headrace.errors import EngineStopped
from headrace.pipeline.batch import BatchingConfig, bucket_of, may_start, take
from headrace.request import Batch, Ticket


class Lane(Protocol):
    """Runs batches in order, beside the other lanes."""

    def launch(self, batch: Batch) -> None:
        """Begin: copies in, model, copies out. Does not wait. Raises what went wrong."""

    def wait(self, batch: Batch) -> None:
        """Return when the outputs of a launched batch lie in its tables. Raises what went wrong."""


class _Busy:
    """A lane and how many batches it has."""

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
        self._lanes = [_Busy(number, lane) for number, lane in enumerate(lanes)]
        self._batching = batching
        self._depth = depth
        self._clock = clock
        self._waiting: deque[Ticket] = deque()
        self._waiting_rows = 0
        self._launched: queue.SimpleQueue[tuple[_Busy, Batch] | None] = queue.SimpleQueue()
        self._changed = threading.Condition(threading.Lock())
        self._open_tickets = 0
        self._failure: Exception | None = None
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        targets = [self._finish_all] + [self._watch_delays] * (self._batching.max_queue_delay_us > 0)
        self._threads = [threading.Thread(target=target, name=target.__name__.strip("_"), daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take over requests of at most `max_batch_size` rows each. Any thread may call it; it does not wait.

        Raises EngineStopped, and then owns none of them.
        """
        with self._changed:
            if self._stopping or self._failure:
                raise EngineStopped(str(self._failure or "the engine is stopping and takes no more requests"))
            self._waiting.extend(tickets)
            self._waiting_rows += sum(ticket.rows for ticket in tickets)
            self._open_tickets += len(tickets)
            self._pump()

    def drain(self) -> None:
        """Return when every ticket has ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open_tickets)

    def stop(self) -> None:
        """Take no more, end what is there, and end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.drain()
        self._launched.put(None)
        for thread in self._threads:
            thread.join()

    def _pump(self) -> None:
        """Launch whatever may be launched now. The lock is held."""
        while (busy := self._freest()) is not None:
            idle = not busy.launched
            if not may_start(self._waiting_rows, self._batching, lane_idle=idle):
                return
            waited_us = (self._clock() - self._waiting[0].received_ns) / 1000
            rows = [ticket.rows for ticket in islice(self._waiting, self._batching.max_batch_size + 1)]
            count = take(rows, waited_us, self._batching, lane_idle=idle)
            if not count:
                return
            self._waiting_rows -= sum(rows[:count])
            self._launch(busy, [self._waiting.popleft() for _ in range(count)])

    def _freest(self) -> _Busy | None:
        best = min(self._lanes, key=lambda busy: busy.launched)
        return best if best.launched < self._depth else None

    def _launch(self, busy: _Busy, tickets: list[Ticket]) -> None:
        batch = Batch.of(tickets, bucket_of(sum(ticket.rows for ticket in tickets), self._batching))
        started_ns = self._clock()
        for ticket in tickets:
            ticket.started_ns, ticket.lane, ticket.batch_rows = started_ns, busy.number, batch.rows
        try:
            busy.lane.launch(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, its requests are told
            for ticket in tickets:
                ticket.error = error
        busy.launched += 1
        # Move it behind its equals, so that lanes take turns.
        self._lanes.remove(busy)
        self._lanes.append(busy)
        self._launched.put((busy, batch))

    def _finish_all(self) -> None:
        while (launched := self._launched.get()) is not None:
            self._finish(*launched)

    def _finish(self, busy: _Busy, batch: Batch) -> None:
        error = batch.tickets[0].error or self._wait(busy.lane, batch)
        if error is not None:
            self._blame(busy.lane, batch, error)
        computed_ns = self._clock()
        for ticket in batch.tickets:
            ticket.computed_ns = computed_ns
        tell(batch.tickets)
        with self._changed:
            busy.launched -= 1
            self._open_tickets -= len(batch.tickets)
            if self._failure:
                self._abandon()
            self._pump()
            if not self._open_tickets:
                self._changed.notify_all()

    def _wait(self, lane: Lane, batch: Batch) -> Exception | None:
        try:
            lane.wait(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, its requests are told
            return error
        return None

    def _blame(self, lane: Lane, batch: Batch, error: Exception) -> None:
        """Find out whose fault it was: run each request by itself, so that only those fail that fail alone."""
        if isinstance(error, EngineStopped):  # the device is lost
            self._failure = error
        for ticket in batch.tickets:
            ticket.error = error
        if self._failure or len(batch.tickets) == 1:
            return
        for ticket in batch.tickets:
            alone = Batch.of([ticket], bucket_of(ticket.rows, self._batching))
            try:
                lane.launch(alone)
                lane.wait(alone)
            except Exception as own:  # noqa: BLE001  whatever it is, its request is told
                ticket.error = own
            else:
                ticket.error = None

    def _abandon(self) -> None:
        """Fail all that wait: nothing can be computed any more. The lock is held."""
        abandoned = list(self._waiting)
        self._waiting.clear()
        self._waiting_rows = 0
        for ticket in abandoned:
            ticket.error = self._failure
        self._open_tickets -= len(abandoned)
        tell(abandoned)

    def _watch_delays(self) -> None:
        """Launch what has waited for the whole delay."""
        delay_ns = self._batching.max_queue_delay_us * 1000
        with self._changed:
            while not (self._stopping and not self._open_tickets):
                self._pump()
                left_ns = self._waiting[0].received_ns + delay_ns - self._clock() if self._waiting else delay_ns
                self._changed.wait(max(left_ns, 10_000) / 1e9)


def tell(tickets: Iterable[Ticket]) -> None:
    """Give ended requests back to their sources, those of one source together."""
    for _, group in groupby(tickets, key=lambda ticket: id(ticket.source)):
        ended = list(group)
        ended[0].source.finish(ended)
