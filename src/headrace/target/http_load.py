"""Requests over HTTP/1.1: raw sockets, kept alive, and one thread that waits for all of them and for the plan.

Bodies are sent by `sendmsg` from the memory that all generators share. `sendfile` from it took 9 to 19 % less of the
sender's CPU from 64 KB on (91 us in place of 113 for 750 KB), and the
exchange was not sooner over: not worth a second way.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections import deque

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import Unreachable
from headrace.target.asking import model_path
from headrace.target.handshake import HANDSHAKE_S, tls_words, why
from headrace.target.http_connection import Connection
from headrace.target.payloads import open_bodies
from headrace.target.polling import IN, OUT, Poller
from headrace.target.sending import GeneratorJob, Sending
from headrace.target.tls_connection import TlsConnection

RECEIVED_BYTES = 1 << 20  # at once
SENT_AT_ONCE = 16
RETRY_S = 0.01  # a closed loop against a server that has gone would else ask as fast as it can
OPENED = 32  # connections of a generator before the clock starts, unless a closed loop needs more
SAID_BYTES = 1 << 16  # of an error: more than a head may have, so that a token that comes back is there whole
_SHED = (503, 429)


class HttpLoad:
    """Sends one generator's share."""

    def __init__(self, job: GeneratorJob, sending: Sending) -> None:
        self.poller = Poller()
        self.received = memoryview(bytearray(RECEIVED_BYTES))
        self._sending = sending
        self._bodies = open_bodies(job.bodies_path, job.places)
        self._endpoint = job.endpoint
        self._address = socket.getaddrinfo(*self._endpoint.address, type=socket.SOCK_STREAM)[0]
        self._context = self._endpoint.context() if job.access.encrypted else None
        self._heads = self._make_heads(job)
        self._limit = max(1, job.target.connections // job.target.generators)
        self._timeout_ns = int(job.target.request_timeout_s * NS_PER_S)
        self._timeout_text = f"no answer within {job.target.request_timeout_s:g} s"
        self._connections: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._waiting: deque[int] = deque()  # requests for want of a connection
        self._under_way: deque[tuple[int, int, Connection]] = deque()  # (time is up, number, where)
        self._owed: deque[int] = deque()  # moments at which a closed loop may send one more
        self._following = False
        self.most_connections = 0

    def _make_heads(self, job: GeneratorJob) -> list[bytes]:
        path = model_path(job.target, job.url)
        extra = "".join(f"{name}: {value}\r\n" for name, value in job.access.authorization.items())
        return [
            (
                f"POST {path}/infer HTTP/1.1\r\nHost: {job.endpoint.target}\r\n{extra}"
                "Content-Type: application/octet-stream\r\n"
                f"Inference-Header-Content-Length: {place.header_bytes}\r\nContent-Length: {place.size}\r\n\r\n"
            ).encode()
            for place in job.places
        ]

    def open(self) -> None:
        """Connect before the clock starts. Raises Unreachable."""
        for _ in range(min(self._limit, self._sending.concurrency or OPENED)):
            self._connect(blocking=True)

    def run(self, start_ns: int) -> None:
        """Send everything and wait for the answers."""
        sending = self._sending
        sending.start(start_ns)
        if sending.offsets is None:
            while now_ns() < start_ns:
                self.poller.wait(start_ns)
            for _ in range(sending.concurrency):
                self._follow(start_ns)
        while not sending.finished(now_ns()):
            for descriptor, events in self.poller.wait(sending.next_due_ns()):
                self._issue_due()
                connection = self._connections.get(descriptor)
                if connection is not None:
                    connection.ready(events)
            self._issue_due()
            self._expire()

    def close(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self.poller.close()

    def _issue_due(self) -> None:
        """Send what is due, however late it is: the plan is kept. Some at once, so that answers are read in between."""
        for _ in range(SENT_AT_ONCE):
            due_ns = self._sending.next_due_ns()
            if due_ns is None or due_ns > now_ns():
                return
            self._issue(self._sending.begin(due_ns))

    def _follow(self, now: int) -> None:
        """In a closed loop, send the next request. One that fails at once calls this again, and must not go deeper."""
        self._owed.append(now)
        if self._following:
            return
        self._following = True
        while self._owed:
            due_ns = self._owed.popleft()
            if self._sending.may_follow(due_ns):
                self._issue(self._sending.begin(due_ns))
        self._following = False

    def _issue(self, number: int) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                self._send(connection, number)
                return
        self._waiting.append(number)
        if len(self._connections) < self._limit:
            self._connect(blocking=False)

    def _send(self, connection: Connection, number: int) -> None:
        payload = self._sending.payload(number)
        at_ns = now_ns()
        self._sending.sent(number, at_ns)
        self._under_way.append((at_ns + self._timeout_ns, number, connection))
        connection.send(number, self._heads[payload], self._bodies[payload])

    def _connect(self, *, blocking: bool) -> None:
        family, kind, protocol, _, address = self._address
        try:
            peer = socket.socket(family, kind, protocol)
        except OSError as error:  # no more open files
            self._no_connection(str(error.strerror), before_start=blocking)
            return
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setblocking(blocking)
        failed = peer.connect_ex(address)
        if failed not in (0, errno.EINPROGRESS):
            peer.close()
            self._no_connection(os.strerror(failed), before_start=blocking)
            return
        connection = self._connection(peer, reached=not failed, blocking=blocking)
        peer.setblocking(False)
        self._connections[peer.fileno()] = connection
        self.poller.epoll.register(peer, IN if connection.connected else IN | OUT)
        self.most_connections = max(self.most_connections, len(self._connections))
        if connection.connected:
            self.free(connection)

    def _connection(self, peer: socket.socket, *, reached: bool, blocking: bool) -> Connection:
        """Return a connection over a socket that has reached the server, or is on its way. Raises Unreachable."""
        if self._context is None:
            return Connection(peer, self, connected=reached)
        connection = TlsConnection(peer, self, self._context, self._endpoint.address[0])
        if blocking:
            try:
                connection.shake_hands_now(min(HANDSHAKE_S, self._timeout_ns / NS_PER_S))
            except OSError as error:
                peer.close()
                raise Unreachable(why(self._endpoint, error)) from error
        return connection

    def tls_words(self, error: ssl.SSLError) -> str:
        """Say what an error of TLS means."""
        return tls_words(self._endpoint, error) or str(error)

    def _no_connection(self, why: str, *, before_start: bool = False) -> None:
        if before_start:
            raise Unreachable(f"no connection to the server ({why}); is it still there?")
        if self._sending.offsets is None:
            time.sleep(RETRY_S)
        if self._waiting:
            self._waiting.popleft()
            self._end_lost(f"no connection ({why})")

    def free(self, connection: Connection) -> None:
        """Take a connection that can carry a request."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def completed(self, connection: Connection, number: int, at_ns: int, *, keep: bool) -> None:
        """Take a response that is there whole."""
        body = b"".join(connection.body)
        if connection.status == 200:
            self._sending.answered(number, at_ns, body, connection.header_bytes)
        else:
            text = f"status {connection.status}: {body[:SAID_BYTES].decode(errors='replace')}"
            self._sending.failed(number, at_ns, text, shed=connection.status in _SHED)
        if keep:
            self.free(connection)
        else:
            self.broken(connection, None, "")
        self._follow(at_ns)

    def broken(self, connection: Connection, number: int | None, why: str) -> None:
        """Give up a connection, and the request on it."""
        was_open = connection.connected
        self._drop(connection)
        if number is not None:
            self._end_lost(why)
        elif not was_open:
            self._no_connection(why)
        if self._waiting and len(self._connections) < self._limit:
            self._connect(blocking=False)

    def _end_lost(self, why: str) -> None:
        self._sending.lost(why)
        self._follow(now_ns())

    def _drop(self, connection: Connection) -> None:
        if connection.is_open:
            del self._connections[connection.peer.fileno()]
            self.poller.epoll.unregister(connection.peer)
            connection.peer.close()

    def _expire(self) -> None:
        """End requests whose time is up, also those that still wait for a connection."""
        now = now_ns()
        while self._under_way:
            end_ns, number, connection = self._under_way[0]
            current = connection.number == number
            if current and end_ns > now:
                break
            self._under_way.popleft()
            if current:
                connection.number = None
                self.broken(connection, number, self._timeout_text)
        recorder = self._sending.recorder
        while self._waiting and recorder.scheduled[self._waiting[0]] + self._timeout_ns < now:
            self._waiting.popleft()
            self._end_lost(f"no connection, and {self._timeout_text}")
