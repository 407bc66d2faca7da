"""A request's body on its way in: straight into the reader's memory, as a whole into our own, or thrown away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools
import numpy as np

from headrace.frontend.http.head import HEAD_BYTES, Refused

if TYPE_CHECKING:
    from headrace.frontend.http.head import Head
    from headrace.frontend.http.stream import Stream

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_CHUNKS = 100_000  # of one body: small ones cost more than their bytes
_CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"  # makes a parser read chunks


class Body:
    """The body that follows a head. All of it must come by `deadline`, else Refused 408.

    A body known to be larger than `limit` bytes raises Refused 413 before anything of it is read.
    """

    def __init__(self, stream: Stream, head: Head, limit: int, deadline: float) -> None:
        self._stream = stream
        self._limit = limit
        self._deadline = deadline
        self._is_chunked = head.length is None
        self._awaits_continue = head.expects_continue
        self.remaining = head.length or 0  # not read yet, where the length is known
        self.is_spoilt = False  # what follows on the connection cannot be told from the body
        if self.remaining > limit:
            raise self._too_large(f"the body has {self.remaining} bytes")

    @property
    def is_chunked(self) -> bool:
        """Tell whether the body comes in chunks that have not been read."""
        return self._is_chunked

    async def fill(self, target: memoryview) -> None:
        """Receive the body's next bytes into `target`, of which there must be as many."""
        if not len(target):
            return
        self._go_on()
        self.remaining -= len(target)
        try:
            await self._stream.fill(target, self._deadline)
        except TimeoutError as error:
            raise self._late() from error

    async def read(self) -> memoryview:
        """Return all that is left of the body, in memory of its own."""
        if self._is_chunked:
            return memoryview(await self._read_chunks())
        data = np.empty(self.remaining, np.uint8).data  # not zeroed, unlike a bytearray
        await self.fill(data)
        return data

    async def skip(self) -> None:
        """Throw away what is left, so that the next request can be read; Refused where that is not to be had."""
        if self._awaits_continue:
            raise Refused(417, "the body was not asked for", close=True)  # so the client may send it, or not
        if self._is_chunked:
            await self._read_chunks()
        scratch = memoryview(bytearray(min(self.remaining, HEAD_BYTES)))
        while self.remaining:
            await self.fill(scratch[: min(self.remaining, len(scratch))])

    def _go_on(self) -> None:
        if self._awaits_continue:
            self._awaits_continue = False
            self._stream.say(CONTINUE)

    async def _read_chunks(self) -> bytearray:
        self._go_on()
        self._is_chunked = False
        chunks = _Chunks()
        self.is_spoilt = True
        try:
            while not chunks.complete:
                chunks.feed(await self._stream.some(self._deadline))
                if len(chunks.body) > self._limit:
                    raise self._too_large("the chunks of the body have more bytes")
        except TimeoutError as error:
            raise self._late() from error
        self.is_spoilt = chunks.ran_on
        return chunks.body

    def _too_large(self, what: str) -> Refused:
        return Refused(413, f"{what}, and the server takes {self._limit}; send less, or raise its limit", close=True)

    def _late(self) -> Refused:
        return Refused(408, "the body did not come in time", close=True)


class _Chunks:
    """Chunks being put together. llhttp does not say where a body ends, only that more than a body came."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.complete = False
        self.ran_on = False  # bytes of a next request came with the last ones, and are lost
        self._count = 0
        self._overhead = 0  # bytes since the last one of the body: sizes, extensions, trailers
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(_CHUNKED)

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises Refused."""
        before = len(self.body)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                raise Refused(400, f"the body's chunks are no HTTP/1.1: {error}", close=True) from error
            self.ran_on = True
        self._overhead = 0 if len(self.body) > before else self._overhead + len(data)
        if self._count > MAX_CHUNKS:
            raise Refused(413, f"the body has more than {MAX_CHUNKS} chunks; send larger ones", close=True)
        if self._overhead > HEAD_BYTES:
            raise Refused(400, "the body's chunks have extensions or trailers without end", close=True)

    def on_message_begin(self) -> None:
        self.ran_on = self.complete

    def on_chunk_header(self) -> None:
        self._count += 1

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.body += data

    def on_message_complete(self) -> None:
        self.complete = True
