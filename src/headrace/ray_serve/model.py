"""A replica's model: made from the same description that `headrace serve` takes, and run by an engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from headrace.clock import NS_PER_S, now_ns
from headrace.config import LanesConfig
from headrace.control import ServedModel
from headrace.engine import Engine, EngineConfig
from headrace.errors import DeadlineExceeded, HeadraceError, InvalidOption, UnknownModel
from headrace.frontend.link import ModelFailed
from headrace.model.checkpoint import ensure_checkpoint
from headrace.model.described import require_no_steps
from headrace.model.load import load_source
from headrace.model.optimise import accuracy_rows
from headrace.model.source import resolve
from headrace.model_options import ModelOptions, served_model
from headrace.option_fields import check_options
from headrace.processes import describe
from headrace.serve_config import ServedModelConfig
from headrace.tensors import TensorSpec

AMPLE = 0.5  # share of the engine's rows up to which a request is copied in at once, and not by a thread that may wait
INLINE_BYTES = 4 << 20  # more is copied by a thread: the event loop has others to serve
THREADS = 4  # that wait for room
QUEUED_BATCHES = 2  # per lane, beside those that run
_LANES_FIELDS = {field.name for field in fields(LanesConfig)} & {field.name for field in fields(EngineConfig)}


def described(source: str, options: Mapping[str, Any]) -> ServedModelConfig:
    """Return the model that the words of `[[models]]` describe, on this machine. Raises InvalidOption."""
    try:
        given = ModelOptions(source=source, **options)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(ModelOptions))
        raise InvalidOption(f"{describe(error)}; a model's options are {known}") from error
    check_options(given)
    return served_model(given.completed())


def start_engine(served: ServedModelConfig, tell: Callable[[str], None]) -> Engine:
    """Load the model and return its engine, warm.

    Raises ModelError, CheckpointError, DeviceUnavailable, InvalidOption.
    """
    source = resolve(served.model.name)
    checkpoint = ensure_checkpoint(served.model, tell) if source.kind == "torchvision" else None
    path = Path(checkpoint.path) if checkpoint else None
    plain = replace(served.model, compile=False)  # the engine compiles
    model = load_source(source, plain, path, torch.device("cpu"), lambda _: None)
    require_no_steps(model)
    if served.model.precision in ("int8", "fp8"):
        example = source.more_inputs(served.image_size, accuracy_rows(served.model.precision))
    else:
        example = source.example_inputs(served.image_size)
    engine = Engine(model, example, engine_config(served))
    engine.start()
    return engine


def engine_config(served: ServedModelConfig) -> EngineConfig:
    """Return an engine's configuration with what was said of the model."""
    lanes = {name: getattr(served.lanes, name) for name in _LANES_FIELDS}
    return EngineConfig(
        device=served.device,
        num_lanes=served.num_lanes,
        max_batch_size=served.largest_batch,
        queue_rows=engine_rows(served),
        precision=served.model.precision,
        compile=served.model.compile,
        compile_cache=served.model.compile_cache,
        **lanes,
    )


def engine_rows(served: ServedModelConfig) -> int:
    """Return how many rows an engine of a replica holds: what its lanes run, and batches that queue behind."""
    return served.largest_batch * served.num_lanes * (served.lanes.depth + QUEUED_BATCHES)


class ReplicaModel:
    """The model of one replica, for callers on an event loop."""

    def __init__(self, served: ServedModelConfig, engine: Engine) -> None:
        self.engine = engine
        self.served = ServedModel(
            name=served.name,
            version=served.version,
            inputs=engine.signature.inputs,
            outputs=engine.signature.outputs,
            max_batch_size=served.largest_batch,
        )
        self._ample_rows = int(AMPLE * engine_rows(served))
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="headrace-room")
        self._lock = threading.Lock()
        self._rows = 0  # of requests that have been taken and not answered

    def find(self, name: str, version: str | None) -> ServedModel:
        """Return what clients are told. Raises UnknownModel."""
        if name != self.served.name:
            raise UnknownModel(f"there is no model {name}; this application has {self.served.name}")
        if version not in (None, self.served.version):
            raise UnknownModel(f"model {name} has no version {version}; it has {self.served.version}")
        return self.served

    def submit(self, inputs: Any, timeout_s: float | None) -> Future[Any]:  # noqa: ANN401  what an engine takes
        """Return a future of the model's outputs, nested as the model gives them. Does not block an event loop.

        Raises InvalidRequest; everything else is the future's.
        """
        tensors = self.engine.signature.flatten(inputs)
        rows, size = len(tensors[0]), sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            at_once = self._rows + rows <= self._ample_rows and size <= INLINE_BYTES
            self._rows += rows
        try:
            submit = self.engine.submit if at_once else self._submit_waiting
            future = submit(tensors, timeout_s)
        except BaseException:
            self._ended(rows)
            raise
        future.add_done_callback(lambda _: self._ended(rows))
        return future

    def stop(self) -> None:
        """Answer what was taken, and end."""
        self._threads.shutdown()
        self.engine.stop()

    def _submit_waiting(self, tensors: Sequence[Tensor], timeout_s: float | None) -> Future[Any]:
        """Have a thread wait for room, and return a future of what it then submits."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()
        due_ns = None if timeout_s is None else now_ns() + int(timeout_s * NS_PER_S)

        def submit() -> None:
            try:
                ticket = self.engine.submit(tensors, _left_s(due_ns))
                ticket.add_done_callback(lambda ended: _pass_on(ended, answer))
            except Exception as error:  # noqa: BLE001  the caller's
                answer.set_exception(error)

        self._threads.submit(submit)
        return answer

    def _ended(self, rows: int) -> None:
        with self._lock:
            self._rows -= rows


def _left_s(due_ns: int | None) -> float | None:
    """Return how long a request may still wait. Raises DeadlineExceeded if that is no time."""
    if due_ns is None:
        return None
    left_s = (due_ns - now_ns()) / NS_PER_S
    if left_s <= 0:
        raise DeadlineExceeded("the request waited for room until its deadline; allow more time, or send less at once")
    return left_s


def _pass_on(ended: Future[Any], answer: Future[Any]) -> None:
    error = ended.exception()
    if error is None:
        answer.set_result(ended.result())
    else:
        answer.set_exception(error)


def tensor_of(data: memoryview | bytes, spec: TensorSpec, rows: int) -> Tensor:
    """Return an input [rows, *features] that is a view of its raw bytes."""
    dtype = getattr(torch, spec.dtype)
    return torch.frombuffer(data, dtype=dtype, count=rows * math.prod(spec.features)).reshape(rows, *spec.features)


def raw_outputs(outputs: object) -> list[memoryview]:
    """Return each output's bytes, in the model's order, where they lie."""
    return [_raw(leaf) for leaf in pytree.tree_leaves(outputs)]


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def told(error: Exception) -> HeadraceError:
    """Return an error of the engine's as clients may read it: what the model raised is without paths."""
    return error if isinstance(error, HeadraceError) else ModelFailed(describe(error))
