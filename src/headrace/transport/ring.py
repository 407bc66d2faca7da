"""The ring: requests and answers in shared memory that is made once, registered with the device once, and used again.

Against the published queue it saves, per request, new shared memory with its cold pages, pinning, pickling,
and passing a file descriptor. The client writes into leased rows of a table, and that is the last copy the host
makes: the backend's copy to the GPU reads those rows themselves. The memory has no name: it is passed as a
descriptor and dies with its last holder.

The client owns the rows: it leases some for a request and has them back when it has read the answer, so there is no
shared list of free ones.
"""

from __future__ import annotations

import importlib
import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from mmap import MAP_POPULATE, MAP_SHARED, mmap
from typing import TYPE_CHECKING, cast

from headrace.clock import now_ns
from headrace.errors import InvalidRequest, PeerGone, TransportFailed
from headrace.processes import describe
from headrace.request import Request, Ticket, Withdrawal
from headrace.transport.descriptors import (
    ANSWER,
    CANCEL,
    CLOSE,
    ERROR,
    REQUEST,
    Descriptor,
    DescriptorRing,
    error_entry,
    kind_of,
    pack,
    require_ordered_memory,
    text_row,
    unpack_requests,
)
from headrace.transport.layout import TEXT
from headrace.transport.leases import RowLeases

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.layout import Layout
    from headrace.transport.pair import RingPair
    from headrace.transport.table import RowTable

POLL_S = 1.0  # how often a waiting backend looks up; the death of its peer wakes it at once
CLIENT, BACKEND = 0, 1  # words of the header: the sides' process ids


class _Peer:
    """The process at the other end: as soon as it has said who it is, unless the pair says when it ends."""

    def __init__(self, memory: mmap, side: int, pair: RingPair) -> None:
        self._known_fd = pair.peer_fd
        self._known: select.epoll | None = None  # readable when any of these is
        if pair.peer_fd is not None and pair.ending_fd is not None:
            self._known = select.epoll()
            for descriptor in (pair.peer_fd, pair.ending_fd):
                self._known.register(descriptor, select.EPOLLIN)
            self._known_fd = self._known.fileno()
        self._pids = memoryview(memory)[:16].cast("Q")
        self._pids[side] = os.getpid()
        self._other = BACKEND if side == CLIENT else CLIENT
        self._fd: int | None = None

    def find(self) -> int | None:
        """Return a descriptor that becomes readable when the process ends; None before it has come.

        When it begins to end, if the pair tells that; else when it has ended (pidfd_open(2)).
        """
        if self._known_fd is not None:
            return self._known_fd
        pid = self._pids[self._other]
        if self._fd is None and pid and pid != os.getpid():
            try:
                self._fd = os.pidfd_open(pid)
            except OSError:  # it came and went: a pipe that is closed at the other end is as readable as a dead process
                self._fd, writer = os.pipe()
                os.close(writer)
        return self._fd

    def close(self) -> None:
        if self._known is not None:
            self._known.close()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Mapped:
    """A process's view of the ring's memory. Nothing in it refers back to it, so it is unmapped when it is let go."""

    def __init__(self, pair: RingPair, side: int) -> None:
        require_ordered_memory()
        self.layout: Layout = pair.layout
        self.memory = mmap(pair.memory_fd, self.layout.total_bytes, MAP_SHARED | MAP_POPULATE)
        self.peer = _Peer(self.memory, side, pair)
        wake_fds = (pair.wake_backend_fd, pair.wake_client_fd)
        self.requests, self.responses = (
            DescriptorRing(self.memory, self.layout.ring_offset(direction), entries, wake_fd, self.peer.find)
            for direction, (entries, wake_fd) in enumerate(zip(self.layout.entries, wake_fds, strict=True))
        )
        self._bytes = memoryview(self.memory)
        self._offsets = tuple(self.layout.tensor_offsets())

    @cached_property
    def table(self) -> RowTable:
        # Imported only when it is asked for: it needs torch, which a server's frontend has no use for.
        table = importlib.import_module("headrace.transport.table").RowTable(self.layout, self.memory)
        return cast("RowTable", table)

    def tensor_bytes(self, number: int, first_row: int, rows: int) -> memoryview:
        """Return some rows of a tensor, the inputs numbered first and then the outputs, as bytes."""
        specs = (*self.layout.inputs, *self.layout.outputs)
        size = specs[number].row_bytes
        begin = self._offsets[number] + first_row * size
        return self._bytes[begin : begin + rows * size]

    def write_error(self, row: int, error: Exception) -> int:
        """Write an error's text as a row's, row 0's where there is no such row, and return the `entry` that says so."""
        row = row if 0 <= row < self.layout.rows else 0
        data = describe(error).encode(errors="replace")[: TEXT - 1]
        error.__traceback__ = None  # its frames hold the request, whose error it is, and with it this memory
        at = self.layout.text_offset(row)
        self.memory[at : at + len(data) + 1] = data + b"\0"
        return error_entry(kind_of(error), row)

    def read_text(self, entry: int) -> str:
        at = self.layout.text_offset(text_row(entry))
        return self.memory[at : at + TEXT].split(b"\0", 1)[0].decode(errors="replace")


