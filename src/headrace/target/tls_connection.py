"""A connection of a generator over TLS: OpenSSL works on memory, and the socket beneath is the plain connection's.

So a large body leaves in few system calls, where OpenSSL on a socket makes one for each record of 16 KiB, and what
is not written yet waits where a plain connection's does.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

from headrace.target.http_connection import Carrier, Connection

RECORD_BYTES = 1 << 14  # of plain text, at most (RFC 8446, 5.1)


class TlsConnection(Connection):
    """Connected once hands are shaken. The moment of an answer is that of its last bytes, before they are decrypted."""

    def __init__(self, peer: socket.socket, load: Carrier, context: ssl.SSLContext, host: str) -> None:
        super().__init__(peer, load, connected=False)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._decrypted = bytearray(RECORD_BYTES)
        self._reached = False
        self._feed = self._decrypt

    def shake_hands_now(self, limit_s: float) -> None:
        """Do so before anything else, on a socket that has reached the server. Raises OSError."""
        self.peer.settimeout(limit_s)
        while not self._shake_hands():
            self.peer.sendall(self._outgoing.read())
            received = self.peer.recv(len(self._load.received))
            if not received:
                raise ConnectionResetError("connection closed by the server during the TLS handshake")
            self._incoming.write(received)
        self.peer.sendall(self._outgoing.read())
        self.connected = True

    def send(self, number: int, head: bytes, body: memoryview) -> None:
        self.number = number
        room = max(0, RECORD_BYTES - len(head))
        self._tls.write(head + bytes(body[:room]))  # one record where there is room, and one packet where that has
        if len(body) > room:
            self._tls.write(body[room:])
        self._flush()

    def _connected(self) -> None:
        """Go on where the socket takes more: it has reached the server, or could not send the whole greeting."""
        if self._reached:
            self._write()
        elif self._has_reached():
            self._reached = True
            self._shake_hands()
            self._flush()

    def _decrypt(self, received: memoryview) -> None:
        """Take what the socket gave, and hand on what it holds. Raises ssl.SSLError."""
        self._incoming.write(received)
        if not self.connected:
            self._greet()
            if not self.connected:
                return
        while self._incoming.pending or self._tls.pending():
            try:
                count: Any = self._tls.read(RECORD_BYTES, self._decrypted)  # typed as if it returned the bytes
            except ssl.SSLWantReadError:
                break
            if not count:  # the server says that it closes
                break
            self._parser.feed_data(memoryview(self._decrypted)[:count])
        self._flush()  # what TLS itself answers, as to a change of keys

    def _greet(self) -> None:
        done = self._shake_hands()
        self._flush()
        if done and self.is_open:
            self.connected = True
            self._load.free(self)

    def _shake_hands(self) -> bool:
        """Take the next step; tell whether that was the last. Raises ssl.SSLError."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.unsent.append(self._outgoing.read())
            self._write()
