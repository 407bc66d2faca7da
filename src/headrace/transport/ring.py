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
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from mmap import MAP_POPULATE, MAP_SHARED, mmap
from typing import TYPE_CHECKING, cast

from headrace.clock import now_ns
from headrace.errors import PeerGone, TransportFailed
from headrace.processes import describe
from headrace.request import Request, Ticket
from headrace.transport.descriptors import (
    ANSWER,
    CLOSE,
    ERROR,
    Descriptor,
    DescriptorRing,
    pack,
    require_ordered_memory,
    unpack,
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
    """The process at the other end: as soon as it has said who it is, unless `known_fd` says when it ends."""

    def __init__(self, memory: mmap, side: int, known_fd: int | None) -> None:
        self._known_fd = known_fd
        self._pids = memoryview(memory)[:16].cast("Q")
        self._pids[side] = os.getpid()
        self._other = BACKEND if side == CLIENT else CLIENT
        self._fd: int | None = None

    def find(self) -> int | None:
        """Return a descriptor that becomes readable when the process ends (pidfd_open(2)); None before it has come."""
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
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Mapped:
    """A process's view of the ring's memory. Nothing in it refers back to it, so it is unmapped when it is let go."""

    def __init__(self, pair: RingPair, side: int) -> None:
        require_ordered_memory()
        self.layout: Layout = pair.layout
        self.memory = mmap(pair.memory_fd, self.layout.total_bytes, MAP_SHARED | MAP_POPULATE)
        self.peer = _Peer(self.memory, side, pair.peer_fd)
        entries = self.layout.entries
        self.requests, self.responses = (
            DescriptorRing(self.memory, self.layout.ring_offset(direction), entries, wake_fd, self.peer.find)
            for direction, wake_fd in enumerate((pair.wake_backend_fd, pair.wake_client_fd))
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

    def write_text(self, entry: int, text: str) -> None:
        data = text.encode(errors="replace")[: TEXT - 1]
        at = self.layout.text_offset(entry)
        self.memory[at : at + len(data) + 1] = data + b"\0"

    def read_text(self, entry: int) -> str:
        at = self.layout.text_offset(entry)
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
        """Hand over requests whose rows have been written. Raises TransportFailed."""
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
        self._closed = False
        self._open_requests = 0
        self._open_lock = threading.Lock()

    @property
    def table(self) -> RowTable:
        return self._mapped.table

    @property
    def open_requests(self) -> int:
        """How many have been taken and not finished."""
        return self._open_requests

    def take(self, timeout_s: float) -> list[Descriptor] | None:
        """Return the requests that wait, in order; none after `timeout_s`; None once the client is done or gone."""
        if self._closed:
            return None
        try:
            descriptors = list(unpack(self._mapped.requests.take(timeout_s)))
        except PeerGone:
            return None
        if descriptors and descriptors[-1].kind == CLOSE:
            self._closed = True
            descriptors.pop()
        with self._open_lock:
            self._open_requests += len(descriptors)
        return descriptors

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
            kind = ANSWER
            if ticket.error is not None:
                kind = ERROR
                self._mapped.write_text(ticket.first_row, describe(ticket.error))
            told.append(
                pack(
                    Descriptor(
                        ticket.index,
                        kind,
                        ticket.first_row,
                        ticket.rows,
                        ticket.lane,
                        ticket.batch_rows,
                        ticket.first_row,
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
            received_ns = now_ns()
            for told in taken:
                inputs = self.table.inputs[0][told.first_row : told.first_row + told.rows]
                request = Request(told.request, inputs, told.first_row)
                request.timeline.received_ns = received_ns
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
        self._tell(request, ANSWER, rows)

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error, so that nobody waits for this request for ever."""
        self._mapped.write_text(request.first_row, describe(error))
        self._tell(request, ERROR, len(request.inputs))

    def close(self) -> None:
        """Let go of the device's registration. No copy may be under way."""
        self._unregister()
        self._mapped.peer.close()

    def _tell(self, request: Request, kind: int, rows: int) -> None:
        line = request.timeline
        line.responded_ns = now_ns()
        times = (line.received_ns, line.started_ns, line.computed_ns, line.responded_ns)
        first = request.first_row
        self._mapped.responses.put(pack(Descriptor(request.index, kind, first, rows, line.worker, rows, first, *times)))
