"""The published transport: two multiprocessing queues.

A tensor that is put on such a queue is copied into fresh shared memory by the queue's feeder thread, and its file
descriptor is sent; the receiver maps it. Cold pages make this slow (about 1 GB/s): it is kept as published, to be
measured. Source: PyTorch docs, torch.multiprocessing, file_descriptor sharing.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
import torch.multiprocessing

from headrace.clock import now_ns
from headrace.errors import TransportFailed
from headrace.processes import describe
from headrace.request import Request, Response
from headrace.transport.pair import QueuePair

if TYPE_CHECKING:
    from torch import Tensor

POLL_S = 1.0  # how often a waiting receiver looks up; the supervisor ends it when its peer is gone


class FreshCopy:
    """Crosses a queue as a copy of `batch` in new shared memory, made when the queue sends it.

    The queue moves a plain tensor into shared memory once and afterwards only sends its descriptor, so a batch that is
    sent twice would travel for nothing the second time. This keeps the published cost for every request, with one
    copy, in the feeder thread, where the published experiment pays it. What goes wrong there would be printed by the
    queue and forgotten; it crosses in place of the batch, as TransportFailed.
    """

    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        try:
            return _itself, (self._copied(),)
        except Exception as error:  # noqa: BLE001  whatever it is, the request is told
            return TransportFailed, (describe(error),)

    def _copied(self) -> Tensor:
        storage = torch.UntypedStorage._new_shared(self.batch.nbytes)  # noqa: SLF001  as DataLoader's collate does
        shared = torch.empty(0, dtype=self.batch.dtype).set_(storage, 0, self.batch.shape)  # type: ignore[call-overload]
        shared.copy_(self.batch)
        return cast("Tensor", shared)


class SharedAnswer:
    """Crosses a queue as `response`, whose output is moved into shared memory; as an error, if it cannot be."""

    def __init__(self, response: Response) -> None:
        self.response = response

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        response = self.response
        try:
            if response.output is not None:
                response.output.share_memory_()
        except Exception as error:  # noqa: BLE001  whatever it is, the request is told
            response = Response(response.index, response.timeline, error=describe(error))
        return _itself, (response,)


def _itself(message: object) -> object:
    return message


class QueueClient:
    """The load generator's side."""

    def __init__(self, queues: QueuePair) -> None:
        self._queues = queues

    def send(self, index: int, batch: Tensor) -> None:
        """Hand one request over; returns before it is copied."""
        self._queues.requests.put((index, FreshCopy(batch)))  # type: ignore[arg-type]

    def receive(self, timeout_s: float) -> Response | None:
        """Return the next response, or None after `timeout_s` without one."""
        try:
            return self._queues.responses.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Tell the backend that no request will follow."""
        self._queues.requests.put(None)


class QueueEndpoint:
    """The backend's side. Several threads may answer at the same time."""

    def __init__(self, queues: QueuePair) -> None:
        self._queues = queues

    def requests(self) -> Iterator[Request]:
        """Yield requests in order of arrival until the client closes."""
        while True:
            try:
                message = self._queues.requests.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if message is None:
                return
            index, inputs = message
            request = Request(index=index, inputs=inputs)
            request.timeline.received_ns = now_ns()
            if isinstance(inputs, TransportFailed):
                self.fail(request, inputs)
            else:
                yield request

    def respond(self, request: Request, output: Tensor) -> None:
        """Answer with `output`, [rows, *features] on the CPU."""
        request.timeline.responded_ns = now_ns()
        self._put(Response(request.index, request.timeline, output=output))

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error, so that nobody waits for this request for ever."""
        request.timeline.responded_ns = now_ns()
        self._put(Response(request.index, request.timeline, error=describe(error)))

    def _put(self, response: Response) -> None:
        self._queues.responses.put(SharedAnswer(response))  # type: ignore[arg-type]
