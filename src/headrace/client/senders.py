"""HTTP connections, kept and shared: urllib3's where the caller blocks, aiohttp's on an event loop.

Bodies go out in parts, so that no tensor is copied to stand behind its JSON.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from headrace.client.failures import NotTaken
from headrace.errors import DeadlineExceeded, PeerGone, Unreachable

if TYPE_CHECKING:
    import aiohttp
    import urllib3

CONNECTIONS = 64  # kept open; more are made where more requests are under way, and closed again


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One exchange. Without parts it is a GET."""

    path: str
    headers: Mapping[str, str]
    parts: tuple[bytes | memoryview, ...] = ()
    limit_s: float | None = None

    @property
    def method(self) -> str:
        return "POST" if self.parts else "GET"

    def all_headers(self) -> dict[str, str]:
        if not self.parts:
            return dict(self.headers)
        return {**self.headers, "Content-Length": str(sum(len(part) for part in self.parts))}

    def took_too_long(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"no answer to {self.method} {self.path} in time; allow more")


class Sender(Protocol):
    """Connections to one server."""

    async def send(self, call: HttpCall) -> HttpAnswer:
        """Raises NotTaken(Unreachable) where nobody listens, PeerGone for a lost connection, DeadlineExceeded."""
        ...

    async def close(self) -> None: ...


class BlockingSender:
    """Any number of threads may send."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http: Any = importlib.import_module("urllib3")  # not for those who only use a ring
        self._pool: urllib3.HTTPConnectionPool = self._http.connection_from_url(url, maxsize=CONNECTIONS)

    async def send(self, call: HttpCall) -> HttpAnswer:
        failures = self._http.exceptions
        body: Any = call.parts or None  # its types leave memoryviews out; sockets take them
        try:
            answer = self._pool.urlopen(
                call.method,
                call.path,
                body=body,
                headers=call.all_headers(),
                timeout=self._http.Timeout(total=_above_zero(call.limit_s)),
                retries=False,
                redirect=False,
            )
        except (failures.NewConnectionError, failures.NameResolutionError) as error:
            raise NotTaken(_unreachable(self._url, error)) from error
        except failures.TimeoutError as error:
            raise call.took_too_long() from error
        except failures.HTTPError as error:
            raise _lost(self._url, error) from error
        return HttpAnswer(answer.status, answer.headers, answer.data)

    async def close(self) -> None:
        self._pool.close()


class LoopSender:
    """For one event loop."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._http: Any = importlib.import_module("aiohttp")
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: HttpCall) -> HttpAnswer:
        session = self._open_session()
        try:
            async with session.request(
                call.method,
                self._url + call.path,
                data=_each(call.parts) if call.parts else None,
                headers=call.all_headers(),
                timeout=self._http.ClientTimeout(total=_above_zero(call.limit_s)),
                allow_redirects=False,
            ) as answer:
                return HttpAnswer(answer.status, answer.headers, await answer.read())
        except self._http.ClientConnectorError as error:
            raise NotTaken(_unreachable(self._url, error)) from error
        except TimeoutError as error:
            raise call.took_too_long() from error
        except self._http.ClientError as error:
            raise _lost(self._url, error) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = self._http.TCPConnector(limit=0, limit_per_host=0)
            self._session = self._http.ClientSession(connector=connector, cookie_jar=self._http.DummyCookieJar())
        assert self._session is not None
        return self._session


async def _each(parts: Sequence[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    for part in parts:
        yield part


def _above_zero(limit_s: float | None) -> float | None:
    """Both libraries take 0 for no limit at all."""
    return None if limit_s is None else max(limit_s, 1e-3)


def _unreachable(url: str, error: Exception) -> Unreachable:
    return Unreachable(f"no server answers at {url} ({error}); is it started?")


def _lost(url: str, error: Exception) -> PeerGone:
    return PeerGone(f"the connection to {url} was lost ({type(error).__name__}: {error}); send the request again")
