"""The in-process transport: a table of rows of our own, and a future per request. Callers share it with the lanes.

A caller's tensors are copied into leased rows, which is the last copy that the host makes of them, and the answer out
of them. With no rows free, callers wait: that is the back-pressure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from mmap import mmap
from typing import TYPE_CHECKING

from headrace.clock import now_ns
from headrace.errors import EngineStopped, InvalidRequest, QueueFull
from headrace.request import Ticket
from headrace.transport.leases import RowLeases
from headrace.transport.table import RowTable

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.layout import Layout

Outputs = tuple["Tensor", ...]


@dataclass(slots=True, eq=False)
class LocalTicket(Ticket):
    """A ticket whose caller waits on a future. Its outputs are the caller's own copies, [rows, *features]."""

    future: Future[Outputs] = field(default_factory=Future)


class LocalSource:
    """Rows for callers in this process. Any number of threads may call it."""

    def __init__(self, layout: Layout, register: Callable[[Tensor], Callable[[], None]]) -> None:
        self._table = RowTable(layout, mmap(-1, layout.total_bytes))
        self._unregister = register(self._table.memory())
        self._leases = RowLeases(layout.rows)
        self._changed = threading.Condition()
        self._closed = False

    @property
    def table(self) -> RowTable:
        return self._table

    def place(self, inputs: Sequence[Tensor], timeout_s: float | None) -> LocalTicket:
        """Copy a request's tensors, [rows, *features] and of the layout's dtypes, into rows of their own.

        Raises InvalidRequest for other shapes, QueueFull if no rows become free within `timeout_s`, EngineStopped if
        the source is closed meanwhile.
        """
        rows = len(inputs[0])
        for spec, tensor in zip(self._table.layout.inputs, inputs, strict=True):
            if tuple(tensor.shape) != (rows, *spec.features):
                raise InvalidRequest(
                    f"input {spec.name} has shape {list(tensor.shape)}; the lanes take {[rows, *spec.features]}"
                )
        first = self._lease(rows, timeout_s)
        ticket = LocalTicket(self, -1, first, rows, received_ns=now_ns())
        try:
            for place, tensor in zip(self._table.inputs, inputs, strict=True):
                place[first : first + rows].copy_(tensor)
        except BaseException:
            self.give_back(ticket)
            raise
        ticket.future.set_running_or_notify_cancel()  # from here on it is computed, whoever stops waiting
        ticket.received_ns = now_ns()
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """Free the rows of a ticket that nobody took over."""
        with self._changed:
            self._leases.release(ticket.first_row, ticket.rows)
            self._changed.notify_all()

    def finish(self, tickets: Sequence[Ticket]) -> None:
        """See `request.Source`."""
        for ticket in tickets:
            assert isinstance(ticket, LocalTicket)
            rows = slice(ticket.first_row, ticket.first_row + ticket.rows)
            outputs = tuple(output[rows].clone() for output in self._table.outputs) if ticket.error is None else ()
            self.give_back(ticket)
            if ticket.error is None:
                ticket.future.set_result(outputs)
            else:
                ticket.future.set_exception(ticket.error)

    def close(self) -> None:
        """Turn away whoever waits for rows, and let go of the device's registration. No copy may be under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._unregister()

    def _lease(self, rows: int, timeout_s: float | None) -> int:
        first: int | None = None

        def found() -> bool:
            nonlocal first
            first = None if self._closed else self._leases.lease(rows)
            return self._closed or first is not None

        with self._changed:
            in_time = self._changed.wait_for(found, timeout_s)
            free = self._leases.free_rows
        if first is not None:
            return first
        if in_time:
            raise EngineStopped("the engine was stopped while a request waited for room")
        raise QueueFull(
            f"no room for {rows} rows within {timeout_s:g} s ({free} of {self._table.layout.rows} rows are free);"
            " send less at once, wait longer, or raise queue_rows"
        )
