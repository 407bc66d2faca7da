"""The stage before the dispatcher, and behind it: threads that make clients' rows the network's, and answers theirs.

It stands between the rings and the dispatcher. A request waits here, by priority and in order of arrival, until there
is room in a table of the stage's own; threads make its rows there, one by one, so that those of a large request are
made side by side; then the dispatcher has it like any other, and batches it. The answer goes through `postprocess`, if
there is one, and into the client's rows. The client's source hears of every request once, whatever becomes of it: it
may be wrong, too late, cancelled, or of a client that is gone, at any point.

The dispatcher runs on threads of its own here, and does not spin: a loop that holds the interpreter lock would take it
from the threads that prepare.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from mmap import mmap
from typing import TYPE_CHECKING

import torch

from headrace.clock import NS_PER_S, Clock, now_ns
from headrace.errors import Cancelled, DeadlineExceeded, InvalidRequest
from headrace.pipeline.dispatch import IDLE_POLL_S, Arrivals, Dispatcher, tell
from headrace.pipeline.waiting import Waiting
from headrace.request import Ticket, Withdrawal
from headrace.transport.layout import Layout
from headrace.transport.leases import RowLeases
from headrace.transport.table import RowTable

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.pipeline.host_steps import HostSteps

_Job = Callable[[], None]


@dataclass(slots=True, eq=False)
class StagedTicket(Ticket):
    """A request on its way through the stage: rows of the stage's own table, in place of the client's."""

    outer: Ticket = field(kw_only=True)  # the client's
    left: int = field(kw_only=True)  # rows that are not made yet
    withdrawn: bool = False


class HostStage:
    """Owns every request from `submit` until its source is told that it has ended.

    `max_batch_size` is the dispatcher's, and the table must have room for as many rows; `register` makes the table's
    memory known to the device. `threads` make rows and answers.
    """

    def __init__(
        self,
        steps: HostSteps,
        rows: int,
        dispatcher: Dispatcher,
        register: Callable[[Tensor], Callable[[], None]],
        threads: int,
        clock: Clock = now_ns,
    ) -> None:
        self._steps = steps
        self._dispatcher = dispatcher
        self._max_batch_size = dispatcher.max_batch_size
        self._clock = clock
        layout = Layout(rows=rows, inputs=steps.signature.inputs, outputs=steps.signature.outputs)
        self._table = RowTable(layout, mmap(-1, layout.total_bytes))
        self._unregister = register(self._table.memory())
        self._leases = RowLeases(rows)
        self._waiting = Waiting()  # clients' tickets that have no rows here yet
        self._rows: deque[_Job] = deque()  # to be made
        self._answers: deque[StagedTicket] = deque()  # to be finished
        self._begun: set[StagedTicket] = set()  # all that have rows here
        self._numbers = itertools.count()
        self._open_tickets = 0
        self._stopping = False
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # there is something to do
        self._ended = threading.Condition(lock)  # a request has ended
        self._started = threading.Barrier(threads + 1)
        self._threads = [
            threading.Thread(target=self._run, name=f"host steps {number}", daemon=True) for number in range(threads)
        ]

    @property
    def table(self) -> RowTable:
        """See `request.Source`."""
        return self._table

    def answer(self, arrivals: Arrivals) -> None:
        """Answer requests until no more will come and all have ended. The counterpart of `Dispatcher.answer`."""
        self.start()
        try:
            while self._receive(arrivals):
                pass
        finally:
            self.stop()

    def start(self) -> None:
        """Begin answering what is submitted."""
        self._dispatcher.start()
        # PyTorch's number of threads is each thread's own, but a new one begins with what was set last anywhere. Rows
        # are to be made by one thread each, and the lanes to keep theirs.
        count = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._started.wait()
        torch.set_num_threads(count)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Take over requests. Does not wait. Larger ones than a batch end with an error."""
        refused = [ticket for ticket in tickets if ticket.rows > self._max_batch_size]
        for ticket in refused:
            ticket.error = InvalidRequest(
                f"the request has {ticket.rows} rows, and a batch at most {self._max_batch_size}; split it"
            )
        with self._work:
            self._open_tickets += len(tickets)
            for ticket in tickets:
                if ticket.error is None:
                    self._waiting.add(ticket)
            self._work.notify(len(tickets))
        self._end(refused)

    def withdraw(self, withdrawals: Sequence[Withdrawal]) -> None:
        """End, as cancelled, what is not wanted any more and has not been launched yet."""
        requests = {(source, *request) for source, request in withdrawals if request is not None}
        gone = {source for source, request in withdrawals if request is None}
        with self._work:
            dropped = self._waiting.take_withdrawn(withdrawals)
            begun = [
                ticket
                for ticket in self._begun
                if ticket.outer.source in gone
                or (ticket.outer.source, ticket.outer.index, ticket.outer.first_row) in requests
            ]
            for ticket in begun:
                ticket.withdrawn = True  # its rows that are not made yet will not be
        for each in dropped:
            each.cancel()
        self._end(dropped)
        if begun:
            self._dispatcher.withdraw([Withdrawal(self, (ticket.index, ticket.first_row)) for ticket in begun])

    def stop(self) -> None:
        """Take no more, end what is there, and end the threads."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        while True:
            self._drop_late()
            with self._ended:
                if not self._open_tickets:
                    break
                self._ended.wait(self._due_in_s())
        with self._work:
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._dispatcher.stop()
        self._unregister()

    def finish(self, tickets: Sequence[Ticket]) -> None:
        """Take back what the dispatcher has ended: `request.Source`'s half of this."""
        staged = [ticket for ticket in tickets if isinstance(ticket, StagedTicket)]
        if self._steps.described.postprocess is None:
            for ticket in staged:
                self._finish(ticket)
            self._give_back(staged)
            return
        answers = [ticket for ticket in staged if ticket.error is None]
        with self._work:
            self._answers.extend(answers)
            self._work.notify(len(answers))
        self._give_back([ticket for ticket in staged if ticket.error is not None])

    def _receive(self, arrivals: Arrivals) -> bool:
        """Take over what has come, and return whether more may come."""
        with self._work:
            timeout_s = self._due_in_s()
        tickets = arrivals.take(timeout_s)
        withdrawn = arrivals.withdrawn()
        if withdrawn:
            self.withdraw(withdrawn)
        if tickets:
            self.submit(tickets)
        self._drop_late()
        return tickets is not None

    def _due_in_s(self) -> float:
        """Return when to look for requests that are late, at the latest. The lock is held."""
        deadlines = self._waiting.deadlines
        if not deadlines:
            return IDLE_POLL_S
        return min(IDLE_POLL_S, max(0, deadlines[0][0] + 1 - self._clock()) / NS_PER_S)

    def _drop_late(self) -> None:
        """End what has waited here beyond its deadline."""
        now = self._clock()
        with self._work:
            late = self._waiting.take_late(now)
        for ticket in late:
            ticket.error = _late(ticket, now)
        self._end(late)

    def _end(self, tickets: Sequence[Ticket]) -> None:
        """Tell of clients' requests that have ended. The lock is not held: sources run their callers' code."""
        if not tickets:
            return
        tell(tickets)
        with self._ended:
            self._open_tickets -= len(tickets)
            self._ended.notify_all()

    def _run(self) -> None:
        """Be one of the threads."""
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first look fixes its count
        self._started.wait()
        with torch.no_grad():
            while (job := self._next_job()) is not None:
                job()

    def _next_job(self) -> _Job | None:
        """Wait for something to do; None at the end. What is furthest comes first, since it gives rows back."""
        with self._work:
            while True:
                if self._answers:
                    return partial(self._answer, self._answers.popleft())
                if self._rows or self._begin():
                    return self._rows.popleft()
                if self._stopping and not self._open_tickets:
                    return None
                self._work.wait()

    def _begin(self) -> bool:
        """Give the first request that waits its rows; False where none waits, or there is no room. The lock is held."""
        rows = next(self._waiting.each_rows(), 0)
        first = self._leases.lease(rows) if rows else None
        if first is None:
            return False
        (outer,) = self._waiting.take(1)
        ticket = StagedTicket(self, next(self._numbers), first, rows, outer.received_ns, outer=outer, left=rows)
        ticket.deadline_ns, ticket.priority = outer.deadline_ns, outer.priority
        self._begun.add(ticket)
        self._rows.extend(partial(self._prepare, ticket, row) for row in range(rows))
        self._work.notify(rows - 1)
        return True

    def _prepare(self, ticket: StagedTicket, row: int) -> None:
        """Make a row; with the last one the dispatcher gets the request, or its client the error."""
        error = ticket.error or self._obstacle(ticket)
        if error is None:
            outer = ticket.outer
            given = [tensor[outer.first_row + row] for tensor in outer.source.table.inputs]
            own = [tensor[ticket.first_row + row] for tensor in self._table.inputs]
            error = self._steps.prepare(row, given, own)
        with self._work:
            ticket.error = ticket.error or error
            ticket.left -= 1
            if ticket.left:
                return
        if ticket.error is None:
            self._dispatcher.submit_or_tell([ticket])
        else:
            self._give_back([ticket])

    def _obstacle(self, ticket: StagedTicket) -> Exception | None:
        """Return why a request need not be prepared any further."""
        now = self._clock()
        if ticket.withdrawn:
            return Cancelled("its client left before the request was computed, and it was dropped")
        if ticket.deadline_ns and ticket.deadline_ns < now:
            return _late(ticket, now)
        return None

    def _answer(self, ticket: StagedTicket) -> None:
        self._finish(ticket)
        self._give_back([ticket])

    def _finish(self, ticket: StagedTicket) -> None:
        """Make the client's rows of an answer."""
        outer = ticket.outer
        for row in range(ticket.rows):
            if ticket.error is not None:
                return
            given = [tensor[ticket.first_row + row] for tensor in self._table.outputs]
            target = [tensor[outer.first_row + row] for tensor in outer.source.table.outputs]
            ticket.error = self._steps.finish(given, target)

    def _give_back(self, tickets: Sequence[StagedTicket]) -> None:
        """Free the rows here, and tell the clients."""
        if not tickets:
            return
        computed_ns = self._clock()
        for ticket in tickets:
            outer = ticket.outer
            outer.error, outer.started_ns, outer.computed_ns = ticket.error, ticket.started_ns, computed_ns
            outer.lane, outer.batch_rows = ticket.lane, ticket.batch_rows
        with self._work:
            for ticket in tickets:
                self._begun.remove(ticket)
                self._leases.release(ticket.first_row, ticket.rows)
            self._work.notify(len(tickets))
        self._end([ticket.outer for ticket in tickets])


def _late(ticket: Ticket, now: int) -> DeadlineExceeded:
    waited_ms = (now - ticket.received_ns) / 1e6
    return DeadlineExceeded(
        f"the request waited {waited_ms:.1f} ms, longer than its deadline allows, and was not computed; allow more"
        " time, or send less at once"
    )
