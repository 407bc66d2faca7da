"""What no server of this model can exceed on this machine: the model alone, the copies alone, the host's memory alone.

Measured in the process that served, with the lanes that served, right after the last answer: same model, precision,
batch, machine state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from headrace.bench.summary import Limits
from headrace.clock import NS_PER_S, now_ns

if TYPE_CHECKING:
    from headrace.pipeline.wiring import LaneSet, RawLane

STREAMS = (1, 2, 4, 8, 16)
WINDOW_S = 0.3  # of each measurement
COPY_BYTES = 64 << 20
MEMCPY_THREADS = (1, 2, 4, 8)


def measure(lanes: LaneSet, bucket: int, row_bytes: int, answer_bytes: int) -> Limits:
    """Measure all limits of serving batches of `bucket` rows, of so many bytes in and out a row, with idle lanes."""
    on_cuda = lanes.device.type == "cuda"
    h2d = copy_rate(lanes.device, to_device=True) if on_cuda else None
    d2h = copy_rate(lanes.device, to_device=False) if on_cuda else None
    return Limits(
        bucket=bucket,
        row_bytes=row_bytes,
        answer_bytes=answer_bytes,
        forward_samples_per_s=forward_rates(lanes, bucket, STREAMS if on_cuda else (1, 2)),
        h2d_bytes_per_s=h2d,
        d2h_bytes_per_s=d2h,
        memcpy_bytes_per_s=memcpy_rates(),
    )


def forward_rates(lanes: LaneSet, bucket: int, streams: Sequence[int]) -> dict[int, float]:
    """Return samples/s of the model alone, on data that is on the device already, by the number of lanes used."""
    available = list(lanes.lanes)
    rates = {}
    for count in streams:
        while len(available) < count:
            available.append(lanes.make_lane(1))
        rates[count] = bucket * _launches_per_s(available[:count], bucket)
    for lane in available[len(lanes.lanes) :]:
        lane.close()
    return rates


def _launches_per_s(lanes: Sequence[RawLane], bucket: int) -> float:
    def run(rounds: int) -> int:
        began = now_ns()
        for _ in range(rounds):
            for lane in lanes:
                lane.replay(bucket)
        for lane in lanes:
            lane.synchronize()
        return now_ns() - began

    return len(lanes) * _rate(run)


def _rate(run: Callable[[int], int]) -> float:
    """Return rounds per second; `run` makes so many and returns their nanoseconds. Warms up, then fills the window."""
    run(3)
    rounds = 4
    while (took := run(rounds)) < WINDOW_S * NS_PER_S / 8:
        rounds *= 2
    rounds = max(rounds, int(rounds * WINDOW_S * NS_PER_S / took))
    return rounds * NS_PER_S / run(rounds)


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

    return COPY_BYTES * _rate(run)


def memcpy_rates() -> dict[int, float]:
    """Return bytes/s of copying within the host's warm memory, by the number of threads."""
    threads = torch.get_num_threads()
    source = torch.empty(COPY_BYTES, dtype=torch.uint8).random_()
    target = torch.empty_like(source).random_()

    def run(rounds: int) -> int:
        began = now_ns()
        for _ in range(rounds):
            target.copy_(source)
        return now_ns() - began

    rates = {}
    for count in MEMCPY_THREADS:
        if count <= max(1, torch.multiprocessing.cpu_count()):
            torch.set_num_threads(count)
            rates[count] = COPY_BYTES * _rate(run)
    torch.set_num_threads(threads)
    return rates
