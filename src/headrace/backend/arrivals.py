"""Requests of several rings as one stream, for the dispatcher. Rings come and go while it serves."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from headrace.control import Attach, Stop
from headrace.request import Ticket, Withdrawal
from headrace.transport.ring import RingEndpoint

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.pair import RingPair

LISTEN_EVERY = 1024  # looks for requests between two looks for words and deaths, while busy


class Control(Protocol):
    """The supervisor's end of a pipe."""

    def poll(self) -> bool: ...

    def recv(self) -> object: ...

    def fileno(self) -> int: ...


class RingsArrivals:
    """All rings of a backend. One thread uses it.

    `register` makes a ring's memory known to the device. Ends with the supervisor's word, or with the supervisor. When
    a client's process ends, what it had sent is not computed any more, and its ring is let go when nothing of it is
    under way.
    """

    def __init__(self, control: Control, wake_fd: int, register: Callable[[Tensor], Callable[[], None]]) -> None:
        self._control = control
        self._wake_fd = wake_fd
        self._register = register
        self._rings: list[RingEndpoint] = []  # that may send more
        self._pairs: dict[RingEndpoint, RingPair] = {}  # of all
        self._dead: set[RingEndpoint] = set()
        self._withdrawn: list[Withdrawal] = []
        self._looks = 0
        self._stopping = False

    def ready(self) -> bool:
        """See `dispatch.Arrivals`."""
        self._looks += 1
        return any(ring.ready() for ring in self._rings) or self._looks >= LISTEN_EVERY

    def take(self, timeout_s: float) -> Sequence[Ticket] | None:
        """See `dispatch.Arrivals`."""
        self._looks += 1
        listened = self._looks >= LISTEN_EVERY  # also while there is always something to take
        if listened:
            self._listen()
        tickets = self._take_all()
        if tickets or self._withdrawn:
            return tickets
        if not listened:
            self._listen()
        if timeout_s and not self._stopping and not self._withdrawn:
            self._sleep(timeout_s)
            tickets = self._take_all()
        return None if self._stopping and not tickets else tickets

    def withdrawn(self) -> Sequence[Withdrawal]:
        """See `dispatch.Arrivals`."""
        if not self._withdrawn:
            return ()
        withdrawn, self._withdrawn = self._withdrawn, []
        return withdrawn

    def close(self) -> None:
        """Let go of all rings. No request may be under way."""
        self._rings.clear()
        for ring in list(self._pairs):
            self._let_go(ring)

    def _let_go(self, ring: RingEndpoint) -> None:
        self._dead.discard(ring)
        ring.close()
        self._pairs.pop(ring).close()

    def _take_all(self) -> list[Ticket]:
        tickets: list[Ticket] = []
        for ring in list(self._rings):
            if ring.ready():
                tickets += ring.take(0) or ()
                self._withdrawn += ring.withdrawn()
                if ring.closed:
                    self._rings.remove(ring)
        return tickets

    def _listen(self) -> None:
        """Hear the supervisor, notice clients that are gone, and let go of those whose requests have all ended."""
        self._looks = 0
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
        clients = self._clients()
        self._bury(clients, select.select([*clients], [], [], 0)[0])
        for ring in [ring for ring in self._pairs if ring not in self._rings and not ring.open_requests]:
            self._let_go(ring)

    def _clients(self) -> dict[int, RingEndpoint]:
        """Return the rings by the descriptors that tell of their clients' deaths, those of the dead left out."""
        return {fd: ring for ring in self._pairs if ring not in self._dead and (fd := ring.peer_fd()) is not None}

    def _bury(self, clients: dict[int, RingEndpoint], ready: Sequence[int]) -> None:
        """Take no more from clients that are gone, and withdraw what they sent."""
        for ring in (clients[descriptor] for descriptor in ready if descriptor in clients):
            self._dead.add(ring)
            self._withdrawn.append(Withdrawal(ring, None))
            if ring in self._rings:
                self._rings.remove(ring)

    def _sleep(self, timeout_s: float) -> None:
        """Wait for requests, words or deaths."""
        armed = [ring.arm() for ring in self._rings]  # all of them, whatever the first says
        if all(armed):
            clients = self._clients()
            ready, _, _ = select.select([self._wake_fd, self._control.fileno(), *clients], [], [], timeout_s)
            self._bury(clients, ready)
        for ring in self._pairs:
            ring.disarm()
