"""A server that reads requests and answers zeros: what the load generator reaches where the server costs least."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket

import settings
import uvloop

HEAD_END = b"\r\n\r\n"
HEAD_BYTES = 16 << 10


class Null(asyncio.BufferedProtocol):
    """Receives every body into the same memory."""

    def __init__(self) -> None:
        self._head = memoryview(bytearray(HEAD_BYTES))
        self._sink = memoryview(bytearray(1 << 20))
        self._filled = 0  # bytes of a head that is not whole yet
        self._missing = 0  # bytes of the body
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._sink[: self._missing] if self._missing else self._head[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._missing:
            self._missing -= nbytes
        else:
            self._filled += nbytes
            self._begin_body()
        if not self._missing and self._answer:
            self._transport.write(self._answer)  # type: ignore[attr-defined]
            self._answer = b""

    def _begin_body(self) -> None:
        received = bytes(self._head[: self._filled])
        head, found, rest = received.partition(HEAD_END)
        if not found:
            return
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields[b"content-length"])
        self._missing = length - len(rest)
        self._filled = 0
        answer_bytes = 4 * settings.OUTPUTS * (length // settings.ROW_BYTES)
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % answer_bytes + bytes(answer_bytes)


async def _serve(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Null, sock=listener)
    await server.serve_forever()


def _run(listener: socket.socket) -> None:
    uvloop.run(_serve(listener))


def main() -> None:
    given = settings.from_environment()
    listener = socket.create_server(("127.0.0.1", given.port), backlog=1024)
    others = [
        multiprocessing.get_context("fork").Process(target=_run, args=(listener,), daemon=True)
        for _ in range(given.frontends - 1)
    ]
    for other in others:
        other.start()
    _run(listener)


if __name__ == "__main__":
    main()
