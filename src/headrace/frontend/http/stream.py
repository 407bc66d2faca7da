"""The bytes of one connection: received into the memory that a reader names, written without a queue of their own.

Bytes that nobody waits for go into a small inbox, and once that is full the client is kept waiting. So a connection
notices at any time that the client has gone, and still cannot make memory grow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, cast

from headrace.frontend.http.head import HEAD_BYTES

LINGER_S = 1.0  # how long a refused client may go on sending, so that it reads the answer rather than an error
END = b"\r\n\r\n"

Buffer = bytes | bytearray | memoryview


class Stream(asyncio.BufferedProtocol):
    """One connection. Deadlines are of the event loop's clock; what waits past one raises TimeoutError.

    `serve` is run as `task` as soon as the connection is there, and cancelled when it has gone; `lost` is told when
    both have ended.
    Only `serve` may call what is awaitable.
    """

    def __init__(self, serve: Callable[[Stream], Coroutine[Any, Any, None]], lost: Callable[[Stream], None]) -> None:
        self._serve = serve
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._inbox = memoryview(bytearray(HEAD_BYTES))
        self._begin = self._end = 0  # what of the inbox has not been read
        self._target: memoryview | None = None  # where bytes go instead
        self._waiter: asyncio.Future[None] | None = None
        self._is_paused = False  # reading
        self._is_blocked = False  # writing
        self._transport: asyncio.Transport | None = None
        self.task: asyncio.Task[None] | None = None

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's do not inherit from it
        self._transport.set_write_buffer_limits(0)  # blocked until the kernel has everything
        self.task = self._loop.create_task(self._serve(self))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  asyncio's signature
        return self._inbox[self._end :] if self._target is None else self._target

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is None:
            self._end += nbytes
            if self._end == len(self._inbox):
                self._is_paused = True
                self.transport.pause_reading()
            self._wake()
        elif nbytes == len(self._target):
            self._target = None
            self._wake()
        else:
            self._target = self._target[nbytes:]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  asyncio's signature
        self._target = None
        if self.task is not None:
            self.task.cancel()
            self.task.add_done_callback(lambda _: self._lost(self))

    def pause_writing(self) -> None:
        self._is_blocked = True

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._wake()

    # What the connection's task calls.

    @property
    def transport(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    @property
    def has_bytes(self) -> bool:
        """Tell whether something has come that was not read."""
        return self._end > self._begin

    async def first_bytes(self, deadline: float) -> None:
        """Wait for the next request's first bytes, and leave out empty lines before it (RFC 9112, 2.2)."""
        while True:
            while self._unread(2) == b"\r\n":
                self._begin += 2
            if self.has_bytes and self._unread(2) != b"\r":
                return
            await self._more(deadline)

    async def head(self, deadline: float) -> bytes | None:
        """Return bytes up to and with the first empty line; None where the inbox is full without one."""
        seen = self._begin
        while True:
            at = self._inbox.obj.find(END, max(self._begin, seen - len(END) + 1), self._end)  # type: ignore[attr-defined]
            if at >= 0:
                head = bytes(self._inbox[self._begin : at + len(END)])
                self._begin = at + len(END)
                return head
            if self._end - self._begin == len(self._inbox):
                return None
            unread = self._end - self._begin
            await self._more(deadline)
            seen = self._begin + unread

    async def fill(self, target: memoryview, deadline: float) -> None:
        """Receive exactly as many bytes as `target` has, straight into it where they have not come yet."""
        ready = min(len(target), self._end - self._begin)
        target[:ready] = self._inbox[self._begin : self._begin + ready]
        self._begin += ready
        if ready == len(target):
            return
        self._begin = self._end = 0  # room for what comes after the target's last byte
        self._target = target[ready:]
        self._resume()
        try:
            while self._target is not None:
                await self._wait(deadline)
        finally:
            self._target = None

    async def some(self, deadline: float) -> bytes:
        """Return what has come, at least a byte."""
        while not self.has_bytes:
            await self._more(deadline)
        data = bytes(self._inbox[self._begin : self._end])
        self._begin = self._end = 0
        return data

    def say(self, data: bytes) -> None:
        """Write a few bytes."""
        if not self.transport.is_closing():
            self.transport.write(data)

    async def write(self, pieces: Sequence[Buffer], deadline: float) -> None:
        """Write, and return once the kernel has all of it: the pieces' memory is free again."""
        if self.transport.is_closing():  # the client has gone, and the task is about to be told
            return
        self.transport.writelines(pieces)
        while self._is_blocked:
            await self._wait(deadline)

    async def linger(self) -> None:
        """Say that no answer will follow, and throw away what the client still sends, for a while.

        A connection that is closed with bytes unread is reset, and the client would lose the answer (RFC 9112, 9.6).
        """
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        deadline = self._loop.time() + LINGER_S
        with suppress(TimeoutError):
            while True:
                self._begin = self._end
                await self._more(deadline)

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    async def _more(self, deadline: float) -> None:
        """Wait for more bytes in the inbox, which must have room or unread bytes in front of it."""
        if self._begin:
            unread = self._end - self._begin
            self._inbox[:unread] = bytes(self._inbox[self._begin : self._end])
            self._begin, self._end = 0, unread
        self._resume()
        await self._wait(deadline)

    def _unread(self, limit: int) -> bytes:
        return bytes(self._inbox[self._begin : min(self._begin + limit, self._end)])

    def _resume(self) -> None:
        if self._is_paused and not self.transport.is_closing():
            self._is_paused = False
            self.transport.resume_reading()

    async def _wait(self, deadline: float) -> None:
        """Wait until anything has happened."""
        waiter = self._waiter = self._loop.create_future()
        timer = self._loop.call_at(deadline, _expire, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())
