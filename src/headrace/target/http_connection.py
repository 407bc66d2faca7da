"""A connection of a generator over HTTP/1.1, plain: one request at a time, by a socket that never blocks."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

import httptools

from headrace.clock import now_ns
from headrace.target.polling import BROKEN, IN, OUT, Poller

_HEADER_LENGTH = b"inference-header-content-length"


class Carrier(Protocol):
    """Whose connections these are."""

    poller: Poller
    received: memoryview  # memory to receive into, shared by all connections

    def free(self, connection: Connection) -> None:
        """Take a connection that can carry a request."""

    def completed(self, connection: Connection, number: int, at_ns: int, *, keep: bool) -> None:
        """Take a response that is there whole."""

    def broken(self, connection: Connection, number: int | None, why: str) -> None:
        """Give up a connection, and the request on it."""

    def tls_words(self, error: ssl.SSLError) -> str:
        """Say what an error of TLS means."""


class Connection:
    """One request at a time. httptools calls the methods that begin with `on_`."""

    def __init__(self, peer: socket.socket, load: Carrier, *, connected: bool) -> None:
        self.peer = peer
        self.connected = connected
        self.number: int | None = None  # of the request that is under way
        self.unsent: list[bytes | memoryview] = []
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._feed: Callable[[memoryview], None] = self._parser.feed_data
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
        if self._has_reached():
            self.connected = True
            self._watch(IN)
            self._load.free(self)

    def _has_reached(self) -> bool:
        """Tell whether the socket has reached the server; break the connection where it failed."""
        failed = self.peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._break(os.strerror(failed))
        return not failed

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
            self._feed(self._load.received[:count])
        except ssl.SSLError as error:
            self._break(self._load.tls_words(error))
            return
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
