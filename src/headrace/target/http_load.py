"""Requests over HTTP/1.1: raw sockets, kept alive, and one thread that waits for all of them and for the plan.

Bodies are sent by `sendmsg` from the memory that all generators share. `sendfile` from it took 9 to 19 % less of the
sender's CPU from 64 KB on (91 us in place of 113 for 750 KB), and the
exchange was not sooner over: not worth a second way.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Sequence

import httptools

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import Unreachable
from headrace.target.asking import host_and_port, model_path
from headrace.target.payloads import open_bodies
from headrace.target.polling import BROKEN, IN, OUT, Poller
from headrace.target.sending import GeneratorJob, Sending

RECEIVED_BYTES = 1 << 20  # at once
SENT_AT_ONCE = 16
RETRY_S = 0.01  # a closed loop against a server that has gone would else ask as fast as it can
OPENED = 32  # connections of a generator before the clock starts, unless a closed loop needs more
_HEADER_LENGTH = b"inference-header-content-length"
_SHED = (503, 429)


class HttpLoad:
    """Sends one generator's share."""

    def __init__(self, job: GeneratorJob, sending: Sending) -> None:
        self.poller = Poller()
        self.received = memoryview(bytearray(RECEIVED_BYTES))
        self._sending = sending
        self._bodies = open_bodies(job.bodies_path, job.places)
        self._address = socket.getaddrinfo(*host_and_port(job.url), type=socket.SOCK_STREAM)[0]
        self._heads = self._make_heads(job)
        self._limit = max(1, job.target.connections // job.target.generators)
        self._timeout_ns = int(job.target.request_timeout_s * NS_PER_S)
        self._timeout_text = f"no answer within {job.target.request_timeout_s:g} s"
        self._connections: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._waiting: deque[int] = deque()  # requests for want of a connection
        self._under_way: deque[tuple[int, int, _Connection]] = deque()  # (time is up, number, where)
        self._owed: deque[int] = deque()  # moments at which a closed loop may send one more
        self._following = False
        self.most_connections = 0

    def _make_heads(self, job: GeneratorJob) -> list[bytes]:
        host, port = host_and_port(job.url)
        path = model_path(job.target, job.url)
        return [
            (
                f"POST {path}/infer HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/octet-stream\r\n"
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

    def _send(self, connection: _Connection, number: int) -> None:
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
        peer.setblocking(False)
        connection = _Connection(peer, self, connected=not failed)
        self._connections[peer.fileno()] = connection
        self.poller.epoll.register(peer, IN if not failed else IN | OUT)
        self.most_connections = max(self.most_connections, len(self._connections))
        if not failed:
            self.free(connection)

    def _no_connection(self, why: str, *, before_start: bool = False) -> None:
        if before_start:
            raise Unreachable(f"no connection to the server ({why}); is it still there?")
        if self._sending.offsets is None:
            time.sleep(RETRY_S)
        if self._waiting:
            self._waiting.popleft()
            self._end_lost(f"no connection ({why})")

    def free(self, connection: _Connection) -> None:
        """Take a connection that can carry a request."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def completed(self, connection: _Connection, number: int, at_ns: int, *, keep: bool) -> None:
        """Take a response that is there whole."""
        body = b"".join(connection.body)
        if connection.status == 200:
            self._sending.answered(number, at_ns, body, connection.header_bytes)
        else:
            text = f"status {connection.status}: {body[:200].decode(errors='replace')}"
            self._sending.failed(number, at_ns, text, shed=connection.status in _SHED)
        if keep:
            self.free(connection)
        else:
            self.broken(connection, None, "")
        self._follow(at_ns)

    def broken(self, connection: _Connection, number: int | None, why: str) -> None:
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

    def _drop(self, connection: _Connection) -> None:
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


class _Connection:
    """One request at a time. httptools calls the methods that begin with `on_`."""

    def __init__(self, peer: socket.socket, load: HttpLoad, *, connected: bool) -> None:
        self.peer = peer
        self.connected = connected
        self.number: int | None = None  # of the request that is under way
        self.unsent: list[bytes | memoryview] = []
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._whole = self._keep = False
        self._watched = IN
        self.on_message_begin()

    @property
    def is_open(self) -> bool:
        return self.peer.fileno() >= 0

    def on_message_begin(self) -> None:
        self.status = 0
        self.header_bytes: int | None = None
        self.body: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == _HEADER_LENGTH:
            self.header_bytes = int(value)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        self.body.append(part)

    def on_message_complete(self) -> None:
        self._whole = self.status >= 200  # 100 is not the answer yet
        self._keep = self._parser.should_keep_alive()  # asked later, the parser always says no

    def send(self, number: int, head: bytes, body: memoryview) -> None:
        self.number = number
        self.unsent = [head, body]
        self._write()

    def _write(self) -> None:
        try:
            sent = self.peer.sendmsg(self.unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._break(f"connection lost ({error.strerror})")
            return
        self.unsent = _rest(self.unsent, sent)
        self._watch(IN | OUT if self.unsent else IN)

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._load.poller.epoll.modify(self.peer, events)

    def ready(self, events: int) -> None:
        if events & OUT and not self.connected:
            self._watched = IN | OUT
            self._connected()
        elif events & OUT and self.unsent:
            self._write()
        if events & (IN | BROKEN) and self.is_open:
            self._read()

    def _connected(self) -> None:
        failed = self.peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._break(os.strerror(failed))
            return
        self.connected = True
        self._watch(IN)
        self._load.free(self)

    def _read(self) -> None:
        try:
            count = self.peer.recv_into(self._load.received)
        except BlockingIOError:
            return
        except OSError as error:
            self._break(f"connection lost ({error.strerror})")
            return
        at_ns = now_ns()
        try:
            self._parser.feed_data(self._load.received[:count])
        except httptools.HttpParserError as error:
            self._break(f"the answer is no HTTP ({error})")
            return
        if self._whole:
            self._complete(at_ns)
        elif not count:
            self._break("connection closed by the server")

    def _complete(self, at_ns: int) -> None:
        """Hand over the answer. One that came before the request was read is the last of its connection."""
        number, self.number = self.number, None
        self._whole = False
        if number is None:
            self._break("an answer to nothing")
            return
        keep = self._keep and not self.unsent
        self._load.completed(self, number, at_ns, keep=keep)

    def _break(self, why: str) -> None:
        number, self.number = self.number, None
        self._load.broken(self, number, why)


def _rest(parts: Sequence[bytes | memoryview], sent: int) -> list[bytes | memoryview]:
    """Return what is left of the parts after `sent` bytes."""
    left: list[bytes | memoryview] = []
    for part in parts:
        if sent >= len(part):
            sent -= len(part)
        else:
            left.append(memoryview(part)[sent:])
            sent = 0
    return left
