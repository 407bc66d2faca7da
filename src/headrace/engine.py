"""The lanes in one's own program: `with Engine(model, example) as engine: engine.infer(batch)`."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headrace.clock import now_ns, seconds
from headrace.config import LanesConfig, Precision
from headrace.errors import EngineStopped
from headrace.model import precision as process_precision
from headrace.model.optimise import (
    ErrorReport,
    Normalise,
    OptimiseConfig,
    measure_error,
    optimise,
    require_accuracy,
)
from headrace.model.signature import FlatModel, Signature, signature_of
from headrace.pipeline.batch import BatchingConfig, powers_of_two
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder, LaneSet
from headrace.runtime.device import open_device
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

ACCURACY_ROWS = 16  # of the example that the error is measured on
LANES = 4
CUDA_DEPTH, HOST_DEPTH = 3, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine serves. `device` is "auto", "cpu", "cuda" or "cuda:N"."""

    device: str = "auto"
    num_lanes: int | None = None  # batches that run side by side; 4 on CUDA, 1 on the host
    max_batch_size: int = 32  # rows; larger requests are split
    buckets: tuple[int, ...] = ()  # batch sizes to prepare the model for; empty: the powers of two up to max_batch_size
    max_queue_delay_us: int = 0  # how long a batch may wait to grow; 0: never while a lane is free
    queue_rows: int | None = None  # rows that wait or run at once; beyond it callers wait
    precision: Precision = "tf32"
    compile: bool = False
    graphs: bool = True
    channels_last: bool = True
    fold_batch_norm: bool = True
    fuse_epilogues: bool = False
    space_to_depth: bool = False
    normalise: Normalise | None = (
        None  # uint8 images [rows, height, width, 3] come in, and are normalised on the device
    )
    check_accuracy: bool = True  # measure the error against float64 at start, and refuse to serve beyond the tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What an engine says of itself once it is ready."""

    form: str  # how the lanes run the model
    applied: tuple[str, ...]  # what was done to the model
    notes: tuple[str, ...]  # what was asked for and could not be had, with the reason
    accuracy: ErrorReport | None
    start_up_s: dict[str, float]  # by part, in order


