"""A frontend's end of the ring to the backend, on an event loop: rows in, rows out, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from headrace.clock import now_ns
from headrace.errors import EngineStopped, HeadraceError, InvalidRequest, QueueFull, RunFailed
from headrace.processes import without_paths
from headrace.routing import EngineLoad
from headrace.transport.descriptors import ERROR, Descriptor, ErrorKind, cancellation, request, unpack
from headrace.transport.ring import RingClient
from headrace.wire.v2 import MAX_PRIORITY

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.transport.pair import RingPair

LOST = "the backend ended while it held this request; send it again"


class ModelFailed(RunFailed):
    """The model raised on these rows; the message is its own, without paths."""

    def __init__(self, text: str) -> None:
        super().__init__(without_paths(text))


def _error(kind: ErrorKind, text: str) -> HeadraceError:
    """Return an error as the backend described it: its class, and its message behind the class's name."""
    return ModelFailed(text) if kind is ErrorKind.MODEL else kind.error_class(text.partition(": ")[2] or text)


@dataclass(slots=True, eq=False)
class Call:
    """One request's rows of the ring: write the inputs, await `answer`, read the outputs, `close` in any case.

    A caller that goes away while it waits loses nothing: the rows come back when the backend has answered.
    """

    rows: int
    deadline_ns: int
    priority: int
    _link: BackendLink
    _first_row: int
    engine: int = 0  # which of the version's it is sent to
    told: Descriptor | None = None  # what `answer` returned
    _is_backends: bool = False  # the backend has the rows, and gives them back

    def input(self, number: int) -> memoryview:
        """Return an input's rows as writable bytes; inputs are numbered in the model's order."""
        return self._link.ring.input_bytes(number, self._first_row, self.rows)

    def output(self, number: int) -> memoryview:
        """Return an output's rows as bytes: once `answer` has returned, and until `close`."""
        return self._link.ring.output_bytes(number, self._first_row, self.rows)

    @property
    def free_share(self) -> float:
        """Which share of the rows is free where this call's are, also once no other call is taken there."""
        return self._link.free_share

    async def answer(self) -> Descriptor:
        """Hand over the inputs and wait; return what the backend says of the request: its times and its batch.

        Raises EngineStopped, DeadlineExceeded, or ModelFailed.
        """
        future = self._link.send(self._first_row, self)
        self._is_backends = True
        try:
            self.told = await future
        finally:
            self._is_backends = future.cancelled()
            if self._is_backends:
                self._link.withdraw(self._first_row)
        return self.told

    def close(self) -> None:
        """Give the rows back. Safe to call again."""
        if not self._is_backends:
            self._is_backends = True
            self._link.release(self._first_row, self.rows)


@dataclass(slots=True, eq=False)
class _Held:
    """A request that the backend has."""

    number: int
    rows: int
    answered: asyncio.Future[Descriptor]
    sent_ns: int
    load_rows: int  # under way when it was sent, its own among them


