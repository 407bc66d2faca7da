"""A request's head: read by llhttp, and checked by the few rules that it leaves to servers.

Source: RFC 9112 (HTTP/1.1); llhttp refuses what smuggles requests: two lengths, a length beside chunks, bare line ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import httptools

from headrace.errors import HeadraceError, InvalidRequest

HEAD_BYTES = 16 << 10  # of request line and headers


class Refused(HeadraceError):
    """A request that is refused by HTTP's own rules; nothing was computed. `status` says which rule."""

    def __init__(
        self, status: int, text: str, headers: tuple[tuple[str, str], ...] = (), *, close: bool = False
    ) -> None:
        super().__init__(text)
        self.http_status = status
        self.headers = headers
        self.close = close  # the rest of the connection's bytes cannot be read as requests


@dataclass(frozen=True, slots=True)
class Head:
    """What the head says. Header names are in lower case; one that came several times is joined by ", "."""

    method: str
    path: str  # percent-encoded as it came; no query
    headers: dict[str, str]
    keep_alive: bool
    is_http_1_0: bool
    length: int | None  # bytes of the body; None: it comes in chunks
    expects_continue: bool  # the client waits for a word before it sends the body


class _Callbacks:
    """What the parser finds, in its own words."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.keep_alive = False
        self.parser = httptools.HttpRequestParser(self)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keep_alive = self.parser.should_keep_alive()


def parse_head(data: bytes) -> Head:
    """Read a head that ends with its empty line. Raises Refused, which always closes the connection."""
    found = _Callbacks()
    try:
        found.parser.feed_data(data)
    except httptools.HttpParserUpgrade:  # an offer to speak another protocol, which a server may ignore
        pass
    except httptools.HttpParserError as error:
        if not found.complete:
            raise Refused(400, f"the request is no HTTP/1.1: {error}", close=True) from error
    if not found.complete:
        raise Refused(400, "the request is no HTTP/1.1: its head is incomplete", close=True)
    headers: dict[str, str] = {}
    for name_bytes, value_bytes in found.headers:
        name, value = name_bytes.decode("latin-1").lower(), value_bytes.decode("latin-1").strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    version = found.parser.get_http_version()
    _check(version, headers)
    expects = headers.get("expect")
    length = _length(headers)
    return Head(
        method=found.parser.get_method().decode("latin-1"),
        path=_path(found.url),
        headers=headers,
        keep_alive=found.keep_alive,
        is_http_1_0=version == "1.0",
        length=length,
        expects_continue=expects is not None and version == "1.1" and length != 0,
    )


def _check(version: str, headers: dict[str, str]) -> None:
    if version not in ("1.0", "1.1"):
        raise Refused(505, f"HTTP/{version} is not spoken here; send HTTP/1.1", close=True)
    if version == "1.1" and ("host" not in headers or "," in headers["host"]):
        raise Refused(400, "a request needs exactly one Host header", close=True)
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refused(417, f"Expect: {headers['expect'][:40]} cannot be met; the server knows 100-continue", close=True)
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise Refused(501, "the only Transfer-Encoding taken is chunked", close=True)
        if version == "1.0" or "content-length" in headers:
            raise Refused(400, "Transfer-Encoding cannot stand here; send Content-Length", close=True)


def _length(headers: dict[str, str]) -> int | None:
    if "transfer-encoding" in headers:
        return None
    given = headers.get("content-length", "0")
    if not given.isdecimal() or len(given) > 18:
        raise Refused(400, f"Content-Length is {given[:40]!r}; it must be a number of bytes", close=True)
    return int(given)


def _path(url: bytes) -> str:
    if url == b"*":
        return "*"
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError as error:
        raise Refused(400, "the request's target is no URL path", close=True) from error
    return path.decode("latin-1") if path else "/"


def header_number(headers: dict[str, str], name: str) -> int | None:
    """Return a header that is a number of bytes; None where it was not given. Raises InvalidRequest."""
    given = headers.get(name.lower())
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal()) or len(given) > 18:
        raise InvalidRequest(f"{name} is {given[:40]!r}; it must be a number of bytes")
    return int(given)
