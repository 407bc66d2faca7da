"""What no server of this model can exceed on this machine: the model alone, the copies alone, the host's memory alone.

After a run it is measured in the process that served, with the lanes that served, right after the last answer: same
model, precision, batch, machine state. `headrace limits` measures the same by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from headrace.bench.summary import Limits
from headrace.clock import NS_PER_S, now_ns

if TYPE_CHECKING:
    from headrace.pipeline.wiring import LaneSet, RawLane

STREAMS = (1, 2, 4, 8, 16)
STREAMS_ON_HOST = (1, 2)
WINDOW_S = 0.3  # of each measurement
COPY_BYTES = 64 << 20
MEMCPY_BYTES = 512 << 20  # of each of the two buffers; the largest caches of servers are some hundred MiB
MEMCPY_THREADS = (1, 2, 4, 8)


def measure(lanes: LaneSet, bucket: int, row_bytes: int, answer_bytes: int) -> Limits:
    """Measure all limits of serving batches of `bucket` rows, of so many bytes in and out a row, with idle lanes."""
    on_cuda = lanes.device.type == "cuda"
    streams = streams_of(lanes.device)
    with lanes_up_to(lanes, streams[-1]) as available:
        forward = forward_rates(available, bucket, streams)
    return Limits(
        bucket=bucket,
        row_bytes=row_bytes,
        answer_bytes=answer_bytes,
        forward_samples_per_s=forward,
        h2d_bytes_per_s=copy_rate(lanes.device, to_device=True) if on_cuda else None,
        d2h_bytes_per_s=copy_rate(lanes.device, to_device=False) if on_cuda else None,
        memcpy_bytes_per_s=memcpy_rates(),
    )


def streams_of(device: torch.device) -> tuple[int, ...]:
    """Return with how many streams a device's forward is measured. A host computes with all its CPUs on one already."""
    return STREAMS if device.type == "cuda" else STREAMS_ON_HOST


@contextmanager
def lanes_up_to(lanes: LaneSet, count: int) -> Iterator[list[RawLane]]:
    """Give the lanes and more like them: `count` in all, or as many as the device's memory holds; close those added."""
    available = list(lanes.lanes)
    try:
        while len(available) < count:
            available.append(lanes.make_lane(1))
    except torch.OutOfMemoryError:  # fewer streams are measured; the result says how many
        pass
    try:
        yield available
    finally:
        for lane in available[len(lanes.lanes) :]:
            lane.close()


def forward_rates(lanes: Sequence[RawLane], bucket: int, streams: Sequence[int]) -> dict[int, float]:
    """Return samples/s of the model alone, on data that is on the device already, by the number of lanes used."""
    return {count: bucket * _launches_per_s(lanes[:count], bucket) for count in streams if count <= len(lanes)}


def _launches_per_s(lanes: Sequence[RawLane], bucket: int) -> float:
    def run(rounds: int) -> int:
        began = now_ns()
        for _ in range(rounds):
            for lane in lanes:
                lane.replay(bucket)
        for lane in lanes:
            lane.synchronize()
        return now_ns() - began

    return len(lanes) * rate(run)


def rate(run: Callable[[int], int]) -> float:
    """Return rounds per second; `run` makes so many and returns their nanoseconds. Warms up, then fills the window.

    What takes longer than the window is measured once, after one round to warm up.
    """
    window_ns = WINDOW_S * NS_PER_S
    run(1)
    rounds = 1
    while (took := run(rounds)) < window_ns / 8:
        rounds *= 2
    if took < window_ns:
        rounds = int(rounds * window_ns / took)
        took = run(rounds)
    return rounds * NS_PER_S / took


def copy_rate(device: torch.device, *, to_device: bool) -> float:
    """Return bytes/s between pinned memory and the device, one large copy after the other on one stream."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True).random_()
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target, source = (there, host) if to_device else (host, there)

    def run(rounds: int) -> int:
        began = now_ns()
        for _ in range(rounds):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        return now_ns() - began

    return COPY_BYTES * rate(run)


def memcpy_rates(threads: Sequence[int] = MEMCPY_THREADS, size: int | None = None) -> dict[int, float]:
    """Return bytes/s of copying within the host's memory, by the number of threads, as far as there are CPUs for them.

    The two buffers, of `size` bytes each (default: `memcpy_bytes`), are far larger than any cache, as the payloads of
    requests in flight are: what fits into a cache is copied several times as fast as any server could copy payloads.
    Their pages have been touched before.
    """
    size = memcpy_bytes(psutil.virtual_memory().available) if size is None else size
    source = torch.full((size,), 1, dtype=torch.uint8)
    target = torch.full((size,), 2, dtype=torch.uint8)

    def run(rounds: int) -> int:
        began = now_ns()
        for _ in range(rounds):
            target.copy_(source)
        return now_ns() - began

    before = torch.get_num_threads()
    rates = {}
    for count in threads:
        if count <= len(os.sched_getaffinity(0)):
            torch.set_num_threads(count)
            rates[count] = size * rate(run)
    torch.set_num_threads(before)
    return rates


def memcpy_bytes(available: int) -> int:
    """Return how large each of the two buffers is, with so many bytes of memory free: together at most a quarter."""
    return max(1 << 20, min(MEMCPY_BYTES, available // 8))
