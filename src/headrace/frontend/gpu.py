"""The GPUs' state for whoever reads the server's numbers: asked on a thread, and never waited for long.

A driver that hangs must not hang the frontend, so what does not answer in time is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace import nvml
from headrace.clock import NS_PER_S, now_ns
from headrace.errors import DeviceUnavailable

if TYPE_CHECKING:
    from headrace.nvml import NvmlGpu

FRESH_S = 1.0  # what is younger is not asked for again
WAIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One look at a GPU; None is what NVML does not answer."""

    uuid: str
    name: str
    utilization_pct: float | None  # share of time with any kernel running
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: int | None


def read_gpus(devices: Sequence[str]) -> Callable[[], tuple[GpuReading, ...]]:
    """Return what reads these GPUs, see `read_gpu`; one that is not there, or lost, is left out."""
    readers = [read_gpu(device) for device in devices]
    return lambda: tuple(reading for read in readers if (reading := read()) is not None)


def read_gpu(device: str) -> Callable[[], GpuReading | None]:
    """Return what reads the GPU of this UUID, or that torch calls so; None where there is none, or it is lost."""
    opened: list[NvmlGpu | None] = []

    def read() -> GpuReading | None:
        try:
            if not opened:
                opened.append(_open(device))
            return None if opened[0] is None else _look(opened[0])
        except DeviceUnavailable:
            return None

    return read


def _open(device: str) -> NvmlGpu | None:
    if device.startswith(("GPU-", "MIG-")):
        return nvml.open_gpu(0, device)
    kind, _, index = device.partition(":")
    return nvml.open_gpu(int(index or 0)) if kind == "cuda" else None


def _look(gpu: NvmlGpu) -> GpuReading:
    facts, state = gpu.facts(), gpu.state()
    return GpuReading(
        uuid=gpu.uuid() or "",
        name=facts.name or "",
        utilization_pct=state.utilization_pct,
        memory_used_bytes=state.memory_used_bytes,
        memory_total_bytes=facts.memory_bytes,
        power_w=state.power_w,
        power_limit_w=facts.power_limit_w,
        temperature_c=state.temperature_c,
    )


class GpuWatch:
    """The last reading, for one event loop."""

    def __init__(self, read: Callable[[], tuple[GpuReading, ...]], wait_s: float = WAIT_S) -> None:
        self._read = read
        self._wait_s = wait_s
        self._pool = ThreadPoolExecutor(1, "gpu")
        self._asked_ns = -NS_PER_S
        self._asked: asyncio.Future[tuple[GpuReading, ...]] | None = None

    async def look(self) -> tuple[GpuReading, ...]:
        """Return the GPUs' state, at most a second old; nothing without a GPU, or without an answer in time."""
        if self._asked is None or (self._asked.done() and now_ns() - self._asked_ns > FRESH_S * NS_PER_S):
            self._asked = asyncio.get_running_loop().run_in_executor(self._pool, self._read)
            self._asked_ns = now_ns()
        await asyncio.wait([self._asked], timeout=self._wait_s)
        return self._asked.result() if self._asked.done() else ()
