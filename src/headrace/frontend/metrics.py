"""The server's numbers as Prometheus reads them, under Triton's names where Triton has one.

Source: Prometheus, exposition formats, text format 0.0.4; Triton, user guide, metrics. The text is made here, not by
prometheus_client, because that names counters `..._total`, which Triton's are not, and writes a million as 1e+06, which
Triton's perf_analyzer cannot read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from headrace.clock import seconds
from headrace.frontend.board import FAILURES, STAGES
from headrace.frontend.scale import BATCH_ROWS, RESPONSE_NS

if TYPE_CHECKING:
    from headrace.control import VersionStatus
    from headrace.frontend.board import ModelTotals
    from headrace.frontend.gpu import GpuReading
    from headrace.frontend.scale import Scale

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Triton's reasons; what it has no word for is OTHER.
_TRITONS_REASONS = {
    "full": "REJECTED",
    "deadline": "REJECTED",
    "cancelled": "CANCELED",
    "model": "BACKEND",
    "lost": "BACKEND",
}
# Of the buckets, every sixteenth is a bound: two to a doubling, from 16 us to 137 s.
_RESPONSE_BOUNDS = tuple(range(63, RESPONSE_NS.buckets - 1, 16))
_BATCH_BOUNDS = tuple(BATCH_ROWS.index(1 << power) for power in range(17))


@dataclass(slots=True)
class _Family:
    """One metric: its samples follow each other in the text."""

    name: str
    kind: str
    text: str
    lines: list[str] = field(default_factory=list)

    def add(self, value: float, labels: Mapping[str, str], suffix: str = "") -> None:
        told = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        self.lines.append(
            f"{self.name}{suffix}{{{told}}} {_number(value)}" if told else f"{self.name} {_number(value)}"
        )

    def add_histogram(self, bounds: Iterable[tuple[float, float]], total: float, labels: Mapping[str, str]) -> None:
        """Add cumulative counts up to each bound, the count of all, and the sum of what was counted."""
        count = 0.0
        for bound, count in bounds:
            self.add(round(count), {**labels, "le": "+Inf" if math.isinf(bound) else _number(bound)}, "_bucket")
        self.add(total, labels, "_sum")
        self.add(round(count), labels, "_count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Now:
    """What is told beside what has been counted."""

    ready: Mapping[tuple[str, str], bool]  # by name and version: whether it would take a request
    started_ago_s: float
    versions: Sequence[VersionStatus] = ()
    gpus: Sequence[GpuReading] = ()


def render(models: Sequence[ModelTotals], now: Now) -> bytes:
    """Return the text."""
    families: list[_Family] = []
    for group in (_triton_counters, _triton_times, _histograms, _gauges, _engine_counters):
        families += group(models)
    families += [_ready(now.ready), *_engines(now.versions), _uptime(now.started_ago_s), *_gpu_families(now.gpus)]
    lines: list[str] = []
    for family in families:
        if family.lines:
            lines += [f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}", *family.lines]
    return ("\n".join(lines) + "\n").encode()


def _triton_counters(models: Sequence[ModelTotals]) -> Iterator[_Family]:
    success = _Family("nv_inference_request_success", "counter", "Requests that were answered well.")
    failure = _Family("nv_inference_request_failure", "counter", "Requests that were not, by Triton's reasons.")
    own = _Family("headrace_request_failures_total", "counter", "Requests that were not answered well, by reason.")
    rows = _Family("nv_inference_count", "counter", "Rows that were answered well.")
    batches = _Family("nv_inference_exec_count", "counter", "Batches that these rows were computed in.")
    for model in models:
        labels = _labels(model)
        success.add(model.requests, labels)
        reasons = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
        for kind in FAILURES:
            reasons[_TRITONS_REASONS.get(kind, "OTHER")] += model.failure_count[kind]
            own.add(model.failure_count[kind], {**labels, "reason": kind})
        for reason, count in reasons.items():
            failure.add(count, {**labels, "reason": reason})
        rows.add(model.rows, labels)
        batches.add(model.batches, labels)
    yield from (success, failure, own, rows, batches)


def _triton_times(models: Sequence[ModelTotals]) -> Iterator[_Family]:
    """Counters of microseconds, as Triton has them, and the same by stage in seconds."""
    request = _Family("nv_inference_request_duration_us", "counter", "Sum of the answered requests' times.")
    queue = _Family("nv_inference_queue_duration_us", "counter", "Of that, waiting for a lane.")
    infer = _Family("nv_inference_compute_infer_duration_us", "counter", "Of that, on a lane, with copies in and out.")
    stages = _Family("headrace_stage_seconds_total", "counter", "Sum of the answered requests' times by stage.")
    lanes = _Family("headrace_lane_seconds_total", "counter", "Sum of the batches' times on a lane.")
    for model in models:
        labels = _labels(model)
        request.add(model.request_ns // 1000, labels)
        queue.add(model.stage_ns["queue"] // 1000, labels)
        infer.add(model.stage_ns["compute"] // 1000, labels)
        for stage in STAGES:
            stages.add(seconds(model.stage_ns[stage]), {**labels, "stage": stage})
        for lane, ns in enumerate(model.lane_ns):
            if ns:
                lanes.add(seconds(ns), {**labels, "lane": str(lane)})
    yield from (request, queue, infer, stages, lanes)


def _histograms(models: Sequence[ModelTotals]) -> Iterator[_Family]:
    times = _Family("headrace_response_time_seconds", "histogram", "Times of the requests that were answered well.")
    sizes = _Family("headrace_batch_rows", "histogram", "Rows of the batches that were computed.")
    for model in models:
        labels = _labels(model)
        bounds = _cumulative(model.response_counts, RESPONSE_NS, _RESPONSE_BOUNDS)
        times.add_histogram(((seconds(bound), n) for bound, n in bounds), seconds(model.request_ns), labels)
        sizes.add_histogram(_cumulative(model.batch_counts, BATCH_ROWS, _BATCH_BOUNDS), model.rows, labels)
    yield from (times, sizes)


def _cumulative(counts: Sequence[float], scale: Scale, bounds: Sequence[int]) -> Iterator[tuple[float, float]]:
    """Yield (largest value, how many do not exceed it) for these buckets, and for all."""
    sums = np.cumsum(counts).tolist()
    for index in bounds:
        yield scale.upper(index), sums[index]
    yield math.inf, sums[-1]


def _gauges(models: Sequence[ModelTotals]) -> Iterator[_Family]:
    pending = _Family("nv_inference_pending_request_count", "gauge", "Requests that have been taken and not answered.")
    held = _Family("headrace_requests_in_flight", "gauge", "Requests that have been taken and not answered.")
    free = _Family("headrace_ring_rows_free", "gauge", "Rows that the rings have room for now.")
    room = _Family("headrace_ring_rows", "gauge", "Rows that the rings have room for when nothing is under way.")
    restarts = _Family("headrace_backend_restarts_total", "counter", "Backends that were started anew.")
    for model in models:
        labels = _labels(model)
        pending.add(model.in_flight, labels)
        held.add(model.in_flight, labels)
        free.add(model.rows_free, labels)
        room.add(model.rows_room, labels)
        restarts.add(model.restarts, labels)
    yield from (pending, held, free, room, restarts)


def _engine_counters(models: Sequence[ModelTotals]) -> Iterator[_Family]:
    requests = _Family("headrace_engine_requests_total", "counter", "Requests that were answered well, by engine.")
    rows = _Family("headrace_engine_rows_total", "counter", "Rows that were answered well, by engine.")
    for model in models:
        for engine, count in enumerate(model.engine_requests):
            if count:
                labels = {**_labels(model), "engine": str(engine)}
                requests.add(count, labels)
                rows.add(model.engine_rows[engine], labels)
    yield from (requests, rows)


def _engines(versions: Sequence[VersionStatus]) -> Iterator[_Family]:
    wanted = _Family("headrace_engines", "gauge", "Engines that there should be.")
    ready = _Family("headrace_engines_ready", "gauge", "Engines that take requests; with fewer, all goes on, slower.")
    for status in versions:
        if status.engines_ready or status.required:
            labels = {"model": status.name, "version": status.version}
            wanted.add(status.engines, labels)
            ready.add(status.engines_ready, labels)
    yield from (wanted, ready)


def _ready(ready: Mapping[tuple[str, str], bool]) -> _Family:
    family = _Family("headrace_ready", "gauge", "1 if the model would take a request now.")
    for (name, version), is_ready in ready.items():
        family.add(int(is_ready), {"model": name, "version": version})
    return family


def _uptime(started_ago_s: float) -> _Family:
    family = _Family("headrace_uptime_seconds", "gauge", "How long the server has been up.")
    family.add(round(started_ago_s, 3), {})
    return family


_GPU_FAMILIES: tuple[tuple[str, str, Callable[[GpuReading], float | None]], ...] = (
    ("nv_gpu_utilization", "Share of time with any kernel running.", lambda gpu: _hundredth(gpu.utilization_pct)),
    ("nv_gpu_memory_used_bytes", "Memory used, by every process.", lambda gpu: gpu.memory_used_bytes),
    ("nv_gpu_memory_total_bytes", "Memory.", lambda gpu: gpu.memory_total_bytes),
    ("nv_gpu_power_usage", "Watts.", lambda gpu: gpu.power_w),
    ("nv_gpu_power_limit", "Watts, the lowest of all limits in force.", lambda gpu: gpu.power_limit_w),
)


def _gpu_families(gpus: Sequence[GpuReading]) -> Iterator[_Family]:
    """What NVML does not answer is left out. Triton's share of utilization is 0 to 1."""
    for name, text, value_of in _GPU_FAMILIES:
        family = _Family(name, "gauge", text)
        for gpu in gpus:
            value = value_of(gpu)
            if value is not None:
                family.add(value, {"gpu_uuid": gpu.uuid})
        yield family


def _labels(model: ModelTotals) -> dict[str, str]:
    return {"model": model.name, "version": model.version}


def _hundredth(value: float | None) -> float | None:
    return None if value is None else value / 100


def _number(value: float) -> str:
    """Return the shortest text without an exponent; of whole numbers, without a point."""
    return str(value) if isinstance(value, int) else np.format_float_positional(value, trim="-")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
