"""The ring: requests and answers in shared memory that is made once, registered with the device once, and used again.

Against the published queue it saves, per request, new shared memory with its cold pages, pinning, pickling,
and passing a file descriptor. The client copies a batch into a slot, and that is the last copy the host
makes: the backend's copy to the GPU reads the slot itself. The memory has no name: it is passed as a
descriptor and dies with its last holder.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from mmap import MAP_POPULATE, MAP_SHARED, mmap
from typing import TYPE_CHECKING

import torch

from headrace.clock import now_ns
from headrace.errors import TransportFailed
from headrace.processes import describe
from headrace.request import Request, Response, Timeline
from headrace.transport.descriptors import (
    ANSWER,
    CLOSE,
    ERROR,
    MAX_DIMENSIONS,
    REQUEST,
    Descriptor,
    DescriptorRing,
    require_ordered_memory,
)

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.transport.layout import Layout
    from headrace.transport.pair import RingPair

POLL_S = 1.0  # how often a waiting backend looks up; the supervisor ends it when its peer is gone
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)


class _Mapped:
    """A process's view of the ring's memory."""

    def __init__(self, pair: RingPair) -> None:
        require_ordered_memory()
        self.layout: Layout = pair.layout
        self.memory = mmap(pair.memory_fd, self.layout.total_bytes, MAP_SHARED | MAP_POPULATE)
        entries = self.layout.entries
        self.requests = DescriptorRing(self.memory, self.layout.ring_offset(0), entries, pair.wake_backend_fd)
        self.responses = DescriptorRing(self.memory, self.layout.ring_offset(1), entries, pair.wake_client_fd)
        self._bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the shared memory itself."""
        size = math.prod(shape) * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).view(shape)

    def slots_memory(self) -> Tensor:
        """Return all slots as bytes, page-aligned."""
        return self._bytes[self.layout.slots_offset :]


def _require_room(what: str, tensor: Tensor, room: int) -> None:
    if tensor.nbytes > room:
        raise TransportFailed(f"{what} has {tensor.nbytes} bytes, and a slot of this ring holds {room}")
    if tensor.ndim > MAX_DIMENSIONS or tensor.dtype not in DTYPES:
        raise TransportFailed(
            f"{what} is {tensor.dtype} with {tensor.ndim} dimensions; the ring carries at most {MAX_DIMENSIONS}"
            f" dimensions of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
        )


class RingClient:
    """The client's side: it owns the slots, leases one per request, and gets it back with the answer."""

    def __init__(self, pair: RingPair) -> None:
        self._mapped = _Mapped(pair)
        self._free = list(range(pair.layout.slots))
        self._lock = threading.Lock()

    def send(self, index: int, batch: Tensor) -> None:
        """Copy a batch into a free slot and hand it over. Raises TransportFailed if it does not fit or none is free.

        A sender that keeps no more requests in flight than there are slots always finds one.
        """
        _require_room("the request", batch, self._mapped.layout.input_bytes)
        slot = self._lease()
        self._mapped.view(self._mapped.layout.input_offset(slot), tuple(batch.shape), batch.dtype).copy_(batch)
        dtype = DTYPES.index(batch.dtype)
        self._mapped.requests.put(Descriptor(index, REQUEST, slot, dtype, tuple(batch.shape)))

    def receive(self, timeout_s: float) -> Response | None:
        """Return the next response, its output in memory of its own, or None after `timeout_s` without one."""
        told = self._mapped.responses.take(timeout_s)
        if told is None:
            return None
        data = self._mapped.view(self._mapped.layout.output_offset(told.slot), told.shape, DTYPES[told.dtype])
        output, error = (
            (data.clone(), None) if told.kind == ANSWER else (None, data.numpy().tobytes().decode(errors="replace"))
        )
        with self._lock:
            self._free.append(told.slot)
        return Response(told.index, Timeline(*told.times_ns, told.worker), output, error)

    def close(self) -> None:
        """Tell the backend that no request will follow."""
        self._mapped.requests.put(Descriptor(-1, CLOSE))

    def _lease(self) -> int:
        with self._lock:
            if not self._free:
                raise TransportFailed(
                    f"all {self._mapped.layout.slots} slots of the ring are in use; send again when an answer has come"
                )
            return self._free.pop()


class RingEndpoint:
    """The backend's side. Several threads may answer at the same time.

    `register` is told the slots' memory once (uint8, page-aligned), to make it known to the device.
    """

    def __init__(self, pair: RingPair, register: Callable[[Tensor], None]) -> None:
        self._mapped = _Mapped(pair)
        register(self._mapped.slots_memory())

    def requests(self) -> Iterator[Request]:
        """Yield requests in order of arrival, their inputs in the slots themselves, until the client closes."""
        while True:
            told = self._mapped.requests.take(POLL_S)
            if told is None:
                continue
            if told.kind == CLOSE:
                return
            inputs = self._mapped.view(self._mapped.layout.input_offset(told.slot), told.shape, DTYPES[told.dtype])
            request = Request(told.index, inputs, told.slot)
            request.timeline.received_ns = now_ns()
            yield request

    def respond(self, request: Request, output: Tensor) -> None:
        """Answer with `output`, [rows, *features] on the CPU, copied into the request's slot."""
        try:
            _require_room("the answer", output, self._mapped.layout.output_bytes)
        except TransportFailed as error:
            self.fail(request, error)
            return
        shape = tuple(output.shape)
        self._mapped.view(self._mapped.layout.output_offset(request.slot), shape, output.dtype).copy_(output)
        self._answer(request, Descriptor(request.index, ANSWER, request.slot, DTYPES.index(output.dtype), shape))

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error, so that nobody waits for this request for ever."""
        text = describe(error).encode()[: self._mapped.layout.output_bytes]
        offset = self._mapped.layout.output_offset(request.slot)
        self._mapped.memory[offset : offset + len(text)] = text
        self._answer(request, Descriptor(request.index, ERROR, request.slot, DTYPES.index(torch.uint8), (len(text),)))

    def _answer(self, request: Request, descriptor: Descriptor) -> None:
        line = request.timeline
        line.responded_ns = now_ns()
        descriptor.times_ns = (line.received_ns, line.started_ns, line.computed_ns, line.responded_ns)
        descriptor.worker = line.worker
        self._mapped.responses.put(descriptor)
