"""A frontend's end of the ring to the backend, on an event loop: rows in, rows out, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from headrace.errors import EngineStopped, InvalidRequest, QueueFull, RunFailed
from headrace.transport.descriptors import ERROR, REQUEST, Descriptor, pack, unpack
from headrace.transport.ring import RingClient

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.transport.pair import RingPair


_PATH = re.compile(r"(?<![\w.:/])/[^\s'\":,()]+")  # what a message says of our file system is not for clients


class ModelFailed(RunFailed):
    """The model raised on these rows; the message is its own, without paths."""

    def __init__(self, text: str) -> None:
        super().__init__(_PATH.sub("(path)", text))


class BackendLink:
    """Requests to one backend. Made, used and closed on one event loop.

    `on_lost` is called once when the backend's process has ended; all requests that it held have failed by then.
    """

    def __init__(self, ring: RingPair, model: ServedModel, on_lost: Callable[[], None]) -> None:
        self.model = model
        self._pair = ring
        self._ring = RingClient(ring)
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by first row, which is a request's own while it lasts
        self._rows: dict[int, int] = {}
        self._numbers = 0
        self._lost = False
        self._peer: int | None = None

    def start(self) -> None:
        self._loop.add_reader(self._ring.answers_fd, self._woken)
        self._rearm()

    async def infer(self, inputs: Sequence[memoryview], rows: int) -> list[bytes]:
        """Return the outputs' raw bytes for `rows` rows, of which `inputs` are the raw bytes, one for each input.

        Raises InvalidRequest, QueueFull at once where there is no room, EngineStopped, or ModelFailed.
        """
        first = self._admit(rows)
        for number, data in enumerate(inputs):
            self._ring.input_bytes(number, first, rows)[:] = data
        answered = self._loop.create_future()
        self._waiting[first], self._rows[first] = answered, rows
        self._numbers += 1
        self._ring.send(pack(Descriptor(self._numbers, REQUEST, first, rows)))
        if self._peer is None:
            self._watch_peer()
        await answered  # if the caller goes away, the rows come back with the answer all the same
        outputs = [bytes(self._ring.output_bytes(n, first, rows)) for n in range(len(self.model.outputs))]
        self._release(first)
        return outputs

    @property
    def in_flight(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Tell the backend that nothing will follow. Requests under way must have ended."""
        if self._lost:
            return
        self._loop.remove_reader(self._ring.answers_fd)
        if self._peer is not None:
            self._loop.remove_reader(self._peer)
        self._ring.close()
        self._pair.close()

    def _admit(self, rows: int) -> int:
        if self._lost:
            raise EngineStopped("the backend has ended; the server starts a new one: try again in a while")
        if rows > self.model.max_batch_size:
            raise InvalidRequest(
                f"the request has {rows} rows, and the model takes at most {self.model.max_batch_size}; split it"
            )
        first = self._ring.lease(rows)
        if first is None:
            raise QueueFull(f"the server holds as many requests as it has room for; no {rows} rows are free: try again")
        return first

    def _release(self, first: int) -> None:
        self._ring.release(first, self._rows.pop(first))

    def _woken(self) -> None:
        self._ring.disarm()
        self._rearm()

    def _rearm(self) -> None:
        """Handle all answers that are there, and ask to be woken for the next."""
        while True:
            if self._ring.ready():
                for answer in unpack(self._ring.take(0)):
                    self._answered(answer)
            if self._ring.arm():
                return
            self._ring.disarm()

    def _answered(self, answer: Descriptor) -> None:
        future = self._waiting.pop(answer.first_row)
        if future.cancelled():
            self._release(answer.first_row)
        elif answer.kind == ERROR:
            self._release(answer.first_row)
            future.set_exception(ModelFailed(self._ring.error_text(answer.entry)))
        else:
            future.set_result(None)

    def _watch_peer(self) -> None:
        self._peer = self._ring.peer_fd()
        if self._peer is not None:
            self._loop.add_reader(self._peer, self._lose)

    def _lose(self) -> None:
        """The backend's process has ended: take what it answered before, and fail the rest at once."""
        if self._ring.ready():
            for answer in unpack(self._ring.take(0)):
                self._answered(answer)
        self.close()
        self._lost = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineStopped("the backend ended while it held this request; send it again"))
        self._waiting.clear()
        self._on_lost()