class RingClient:
    """The client's side. One thread may `send` while another `take`s."""

    def __init__(self, pair: RingPair) -> None:
        self._mapped = _Mapped(pair, CLIENT)
        self.answers_fd = pair.wake_client_fd
        self._leases = RowLeases(pair.layout.rows)
        self._lock = threading.Lock()

    @property
    def table(self) -> RowTable:
        return self._mapped.table

    @property
    def layout(self) -> Layout:
        return self._mapped.layout

    @property
    def free_rows(self) -> int:
        return self._leases.free_rows

    def input_bytes(self, number: int, first_row: int, rows: int) -> memoryview:
        """Return rows of an input as writable bytes, without torch."""
        return self._mapped.tensor_bytes(number, first_row, rows)

    def output_bytes(self, number: int, first_row: int, rows: int) -> memoryview:
        """Return rows of an output as bytes, without torch."""
        return self._mapped.tensor_bytes(len(self._mapped.layout.inputs) + number, first_row, rows)

    def lease(self, rows: int) -> int | None:
        """Take consecutive rows of the table; None where the table is too full: try again when an answer has come."""
        with self._lock:
            return self._leases.lease(rows)

    def release(self, first_row: int, rows: int) -> None:
        with self._lock:
            self._leases.release(first_row, rows)

    def send(self, descriptors: bytes) -> None:
        """Hand over requests whose rows have been written, or cancellations. Raises TransportFailed."""
        self._mapped.requests.put(descriptors)

    def take(self, timeout_s: float) -> bytes:
        """Return the descriptors of all answers that have come; none after `timeout_s`. Raises PeerGone.

        Their rows are still leased: read the outputs, then `release`.
        """
        return self._mapped.responses.take(timeout_s)

    def ready(self) -> bool:
        """Tell whether an answer has come."""
        return self._mapped.responses.has_work()

    def arm(self) -> bool:
        """Have `answers_fd` become readable when an answer comes; False if one is there already: `take` it first."""
        return self._mapped.responses.arm()

    def disarm(self) -> None:
        self._mapped.responses.disarm()

    def peer_fd(self) -> int | None:
        """Return a descriptor that becomes readable when the backend's process ends; None before it has come."""
        return self._mapped.peer.find()

    def error_text(self, entry: int) -> str:
        return self._mapped.read_text(entry)

    def close(self) -> None:
        """Tell the backend that no request will follow."""
        self._mapped.requests.put(pack(Descriptor(-1, CLOSE)))
        self._mapped.peer.close()


