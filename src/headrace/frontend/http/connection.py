"""One client's requests, answered in order, one after the other; what goes wrong is answered or ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from headrace.errors import HeadraceError
from headrace.frontend.http.answers import Headers, Reply, encoded, error_reply, pieces, reply_of
from headrace.frontend.http.body import Body
from headrace.frontend.http.head import HEAD_BYTES, Head, Refused, parse_head
from headrace.frontend.http.routes import HEALTH
from headrace.frontend.http.visitors import preflight
from headrace.frontend.tracing import http_outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from headrace.frontend.auth import Tokens
    from headrace.frontend.http.infer import Infer
    from headrace.frontend.http.routes import Routes
    from headrace.frontend.http.stream import Stream
    from headrace.frontend.http.visitors import Visitors
    from headrace.frontend.spans import Tracer
    from headrace.frontend.tracing import Trace
    from headrace.frontend_job import HttpSettings

SMALL_BYTES = 1 << 20  # of a body that is no infer request


@dataclass(slots=True)
class Answerer:
    """What all connections of a front share."""

    settings: HttpSettings
    routes: Routes
    infer: Infer
    tokens: Tokens | None  # None: everybody is let in
    visitors: Visitors
    scheme: str  # of URLs
    tracer: Tracer | None = None
    stopping: bool = False  # answers close their connections


class Exchange:
    """One request and its answer."""

    def __init__(self, stream: Stream, head: Head, body: Body, shared: Answerer) -> None:
        self.head = head
        self.body = body
        self.keep_alive = head.keep_alive  # the next request can be read
        self.is_answered = False
        self.visitor_headers: Headers = ()  # for the page that asks
        self.trace: Trace | None = None  # of a request that is sampled
        self._stream = stream
        self._shared = shared

    async def send(self, reply: Reply | None) -> None:
        """Send the answer; once this returns the reply's memory is free again. None: it was sent before.

        A client that does not take it is cut off.
        """
        if reply is None:
            return
        self.is_answered = True
        if self.trace is not None:
            self.trace.status = reply.status
        if self.visitor_headers:
            reply = Reply(reply.status, (*reply.headers, *self.visitor_headers), reply.body, reply.tensors)
        self.keep_alive = self.keep_alive and not self.body.is_spoilt and not self._shared.stopping
        connection = None if self.keep_alive else "close"
        if self.keep_alive and self.head.is_http_1_0:
            connection = "keep-alive"
        data = pieces(reply, connection, with_body=self.head.method != "HEAD")
        await send(self._stream, data, self._shared.settings.body_timeout_s)


async def send(stream: Stream, data: Sequence[bytes | memoryview], timeout_s: float) -> None:
    try:
        await stream.write(data, asyncio.get_running_loop().time() + timeout_s)
    except TimeoutError:
        stream.abort()


class Connection:
    """What is done on one stream. `run` ends when the connection is to be closed, and raises only CancelledError."""

    def __init__(self, stream: Stream, shared: Answerer) -> None:
        self._stream = stream
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._is_first = True
        self.is_busy = False  # has taken a request and not answered it

    async def run(self) -> None:
        try:
            while await self._next():
                self._is_first = False
        except TimeoutError:
            return
        finally:
            self.is_busy = False
            self._stream.close()

    async def _next(self) -> bool:
        """Answer the next request; False if it is the last. Raises TimeoutError where none comes."""
        settings = self._shared.settings
        idle_s = settings.header_timeout_s if self._is_first else settings.idle_timeout_s
        await self._stream.first_bytes(self._loop.time() + idle_s)
        try:
            head = await self._head()
            self.is_busy = True
            body = Body(self._stream, head, settings.max_body_bytes, self._loop.time() + settings.body_timeout_s)
        except Refused as refused:
            await self._turn_away(refused)
            return False
        exchange = Exchange(self._stream, head, body, self._shared)
        tracer = self._shared.tracer
        if tracer is not None and (context := tracer.sampled(head.headers)) is not None:
            await self._traced(exchange, tracer, context)
        else:
            await self._answer(exchange)
        self.is_busy = False
        return exchange.keep_alive

    async def _head(self) -> Head:
        try:
            data = await self._stream.head(self._loop.time() + self._shared.settings.header_timeout_s)
        except TimeoutError as error:
            raise Refused(408, "the request's head did not come in time", close=True) from error
        if data is None:
            raise Refused(431, f"the request's head is longer than {HEAD_BYTES} bytes", close=True)
        return parse_head(data)

    async def _traced(self, exchange: Exchange, tracer: Tracer, context: Context) -> None:
        """Answer; of an infer request that was sampled, also make spans."""
        head = exchange.head
        route = self._shared.infer.route(head.method, head.path)
        if route is None:
            await self._answer(exchange)
            return
        with tracer.request(context, partial(http_outcome, head, route, self._shared.scheme)) as exchange.trace:
            await self._answer(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        """Answer whatever happens."""
        try:
            reply = await self._reply(exchange)
            if reply is not None:
                await exchange.body.skip()
        except HeadraceError as error:
            if exchange.trace is not None:
                exchange.trace.error = error
            reply = await self._reply_to(error, exchange)
        except Exception as error:  # noqa: BLE001  ours, and no reason to leave a client without an answer
            self._loop.call_exception_handler({"message": "an HTTP request failed", "exception": error})
            reply = error_reply(500, "the server failed on this request; its log says why")
            exchange.keep_alive = False
            if exchange.trace is not None:
                exchange.trace.error = error
        if exchange.is_answered:
            return
        await exchange.send(reply)
        if not exchange.keep_alive and (exchange.body.remaining or exchange.body.is_spoilt):
            await self._stream.linger()

    async def _reply(self, exchange: Exchange) -> Reply | None:
        """Return the answer; None where it has been sent."""
        head = exchange.head
        exchange.visitor_headers = self._shared.visitors.admit(head.headers)
        if exchange.visitor_headers and (told := preflight(head.method, head.headers)) is not None:
            return told
        tokens = self._shared.tokens
        if tokens is not None and head.path not in HEALTH and not tokens.allow(head.headers.get("authorization")):
            text = "this server needs a token; send the header Authorization: Bearer TOKEN"
            raise Refused(401, text, (("WWW-Authenticate", "Bearer"),))
        wanted = self._shared.infer.wanted(head.method, head.path)
        if wanted is not None:
            await self._shared.infer.answer(wanted, exchange)
            return None
        match = self._shared.routes.find(head.method, head.path)
        if exchange.body.remaining > SMALL_BYTES:
            raise Refused(413, f"the body has {exchange.body.remaining} bytes; this call takes {SMALL_BYTES}")
        reply = match.handler(match.parameters, bytes(await exchange.body.read()))
        if not isinstance(reply, Reply):
            reply = await reply
        accept = head.headers.get("accept-encoding")
        return reply if accept is None else await encoded(reply, accept)

    async def _reply_to(self, error: HeadraceError, exchange: Exchange) -> Reply:
        """Return an error's answer, the rest of the body thrown away unless that cannot be had."""
        if isinstance(error, Refused) and error.close:
            exchange.keep_alive = False
            return reply_of(error)
        try:
            await exchange.body.skip()
        except Refused as refused:
            exchange.keep_alive = False
            return reply_of(error if refused.http_status == 417 else refused)
        return reply_of(error)

    async def _turn_away(self, refused: Refused) -> None:
        """Answer what is no request, or one whose body is not even looked at."""
        await send(self._stream, pieces(reply_of(refused), "close"), self._shared.settings.body_timeout_s)
        await self._stream.linger()


async def turn_away(stream: Stream, error: HeadraceError, timeout_s: float) -> None:
    """Answer a connection that there is no room for, and close it."""
    try:
        await send(stream, pieces(reply_of(error), "close"), timeout_s)
        await stream.linger()
    finally:
        stream.close()
