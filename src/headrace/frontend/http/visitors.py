"""Web pages as clients: whether a page may ask this server, and by which names the server may be asked for.

A browser lets the page of any site send requests to this machine, and tells whose page it was in the Origin header
(RFC 6454; Fetch standard, "Origin header"). A site can also have its own name point here, so that its pages are of the
same origin: then the name in the Host header is not ours. Other programs send no Origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from headrace.addresses import ANY_ORIGIN, DEFAULT_PORTS, Origin, read_authority, read_origin
from headrace.frontend.http.answers import RETRY_AFTER, Headers, Reply
from headrace.frontend.http.head import Refused
from headrace.wire.v2 import ERROR_CLASS, HEADER_LENGTH

if TYPE_CHECKING:
    from headrace.frontend_job import AccessSettings

METHODS = "GET, HEAD, POST"
PREFLIGHT_S = 600  # for so long a browser need not ask again
EXPOSED = ", ".join((HEADER_LENGTH, ERROR_CLASS, RETRY_AFTER))  # what a page may read of an answer's head
SHOWN = 200  # characters of a header that are repeated


class Visitors:
    """Which pages are let in, and which names are the server's."""

    def __init__(self, access: AccessSettings) -> None:
        self._hosts = None if access.hosts is None else frozenset(access.hosts)
        self._any_origin = ANY_ORIGIN in access.origins
        self._origins = frozenset(filter(None, map(read_origin, access.origins)))

    def admit(self, headers: Mapping[str, str]) -> Headers:
        """Return what the answer must say so that the browser shows it to the page; nothing for the server's own.

        Raises Refused 403.
        """
        host = headers.get("host")
        if self._hosts is not None and host is not None and _host_of(host) not in self._hosts:
            raise Refused(
                403,
                f"the request asks for the host {host[:SHOWN]}, which is none of this server's names; if it is one,"
                " start the server with --allow-host",
            )
        origin = headers.get("origin")
        if origin is None:
            return ()
        found = read_origin(origin)
        if found is not None and _is_own(found, host):
            return ()
        if not self._any_origin and found not in self._origins:
            raise Refused(
                403,
                f"the request comes from a web page of {origin[:SHOWN]}, whom this server does not answer; if it is to,"
                " start the server with --allow-origin",
            )
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", EXPOSED),
            ("Vary", "Origin"),
        )


def preflight(method: str, headers: Mapping[str, str]) -> Reply | None:
    """Return the answer to a browser that asks what an admitted page may send; None where this is no such question.

    It comes before any token, which browsers do not send with it. Source: Fetch standard, "CORS-preflight fetch".
    """
    if method != "OPTIONS" or "access-control-request-method" not in headers:
        return None
    told = [("Access-Control-Allow-Methods", METHODS), ("Access-Control-Max-Age", str(PREFLIGHT_S))]
    asked = headers.get("access-control-request-headers")
    if asked is not None:
        told.append(("Access-Control-Allow-Headers", asked))
    return Reply(200, tuple(told))  # a 204 could not have the Content-Length that all answers have (RFC 9110, 8.6)


@lru_cache
def _host_of(header: str) -> str | None:
    found = read_authority(header)
    return None if found is None else found.host


def _is_own(origin: Origin, host: str | None) -> bool:
    """Tell whether a page is of the server that was asked. Its scheme may be that of a proxy in front."""
    default = DEFAULT_PORTS.get(origin.scheme)
    own = None if host is None or default is None else read_authority(host)
    return own is not None and (own.host, own.port or default) == (origin.host, origin.port)
