"""An engine for one's own program, put together: the model made ready, lanes for every shape, a way in for callers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.config import LanesConfig, Precision, Stem
from headrace.errors import EngineStopped
from headrace.model import precision as process_precision
from headrace.model.optimise import (
    ErrorReport,
    Normalise,
    accuracy_rows,
    measure_error,
    optimise,
    require_accuracy,
    tolerance,
)
from headrace.model.shapes import DynamicDim, cut, dynamic_outputs, require_padding_is_ignored
from headrace.model.signature import FlatModel, Signature, signature_of
from headrace.pipeline.batch import powers_of_two
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder, LaneSet, batching_config, keep_compiled_code, optimise_config
from headrace.runtime.device import divide_cpus, open_device
from headrace.transport.inprocess import LocalSource
from headrace.transport.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.model.signature import Inputs
    from headrace.runtime.device import Device

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
    precision: Precision = "tf32"  # "int8" and "fp8" need the extra `quantised`
    compile: bool = False
    compile_cache: Path | None = None  # folder where compiled code is kept for the next start; None: PyTorch's own
    depth: int | None = None  # batches that a lane has at once, running and queued; 3 on CUDA, 2 on the host
    prefetch: bool = True  # large batches are copied in on a stream of their own, ahead of the lanes
    spin: bool = True  # wait for the device with a busy core, which answers sooner than an interrupt
    graphs: bool = True
    channels_last: bool = True
    fold_batch_norm: bool = True
    # None and "auto": where it pays, which is in 16 bit on a GPU.
    fuse_epilogues: bool | None = None
    stem: Stem = "auto"
    pointwise_as_matmul: bool | None = None
    normalise: Normalise | None = (
        None  # uint8 images [rows, height, width, 3] come in, and are normalised on the device
    )
    dynamic: DynamicDim | None = None  # a further dimension that differs from request to request
    check_accuracy: bool = True  # measure the error against float64 at start, and refuse to serve beyond the tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What an engine says of itself once it is ready."""

    form: str  # how the lanes run the model
    applied: tuple[str, ...]  # what was done to the model
    notes: tuple[str, ...]  # what was asked for and could not be had, with the reason
    accuracy: ErrorReport | None
    start_up_s: dict[str, float]  # by part, in order


@dataclass(frozen=True, slots=True)
class _Lanes:
    """Running lanes for inputs of one fixed shape."""

    signature: Signature
    source: LocalSource
    dispatcher: Dispatcher
    lanes: LaneSet

    def submit(self, tensors: Sequence[Tensor], timeout_s: float | None) -> Future[tuple[Tensor, ...]]:
        ticket = self.source.place(tensors, timeout_s)
        if timeout_s is not None:
            ticket.deadline_ns = ticket.received_ns + int(timeout_s * NS_PER_S)
        try:
            self.dispatcher.submit([ticket])
        except EngineStopped:
            self.source.give_back(ticket)
            raise
        return ticket.future


class _Gathered:
    """One future of several parts: their rows joined in order and finished, or the first error among them."""

    def __init__(
        self, parts: Sequence[Future[tuple[Tensor, ...]]], finish: Callable[[Sequence[Tensor]], object]
    ) -> None:
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()
        self._finish = finish
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
        self.future.set_result(self._finish(joined))


