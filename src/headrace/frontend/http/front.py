"""The HTTP front of a frontend: takes connections on the server's socket, and lets them end in good order."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from headrace.errors import QueueFull
from headrace.frontend.auth import Tokens
from headrace.frontend.http.connection import Answerer, Connection, turn_away
from headrace.frontend.http.infer import Infer
from headrace.frontend.http.routes import Routes, add_protocol
from headrace.frontend.http.shared_memory import add_shared_memory
from headrace.frontend.http.stream import Stream
from headrace.frontend.http.visitors import Visitors
from headrace.frontend.tls import server_context

if TYPE_CHECKING:
    from headrace.frontend.regions import SharedRegions
    from headrace.frontend.service import Service
    from headrace.frontend.spans import Tracer
    from headrace.frontend_job import AccessSettings, HttpSettings

FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # no room for one more connection
ROUND_S = 0.00025  # of the event loop, while it has little to do
PAUSE_S = 0.1  # until there may be
BACKLOG = 4096  # connections not accepted yet; the kernel drops more, and clients try again after seconds


def make_front(
    service: Service,
    regions: SharedRegions,
    settings: HttpSettings,
    access: AccessSettings,
    tracer: Tracer | None = None,
) -> Front:
    """Return the front, whose `routes` may be added to. Raises InvalidOption for files that `access` names."""
    routes = Routes()
    add_protocol(routes, service, shared_memory=regions.own.offered)
    add_shared_memory(routes, regions)
    tokens = Tokens.read(access.token_file) if access.token_file is not None else None
    scheme = "http" if access.tls_cert is None else "https"
    infer = Infer(service, regions.own, settings.max_body_bytes)
    shared = Answerer(settings, routes, infer, tokens, Visitors(access), scheme, tracer)
    return Front(shared, access)


class Front:
    """Made, used and closed on one event loop."""

    def __init__(self, shared: Answerer, access: AccessSettings) -> None:
        self.routes = shared.routes
        self._shared = shared
        self._context = server_context(access)
        self._taking: set[asyncio.Task[None]] = set()
        self._left_some_at: float | None = None  # when a round took all that it might
        self._listener: socket.socket | None = None
        self._connections: dict[Stream, Connection | None] = {}  # None: refused, for want of room

    async def start(self, listener: socket.socket) -> None:
        """Take connections."""
        self._loop = asyncio.get_running_loop()
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self._listener = listener
        self._loop.add_reader(listener, self._accept)

    def _accept(self) -> None:
        """Take some of the connections that wait.

        One in each round of the event loop, as the loop itself would, spreads them over the frontends while these have
        little to do. Rounds get long where hundreds of connections have work, and those not taken yet would wait for
        minutes (seen: 600 of 1,000 after ten seconds). After a round that left some, as many are taken as short rounds
        would.
        """
        now = self._loop.time()
        most = 1 if self._left_some_at is None else 1 + int((now - self._left_some_at) / ROUND_S)
        self._left_some_at = now
        self._accept_up_to(most)

    def _accept_up_to(self, most: int) -> None:
        assert self._listener is not None
        for _ in range(min(most, BACKLOG)):
            try:
                accepted, _address = self._listener.accept()
            except BlockingIOError:
                self._left_some_at = None
                return
            except OSError as error:
                if error.errno not in FULL:
                    continue  # this one has gone again
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_S, self._accept_again)
                return
            task = self._loop.create_task(self._take(accepted))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    async def _take(self, accepted: socket.socket) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(
                lambda: Stream(self._serve, self._lost),
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._shared.settings.header_timeout_s if self._context is not None else None,
            )
        except OSError:  # it has gone again, or speaks no TLS
            accepted.close()

    @property
    def in_flight(self) -> int:
        """How many requests have been taken and not answered."""
        return sum(connection is not None and connection.is_busy for connection in self._connections.values())

    def stop_accepting(self) -> None:
        """Take no more connections; those that are there close with their next answer."""
        self._shared.stopping = True
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._accept_up_to(BACKLOG)  # they are told that the server ends
            self._listener.close()
            self._listener = None

    async def close(self) -> None:
        """End all connections; a request that has not been answered by now is given up."""
        self.stop_accepting()
        await asyncio.gather(*self._taking, return_exceptions=True)
        streams = list(self._connections)
        for stream in streams:
            if stream.task is not None:
                stream.task.cancel()
        await asyncio.gather(*(stream.task for stream in streams if stream.task is not None), return_exceptions=True)
        for stream in streams:
            stream.abort()

    def _serve(self, stream: Stream) -> Coroutine[Any, Any, None]:
        limit = self._shared.settings.max_connections
        if len(self._connections) >= limit:
            self._connections[stream] = None
            error = QueueFull(f"the server has {limit} connections open, and takes no more; close some, or try again")
            return turn_away(stream, error, self._shared.settings.header_timeout_s)
        connection = self._connections[stream] = Connection(stream, self._shared)
        return connection.run()

    def _lost(self, stream: Stream) -> None:
        self._connections.pop(stream, None)
