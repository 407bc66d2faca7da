"""A server's processes, all of them: their memory, their CPU time, and their end."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

TERMINATE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    at_ns: int  # time.perf_counter_ns
    processes: int
    rss_bytes: int  # the sum: pages that processes share count in each
    cpu_s: float  # since they began


class Tree:
    """A process and its descendants, also those whose parent has gone."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[int, psutil.Process] = {}

    def members(self) -> list[psutil.Process]:
        """Return who lives now."""
        with suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if _lives(process)]

    def sample(self) -> Sample:
        rss = cpu = 0.0
        members = self.members()
        for process in members:
            with suppress(psutil.NoSuchProcess), process.oneshot():
                times = process.cpu_times()
                rss += process.memory_info().rss
                cpu += times.user + times.system
        return Sample(time.perf_counter_ns(), len(members), int(rss), cpu)

    def pss_bytes(self) -> int:
        """Return the memory of all, shared pages counted once; it is slow where there is much."""
        total = 0
        for process in self.members():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
        return total

    def end(self) -> None:
        """Ask the root to end, then end whoever is left."""
        members = self.members()
        with suppress(psutil.NoSuchProcess):
            self._root.terminate()
        psutil.wait_procs(members, timeout=TERMINATE_S)
        left = self.members()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=TERMINATE_S)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def cores(samples: list[Sample], begin_ns: int, end_ns: int) -> float | None:
    """Return how many cores were busy between the samples nearest to both times; None for fewer than two."""
    inside = [sample for sample in samples if begin_ns <= sample.at_ns <= end_ns]
    if len(inside) < 2:
        return None
    first, last = inside[0], inside[-1]
    return (last.cpu_s - first.cpu_s) / ((last.at_ns - first.at_ns) / 1e9)
