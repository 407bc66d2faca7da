"""The requests that wait for a lane: by priority, then in order of arrival. The clock is an argument."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace.request import Ticket, Withdrawal

_SPENT = 64  # deadlines of requests that wait no more, kept at most beside as many as still wait


class Waiting:
    """`rows` is the sum of all that wait; `deadlines` a heap whose first entry begins with when `take_late` is due.

    Deadlines cost only those who have one. A launched request's stays in the heap until it is the first.
    """

    __slots__ = ("_queue", "_timed", "deadlines", "rows")

    def __init__(self) -> None:
        self.rows = 0
        self._queue: deque[Ticket] = deque()
        self.deadlines: list[tuple[int, int]] = []  # and ids
        self._timed: dict[int, Ticket] = {}  # by id: those with a deadline

    def add(self, ticket: Ticket) -> None:
        queue = self._queue
        if queue and ticket.priority < queue[-1].priority:
            insort(queue, ticket, key=attrgetter("priority"))
        else:
            queue.append(ticket)
        self.rows += ticket.rows
        if ticket.deadline_ns:
            self._timed[id(ticket)] = ticket
            heappush(self.deadlines, (ticket.deadline_ns, id(ticket)))
            if len(self.deadlines) > 2 * len(self._timed) + _SPENT:
                self.deadlines = [(timed.deadline_ns, key) for key, timed in self._timed.items()]
                heapify(self.deadlines)

    def take(self, count: int) -> list[Ticket]:
        """Take out the first `count`."""
        queue = self._queue
        tickets = []
        for _ in range(count):
            ticket = queue.popleft()
            self.rows -= ticket.rows
            if ticket.deadline_ns:
                self._untime(ticket)
            tickets.append(ticket)
        return tickets

    def take_all(self) -> list[Ticket]:
        return self.take(len(self._queue))

    def take_late(self, now_ns: int) -> list[Ticket]:
        """Take out those whose deadline has passed, the one that was due first before the others."""
        late: list[Ticket] = []
        while self.deadlines and self.deadlines[0][0] < now_ns:
            deadline_ns, key = heappop(self.deadlines)
            ticket = self._timed.get(key)
            if ticket is not None and ticket.deadline_ns == deadline_ns:
                self._untime(ticket)
                late.append(ticket)
        self._remove(late)
        return late

    def take_withdrawn(self, withdrawals: Sequence[Withdrawal]) -> list[Ticket]:
        """Take out what is not wanted any more, as far as it still waits."""
        requests = {(source, *request) for source, request in withdrawals if request is not None}
        indexes = {index for _, index, _ in requests}
        gone = {source for source, request in withdrawals if request is None}
        withdrawn = [
            ticket
            for ticket in self._queue
            if ticket.source in gone
            or (ticket.index in indexes and (ticket.source, ticket.index, ticket.first_row) in requests)
        ]
        for ticket in withdrawn:
            if ticket.deadline_ns:
                self._untime(ticket)
        self._remove(withdrawn)
        return withdrawn

    def oldest_ns(self) -> int:
        """Return when the oldest one came. Something must wait."""
        queue = self._queue
        if queue[0].priority == queue[-1].priority:
            return queue[0].received_ns
        return min(ticket.received_ns for ticket in queue)

    def each_rows(self) -> Iterator[int]:
        """Yield their rows, in order."""
        return (ticket.rows for ticket in self._queue)

    def _untime(self, ticket: Ticket) -> None:
        del self._timed[id(ticket)]
        if not self._timed:
            self.deadlines.clear()

    def _remove(self, tickets: Iterable[Ticket]) -> None:
        """Take these out of the queue: most cheaply those at its head, where what is late mostly is."""
        gone = {id(ticket): ticket.rows for ticket in tickets}
        self.rows -= sum(gone.values())
        while gone and id(self._queue[0]) in gone:
            del gone[id(self._queue.popleft())]
        if gone:
            self._queue = deque(ticket for ticket in self._queue if id(ticket) not in gone)