class RingEndpoint:
    """The backend's side. Several threads may answer at the same time.

    `register` makes the table's memory (uint8, page-aligned) known to the device, once, and returns what undoes that.
    """

    def __init__(self, pair: RingPair, register: Callable[[Tensor], Callable[[], None]]) -> None:
        self._mapped = _Mapped(pair, BACKEND)
        self._unregister = register(self._mapped.table.memory())
        self.closed = False  # the client has said that no request will follow, and all that it sent has been taken
        self._open_requests = 0
        self._open_lock = threading.Lock()
        self._withdrawn: list[Withdrawal] = []

    @property
    def table(self) -> RowTable:
        return self._mapped.table

    @property
    def open_requests(self) -> int:
        """How many have been taken and not finished."""
        return self._open_requests

    def take(self, timeout_s: float) -> list[Ticket] | None:
        """Return the requests that wait, in order; none after `timeout_s`; None once the client is done or gone.

        Those that cannot be, or that have been cancelled since, are answered at once. See `withdrawn`.
        """
        if self.closed:
            return None
        try:
            data = self._mapped.requests.take(timeout_s)
        except PeerGone:
            self._withdrawn.append(Withdrawal(self, None))
            return None
        return self._tickets(data) if data else []

    def withdrawn(self) -> Sequence[Withdrawal]:
        """Return what the client no longer wants of what had been taken before, as far as `take` has seen."""
        if not self._withdrawn:
            return ()
        withdrawn, self._withdrawn = self._withdrawn, []
        return withdrawn

    def _tickets(self, data: bytes) -> list[Ticket]:
        tickets: list[Ticket] = []
        refused: list[Ticket] = []
        cancels: list[tuple[tuple[int, int], int]] = []  # whose, and how many requests had been taken before it
        received_ns = now_ns()
        table_rows = self._mapped.layout.rows
        for number, kind, first, rows, priority, _, _, deadline_ns, _, _, _ in unpack_requests(data):
            ticket = Ticket(self, number, first, rows, received_ns)
            if kind == REQUEST and rows > 0 and 0 <= first <= table_rows - rows:
                if deadline_ns > 0:
                    ticket.deadline_ns = deadline_ns
                if priority > 0:
                    ticket.priority = priority
                tickets.append(ticket)
            elif kind == CANCEL:
                cancels.append(((number, first), len(tickets)))
            elif kind == CLOSE:
                self.closed = True
                break
            else:
                ticket.error = InvalidRequest(
                    f"a descriptor of kind {kind} with {rows} rows at row {first}: must be a request of 1 to"
                    f" {table_rows} rows of the table"
                )
                refused.append(ticket)
        if cancels:
            tickets = self._without_cancelled(tickets, cancels, refused)
        with self._open_lock:
            self._open_requests += len(tickets) + len(refused)
        if refused:
            self.finish(refused)
        return tickets

    def _without_cancelled(
        self, tickets: list[Ticket], cancels: Sequence[tuple[tuple[int, int], int]], refused: list[Ticket]
    ) -> list[Ticket]:
        """Move requests that are followed by their cancellation to `refused`, and keep the other cancellations."""
        positions = {(ticket.index, ticket.first_row): position for position, ticket in enumerate(tickets)}
        cancelled = set()
        for request, before in cancels:
            position = positions.get(request, before)
            if position < before:
                cancelled.add(position)
            else:
                self._withdrawn.append(Withdrawal(self, request))
        for position in cancelled:
            tickets[position].cancel()
            refused.append(tickets[position])
        return [ticket for position, ticket in enumerate(tickets) if position not in cancelled]

    def ready(self) -> bool:
        """Tell whether `take` would return at once."""
        return self._mapped.requests.has_work()

    def arm(self) -> bool:
        """Have the wake-up descriptor become readable when a request comes; False if one is there already."""
        return self._mapped.requests.arm()

    def disarm(self) -> None:
        self._mapped.requests.disarm()

    def peer_fd(self) -> int | None:
        """Return a descriptor that becomes readable when the client's process ends; None before it has come."""
        return self._mapped.peer.find()

    def finish(self, tickets: Sequence[Ticket]) -> None:
        """Tell the client of requests that have ended: `request.Source`'s half of this."""
        responded_ns = now_ns()
        told = []
        for ticket in tickets:
            kind, entry = ANSWER, 0
            if ticket.error is not None:
                kind, entry = ERROR, self._mapped.write_error(ticket.first_row, ticket.error)
            told.append(
                pack(
                    Descriptor(
                        ticket.index,
                        kind,
                        ticket.first_row,
                        ticket.rows,
                        ticket.lane,
                        ticket.batch_rows,
                        entry,
                        ticket.received_ns,
                        ticket.started_ns,
                        ticket.computed_ns,
                        responded_ns,
                    )
                )
            )
        with self._open_lock:
            self._open_requests -= len(told)
        self._mapped.responses.put(b"".join(told))

    def requests(self) -> Iterator[Request]:
        """Yield requests in order of arrival, their inputs in the table itself, until the client closes."""
        while (taken := self.take(POLL_S)) is not None:
            self._withdrawn.clear()  # a published design computes all that it was sent
            for ticket in taken:
                inputs = self.table.inputs[0][ticket.first_row : ticket.first_row + ticket.rows]
                request = Request(ticket.index, inputs, ticket.first_row)
                request.timeline.received_ns = ticket.received_ns
                yield request

    def respond(self, request: Request, output: Tensor) -> None:
        """Answer with `output`, [rows, *features] on the CPU, copied into the request's rows."""
        rows = len(request.inputs)
        place = self.table.outputs[0][request.first_row : request.first_row + rows]
        if output.shape != place.shape:
            self.fail(
                request,
                TransportFailed(
                    f"the answer has shape {list(output.shape)}, and the ring was made for {list(place.shape)}"
                ),
            )
            return
        place.copy_(output)
        self._tell(request, ANSWER, rows, 0)

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error, so that nobody waits for this request for ever."""
        self._tell(request, ERROR, len(request.inputs), self._mapped.write_error(request.first_row, error))

    def close(self) -> None:
        """Let go of the device's registration. No copy may be under way."""
        self._unregister()
        self._mapped.peer.close()

    def _tell(self, request: Request, kind: int, rows: int, entry: int) -> None:
        line = request.timeline
        line.responded_ns = now_ns()
        times = (line.received_ns, line.started_ns, line.computed_ns, line.responded_ns)
        first = request.first_row
        self._mapped.responses.put(pack(Descriptor(request.index, kind, first, rows, line.worker, rows, entry, *times)))
