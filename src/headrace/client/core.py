"""What both clients do: choose the ring or HTTP for each request, and send what was refused again if told to."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from headrace.client.failures import NotTaken
from headrace.client.http import HttpTransport
from headrace.client.request import Sent
from headrace.client.ring import Rings
from headrace.clock import NS_PER_S, now_ns
from headrace.door_messages import doors_of
from headrace.errors import InvalidOption
from headrace.wire.datatypes import FROM_DTYPE

if TYPE_CHECKING:
    from headrace.client.arrays import Array
    from headrace.client.senders import Sender
    from headrace.client.waiting import Waits
    from headrace.control import ServedModel
    from headrace.tensors import TensorSpec

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, RING_VARIABLE = "HEADRACE_URL", "HEADRACE_RING"
NO_RING = "off"
THE_CLIENTS = -1.0  # a request's timeout that stands for the client's own

T = TypeVar("T")
TransportName = Literal["ring", "http"]


class Room(Protocol):
    """Memory for a request: `RingRoom` or `HttpRoom`."""

    inputs: dict[str, Array]

    async def answer(self, sent: Sent) -> dict[str, Array]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the server is, and what all requests have in common."""

    url: str | None  # None: there is only the ring
    doors: tuple[str, ...]  # where a ring may be had
    timeout_s: float | None = 60.0
    retries: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    ring_rows: int = 0  # 0: as the server thinks fit

    @classmethod
    def of(cls, url: str | None, ring: str | None, **others: Any) -> ClientConfig:  # noqa: ANN401
        """Return the configuration from a client's arguments and the environment, validated. Raises InvalidOption."""
        ring = os.environ.get(RING_VARIABLE) if ring is None else ring
        url = os.environ.get(URL_VARIABLE) if url is None else url
        if url is None and ring in (None, NO_RING):
            url = DEFAULT_URL
        if url is not None:
            _require_url(url)
        doors = doors_of(url or "") if ring is None else () if ring == NO_RING else (ring,)
        config = cls(url=url, doors=doors, **others)
        if config.timeout_s is not None and not config.timeout_s > 0:
            raise InvalidOption(f"timeout={config.timeout_s}: give seconds above 0, or None for no limit")
        if config.retries < 0 or config.ring_rows < 0:
            raise InvalidOption(f"retries={config.retries}, ring_rows={config.ring_rows}: neither can be negative")
        return config

    @property
    def base_url(self) -> str:
        """The server's address without a path."""
        parts = urlsplit(self.url or "")
        return f"{parts.scheme}://{parts.netloc}"


class Core:
    """A client, whichever way it waits."""

    def __init__(self, config: ClientConfig, waits: Waits, make_sender: Callable[[str], Sender]) -> None:
        self._config = config
        self._waits = waits
        self._rings = Rings(config.doors, config.ring_rows, waits) if config.doors else None
        self._http = None
        if config.url is not None:
            self._http = HttpTransport(config.url, config.headers, make_sender(config.base_url))
        self.transport: TransportName | None = None  # of the last request

    def sent(
        self,
        version: str | None = None,
        timeout_s: float | None = THE_CLIENTS,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Sent:
        """Return a request's options, its time running from now."""
        limit_s = self._config.timeout_s if timeout_s == THE_CLIENTS else timeout_s
        return Sent.now(version, limit_s, priority, request_id)

    async def infer(self, model: str, inputs: object, sent: Sent) -> dict[str, Array]:
        return await self._tried(
            sent,
            lambda rings: rings.infer(model, inputs, sent),
            lambda http: http.infer(model, inputs, sent),
        )

    async def allocate(self, model: str, rows: int, sent: Sent) -> Room:
        async def ring(rings: Rings) -> Room:
            return await rings.allocate(model, rows, sent)

        async def http(transport: HttpTransport) -> Room:
            return await transport.allocate(model, rows, sent)

        return await self._tried(sent, ring, http)

    async def metadata(self, model: str, sent: Sent) -> dict[str, Any]:
        if self._http is not None:
            return await self._again(sent, self._http.metadata, model, sent)
        assert self._rings is not None
        return _metadata(await self._again(sent, self._rings.model, model, sent.version))

    async def is_ready(self, sent: Sent) -> bool:
        try:
            if self._http is not None:
                return await self._http.is_ready(sent)
            assert self._rings is not None
            return bool(await self._rings.models())
        except NotTaken:
            return False

    async def close(self) -> None:
        if self._rings is not None:
            self._rings.close()
        if self._http is not None:
            await self._http.close()
        self._waits.close()

    async def _tried(
        self,
        sent: Sent,
        ring: Callable[[Rings], Awaitable[T]],
        http: Callable[[HttpTransport], Awaitable[T]],
    ) -> T:
        async def once() -> T:
            if self._rings is not None:
                try:
                    done = await ring(self._rings)
                except NotTaken:
                    if self._http is None:
                        raise
                else:
                    self.transport = "ring"
                    return done
            assert self._http is not None
            self.transport = "http"
            return await http(self._http)

        return await self._again(sent, once)

    async def _again(self, sent: Sent, once: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Try as often as the client may and the time allows. Raises the last refusal."""
        tries = 0
        while True:
            try:
                return await once(*arguments)
            except NotTaken as refused:
                # Up to twice as long as the server says, so that many clients do not all come back at once.
                pause_s = refused.after_s * 2**tries * (1 + random.random())  # noqa: S311
                is_too_late = sent.deadline_ns is not None and now_ns() + pause_s * NS_PER_S > sent.deadline_ns
                if tries == self._config.retries or is_too_late:
                    raise refused.error from None
            await self._waits.sleep(pause_s)
            tries += 1


def _require_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise InvalidOption(f"{url!r} is no address of a server; give one like {DEFAULT_URL}")


def _metadata(model: ServedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "pytorch",
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": FROM_DTYPE[spec.dtype], "shape": [-1, *spec.features]}
