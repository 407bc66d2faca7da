"""Our own design: N lanes share one copy of the weights, each a stream with graphs made before it serves.

Over the ring, a request's rows lie in memory that the device reads itself, and the backend touches no payload. Over the
queue, the published transport, each batch is copied from its fresh shared memory into rows of a table of our own.

As in the other designs, the model is loaded when the first request has come, so that the warm-up latency contains it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from headrace.config import LanesConfig, Precision
from headrace.errors import HeadraceError, ModelError
from headrace.model.optimise import Normalise, optimise, tolerance
from headrace.model.signature import FlatModel
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder, LaneSet, batching_config, optimise_config, stand_in
from headrace.request import Request, Ticket
from headrace.tensors import TensorSpec
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import Layout
from headrace.transport.ring import POLL_S, RingEndpoint

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from torch import Tensor

    from headrace.designs.base import Endpoint, Model
    from headrace.runtime.device import Device


EXAMPLE_ROWS = 8  # of noise, repeated to fill the largest bucket


@dataclass(frozen=True, slots=True)
class LanesDesign:
    """`num_lanes` lanes. After `serve`, `report` has what the lanes say of themselves."""

    num_lanes: int
    config: LanesConfig
    compile: bool
    precision: Precision
    normalise: Normalise | None  # of uint8 images
    keep: Path | None  # folder of compiled programs
    mark: Callable[[str], None]
    report: list[str]
    # Called when the last request has been answered, with the bytes of a row in and out.
    on_idle: Callable[[LaneSet, int, int], None] = lambda _lanes, _row, _answer: None

    def serve(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        """See `Design.serve`."""
        if isinstance(endpoint, RingEndpoint):
            self._serve_ring(endpoint, device, load_model)
        else:
            self._serve_queue(endpoint, device, load_model)

    def _serve_ring(self, endpoint: RingEndpoint, device: Device, load_model: Callable[[], Model]) -> None:
        first: Sequence[Ticket] | None = ()
        while not first:
            first = endpoint.take(POLL_S)
            if first is None:
                return
        rows = slice(first[0].first_row, first[0].first_row + first[0].rows)
        example = [each[rows] for each in endpoint.table.inputs]
        with ExitStack() as stack:
            dispatcher = self._build(stack, load_model(), example, endpoint.table.layout, device)
            dispatcher.submit(first)
            dispatcher.answer(endpoint, spin=self.config.spin and device.torch_device.type == "cuda")

    def _serve_queue(self, endpoint: Endpoint, device: Device, load_model: Callable[[], Model]) -> None:
        with ExitStack() as stack:
            relay: _Relay | None = None
            for request in endpoint.requests():
                if relay is None:
                    relay = self._relay(stack, endpoint, request, device, load_model)
                relay.send(request)

    def _relay(
        self,
        stack: ExitStack,
        endpoint: Endpoint,
        request: Request,
        device: Device,
        load_model: Callable[[], Model],
    ) -> _Relay:
        model = load_model()
        with torch.no_grad():
            output = model(stand_in(request.inputs[:1]).to(device.torch_device))
        if not isinstance(output, torch.Tensor):
            raise ModelError(f"the model returned {type(output).__name__}; the benchmark's must return one tensor")
        features = tuple(request.inputs.shape[1:])
        layout = Layout(
            rows=self.config.buckets[-1] * self.num_lanes * (self.config.depth + 1),
            inputs=(TensorSpec(name="input", dtype="float32", features=features),),
            outputs=(TensorSpec(name="output", dtype="float32", features=tuple(output.shape[1:])),),
        )
        source = LocalSource(layout, device.register)
        stack.callback(source.close)
        return _Relay(endpoint, source, self._started(stack, model, request, layout, device))

    def _started(self, stack: ExitStack, model: Model, request: Request, layout: Layout, device: Device) -> Dispatcher:
        dispatcher = self._build(stack, model, [request.inputs], layout, device)
        dispatcher.start()
        stack.callback(dispatcher.stop)
        return dispatcher

    def _build(
        self, stack: ExitStack, model: Model, example: Sequence[Tensor], layout: Layout, device: Device
    ) -> Dispatcher:
        """Return a dispatcher of lanes that are ready, and that `stack` will close when it has been stopped."""
        assert isinstance(model, nn.Module)
        optimised = optimise(model, optimise_config(self.config, self.precision, self.normalise, device.torch_device))
        self.mark("optimise")
        lanes = LaneBuilder(
            model=FlatModel(optimised.module, None),
            example=[
                stand_in(tensor[:EXAMPLE_ROWS]) for tensor in example
            ],  # the first request may be one that the model fails on
            device=device.torch_device,
            num_lanes=self.num_lanes,
            compile=self.compile,
            config=self.config,
            mark=self.mark,
            keep=self.keep,
            tolerance=tolerance(self.precision),
        ).build()
        stack.callback(self._finish, lanes, optimised.skipped, layout)
        gc.collect()
        gc.freeze()  # what was made up to here is never looked at again: a full collection would stop the loop
        return Dispatcher(lanes.lanes, batching_config(self.config), self.config.depth)

    def _finish(self, lanes: LaneSet, skipped: Sequence[str], layout: Layout) -> None:
        self.report.extend((f"lanes: {lanes.form}", *lanes.notes, *skipped))
        self.report.append(f"recompiles while serving: {lanes.recompiles()}")
        row_bytes, answer_bytes = (sum(spec.row_bytes for spec in specs) for specs in (layout.inputs, layout.outputs))
        self.on_idle(lanes, row_bytes, answer_bytes)
        lanes.close()


class _Relay:
    """Takes the queue's requests into rows of our own, and their answers back."""

    def __init__(self, endpoint: Endpoint, source: LocalSource, dispatcher: Dispatcher) -> None:
        self._endpoint = endpoint
        self._source = source
        self._dispatcher = dispatcher

    def send(self, request: Request) -> None:
        try:
            ticket = self._source.place([request.inputs], None)
        except HeadraceError as error:
            self._endpoint.fail(request, error)
            return

        def answer(future: Future[tuple[Tensor, ...]]) -> None:
            line = request.timeline
            line.started_ns, line.computed_ns, line.worker = ticket.started_ns, ticket.computed_ns, ticket.lane
            error = future.exception()
            if error is None:
                self._endpoint.respond(request, future.result()[0])
            else:
                self._endpoint.fail(request, error if isinstance(error, Exception) else ModelError(str(error)))

        ticket.future.add_done_callback(answer)
        self._dispatcher.submit_or_tell([ticket])