@dataclass(frozen=True, slots=True)
class Running:
    """What a started engine is made of: lanes for every size of the dynamic dimension, one set where there is none."""

    by_size: Mapping[int, _Lanes]
    dynamic: DynamicDim | None
    dynamic_outputs: Sequence[int | None]  # which dimension of each output follows the dynamic one
    max_batch_size: int
    report: EngineReport

    @property
    def signature(self) -> Signature:
        """What goes in and comes out; of the smallest size where a dimension is dynamic."""
        return next(iter(self.by_size.values())).signature

    def failure(self) -> Exception | None:
        """Return why nothing can be computed any more; None while all is well."""
        failures = (lanes.dispatcher.failure for lanes in self.by_size.values())
        return next((failure for failure in failures if failure is not None), None)

    def recompiles(self) -> int:
        """Return how often Dynamo has compiled since all lanes were ready."""
        return list(self.by_size.values())[-1].lanes.recompiles()

    def submit(self, inputs: Inputs, timeout_s: float | None) -> Future[Any]:
        """See `Engine.submit`."""
        lanes = next(iter(self.by_size.values()))
        signature, size = lanes.signature, 0
        if self.dynamic is not None:
            named = signature.named(inputs)
            size = self.dynamic.size_of(named)
            lanes = self.by_size[self.dynamic.padded_size(size)]
            signature = lanes.signature
            inputs = list(self.dynamic.pad(named, self.dynamic.padded_size(size)).values())
        tensors = signature.flatten(inputs)
        rows = range(0, len(tensors[0]), self.max_batch_size)
        parts = [[tensor[at : at + self.max_batch_size] for tensor in tensors] for at in rows]

        def finish(outputs: Sequence[Tensor]) -> object:
            return signature.unflatten(cut(outputs, self.dynamic_outputs, size) if self.dynamic else outputs)

        return _Gathered([lanes.submit(part, timeout_s) for part in parts], finish).future


def start(model: nn.Module, example: Inputs, config: EngineConfig, stack: ExitStack) -> Running:
    """Return a running engine that `stack` ends. Raises ModelError, InvalidOption, DeviceUnavailable."""
    clock = _Stopwatch()
    if config.dynamic is not None:
        config.dynamic.validate()
    device = open_device(_device_name(config.device))
    keep_compiled_code(config.compile_cache)
    lanes_config = _lanes_config(config, device.torch_device)
    lanes_config.validate()
    device.start()
    if config.precision in ("float32", "tf32"):
        process_precision.apply(config.precision)
    clock.mark("device context")
    how = optimise_config(lanes_config, config.precision, config.normalise, device.torch_device)
    optimised = optimise(model, how, device.torch_device)
    module = optimised.module
    shapes = _shapes(module, example, config, device.torch_device)
    accuracy = _accuracy(model, module, example, config, device.torch_device)
    clock.mark("model")
    starter = _Starter(module, config, lanes_config, device, clock, stack)
    by_size = {size: starter.start(signature, inputs) for size, (signature, inputs) in shapes.inputs.items()}
    forms = [lanes.lanes.form for lanes in by_size.values()]
    report = EngineReport(
        form=" and ".join(dict.fromkeys(forms)),
        applied=optimised.applied,
        notes=(*optimised.skipped, *dict.fromkeys(note for lanes in by_size.values() for note in lanes.lanes.notes)),
        accuracy=accuracy,
        start_up_s=clock.parts_s,
    )
    return Running(by_size, config.dynamic, shapes.dynamic_outputs, lanes_config.buckets[-1], report)


@dataclass(frozen=True, slots=True)
class _Shapes:
    """What the lanes are made for: by size, a signature and example inputs on the host."""

    inputs: dict[int, tuple[Signature, list[Tensor]]]
    dynamic_outputs: Sequence[int | None]


def _shapes(module: nn.Module, example: Inputs, config: EngineConfig, device: torch.device) -> _Shapes:
    """Return every shape to prepare for. Raises ModelError if the answers depend on padding."""
    there = _to(example, device)
    base = signature_of(module, there)
    if config.dynamic is None:
        return _Shapes({0: (base, [tensor.cpu() for tensor in base.flatten(example)])}, [None] * len(base.outputs))
    dynamic, named = config.dynamic, base.named(there)
    size = dynamic.size_of(named)
    inputs = {}
    for larger in dynamic.sizes:
        tensors = _resized(named, dynamic, size, larger)
        signature = signature_of(module, tensors if base.keyword else list(tensors.values()))
        inputs[larger] = (signature, [tensor.cpu() for tensor in tensors.values()])
    smallest, largest = dynamic.sizes[0], dynamic.sizes[-1]
    follow: list[int | None] = [None] * len(base.outputs)
    if smallest != largest:
        follow = dynamic_outputs(inputs[smallest][0].outputs, inputs[largest][0].outputs, (smallest, largest))
    elif size != smallest:
        follow = dynamic_outputs(base.outputs, inputs[smallest][0].outputs, (size, smallest))
    require_padding_is_ignored(FlatModel(module, base.names), named, dynamic, follow, tolerance(config.precision))
    return _Shapes(inputs, follow)


