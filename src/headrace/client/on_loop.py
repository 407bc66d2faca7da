"""The client for asyncio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from headrace.client.core import THE_CLIENTS, ClientConfig, Core, Room, TransportName
from headrace.client.senders import LoopSender
from headrace.client.waiting import LoopWaits

if TYPE_CHECKING:
    from headrace.client.arrays import Array


class AsyncClient:
    """A server's models, from one event loop: `Client`'s twin, whose arguments, arrays and errors it has.

    Use it in an `async with` block, or `close` it. A request whose task is cancelled is given up.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        ring: str | None = None,
        timeout: float | None = 60.0,
        retries: int = 0,
        headers: Mapping[str, str] | None = None,
        ring_rows: int = 0,
    ) -> None:
        """See `Client`. Raises InvalidOption."""
        config = ClientConfig.of(
            url, ring, timeout_s=timeout, retries=retries, headers=headers or {}, ring_rows=ring_rows
        )
        self._core = Core(config, LoopWaits(), LoopSender)

    @property
    def transport(self) -> TransportName | None:
        """By which way the last request went; None before the first."""
        return self._core.transport

    async def infer(
        self,
        model: str,
        inputs: object,
        *,
        version: str | None = None,
        timeout: float | None = THE_CLIENTS,
        priority: int = 0,
        request_id: str | None = None,
    ) -> dict[str, Array]:
        """Return the model's outputs by name, [rows, *features]. See `Client.infer`."""
        return await self._core.infer(model, inputs, self._core.sent(version, timeout, priority, request_id))

    def allocate(
        self, model: str, rows: int, *, version: str | None = None, timeout: float | None = THE_CLIENTS
    ) -> AsyncAllocation:
        """Return memory that the server reads itself, to make inputs in: use it in an `async with` block."""
        return AsyncAllocation(self._core, model, rows, version, timeout)

    async def metadata(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return the protocol's metadata: name, versions, platform, inputs and outputs; -1 stands for the rows."""
        return await self._core.metadata(model, self._core.sent(version))

    async def is_ready(self) -> bool:
        """Tell whether the server says that it takes requests; False where there is none."""
        return await self._core.is_ready(self._core.sent())

    async def close(self) -> None:
        """Let go of everything. Requests under way end with EngineStopped."""
        await self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncAllocation:
    """`blocking.Allocation`'s twin."""

    def __init__(self, core: Core, model: str, rows: int, version: str | None, timeout_s: float | None) -> None:
        self._core = core
        self._model = model
        self._rows = rows
        self._version = version
        self._timeout_s = timeout_s
        self._room: Room

    @property
    def inputs(self) -> dict[str, Array]:
        """Arrays to write into, by name; within the block."""
        return self._room.inputs

    async def infer(self, *, timeout: float | None = THE_CLIENTS, priority: int = 0) -> dict[str, Array]:
        """Return the outputs' views, valid until the next `infer` or the end of the block. Raises as `Client.infer`."""
        return await self._room.answer(self._core.sent(None, timeout, priority))

    async def __aenter__(self) -> Self:
        sent = self._core.sent(self._version, self._timeout_s)
        self._room = await self._core.allocate(self._model, self._rows, sent)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._room.close()
