"""How the load generator's batches reach the backend: over the queue, or over the ring, copied or already in place."""

from __future__ import annotations

import select
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from headrace.clock import now_ns
from headrace.routing import EngineLoad, Spread
from headrace.transport.descriptors import DESCRIPTOR_DTYPE, ERROR, REQUEST

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.request import Response
    from headrace.transport.queue import QueueClient
    from headrace.transport.ring import RingClient

Descriptors = npt.NDArray[np.void]  # of DESCRIPTOR_DTYPE


@dataclass(frozen=True, slots=True)
class Received:
    """Answers that came together. `outputs` are those of all that are no errors, in order: [answers, rows, ...]."""

    descriptors: Descriptors
    outputs: npt.NDArray[np.generic] | None
    first_error: str | None

    @property
    def failed(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self.descriptors["kind"] == ERROR)


class Sender(Protocol):
    """A way to the backend for prepared batches."""

    def send(self, indexes: Sequence[int]) -> Sequence[int]:
        """Send requests of these indexes, in order, as many as there is room for.

        Returns which prepared batch each that was sent carries.
        """

    def ready(self) -> bool:
        """Tell whether there is something to receive, at little cost. May be True without need."""

    def receive(self, timeout_s: float) -> Received | None:
        """Return what has come; None after `timeout_s` without anything."""

    def close(self) -> None:
        """Say that no request will follow."""


class QueueSender:
    """One at a time: each is copied into fresh shared memory by the queue."""

    def __init__(self, client: QueueClient, batches: Sequence[Tensor]) -> None:
        self._client = client
        self._batches = batches

    def send(self, indexes: Sequence[int]) -> Sequence[int]:
        batch = indexes[0] % len(self._batches)
        self._client.send(indexes[0], self._batches[batch])
        return (batch,)

    def ready(self) -> bool:
        return True

    def receive(self, timeout_s: float) -> Received | None:
        response = self._client.receive(timeout_s)
        return None if response is None else _received(response)

    def close(self) -> None:
        self._client.close()


class CopyingSender:
    """Copies each request's batch into leased rows of the ring, as a client does that has its data elsewhere."""

    def __init__(self, client: RingClient, batches: Sequence[Tensor]) -> None:
        self._client = client
        self._batches = batches
        self._rows = len(batches[0])

    @property
    def client(self) -> RingClient:
        return self._client

    def send(self, indexes: Sequence[int]) -> Sequence[int]:
        first = self._client.lease(self._rows)
        if first is None:
            return ()
        batch = indexes[0] % len(self._batches)
        self._client.table.inputs[0][first : first + self._rows].copy_(self._batches[batch])
        self._client.send(_requests(indexes[:1], first, self._rows))
        return (batch,)

    def ready(self) -> bool:
        return self._client.ready()

    def receive(self, timeout_s: float) -> Received | None:
        received = _take(self._client, self._rows, timeout_s)
        if received is not None:
            for first in received.descriptors["first_row"].tolist():
                self._client.release(first, self._rows)
        return received

    def close(self) -> None:
        self._client.close()


