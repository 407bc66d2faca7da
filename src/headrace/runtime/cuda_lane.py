"""Lanes on CUDA: a stream, and slots with static buffers and graphs, all made before serving.

Nothing is allocated while serving. A lane runs its batches in order; the lanes run side by side. Each of a lane's
slots has input buffers of its own, so the next batch is copied in while the lane still computes. Small batches are
one graph launch, copies and all (`SlotGraph`); large ones are copied in on a stream that all lanes share: copies of
one direction serialise anyway, and in one queue they follow each other without a gap, however the lanes' work falls
together. Measured on an H100 without that stream: eight lanes fell into step, copying all at once and then computing
all at once, and served 0.86 of what the model alone could (batch 32, bf16).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from headrace.runtime.cuda import BlockingEvent, SlotGraph, check, runtime
from headrace.runtime.host_lane import require_rows
from headrace.tensors import row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.request import Batch
    from headrace.runtime.host_lane import FlatModel

WHOLE_BYTES = 2 << 20  # inputs up to this size are copied in by the lane's own graph: fewer calls


@dataclass(frozen=True, slots=True)
class Captured:
    """One bucket of one slot. torch's graph owns the memory that the others use, and must live as long."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]  # static, [bucket, *features]
    whole: SlotGraph  # copies in, model, copies out
    tail: SlotGraph  # model, copies out
    model: object  # cudaGraphExec_t, the model alone


@dataclass(slots=True)
class Slot:
    """Room for one batch."""

    inputs: Sequence[Tensor]  # static, [largest bucket, *features], on the device
    ready: BlockingEvent  # the copies in are done
    done: BlockingEvent  # all is done
    captured: dict[int, Captured] = field(default_factory=dict)


