"""Requests of several rings as one stream, for the dispatcher. Rings come and go while it serves."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from headrace.clock import now_ns
from headrace.control import Attach, Stop
from headrace.errors import InvalidRequest
from headrace.request import Ticket
from headrace.transport.ring import RingEndpoint

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.pair import RingPair

CONTROL_EVERY = 1024  # looks for requests between two looks for words, while busy


class Control(Protocol):
    """The supervisor's end of a pipe."""

    def poll(self) -> bool: ...

    def recv(self) -> object: ...

    def fileno(self) -> int: ...


class RingsArrivals:
    """All rings of a backend. One thread uses it.

    `register` makes a ring's memory known to the device. Ends with the supervisor's word, or with the supervisor.
    """

    def __init__(
        self,
        control: Control,
        wake_fd: int,
        max_batch_size: int,
        register: Callable[[Tensor], Callable[[], None]],
    ) -> None:
        self._control = control
        self._wake_fd = wake_fd
        self._max_batch_size = max_batch_size
        self._register = register
        self._rings: list[RingEndpoint] = []
        self._pairs: dict[RingEndpoint, RingPair] = {}
        self._leaving: list[RingEndpoint] = []  # closed by the client, with requests still under way
        self._looks = 0
        self._stopping = False

    def ready(self) -> bool:
        """See `dispatch.Arrivals`."""
        self._looks += 1
        return any(ring.ready() for ring in self._rings) or self._looks % CONTROL_EVERY == 0

    def take(self, timeout_s: float) -> Sequence[Ticket] | None:
        """See `dispatch.Arrivals`."""
        tickets = self._take_all()
        if tickets:
            return tickets
        self._listen()
        if timeout_s and not self._stopping:
            self._sleep(timeout_s)
            tickets = self._take_all()
        return None if self._stopping and not tickets else tickets

    def close(self) -> None:
        """Let go of all rings. No request may be under way."""
        for ring in (*self._rings, *self._leaving):
            self._let_go(ring)

    def _let_go(self, ring: RingEndpoint) -> None:
        ring.close()
        self._pairs.pop(ring).close()

    def _take_all(self) -> list[Ticket]:
        tickets: list[Ticket] = []
        for ring in list(self._rings):
            if not ring.ready():
                continue
            taken = ring.take(0)
            if taken is None:
                self._leave(ring)
                continue
            received_ns = now_ns()
            for told in taken:
                ticket = Ticket(ring, told.request, told.first_row, told.rows, received_ns)
                if self._is_sane(ticket, ring):
                    tickets.append(ticket)
        return tickets

    def _is_sane(self, ticket: Ticket, ring: RingEndpoint) -> bool:
        """Tell whether the rows are the table's; a broken client is told, and harms nobody else."""
        rows, first = ticket.rows, ticket.first_row
        if 1 <= rows <= self._max_batch_size and 0 <= first <= ring.table.layout.rows - rows:
            return True
        ticket.first_row = 0
        ticket.error = InvalidRequest(
            f"a request of {rows} rows at row {first}: must be 1 to {self._max_batch_size} rows of the table"
        )
        ring.finish([ticket])
        return False

    def _leave(self, ring: RingEndpoint) -> None:
        self._rings.remove(ring)
        self._leaving.append(ring)

    def _listen(self) -> None:
        """Hear the supervisor, notice clients that are gone, and let go of those whose requests have all ended."""
        try:
            while self._control.poll():
                word = self._control.recv()
                if isinstance(word, Attach):
                    ring = RingEndpoint(word.ring, self._register)
                    self._rings.append(ring)
                    self._pairs[ring] = word.ring
                elif isinstance(word, Stop):
                    self._stopping = True
        except (EOFError, OSError):
            self._stopping = True
        for ring in list(self._leaving):
            if not ring.open_requests:
                self._leaving.remove(ring)
                self._let_go(ring)

    def _sleep(self, timeout_s: float) -> None:
        """Wait for requests, words or deaths."""
        armed = [ring.arm() for ring in self._rings]  # all of them, whatever the first says
        if all(armed):
            peers = {fd: ring for ring in self._rings if (fd := ring.peer_fd()) is not None}
            ready, _, _ = select.select([self._wake_fd, self._control.fileno(), *peers], [], [], timeout_s)
            for descriptor in ready:
                if descriptor in peers and not peers[descriptor].ready():
                    self._leave(peers[descriptor])
        for ring in (*self._rings, *self._leaving):
            ring.disarm()
