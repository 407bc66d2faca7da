"""The client for threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from headrace.client.core import THE_CLIENTS, ClientConfig, Core, Room, TransportName
from headrace.client.senders import BlockingSender
from headrace.client.waiting import ThreadWaits, run

if TYPE_CHECKING:
    from headrace.client.arrays import Array

SUBMITTERS = 64  # requests of `submit` under way at once; more wait in line


class Client:
    """A server's models, from any number of threads. Use it in a `with` block, or `close` it.

    On the server's own host, and as its user, tensors are written into memory that the server reads itself (the ring);
    else they go over HTTP. That is found out for each request, and `transport` says what was used.

    Arrays are numpy's or torch's, [rows, *features], of the model's dtypes, and nothing is converted silently. Errors
    are classes of `headrace.errors`: InvalidRequest, UnknownModel, DeadlineExceeded, RunFailed (the model raised), and
    Unavailable: QueueFull, NotReady, Unreachable, EngineStopped (lost while it was under way, as PeerGone is). A client
    that was made before a fork is of no use in the child.
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
        """Raises InvalidOption. Nothing is connected before it is needed.

        Args:
            url: of the HTTP server; None: the environment's HEADRACE_URL, else http://127.0.0.1:8000, or with `ring`
                none, and then there is only the ring.
            ring: the server's Unix socket (`headrace serve --ring-socket`), or "off"; None: the environment's
                HEADRACE_RING, else looked for by the URL.
            timeout: seconds for each request, retries and waiting for room included; None: no limit.
            retries: how often a request is sent again that was refused before anything was done (503 with Retry-After).
            headers: of HTTP requests, such as {"Authorization": "Bearer ..."}.
            ring_rows: rows of each model's ring; 0: as the server thinks fit.
        """
        config = ClientConfig.of(
            url, ring, timeout_s=timeout, retries=retries, headers=headers or {}, ring_rows=ring_rows
        )
        self._core = Core(config, ThreadWaits(), BlockingSender)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def transport(self) -> TransportName | None:
        """By which way the last request went; None before the first."""
        return self._core.transport

    def infer(
        self,
        model: str,
        inputs: object,
        *,
        version: str | None = None,
        timeout: float | None = THE_CLIENTS,
        priority: int = 0,
        request_id: str | None = None,
    ) -> dict[str, Array]:
        """Return the model's outputs by name, [rows, *features].

        Args:
            model: its name.
            inputs: a dict of arrays by the inputs' names, or one array where the model has one input.
            version: of the model; None: the newest.
            timeout: seconds, in place of the client's.
            priority: 1 comes first, larger numbers later; 0: the middle.
            request_id: what the server calls the request, over HTTP.
        """
        return run(self._core.infer(model, inputs, self._core.sent(version, timeout, priority, request_id)))

    def submit(self, model: str, inputs: object, **options: Any) -> Future[dict[str, Array]]:  # noqa: ANN401
        """Return at once what `infer` returns later; the same arguments. Leave the inputs as they are until then."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(SUBMITTERS, "headrace submit")
            return self._pool.submit(self.infer, model, inputs, **options)

    def allocate(
        self, model: str, rows: int, *, version: str | None = None, timeout: float | None = THE_CLIENTS
    ) -> Allocation:
        """Return memory that the server reads itself, to make inputs in: use it in a `with` block."""
        return Allocation(self._core, model, rows, version, timeout)

    def metadata(self, model: str, version: str | None = None) -> dict[str, Any]:
        """Return the protocol's metadata: name, versions, platform, inputs and outputs; -1 stands for the rows."""
        return run(self._core.metadata(model, self._core.sent(version)))

    def is_ready(self) -> bool:
        """Tell whether the server says that it takes requests; False where there is none."""
        return run(self._core.is_ready(self._core.sent()))

    def close(self) -> None:
        """End what was submitted, then let go of everything. Other threads' requests end with EngineStopped."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        run(self._core.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Allocation:
    """Rows of a ring: write `inputs`, call `infer`, read what it returns, as often as wanted, all in a `with` block.

    `inputs` and outputs are arrays over the shared memory itself, by name, so nothing is copied; they are another
    request's after the block. Over HTTP it is memory of the client's own, and works alike. bfloat16 is its bits, as
    uint16.
    """

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

    def infer(self, *, timeout: float | None = THE_CLIENTS, priority: int = 0) -> dict[str, Array]:
        """Return the outputs' views, valid until the next `infer` or the end of the block. Raises as `Client.infer`."""
        return run(self._room.answer(self._core.sent(None, timeout, priority)))

    def __enter__(self) -> Self:
        """Wait for room. Raises as `Client.infer` does."""
        sent = self._core.sent(self._version, self._timeout_s)
        self._room = run(self._core.allocate(self._model, self._rows, sent))
        return self

    def __exit__(self, *_: object) -> None:
        run(self._room.close())
