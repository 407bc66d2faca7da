"""The lanes in one's own program: `with Engine(model, example) as engine: engine.infer(batch)`."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from headrace.errors import EngineStopped
from headrace.model.described import require_no_steps
from headrace.model.optimise import Normalise
from headrace.model.shapes import DynamicDim
from headrace.pipeline.assembly import EngineConfig, EngineReport, Running, start

if TYPE_CHECKING:
    from headrace.model.signature import Inputs, Signature

__all__ = ["DynamicDim", "Engine", "EngineConfig", "EngineReport", "Normalise"]


class Engine:
    """Answers batches with N lanes that share one copy of the weights. Any number of threads may call it.

    `model` is an eager nn.Module in eval mode, on any device; it is copied, never changed. `example_inputs` is a batch
    of 1 row or more as clients will send it: one tensor, a sequence of tensors, or a mapping by the names of the
    model's arguments (a sequence's are called input_0, input_1, ...); rows are the first dimension, and all others are
    fixed by it, but for the one that `dynamic` names.

    Outputs come back as the model nests them, on the CPU, floating ones as float32. Work begins in `start`, which the
    context manager calls, and which returns when every bucket is compiled, warm and captured.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        config: EngineConfig | None = None,
        **options: Any,  # noqa: ANN401  the fields of EngineConfig, which checks them
    ) -> None:
        self._model = model
        self._example = example_inputs
        self._config = config or EngineConfig(**options)
        self._running: Running | None = None
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
        """What goes in and comes out; of the smallest size where a dimension is dynamic. Raises EngineStopped."""
        return self._require().signature

    @property
    def recompiles(self) -> int:
        """How often Dynamo has compiled since the engine was ready: 0, if all is well."""
        return self._require().recompiles()

    def start(self) -> None:
        """Prepare the model and the lanes. Raises ModelError, DeviceUnavailable, InvalidOption."""
        if self._running is None:
            require_no_steps(self._model)
            with ExitStack() as stack:
                self._running = start(self._model, self._example, self._config, stack)
                self._stack = stack.pop_all()

    def stop(self) -> None:
        """Answer what was taken, then end. Safe to call at any time."""
        self._running = None
        self._stack.close()

    def check(self) -> None:
        """Raise EngineStopped if no request can be computed: it was not started, was stopped, or its device is lost."""
        failure = self._require().failure()
        if failure is not None:
            raise EngineStopped(str(failure)) from failure

    def infer(self, inputs: Inputs, timeout_s: float | None = None) -> Any:  # noqa: ANN401
        """Return the model's outputs for these rows.

        Raises InvalidRequest for tensors that the model does not take, QueueFull without room within `timeout_s`,
        DeadlineExceeded if the rows were not launched within it, EngineStopped, TimeoutError, or what the model raised
        on these rows.
        """
        return self.submit(inputs, timeout_s).result(timeout_s)

    def submit(self, inputs: Inputs, timeout_s: float | None = None) -> Future[Any]:
        """Copy the rows in and return a future of the model's outputs. Waits for room, up to `timeout_s`.

        More rows than `max_batch_size` are split, and come back as one. Raises as `infer` does.
        """
        return self._require().submit(inputs, timeout_s)

    async def infer_async(self, inputs: Inputs) -> Any:  # noqa: ANN401
        """Do what `infer` does, without blocking the event loop while there is no room."""
        future = await asyncio.get_running_loop().run_in_executor(None, self.submit, inputs)
        return await asyncio.wrap_future(future)

    def _require(self) -> Running:
        if self._running is None:
            raise EngineStopped("the engine is not running; use `with Engine(...) as engine:`, or call start()")
        return self._running