class Loop(Protocol):
    """What a link needs of the event loop that it lives on. asyncio's has it; a thread can offer it too."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...

    def remove_reader(self, fd: int, /) -> object: ...

    def create_future(self) -> asyncio.Future[Descriptor]: ...


class BackendLink:
    """Requests to one backend. Made, used and closed on one event loop: `loop`, or the running one.

    The pair's `peer_fd` must tell of the backend's end: it may end before it has come to the ring.
    `on_lost` is called once when the backend's process ends; all requests that it held have failed by then.
    """

    def __init__(
        self,
        pair: RingPair,
        model: ServedModel,
        on_lost: Callable[[BackendLink], None],
        loop: Loop | None = None,
        engine: int = 0,
    ) -> None:
        self.model = model
        self.engine = engine  # which of the version's
        self.load = EngineLoad(model.max_batch_size)
        self.ring = RingClient(pair)
        self._pair = pair
        self._on_lost = on_lost
        self._loop: Loop = loop or asyncio.get_running_loop()
        self._held: dict[int, _Held] = {}  # by first row, which is a request's own while it lasts
        self._in_flight = 0
        self._numbers = 0
        self._closed = False
        self._lost = False
        self._peer: int | None = None

    def start(self) -> None:
        self._loop.add_reader(self.ring.answers_fd, self._woken)
        self._peer = self.ring.peer_fd()
        if self._peer is not None:
            self._loop.add_reader(self._peer, self._lose)
        self._rearm()

    def admit(self, rows: int, deadline_ns: int = 0, priority: int = 0) -> Call:
        """Lease rows for a request. Raises InvalidRequest, QueueFull at once where there is no room, EngineStopped."""
        if self._closed:
            raise EngineStopped("the backend has ended; the server starts a new one: try again in a while")
        if not 1 <= rows <= self.model.max_batch_size:
            raise InvalidRequest(
                f"the request has {rows} rows, and the model takes at most {self.model.max_batch_size}; split it"
            )
        if not 0 <= priority <= MAX_PRIORITY:
            raise InvalidRequest(f"the request's priority is {priority}; it must be a number from 0 to {MAX_PRIORITY}")
        first = self.ring.lease(rows)
        if first is None:
            raise QueueFull(f"the server holds as many requests as it has room for; no {rows} rows are free: try again")
        self._in_flight += 1
        self.load.rows += rows
        return Call(rows, deadline_ns, priority, self, first, self.engine)

    @property
    def in_flight(self) -> int:
        """How many requests have rows."""
        return self._in_flight

    @property
    def free_share(self) -> float:
        """Which share of the ring's rows is free."""
        return self.ring.free_rows / self.ring.layout.rows

    def send(self, first: int, call: Call) -> asyncio.Future[Descriptor]:
        """Hand a call's rows over; the future is the answer. Raises EngineStopped."""
        if self._lost:
            raise EngineStopped(LOST)
        self._numbers += 1
        held = _Held(self._numbers, call.rows, self._loop.create_future(), now_ns(), self.load.rows)
        self._held[first] = held
        self.ring.send(request(self._numbers, first, call.rows, call.deadline_ns, call.priority))
        return held.answered

    def withdraw(self, first: int) -> None:
        """Tell the backend that nobody wants the answer. It answers all the same, which gives the rows back."""
        held = self._held.get(first)
        if held is not None:
            self.ring.send(cancellation(held.number, first, held.rows))

    def release(self, first: int, rows: int) -> None:
        self._in_flight -= 1
        self.load.rows -= rows
        self.ring.release(first, rows)

    def close(self) -> None:
        """Tell the backend that nothing will follow. Requests under way must have ended."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self.ring.answers_fd)
        if self._peer is not None:
            self._loop.remove_reader(self._peer)
        self.ring.close()
        self._pair.close()

    def _woken(self) -> None:
        self.ring.disarm()
        self._rearm()

    def _rearm(self) -> None:
        """Handle all answers that are there, and ask to be woken for the next."""
        while True:
            self._take_answers()
            if self.ring.arm():
                return
            self.ring.disarm()

    def _take_answers(self) -> None:
        if self.ring.ready():
            for answer in unpack(self.ring.take(0)):
                self._answered(answer)

    def _answered(self, answer: Descriptor) -> None:
        held = self._held.pop(answer.first_row)
        if held.answered.cancelled():  # the caller has gone away
            self.release(answer.first_row, held.rows)
        elif answer.kind == ERROR:
            held.answered.set_exception(_error(answer.error_kind, self.ring.error_text(answer.entry)))
        else:
            at_ns = now_ns()
            self.load.answered(held.load_rows, at_ns - held.sent_ns, at_ns)
            held.answered.set_result(answer)

    def _lose(self) -> None:
        """The backend's process ends: take what it answered before, and fail the rest at once.

        Some of its threads, or its GPU, may still write to the rows: none of this ring is used again.
        """
        self._take_answers()
        self.close()
        self._lost = True
        for first, held in self._held.items():
            if held.answered.cancelled():
                self.release(first, held.rows)
            else:
                held.answered.set_exception(EngineStopped(LOST))
        self._held.clear()
        self._on_lost(self)