def _resized(named: Mapping[str, Tensor], dynamic: DynamicDim, size: int, wanted: int) -> dict[str, Tensor]:
    """Return the example cut or padded to a size."""
    if size <= wanted:
        return dynamic.pad(named, wanted)
    return {
        name: tensor.narrow(dynamic.dims[name], 0, wanted).contiguous() if name in dynamic.dims else tensor
        for name, tensor in named.items()
    }


@dataclass(frozen=True, slots=True)
class _Starter:
    """Starts lanes that share the module's weights."""

    module: nn.Module
    config: EngineConfig
    lanes_config: LanesConfig
    device: Device
    clock: _Stopwatch
    stack: ExitStack

    def start(self, signature: Signature, example: Sequence[Tensor]) -> _Lanes:
        """Return running lanes for one shape, which the stack ends."""
        device, largest = self.device.torch_device, self.lanes_config.buckets[-1]
        num_lanes = self.config.num_lanes or (LANES if device.type == "cuda" else 1)
        divide_cpus(self.device, num_lanes)
        lanes = LaneBuilder(
            model=FlatModel(self.module, signature.names),
            example=example,
            device=device,
            num_lanes=num_lanes,
            compile=self.config.compile,
            config=self.lanes_config,
            mark=self.clock.mark,
            keep=self.config.compile_cache,
            tolerance=tolerance(self.config.precision),
        ).build()
        self.stack.callback(lanes.close)
        rows = self.config.queue_rows or largest * num_lanes * (self.lanes_config.depth + 2)
        source = LocalSource(
            Layout(rows=rows, inputs=signature.inputs, outputs=signature.outputs), self.device.register
        )
        self.stack.callback(source.close)
        dispatcher = Dispatcher(lanes.lanes, batching_config(self.lanes_config), self.lanes_config.depth)
        dispatcher.start()
        self.stack.callback(dispatcher.stop)
        return _Lanes(signature, source, dispatcher, lanes)


class _Stopwatch:
    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._last_ns = now_ns()

    def mark(self, name: str) -> None:
        at_ns = now_ns()
        self.parts_s[name] = self.parts_s.get(name, 0.0) + seconds(at_ns - self._last_ns)
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
        depth=config.depth or (CUDA_DEPTH if on_cuda else HOST_DEPTH),
        prefetch=config.prefetch,
        spin=config.spin,
        graphs=config.graphs,
        channels_last=config.channels_last,
        fold_batch_norm=config.fold_batch_norm,
        fuse_epilogues=config.fuse_epilogues,
        stem=config.stem,
        pointwise_as_matmul=config.pointwise_as_matmul,
    )


def _accuracy(
    reference: nn.Module,
    module: nn.Module,
    example: Inputs,
    config: EngineConfig,
    device: torch.device,
) -> ErrorReport | None:
    """Measure the error on the example's first rows. Raises ModelError if it is beyond the precision's tolerance."""
    if not config.check_accuracy:
        return None
    few = _to(example, device, rows=accuracy_rows(config.precision))
    inputs = (few,) if isinstance(few, torch.Tensor) else few
    there = copy.deepcopy(reference).to(device)  # the caller's own stays where it is
    report = measure_error(module, there, inputs, normalise=config.normalise)
    require_accuracy(report, config.precision)
    return report


def _to(given: Inputs, device: torch.device, rows: int | None = None) -> Inputs:
    if isinstance(given, torch.Tensor):
        return given[:rows].to(device)
    if isinstance(given, Mapping):
        return {name: tensor[:rows].to(device) for name, tensor in given.items()}
    return [tensor[:rows].to(device) for tensor in given]
