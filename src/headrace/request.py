"""What travels: a request to the backend, and its answer back. State travels with the batch, nothing is looked up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from headrace.errors import Cancelled

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.table import RowTable

DEFAULT_PRIORITY = 100  # of a request that asks for none, so that others can go before and behind it


@dataclass(slots=True)
class Timeline:
    """When one request passed each stage of the backend, in nanoseconds of the one clock; 0: not reached."""

    received_ns: int = 0  # taken from the request queue
    started_ns: int = 0  # forward called
    computed_ns: int = 0  # forward returned; on CUDA the kernels may still run
    responded_ns: int = 0  # answer on the CPU and handed to the response queue
    worker: int = 0  # which predict thread


@dataclass(slots=True)
class Request:
    """One batch on its way through a published design. One stage owns it at a time."""

    index: int
    inputs: Tensor  # [rows, *features], on the CPU, in shared memory
    first_row: int = -1  # of a ring's table, where the inputs lie; -1 where the transport has none
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(slots=True)
class Response:
    """How a request ended: with an output [rows, *features] on the CPU, or with an error."""

    index: int
    timeline: Timeline
    output: Tensor | None = None
    error: str | None = None


class Source(Protocol):
    """Where rows come from: a table, and somebody to tell when they have been answered."""

    @property
    def table(self) -> RowTable: ...

    def finish(self, tickets: Sequence[Ticket]) -> None:
        """Tell that these have ended: with outputs in their rows, or with `error`. Each exactly once."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way through the lanes: consecutive rows of a source's table. One stage owns it at a time.

    `priority` is Triton's: 1 is the highest, larger numbers are lower. A lower one waits for as long as higher ones
    keep coming; only its deadline ends that.
    """

    source: Source
    index: int  # the source's own
    first_row: int
    rows: int
    received_ns: int
    started_ns: int = 0  # launched on a lane
    computed_ns: int = 0  # outputs in the table
    lane: int = 0
    batch_rows: int = 0  # of the batch that it was computed in
    deadline_ns: int = 0  # not computed if it has not been launched by then; 0: whenever there is room
    priority: int = DEFAULT_PRIORITY
    error: Exception | None = None

    def cancel(self) -> None:
        """Say that it will not be computed, since nobody waits for it any more."""
        self.error = Cancelled("its client left before the request was computed, and it was dropped")


class Withdrawal(NamedTuple):
    """A request that its client no longer wants, or all that wait of a client that is gone."""

    source: Source
    request: tuple[int, int] | None  # its index and first row; None: all of the source's


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one table that are copied as one."""

    table: RowTable
    first_row: int
    rows: int

    @property
    def slice(self) -> slice:
        """The rows in the table."""
        return slice(self.first_row, self.first_row + self.rows)


@dataclass(slots=True)
class Batch:
    """Requests that run together on one lane, padded to a bucket. Rows past the sum are computed and never read."""

    tickets: list[Ticket]
    segments: list[Segment]
    rows: int
    bucket: int = 0  # rows that the model runs with; set before it is launched
    token: object = None  # the lane's own: how it knows this batch again
    error: Exception | None = None  # why it could not even be launched

    def pieces(self) -> Iterator[tuple[Segment, slice]]:
        """Yield each segment, and the batch's rows that it is."""
        at = 0
        for segment in self.segments:
            yield segment, slice(at, at + segment.rows)
            at += segment.rows

    @classmethod
    def of(cls, tickets: list[Ticket]) -> Batch:
        """Join requests; those that lie side by side in one table become one segment."""
        first = tickets[0]
        last = Segment(first.source.table, first.first_row, first.rows)
        segments = [last]
        rows = first.rows
        for ticket in tickets[1:]:
            table = ticket.source.table
            if last.table is table and last.first_row + last.rows == ticket.first_row:
                last.rows += ticket.rows
            else:
                last = Segment(table, ticket.first_row, ticket.rows)
                segments.append(last)
            rows += ticket.rows
        return cls(tickets, segments, rows)
