"""The backend's process: loads the model, makes it ready, says so, and answers until it is told to stop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headrace.backend.arrivals import RingsArrivals
from headrace.backend_job import BackendJob
from headrace.config import LanesConfig
from headrace.control import BackendReady, ServedModel
from headrace.gpus import out_of_memory
from headrace.model import precision
from headrace.model.checkpoint import ensure_checkpoint
from headrace.model.described import Described
from headrace.model.load import load_source
from headrace.model.optimise import accuracy_rows, measure_error, optimise, require_accuracy, tolerance
from headrace.model.signature import FlatModel, Signature, signature_of
from headrace.model.source import Example, resolve
from headrace.pipeline.batch import powers_of_two
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.host_stage import HostStage
from headrace.pipeline.host_steps import HostSteps, host_steps, network_example
from headrace.pipeline.wiring import LaneBuilder, batching_config, keep_compiled_code, optimise_config
from headrace.processes import become_child, describe, failures_reported
from headrace.runtime.device import divide_cpus, open_device
from headrace.serve_config import ServedModelConfig
from headrace.transport.ending import tell_of_own_end

if TYPE_CHECKING:
    from torch import Tensor

    from headrace.runtime.device import Device


def run_backend(job: BackendJob) -> None:
    """Serve. The target of the process."""
    become_child()
    tell_of_own_end(job.ending.fd)
    sys.dont_write_bytecode = True  # beside a model file, where it could outlive a change of the file by a second
    with failures_reported(job.control, "the backend stopped"), ExitStack() as stack:
        try:
            _serve(job, stack)
        except torch.OutOfMemoryError as error:
            where = job.place.label or "the GPU"
            raise out_of_memory(where, job.place.gpu_uuid, describe(error)) from error


def _serve(job: BackendJob, stack: ExitStack) -> None:
    served, place, notes = job.served, job.place, list[str]()
    precision.apply(served.model.precision)
    keep_compiled_code(served.model.compile_cache)
    device = open_device(place.device)
    device.start()
    divide_cpus(device, place.sharers * served.num_lanes)
    source = resolve(served.model.name)
    checkpoint = ensure_checkpoint(served.model, notes.append) if source.kind == "torchvision" else None
    path = Path(checkpoint.path) if checkpoint else None
    loaded = load_source(source, replace(served.model, compile=False), path, device.torch_device, lambda _: None)
    described = loaded if isinstance(loaded, Described) else None
    model = loaded if described is None else described.network
    example = source.example_inputs(served.image_size) if described is None else network_example(described)
    config = lanes_config(served, described)
    optimised = optimise(model, optimise_config(config, served.model.precision, None, device.torch_device))
    there = _on(example, device.torch_device)
    rows = accuracy_rows(served.model.precision)
    is_quantised = described is None and served.model.precision in ("int8", "fp8")
    tried = source.more_inputs(served.image_size, rows) if is_quantised else example
    report = measure_error(optimised.module, model, _on(tried, device.torch_device))
    require_accuracy(report, served.model.precision)
    signature = signature_of(optimised.module, there)
    flat = FlatModel(optimised.module, signature.names)
    steps = None
    if described is not None and described.has_steps:
        with torch.no_grad():
            steps = host_steps(described, signature, flat(*signature.flatten(there)))
    lanes = LaneBuilder(
        model=flat,
        example=signature.flatten(example),
        device=device.torch_device,
        num_lanes=served.num_lanes,
        compile=served.model.compile,
        config=config,
        mark=lambda _: None,
        keep=served.model.compile_cache,
        tolerance=tolerance(served.model.precision),
    ).build()
    stack.callback(lanes.close)
    dispatcher = Dispatcher(lanes.lanes, batching_config(config), config.depth)
    notes += [
        f"lanes: {served.num_lanes}, {lanes.form}",
        f"largest error against {report.reference}: {report.max_relative_error:.1e}",
        *lanes.notes,
        *optimised.skipped,
    ]
    _answer(job, _Answering(device, dispatcher, config, signature, steps), notes, stack)


@dataclass(frozen=True, slots=True)
class _Answering:
    """What is ready to answer."""

    device: Device
    dispatcher: Dispatcher
    config: LanesConfig
    signature: Signature
    steps: HostSteps | None  # what the host does before and after the model


def _answer(job: BackendJob, ready: _Answering, notes: list[str], stack: ExitStack) -> None:
    """Say that all is ready, and answer until the end."""
    served, device, steps = job.served, ready.device, ready.steps
    tensors = steps or ready.signature
    told = ServedModel(
        name=served.name,
        version=served.version,
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        max_batch_size=ready.config.buckets[-1],
        lanes=served.num_lanes,
    )
    # With steps, the rings are read by the host alone: it is the stage's table that the device must know.
    arrivals = RingsArrivals(job.control, job.wake.fd, device.register if steps is None else _known_to_nobody)
    stack.callback(arrivals.close)
    if steps is None:
        job.control.send(BackendReady(told, tuple(notes)))
        is_cuda = device.torch_device.type == "cuda"
        ready.dispatcher.answer(arrivals, spin=ready.config.spin and is_cuda)
        return
    rows = ready.config.buckets[-1] * served.num_lanes * (ready.config.depth + 2)  # the lanes', and as many to prepare
    stage = HostStage(steps, rows, ready.dispatcher, device.register, served.preprocess_threads)
    notes += [f"threads before and after the model: {served.preprocess_threads}"]
    job.control.send(BackendReady(told, tuple(notes)))
    stage.answer(arrivals)


def lanes_config(served: ServedModelConfig, described: Described | None) -> LanesConfig:
    """Return how the lanes batch: as the options say, and where they leave it open, as the model's description does."""
    if described is None:
        return served.lanes
    config = served.lanes
    if served.batching_is_open and described.max_batch_size is not None:
        config = replace(config, buckets=powers_of_two(described.max_batch_size))
    return replace(config, max_queue_delay_us=config.max_queue_delay_us or described.max_queue_delay_us)


def _known_to_nobody(_memory: Tensor) -> Callable[[], None]:
    return lambda: None


def _on(example: Example, device: torch.device) -> Example:
    if isinstance(example, dict):
        return {name: tensor.to(device) for name, tensor in example.items()}
    return tuple(tensor.to(device) for tensor in example)
