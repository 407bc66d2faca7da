"""Answers: what a handler returns, and the bytes that it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from headrace.frontend.http import compression
from headrace.frontend.http.head import Refused
from headrace.wire.v2 import ERROR_CLASS

if TYPE_CHECKING:
    from headrace.errors import HeadraceError

RETRY_AFTER, RETRY_AFTER_S = "Retry-After", 1
TEXT = 2000  # characters of an error's text
JSON = ("Content-Type", "application/json")
COPY_BYTES = 64 << 10  # up to here one copy is cheaper than to send from several places

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `tensors` are bytes that follow the body, sent from where they lie; the length is counted here."""

    status: int = 200
    headers: Headers = ()
    body: bytes = b""
    tensors: tuple[memoryview, ...] = ()

    @property
    def size(self) -> int:
        return len(self.body) + sum(map(len, self.tensors))

    def copied(self) -> Reply:
        """Return the same, independent of the tensors' memory."""
        return Reply(self.status, self.headers, b"".join([self.body, *self.tensors])) if self.tensors else self


def json_reply(value: object, status: int = 200) -> Reply:
    return Reply(status, (JSON,), msgspec.json.encode(value))


def error_reply(status: int, text: str, headers: Headers = ()) -> Reply:
    """Return an error as the protocol has it; of a text that repeats what a client sent, no more than its beginning."""
    return Reply(status, (JSON, *headers), msgspec.json.encode({"error": text[:TEXT]}))


def reply_of(error: HeadraceError) -> Reply:
    headers = error.headers if isinstance(error, Refused) else ((ERROR_CLASS, type(error).__name__),)
    if error.http_status in (429, 503):
        headers = (*headers, (RETRY_AFTER, str(RETRY_AFTER_S)))
    return error_reply(error.http_status, str(error), headers)


async def encoded(reply: Reply, accept: str) -> Reply:
    """Return the reply compressed, where the client's Accept-Encoding asks for that and it is worth it."""
    encoding = compression.accepted(accept) if reply.size >= compression.WORTH_BYTES else None
    if encoding is None:
        return reply
    reply = reply.copied()
    body = await compression.compressed([reply.body], encoding)
    return Reply(reply.status, (*reply.headers, ("Content-Encoding", encoding), ("Vary", "Accept-Encoding")), body)


def pieces(reply: Reply, connection: str | None, *, with_body: bool = True) -> Sequence[bytes | memoryview]:
    """Return what is written: one piece for small answers, else the tensors where they lie.

    `connection` is the header of that name, where there is to be one.
    """
    lines = [_status_line(reply.status), f"Date: {_date(int(time.time()))}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    lines.append(f"Content-Length: {reply.size}")
    if connection is not None:
        lines.append(f"Connection: {connection}")
    head = "\r\n".join([*lines, "\r\n"]).encode("latin-1")
    if not with_body:
        return [head]
    if reply.size <= COPY_BYTES:
        return [b"".join([head, reply.body, *reply.tensors])]
    return [head, reply.body, *reply.tensors]


@lru_cache
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
