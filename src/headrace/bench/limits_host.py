"""The process of `headrace limits` that measures: it makes the lanes as a server would, and uses nothing but them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from headrace.bench import limits, ring_rate
from headrace.bench.host import torch_facts
from headrace.bench.inputs import make_pixels, make_rows
from headrace.bench.limits_jobs import LimitsDone, LimitsJob, Step
from headrace.bench.limits_report import LimitsConfig
from headrace.bench.summary import Limits
from headrace.config import InputConfig
from headrace.errors import InputError
from headrace.model import precision
from headrace.model.checkpoint import ensure_checkpoint
from headrace.model.load import load_model
from headrace.model.optimise import IMAGENET_MEAN, IMAGENET_STD, Normalise, optimise
from headrace.model.signature import FlatModel, signature_of
from headrace.pipeline.wiring import LaneBuilder, LaneSet, optimise_config
from headrace.processes import become_child, failures_reported
from headrace.runtime.device import Device, open_device

EXAMPLE_ROWS = 16  # different images that the lanes' buffers are filled with


def run_limits_host(job: LimitsJob) -> None:
    """Measure, and report; or report why not. The target of the process."""
    become_child()
    with failures_reported(job.report, "measuring the limits failed"):
        job.report.send(_measure(job))


def _measure(job: LimitsJob) -> LimitsDone:
    """Load the model first, since that is what can fail."""
    config = job.config
    say = _steps(job)
    notes: list[str] = []
    say("loading the model")
    device = _open(config)
    model = _prepare(config, device, notes)
    say("ring messages")
    ring = ring_rate.measure(job.ring)
    say("copies within the host's memory")
    size = limits.memcpy_bytes(psutil.virtual_memory().available)
    memcpy = limits.memcpy_rates(memcpy_threads(len(os.sched_getaffinity(0))), size)
    copies = _copies(device, say)
    say("compiling the model, making lanes" if config.model.compile else "making lanes")
    lanes = model.lanes.build()
    try:
        forward = _forward(lanes, config, say, notes)
    finally:
        lanes.close()
    return LimitsDone(
        ring=ring,
        limits=tuple(
            Limits(
                bucket=bucket,
                row_bytes=model.row_bytes,
                answer_bytes=model.answer_bytes,
                forward_samples_per_s=rates,
                h2d_bytes_per_s=copies.h2d,
                d2h_bytes_per_s=copies.d2h,
                memcpy_bytes_per_s=memcpy,
            )
            for bucket, rates in forward.items()
        ),
        memcpy_buffer_bytes=size,
        form=lanes.form,
        facts=torch_facts(device),
        notes=(*notes, *lanes.notes),
    )


def _steps(job: LimitsJob) -> Callable[[str], None]:
    """Return what tells the supervisor of each step, which it counts."""
    config = job.config
    total = 4 + 2 * (config.gpu_index is not None) + len(config.lanes.buckets)
    begun = 0

    def say(text: str) -> None:
        nonlocal begun
        job.report.send(Step(text, begun, total))
        begun += 1

    return say


def memcpy_threads(cpus: int) -> tuple[int, ...]:
    """Return with how many threads to copy: powers of two up to 64, and all CPUs where they are fewer."""
    return tuple(sorted({count for count in (1, 2, 4, 8, 16, 32, 64, cpus) if count <= min(cpus, 64)}))


def _open(config: LimitsConfig) -> Device:
    precision.apply(config.model.precision)
    device = open_device(config.device)
    if device.torch_device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    device.start()
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A model ready for lanes, and the bytes of a row in and out."""

    lanes: LaneBuilder
    row_bytes: int
    answer_bytes: int


def _prepare(config: LimitsConfig, device: Device, notes: list[str]) -> _Prepared:
    """Load the model and change it as the lanes do. Raises ModelError, CheckpointError, InputError."""
    checkpoint = ensure_checkpoint(config.model, notes.append)
    path = checkpoint.path if checkpoint else None
    eager = load_model(replace(config.model, compile=False), path, device.torch_device, _unmarked)
    normalise = Normalise(mean=IMAGENET_MEAN, std=IMAGENET_STD) if config.wire == "uint8" else None
    optimised = optimise(eager, optimise_config(config.lanes, config.model.precision, normalise, device.torch_device))
    notes.extend(optimised.skipped)
    example = _example(config.inputs(), notes)
    signature = signature_of(optimised.module, example.to(device.torch_device))
    builder = LaneBuilder(
        model=FlatModel(optimised.module, None),
        example=[example],
        device=device.torch_device,
        num_lanes=1,
        compile=config.model.compile,
        config=config.lanes,
        mark=_unmarked,
    )
    return _Prepared(
        lanes=builder,
        row_bytes=sum(spec.row_bytes for spec in signature.inputs),
        answer_bytes=sum(spec.row_bytes for spec in signature.outputs),
    )


def _unmarked(_stage: str) -> None:
    """Nobody asks how long the parts of the preparation took."""


def _example(inputs: InputConfig, notes: list[str]) -> torch.Tensor:
    """Return images as requests carry them; noise where there are no photographs."""
    make = make_pixels if inputs.wire == "uint8" else make_rows
    count = min(EXAMPLE_ROWS, inputs.batch_size)
    try:
        return make(inputs, count)
    except InputError:
        notes.append("measured on noise, since there are no photographs: pip install 'headrace[photos]'")
        return make(replace(inputs, kind="random"), count)


@dataclass(frozen=True, slots=True)
class _Copies:
    """Bytes/s; None where the host is the device."""

    h2d: float | None
    d2h: float | None


def _copies(device: Device, say: Callable[[str], None]) -> _Copies:
    if device.torch_device.type == "cpu":
        return _Copies(None, None)
    say("copies to the device")
    h2d = limits.copy_rate(device.torch_device, to_device=True)
    say("copies from the device")
    return _Copies(h2d, limits.copy_rate(device.torch_device, to_device=False))


def _forward(
    lanes: LaneSet, config: LimitsConfig, say: Callable[[str], None], notes: list[str]
) -> dict[int, dict[int, float]]:
    """Return samples/s by batch size and number of streams."""
    streams = limits.streams_of(lanes.device)
    rates = {}
    with limits.lanes_up_to(lanes, streams[-1]) as available:
        for bucket in config.lanes.buckets:
            say(f"the model alone, batch size {bucket}")
            rates[bucket] = limits.forward_rates(available, bucket, streams)
        if len(available) < streams[-1]:
            notes.append(
                f"the device's memory holds {len(available)} of {streams[-1]} lanes; more streams were not tried"
            )
    return rates
