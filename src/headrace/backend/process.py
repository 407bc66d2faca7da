"""The backend's process: loads the model, makes it ready, says so, and answers until it is told to stop."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from headrace.backend.arrivals import RingsArrivals
from headrace.backend_job import BackendJob
from headrace.control import BackendReady, ServedModel
from headrace.gpus import out_of_memory
from headrace.model import precision
from headrace.model.checkpoint import ensure_checkpoint
from headrace.model.load import load_source
from headrace.model.optimise import accuracy_rows, measure_error, optimise, require_accuracy, tolerance
from headrace.model.signature import FlatModel, signature_of
from headrace.model.source import Example, resolve
from headrace.pipeline.dispatch import Dispatcher
from headrace.pipeline.wiring import LaneBuilder, batching_config, keep_compiled_code, optimise_config
from headrace.processes import become_child, describe, failures_reported
from headrace.runtime.device import divide_cpus, open_device


def run_backend(job: BackendJob) -> None:
    """Serve. The target of the process."""
    become_child()
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
    model = load_source(source, replace(served.model, compile=False), path, device.torch_device, lambda _: None)
    example = source.example_inputs(served.image_size)
    optimised = optimise(model, optimise_config(served.lanes, served.model.precision, None, device.torch_device))
    there = _on(example, device.torch_device)
    rows = accuracy_rows(served.model.precision)
    tried = source.more_inputs(served.image_size, rows) if served.model.precision in ("int8", "fp8") else example
    report = measure_error(optimised.module, model, _on(tried, device.torch_device))
    require_accuracy(report, served.model.precision)
    signature = signature_of(optimised.module, there)
    lanes = LaneBuilder(
        model=FlatModel(optimised.module, signature.names),
        example=signature.flatten(example),
        device=device.torch_device,
        num_lanes=served.num_lanes,
        compile=served.model.compile,
        config=served.lanes,
        mark=lambda _: None,
        keep=served.model.compile_cache,
        tolerance=tolerance(served.model.precision),
    ).build()
    stack.callback(lanes.close)
    told = ServedModel(
        name=served.name,
        version=served.version,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch_size=served.lanes.buckets[-1],
        lanes=served.num_lanes,
    )
    arrivals = RingsArrivals(job.control, job.wake.fd, device.register)
    stack.callback(arrivals.close)
    dispatcher = Dispatcher(lanes.lanes, batching_config(served.lanes), served.lanes.depth)
    notes += [
        f"lanes: {served.num_lanes}, {lanes.form}",
        f"largest error against {report.reference}: {report.max_relative_error:.1e}",
        *lanes.notes,
        *optimised.skipped,
    ]
    job.control.send(BackendReady(told, tuple(notes)))
    dispatcher.answer(arrivals, spin=served.lanes.spin and device.torch_device.type == "cuda")


def _on(example: Example, device: torch.device) -> Example:
    if isinstance(example, dict):
        return {name: tensor.to(device) for name, tensor in example.items()}
    return tuple(tensor.to(device) for tensor in example)
