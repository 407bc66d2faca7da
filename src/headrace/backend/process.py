"""The backend's process: loads the model, makes it ready, says so, and answers until it is told to stop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from headrace.backend.arrivals import RingsArrivals
from headrace.backend_job import BackendJob
from headrace.control import BackendReady, ServedModel
from headrace.model import precision
from headrace.model.checkpoint import ensure_checkpoint
from headrace.model.load import load_model
from headrace.model.optimise import measure_error, optimise, require_accuracy
from headrace.model.signature import FlatModel, signature_of
from headrace.model.source import example_inputs
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder, batching_config, keep_compiled_code, optimise_config
from headrace.processes import become_child, failures_reported
from headrace.runtime.device import divide_cpus, open_device


def run_backend(job: BackendJob) -> None:
    """Serve. The target of the process."""
    become_child()
    with failures_reported(job.control, "the backend stopped"), ExitStack() as stack:
        _serve(job, stack)


def _serve(job: BackendJob, stack: ExitStack) -> None:
    notes: list[str] = []
    precision.apply(job.model.precision)
    keep_compiled_code(job.model.compile_cache)
    device = open_device(job.device)
    device.start()
    divide_cpus(device, job.num_lanes)
    checkpoint = ensure_checkpoint(job.model, notes.append)
    path = Path(checkpoint.path) if checkpoint else None
    model = load_model(replace(job.model, compile=False), path, device.torch_device, lambda _: None)
    example = example_inputs(job.model.name, job.image_size)
    optimised = optimise(model, optimise_config(job.lanes, job.model.precision, None))
    there = _on(example, device.torch_device)
    report = measure_error(optimised.module, model, there)
    require_accuracy(report, job.model.precision)
    signature = signature_of(optimised.module, there)
    lanes = LaneBuilder(
        model=FlatModel(optimised.module, signature.names),
        example=signature.flatten(example),
        device=device.torch_device,
        num_lanes=job.num_lanes,
        compile=job.model.compile,
        config=job.lanes,
        mark=lambda _: None,
    ).build()
    stack.callback(lanes.close)
    served = ServedModel(
        name=job.name,
        version=job.version,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch_size=job.lanes.buckets[-1],
    )
    arrivals = RingsArrivals(job.control, job.wake.fd, device.register)
    stack.callback(arrivals.close)
    dispatcher = Dispatcher(lanes.lanes, batching_config(job.lanes), job.lanes.depth)
    notes += [
        f"lanes: {job.num_lanes}, {lanes.form}",
        f"largest error against {report.reference}: {report.max_relative_error:.1e}",
        *lanes.notes,
        *optimised.skipped,
    ]
    job.control.send(BackendReady(served, tuple(notes)))
    dispatcher.answer(arrivals, spin=job.lanes.spin and device.torch_device.type == "cuda")


def _on(
    example: dict[str, Tensor] | tuple[Tensor, ...], device: torch.device
) -> dict[str, Tensor] | tuple[Tensor, ...]:
    if isinstance(example, dict):
        return {name: tensor.to(device) for name, tensor in example.items()}
    return tuple(tensor.to(device) for tensor in example)