class InPlaceSender:
    """Fills the whole table before the clock starts, as a client does that makes its data there.

    A request only names a place. A place is used again once its answer has been read, the one that has waited longest
    first.
    """

    def __init__(self, client: RingClient, batches: Sequence[Tensor]) -> None:
        self._client = client
        self._rows = len(batches[0])
        self._count = len(batches)
        self._free: deque[int] = deque()
        for place in range(client.table.layout.rows // self._rows):
            first = place * self._rows
            client.table.inputs[0][first : first + self._rows].copy_(batches[place % self._count])
            self._free.append(first)

    @property
    def client(self) -> RingClient:
        return self._client

    def send(self, indexes: Sequence[int]) -> Sequence[int]:
        places = np.array([self._free.popleft() for _ in range(min(len(indexes), len(self._free)))], np.int32)
        self._client.send(_requests(indexes[: len(places)], places, self._rows))
        batches: list[int] = (places // self._rows % self._count).tolist()
        return batches

    def ready(self) -> bool:
        return self._client.ready()

    def receive(self, timeout_s: float) -> Received | None:
        received = _take(self._client, self._rows, timeout_s)
        if received is not None:
            self._free.extend(received.descriptors["first_row"].tolist())
        return received

    def close(self) -> None:
        self._client.close()


class JoinedSender:
    """Rings to several engines, each with a sender of its own: a request goes where it is answered first.

    One thread sends, one receives. The answers' lanes are numbered through all engines, `lanes` of each. The first
    `skip` answers, before which engines loaded their models, say nothing of how fast they are.
    """

    def __init__(
        self, senders: Sequence[CopyingSender | InPlaceSender], rows: int, largest_batch: int, lanes: int, skip: int
    ) -> None:
        self._senders = senders
        self._rows = rows
        self._lanes = lanes
        self._skip = skip
        self._loads = [EngineLoad(max(largest_batch, rows)) for _ in senders]
        self._spread = Spread()
        self._sent: dict[int, tuple[int, int]] = {}  # by request: rows that were under way, and when it was sent
        self._lock = threading.Lock()
        self._turn = 0

    def send(self, indexes: Sequence[int]) -> Sequence[int]:
        batches: list[int] = []
        for index in indexes:
            sent = self._send(index)
            if not sent:
                break
            batches += sent
        return batches

    def ready(self) -> bool:
        return any(sender.ready() for sender in self._senders)

    def receive(self, timeout_s: float) -> Received | None:
        return self._take() or (self._take() if self._wait(timeout_s) else None)

    def close(self) -> None:
        for sender in self._senders:
            sender.close()

    def _send(self, index: int) -> Sequence[int]:
        at_ns = now_ns()
        with self._lock:
            order = self._spread.order(self._loads, self._rows, at_ns)
        for engine in order:
            load = self._loads[engine]
            with self._lock:
                load.rows += self._rows
                self._sent[index] = load.rows, at_ns
            sent = self._senders[engine].send([index])
            if sent:
                return sent
            with self._lock:
                load.rows -= self._rows
        return ()

    def _wait(self, timeout_s: float) -> bool:
        """Sleep until an answer has come from any engine; return False if none has."""
        clients = [sender.client for sender in self._senders]
        armed = [client.arm() for client in clients]  # all of them, whatever the first says
        if all(armed):
            select.select([client.answers_fd for client in clients], [], [], timeout_s)
        for client in clients:
            client.disarm()
        return any(client.ready() for client in clients)

    def _take(self) -> Received | None:
        """Return what has come from one engine, in turn."""
        count = len(self._senders)
        for engine in ((self._turn + number) % count for number in range(count)):
            sender = self._senders[engine]
            received = sender.receive(0) if sender.client.ready() else None
            if received is not None:
                self._turn = engine + 1
                return self._noted(received, engine)
        return None

    def _noted(self, received: Received, engine: int) -> Received:
        at_ns, load = now_ns(), self._loads[engine]
        descriptors = received.descriptors.copy()
        descriptors["lane"] += engine * self._lanes
        with self._lock:
            for index, failed in zip(descriptors["request"].tolist(), received.failed.tolist(), strict=True):
                load_rows, sent_ns = self._sent.pop(index)
                load.rows -= self._rows
                self._skip -= 1
                if not failed and self._skip < 0:
                    load.answered(load_rows, at_ns - sent_ns, at_ns)
        return replace(received, descriptors=descriptors)


def _requests(indexes: Sequence[int], first_rows: npt.NDArray[np.int32] | int, rows: int) -> bytes:
    requests = np.zeros(len(indexes), DESCRIPTOR_DTYPE)
    requests["request"] = indexes
    requests["kind"] = REQUEST
    requests["first_row"] = first_rows
    requests["rows"] = rows
    return requests.tobytes()


def _take(client: RingClient, rows: int, timeout_s: float) -> Received | None:
    data = client.take(timeout_s)
    if not data:
        return None
    descriptors = np.frombuffer(data, DESCRIPTOR_DTYPE)
    failed = descriptors["kind"] == ERROR
    places = descriptors["first_row"][~failed, None] + np.arange(rows)
    outputs = client.table.outputs[0].numpy()[places]  # a copy: the rows may be used again
    error = client.error_text(int(descriptors["entry"][failed][0])) if failed.any() else None
    return Received(descriptors, outputs, error)


def _received(response: Response) -> Received:
    descriptors = np.zeros(1, DESCRIPTOR_DTYPE)
    line = response.timeline
    descriptors["request"], descriptors["lane"] = response.index, line.worker
    for name in ("received_ns", "started_ns", "computed_ns", "responded_ns"):
        descriptors[name] = getattr(line, name)
    if response.output is None:
        descriptors["kind"] = ERROR
        return Received(descriptors, None, response.error)
    descriptors["batch_rows"] = len(response.output)
    return Received(descriptors, response.output.numpy()[None], None)
