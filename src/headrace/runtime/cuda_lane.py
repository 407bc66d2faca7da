"""Lanes on CUDA: a stream with static buffers, and graphs per bucket that are made before serving. Nothing is allocated later.

Copies in, model and copies out of a batch all go to the lane's own stream: what overlaps are the lanes. Rows that lie
together are one graph launch (`SlotGraph`); rows gathered from several places are copied segment by segment around the
model's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, cast

import torch

from headrace.runtime.cuda import BlockingEvent, SlotGraph, check, runtime
from headrace.tensors import row_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.request import Batch
    from headrace.runtime.host_lane import FlatModel


@dataclass(frozen=True, slots=True)
class Captured:
    """One bucket of one lane. torch's graph owns the memory that the others use, and must live as long."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]  # static, [bucket, *features]
    whole: SlotGraph  # with the copies of one segment
    model: object  # cudaGraphExec_t, the model alone


class CudaLane:
    """One stream, its buffers and graphs. `scratch` is registered host memory, as large as the largest bucket of any tensor."""

    def __init__(self, inputs: Sequence[Tensor], scratch: int, depth: int, *, spin: bool) -> None:
        self._cuda = runtime()
        self._inputs = inputs  # static, [largest bucket, *features], on the device
        self._scratch = scratch
        self._stream = torch.cuda.Stream(inputs[0].device)
        self._handle = self._cuda.cudaStream_t(self._stream.cuda_stream)
        self._captured: dict[int, Captured] = {}
        # One more than may be launched: an event is used again only after its batch has been waited for.
        self._events = cycle([BlockingEvent(spin=spin) for _ in range(depth + 1)])

    def capture(self, model: FlatModel, bucket: int, marks: Sequence[BlockingEvent] = ()) -> None:
        """Warm up and capture one bucket, on the calling thread, while no other thread uses CUDA. Raises what torch does.

        cuDNN's plans are per thread, and a graph of another lane must never share this one's memory pool. Source:
        PyTorch docs, CUDA semantics, "Graph memory management".
        """
        inputs = [tensor[:bucket] for tensor in self._inputs]
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        pool = next((each.graph.pool() for each in self._captured.values()), None)
        with torch.cuda.stream(self._stream), torch.no_grad():
            model(*inputs)
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = model(*inputs)
        raw = graph.raw_cuda_graph()
        whole = SlotGraph(raw, inputs, outputs, self._scratch, marks)
        alone = check(self._cuda.cudaGraphInstantiate(self._cuda.cudaGraph_t(raw), 0))
        self._captured[bucket] = Captured(graph, outputs, whole, alone)

    def replay(self, bucket: int) -> None:
        """See `wiring.RawLane`."""
        check(self._cuda.cudaGraphLaunch(self._captured[bucket].model, self._handle))

    def synchronize(self) -> None:
        """See `wiring.RawLane`."""
        self._stream.synchronize()

    def launch(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        captured = self._captured[batch.bucket]
        if len(batch.segments) == 1:
            segment = batch.segments[0]
            table, first = segment.table, segment.first_row
            captured.whole.launch(
                self._handle, batch.rows, table.input_addresses(first), table.output_addresses(first)
            )
        else:
            self._launch_gathered(batch, captured)
        event = next(self._events)
        event.record(self._handle)
        batch.token = event

    def wait(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        cast("BlockingEvent", batch.token).synchronize()

    def close(self) -> None:
        """Wait for what is under way. The graphs go with the lane."""
        self._stream.synchronize()

    def _launch_gathered(self, batch: Batch, captured: Captured) -> None:
        for host, device, size in self._pieces(batch, self._inputs, inputs=True):
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
            check(self._cuda.cudaMemcpyAsync(device, host, size, kind, self._handle))
        check(self._cuda.cudaGraphLaunch(captured.model, self._handle))
        for host, device, size in self._pieces(batch, captured.outputs, inputs=False):
            kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
            check(self._cuda.cudaMemcpyAsync(host, device, size, kind, self._handle))

    def _pieces(self, batch: Batch, tensors: Sequence[Tensor], *, inputs: bool) -> list[tuple[int, int, int]]:
        """Return (host address, device address, bytes) of every segment of every tensor."""
        pieces = []
        at = 0
        for segment in batch.segments:
            table = segment.table
            hosts = table.input_addresses(segment.first_row) if inputs else table.output_addresses(segment.first_row)
            for host, tensor in zip(hosts, tensors, strict=True):
                size = row_bytes(tensor)
                pieces.append((host, tensor.data_ptr() + at * size, segment.rows * size))
            at += segment.rows
        return pieces


class EagerCudaLane:
    """For models that cannot be captured: the same stream and buffers, the model called for every batch.

    `run` calls the model, under a lock that all lanes share where it is compiled, since Dynamo is not thread-safe.
    """

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], *, spin: bool) -> None:
        self._run = run
        self._inputs = inputs
        self._stream = torch.cuda.Stream(inputs[0].device)
        self._spin = spin

    def launch(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            at = 0
            for segment in batch.segments:
                for buffer, table_input in zip(self._inputs, segment.table.inputs, strict=True):
                    place = table_input[segment.first_row : segment.first_row + segment.rows]
                    buffer[at : at + segment.rows].copy_(place, non_blocking=True)
                at += segment.rows
            outputs = self._run(*(buffer[: batch.bucket] for buffer in self._inputs))
            self._copy_out(batch, outputs)
            event = torch.cuda.Event(blocking=not self._spin)
            event.record()
        batch.token = (event, outputs)  # the outputs live until the copies are done

    def wait(self, batch: Batch) -> None:
        """See `dispatch.Lane`."""
        event, _ = cast("tuple[torch.cuda.Event, object]", batch.token)
        event.synchronize()

    def replay(self, bucket: int) -> None:
        """See `wiring.RawLane`."""
        with torch.cuda.stream(self._stream), torch.no_grad():
            self._run(*(buffer[:bucket] for buffer in self._inputs))

    def synchronize(self) -> None:
        """See `wiring.RawLane`."""
        self._stream.synchronize()

    def close(self) -> None:
        self._stream.synchronize()

    def _copy_out(self, batch: Batch, outputs: Sequence[Tensor]) -> None:
        at = 0
        for segment in batch.segments:
            for output, table_output in zip(outputs, segment.table.outputs, strict=True):
                place = table_output[segment.first_row : segment.first_row + segment.rows]
                place.copy_(output[at : at + segment.rows], non_blocking=True)
            at += segment.rows