class CopyStream:
    """The stream on which all lanes' large batches are copied to the device, in the order of their launch."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.handle = runtime().cudaStream_t(self._stream.cuda_stream)


class CudaLane:
    """One stream and its slots, each given by its static inputs, [largest bucket, *features], on the device."""

    def __init__(self, slots: Sequence[Sequence[Tensor]], copies: CopyStream | None, *, spin: bool) -> None:
        self._cuda = runtime()
        self._slots = [Slot(inputs, BlockingEvent(spin=spin), BlockingEvent(spin=spin)) for inputs in slots]
        self._free = deque(self._slots)
        self._scratch: list[Tensor] = []  # kept: graphs hold their addresses
        self._stream = torch.cuda.Stream(slots[0][0].device)
        self._handle = self._cuda.cudaStream_t(self._stream.cuda_stream)
        self._copies = copies
        self._row_bytes = sum(row_bytes(tensor) for tensor in slots[0])

    def capture(self, model: FlatModel, bucket: int) -> None:
        """Warm up and capture one bucket, on the calling thread, while no other uses CUDA. Raises what torch does.

        cuDNN's plans are per thread, and a graph of another lane must never share this one's memory pool. Source:
        PyTorch docs, CUDA semantics, "Graph memory management".
        """
        for slot in self._slots:
            slot.captured[bucket] = self._captured(model, [tensor[:bucket] for tensor in slot.inputs])

    def replay(self, bucket: int) -> None:
        """See `wiring.RawLane`."""
        check(self._cuda.cudaGraphLaunch(self._slots[0].captured[bucket].model, self._handle))

    def synchronize(self) -> None:
        """See `wiring.RawLane`."""
        self._stream.synchronize()

    def launch(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        slot = self._free.popleft()
        batch.token = slot
        captured = slot.captured[batch.bucket]
        alone = len(batch.segments) == 1
        table, first = batch.segments[0].table, batch.segments[0].first_row
        if alone and (self._copies is None or batch.rows * self._row_bytes <= WHOLE_BYTES):
            inputs, outputs = table.input_addresses(first), table.output_addresses(first)
            captured.whole.launch(self._handle, batch.rows, inputs, outputs)
        else:
            self._copy_in(batch, slot)
            if alone:
                captured.tail.launch(self._handle, batch.rows, (), table.output_addresses(first))
            else:
                check(self._cuda.cudaGraphLaunch(captured.model, self._handle))
                self._copy_out(batch, captured.outputs)
        slot.done.record(self._handle)

    def done(self, batch: Batch) -> bool:
        """See `dispatch.Lane`."""
        return cast("Slot", batch.token).done.passed()

    def wait(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        slot = cast("Slot", batch.token)
        try:
            slot.done.synchronize()
        finally:
            self._free.append(slot)

    def close(self) -> None:
        """Wait for what is under way. The graphs go with the lane."""
        self._stream.synchronize()

    def _captured(self, model: FlatModel, inputs: Sequence[Tensor]) -> Captured:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        pool = next((each.graph.pool() for slot in self._slots for each in slot.captured.values()), None)
        with torch.cuda.stream(self._stream), torch.no_grad():
            model(*inputs)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = model(*inputs)
        require_rows(outputs, len(inputs[0]))
        raw = graph.raw_cuda_graph()
        host = self._scratch_for([*inputs, *outputs])
        return Captured(
            graph,
            outputs,
            whole=SlotGraph(raw, inputs, outputs, host),
            tail=SlotGraph(raw, (), outputs, host),
            model=check(self._cuda.cudaGraphInstantiate(self._cuda.cudaGraph_t(raw), 0)),
        )

    def _scratch_for(self, tensors: Sequence[Tensor]) -> int:
        """Return the address of pinned memory that holds any of these: it stands in a graph until its first launch."""
        size = max(tensor.nbytes for tensor in tensors)
        if not self._scratch or self._scratch[-1].nbytes < size:
            self._scratch.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        return self._scratch[-1].data_ptr()

    def _copy_in(self, batch: Batch, slot: Slot) -> None:
        stream = self._copies.handle if self._copies else self._handle
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for segment, rows in batch.pieces():
            hosts = segment.table.input_addresses(segment.first_row)
            for host, tensor in zip(hosts, slot.inputs, strict=True):
                size = row_bytes(tensor)
                device = tensor.data_ptr() + rows.start * size
                check(self._cuda.cudaMemcpyAsync(device, host, segment.rows * size, kind, stream))
        if self._copies:
            slot.ready.record(stream)
            check(self._cuda.cudaStreamWaitEvent(self._handle, slot.ready.handle, 0))

    def _copy_out(self, batch: Batch, outputs: Sequence[Tensor]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for segment, rows in batch.pieces():
            hosts = segment.table.output_addresses(segment.first_row)
            for host, tensor in zip(hosts, outputs, strict=True):
                size = row_bytes(tensor)
                device = tensor.data_ptr() + rows.start * size
                check(self._cuda.cudaMemcpyAsync(host, device, segment.rows * size, kind, self._handle))


class EagerCudaLane:
    """For models that cannot be captured: a stream, buffers, and the model called for every batch.

    `run` calls the model, under a lock that all lanes share where it is compiled, since Dynamo is not thread-safe.
    """

    def __init__(self, run: FlatModel, inputs: Sequence[Tensor], *, spin: bool) -> None:
        self._run = run
        self._inputs = inputs
        self._stream = torch.cuda.Stream(inputs[0].device)
        self._spin = spin

    def replay(self, bucket: int) -> None:
        """See `wiring.RawLane`."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._run(*(buffer[:bucket] for buffer in self._inputs))

    def synchronize(self) -> None:
        """See `wiring.RawLane`."""
        self._stream.synchronize()

    def launch(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            for segment, rows in batch.pieces():
                for buffer, table_input in zip(self._inputs, segment.table.inputs, strict=True):
                    buffer[rows].copy_(table_input[segment.slice], non_blocking=True)
            outputs = self._run(*(buffer[: batch.bucket] for buffer in self._inputs))
            require_rows(outputs, batch.bucket)
            for segment, rows in batch.pieces():
                for output, table_output in zip(outputs, segment.table.outputs, strict=True):
                    table_output[segment.slice].copy_(output[rows], non_blocking=True)
            event = torch.cuda.Event(blocking=not self._spin)
            event.record()
        batch.token = (event, outputs)  # the outputs live until the copies are done

    def done(self, batch: Batch) -> bool:
        """See `dispatch.Lane`."""
        event, _ = cast("tuple[torch.cuda.Event, object]", batch.token)
        return bool(event.query())

    def wait(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        event, _ = cast("tuple[torch.cuda.Event, object]", batch.token)
        event.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