class Engine:
    """Answers batches with N lanes that share one copy of the weights. Any number of threads may call it.

    `model` is an eager nn.Module in eval mode, on any device; it is copied, never changed. `example_inputs` is a batch
    of 1 row or more as clients will send it: one tensor, a sequence of tensors, or a mapping by the names of the
    model's arguments; rows are the first dimension, and all other dimensions are fixed by it.

    Outputs come back as the model nests them, on the CPU, floating ones as float32. Work begins in `start`, which the
    context manager calls, and which returns when every bucket is compiled, warm and captured.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        config: EngineConfig | None = None,
        **options: Any,  # noqa: ANN401  the fields of EngineConfig, which checks them
    ) -> None:
        self._model = model
        self._example = example_inputs
        self._config = config or EngineConfig(**options)
        self._running: _Running | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def report(self) -> EngineReport:
        """What the lanes are and what was done to the model. Raises EngineStopped before `start`."""
        return self._require().report

    @property
    def signature(self) -> Signature:
        return self._require().signature

    @property
    def recompiles(self) -> int:
        """How often Dynamo has compiled since the engine was ready: 0, if all is well."""
        return self._require().lanes.recompiles()

    def start(self) -> None:
        """Prepare the model and the lanes. Raises ModelError, DeviceUnavailable, InvalidOption."""
        if self._running is None:
            with ExitStack() as stack:
                self._running = _start(self._model, self._example, self._config, stack)
                self._stack = stack.pop_all()

    def stop(self) -> None:
        """Answer what was taken, then end. Safe to call at any time."""
        self._running = None
        self._stack.close()

    def infer(self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """Return the model's outputs for these rows.

        Raises InvalidRequest for tensors that the model does not take, QueueFull without room within `timeout_s`,
        EngineStopped, TimeoutError, or what the model raised on these rows.
        """
        return self.submit(inputs, timeout_s).result(timeout_s)

    def submit(
        self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], timeout_s: float | None = None
    ) -> Future[Any]:
        """Copy the rows in and return a future of the model's outputs. Waits for room, up to `timeout_s`.

        More rows than `max_batch_size` are split, and come back as one. Raises as `infer` does.
        """
        running = self._require()
        tensors = running.signature.flatten(inputs)
        largest = running.batching.max_batch_size
        parts = [[tensor[at : at + largest] for tensor in tensors] for at in range(0, len(tensors[0]), largest)]
        return _Gathered(running.signature, [running.submit(part, timeout_s) for part in parts]).future

    async def infer_async(self, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        """Do what `infer` does, without blocking the event loop while there is no room."""
        future = await asyncio.get_running_loop().run_in_executor(None, self.submit, inputs)
        return await asyncio.wrap_future(future)

    def _require(self) -> _Running:
        if self._running is None:
            raise EngineStopped("the engine is not running; use `with Engine(...) as engine:`, or call start()")
        return self._running


@dataclass(frozen=True, slots=True)
class _Running:
    signature: Signature
    batching: BatchingConfig
    source: LocalSource
    dispatcher: Dispatcher
    lanes: LaneSet
    report: EngineReport

    def submit(self, tensors: Sequence[Tensor], timeout_s: float | None) -> Future[tuple[Tensor, ...]]:
        ticket = self.source.place(tensors, timeout_s)
        ticket.future.set_running_or_notify_cancel()  # from here on it is computed, whoever stops waiting
        try:
            self.dispatcher.submit([ticket])
        except EngineStopped:
            self.source.give_back(ticket)
            raise
        return ticket.future


class _Gathered:
    """One future of several parts: their rows joined in order, or the first error among them."""

    def __init__(self, signature: Signature, parts: Sequence[Future[tuple[Tensor, ...]]]) -> None:
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()
        self._signature = signature
        self._parts = parts
        self._left = len(parts)
        self._lock = threading.Lock()
        for part in parts:
            part.add_done_callback(self._ended)

    def _ended(self, _: Future[tuple[Tensor, ...]]) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        error = next((part.exception() for part in self._parts if part.exception()), None)
        if error is not None:
            self.future.set_exception(error)
            return
        outputs = [part.result() for part in self._parts]
        joined = outputs[0] if len(outputs) == 1 else [torch.cat(pieces) for pieces in zip(*outputs, strict=True)]
        self.future.set_result(self._signature.unflatten(joined))


def _start(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    config: EngineConfig,
    stack: ExitStack,
) -> _Running:
    """Return a running engine that `stack` ends."""
    clock = _Stopwatch()
    device = open_device(_device_name(config.device))
    lanes_config = _lanes_config(config, device.torch_device)
    lanes_config.validate()
    device.start()
    if config.precision in ("float32", "tf32"):
        process_precision.apply(config.precision)
    clock.mark("device context")
    optimised = optimise(model, _optimise_config(config))
    module = optimised.module.to(device.torch_device)
    signature = signature_of(module, _to(example, device.torch_device))
    accuracy = _accuracy(model, module, example, config, device.torch_device)
    clock.mark("model")
    tensors = [tensor.cpu() for tensor in signature.flatten(example)]
    num_lanes = config.num_lanes or (LANES if device.torch_device.type == "cuda" else 1)
    if device.torch_device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_lanes))
    lanes = LaneBuilder(
        model=FlatModel(module, signature.names),
        example=tensors,
        device=device.torch_device,
        num_lanes=num_lanes,
        compile=config.compile,
        config=lanes_config,
        mark=clock.mark,
    ).build()
    stack.callback(lanes.close)
    queue_rows = config.queue_rows or lanes_config.buckets[-1] * num_lanes * (lanes_config.depth + 2)
    source = LocalSource(Layout(rows=queue_rows, inputs=signature.inputs, outputs=signature.outputs), device.register)
    stack.callback(source.close)
    batching = BatchingConfig(buckets=lanes_config.buckets, max_queue_delay_us=config.max_queue_delay_us)
    dispatcher = Dispatcher(lanes.lanes, batching, lanes_config.depth)
    dispatcher.start()
    stack.callback(dispatcher.stop)
    report = EngineReport(
        form=lanes.form,
        applied=optimised.applied,
        notes=(*optimised.skipped, *lanes.notes),
        accuracy=accuracy,
        start_up_s=clock.parts_s,
    )
    return _Running(signature, batching, source, dispatcher, lanes, report)


class _Stopwatch:
    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._last_ns = now_ns()

    def mark(self, name: str) -> None:
        at_ns = now_ns()
        self.parts_s[name] = seconds(at_ns - self._last_ns)
        self._last_ns = at_ns


def _device_name(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _lanes_config(config: EngineConfig, device: torch.device) -> LanesConfig:
    on_cuda = device.type == "cuda"
    return LanesConfig(
        buckets=config.buckets or powers_of_two(config.max_batch_size),
        max_queue_delay_us=config.max_queue_delay_us,
        depth=CUDA_DEPTH if on_cuda else HOST_DEPTH,
        graphs=config.graphs,
    )


def _optimise_config(config: EngineConfig) -> OptimiseConfig:
    return OptimiseConfig(
        precision=config.precision,
        channels_last=config.channels_last,
        fold_batch_norm=config.fold_batch_norm,
        fuse_epilogues=config.fuse_epilogues,
        space_to_depth=config.space_to_depth,
        normalise=config.normalise,
    )


def _accuracy(
    reference: nn.Module,
    module: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    config: EngineConfig,
    device: torch.device,
) -> ErrorReport | None:
    """Measure the error on the example's first rows. Raises ModelError if it is beyond the precision's tolerance."""
    if not config.check_accuracy:
        return None
    few = _to(example, device, rows=ACCURACY_ROWS)
    inputs = (few,) if isinstance(few, torch.Tensor) else few
    there = copy.deepcopy(reference).to(device)  # the caller's own stays where it is
    report = measure_error(module, there, inputs, normalise=config.normalise)
    require_accuracy(report, config.precision)
    return report


def _to(
    given: Tensor | Sequence[Tensor] | Mapping[str, Tensor], device: torch.device, rows: int | None = None
) -> Tensor | Sequence[Tensor] | Mapping[str, Tensor]:
    if isinstance(given, torch.Tensor):
        return given[:rows].to(device)
    if isinstance(given, Mapping):
        return {name: tensor[:rows].to(device) for name, tensor in given.items()}
    return [tensor[:rows].to(device) for tensor in given]
