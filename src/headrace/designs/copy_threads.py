"""Steps 3 and 4 (#116189, #116190): copies in and out on threads and streams of their own, N predict threads.

Per request the main thread allocates the input buffer on the device, makes two events and two semaphores, and submits
three tasks: `_copy_h2d` (one thread, one stream) pins the batch and copies it into the buffer; `_predict` (one of N
threads, each with a stream made when the thread starts) runs the model; `_respond` (one thread, one stream) copies the
answer to the CPU and sends it. Events order the streams. A wait on an event that is not recorded yet would be no wait,
so a semaphore says when it has been.

Repaired here, because a wrong or missing answer is not a result:

- The race. The buffer is allocated on the main thread's stream, written on a second and read on a third; the published
  code dropped it without telling the allocator, which could hand the memory to the next request while it was being
  read. Each stream now `keeps` what it uses.
- Lost errors. The futures were discarded. Now a stage that fails leaves its error in the batch, the later stages pass
  it on, and `_respond` answers with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import torch

from headrace.designs.base import Endpoint, Model, forward

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.request import Request
    from headrace.runtime.device import Device, Event, Stream


def _not_yet() -> threading.Semaphore:
    return threading.Semaphore(0)


@dataclass(slots=True)
class _Batch:
    """One request on its way through the three stages, with everything that the published design makes for each."""

    request: Request
    buffer: Tensor | None  # on the device, shaped like the request's inputs; given up after the forward
    input_ready: Event
    compute_done: Event
    input_recorded: threading.Semaphore = field(default_factory=_not_yet)
    compute_recorded: threading.Semaphore = field(default_factory=_not_yet)
    output: Tensor | None = None
    error: Exception | None = None


class _Worker(threading.local):
    """What a predict thread has of its own."""

    stream: Stream
    number: int


class CopyThreads:
    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers

    def serve(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        """See `Design.serve`."""
        stages = _Stages(endpoint, device)
        model: Model | None = None
        with ExitStack() as pools:
            # Left in reverse: copies in end first, then the predictions, then the answers.
            respond = pools.enter_context(ThreadPoolExecutor(1, "respond"))
            predict = pools.enter_context(
                ThreadPoolExecutor(self._num_workers, "predict", initializer=stages.start_worker)
            )
            copy_h2d = pools.enter_context(ThreadPoolExecutor(1, "copy_h2d"))
            for request in endpoint.requests():
                model = load_model() if model is None else model
                batch = stages.admit(request)
                if batch is None:
                    continue
                copy_h2d.submit(stages.copy_h2d, batch)
                predict.submit(stages.predict, model, batch)
                respond.submit(stages.respond, batch)


class _Stages:
    """The tasks. Each but the last leaves its error in the batch, and releases the next in any case."""

    def __init__(self, endpoint: Endpoint, device: Device) -> None:
        self._endpoint = endpoint
        self._device = device
        self._h2d_stream = device.stream()
        self._d2h_stream = device.stream()
        self._worker = _Worker()
        self._numbers = count()

    def start_worker(self) -> None:
        self._worker.stream = self._device.stream()
        self._worker.number = next(self._numbers)

    def admit(self, request: Request) -> _Batch | None:
        """Allocate what the request needs, or answer it with the error."""
        try:
            buffer = torch.empty_like(request.inputs, device=self._device.torch_device)
            return _Batch(request, buffer, self._device.event(), self._device.event())
        except Exception as error:  # noqa: BLE001  whatever it is, its request is told
            self._endpoint.fail(request, error)
            return None

    def copy_h2d(self, batch: _Batch) -> None:
        try:
            assert batch.buffer is not None
            pinned = self._device.pin(batch.request.inputs)
            with self._h2d_stream.use():
                self._h2d_stream.keeps(batch.buffer)
                batch.buffer.copy_(pinned, non_blocking=True)
                batch.input_ready.record()
        except Exception as error:  # noqa: BLE001  told in `respond`
            batch.error = error
        finally:
            batch.input_recorded.release()

    def predict(self, model: Model, batch: _Batch) -> None:
        batch.input_recorded.acquire()
        try:
            if batch.error is None:
                self._compute(model, batch)
        except Exception as error:  # noqa: BLE001  told in `respond`
            batch.error = error
        finally:
            batch.buffer = None
            batch.compute_recorded.release()

    def _compute(self, model: Model, batch: _Batch) -> None:
        assert batch.buffer is not None
        worker = self._worker
        batch.request.timeline.worker = worker.number
        worker.stream.wait(batch.input_ready)
        with worker.stream.use():
            worker.stream.keeps(batch.buffer)
            batch.output = forward(model, batch.buffer, batch.request.timeline)
            batch.compute_done.record()

    def respond(self, batch: _Batch) -> None:
        batch.compute_recorded.acquire()
        if batch.error is not None:
            self._endpoint.fail(batch.request, batch.error)
            return
        try:
            output = self._copy_d2h(batch)
        except Exception as error:  # noqa: BLE001  whatever it is, its request is told
            self._endpoint.fail(batch.request, error)
        else:
            self._endpoint.respond(batch.request, output)

    def _copy_d2h(self, batch: _Batch) -> Tensor:
        assert batch.output is not None
        self._d2h_stream.wait(batch.compute_done)
        with self._d2h_stream.use():
            self._d2h_stream.keeps(batch.output)
            return batch.output.cpu()
