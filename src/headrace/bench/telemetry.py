"""What the devices do during the run, watched by a process of its own.

A thread that polls would share an interpreter lock with the threads that stamp requests; this process shares
none. It imports no torch. Words over the pipes: the load generator sends "open" and "close" around the
measured requests and waits until the same word comes back; the supervisor sends "stop".
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.bench.summary import Activity
from headrace.clock import NS_PER_S, Clock, now_ns, seconds
from headrace.errors import HeadraceError
from headrace.files import writing
from headrace.nvml import GpmMetrics, GpmSample, Gpu, GpuState, open_gpu, throttle_words
from headrace.processes import ChildFailed, Ready, become_child

Number = TypeVar("Number", int, float)
ENERGY_MIN_S = 1.0  # the counter moves once in 0.1 s (H100): below this, its steps are over a tenth of the answer
# multiprocessing.connection.wait: those that can be read or have ended; none of them after so many seconds.
Wait: TypeAlias = Callable[[list[Connection], float], list[Connection]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryJob:
    window: Connection  # from the load generator
    report: Connection  # to the supervisor
    gpu_index: int | None  # CUDA's; None on the CPU
    gpu_uuid: str | None = None  # settles which GPU it is, where it is known
    interval_s: float  # between two polls
    samples_path: Path  # Parquet, one row per poll


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryResult:
    activity: Activity


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One poll; its fields are the columns of the samples file."""

    at_ns: int
    gpu_utilization_pct: float | None
    gpu_memory_used_bytes: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    throttle_reasons: int | None  # NVML's bit mask
    cpu_utilization_pct: float | None  # since the previous sample


SCHEMA = pa.schema(
    [
        pa.field("at_ns", pa.int64(), nullable=False),
        ("gpu_utilization_pct", pa.float64()),
        ("gpu_memory_used_bytes", pa.int64()),
        ("sm_clock_mhz", pa.int32()),
        ("memory_clock_mhz", pa.int32()),
        ("power_w", pa.float64()),
        ("temperature_c", pa.int32()),
        ("throttle_reasons", pa.int64()),
        ("cpu_utilization_pct", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since boot, summed over all logical CPUs."""

    busy_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What can only be read as a difference, at one end of the window."""

    at_ns: int
    cpu: CpuTimes
    energy_mj: int | None = None


class Cpu(Protocol):
    def times(self) -> CpuTimes: ...


class SystemCpu:
    """The kernel's count. Waiting for a disk is not busy; time that a hypervisor took away is."""

    def times(self) -> CpuTimes:
        times = psutil.cpu_times()._asdict()
        # The kernel counts a guest's time within user and nice already. Source: proc_stat(5).
        total_s = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        return CpuTimes(busy_s=total_s - times["idle"] - times.get("iowait", 0.0), total_s=total_s)


def run_telemetry(job: TelemetryJob) -> None:
    """Watch until the supervisor says stop, or is gone. The target of a process.

    Reports Ready, then TelemetryResult; or ChildFailed and ends at once, if the GPU is lost or the samples
    file cannot be written.
    """
    become_child()
    try:
        gpu = None if job.gpu_index is None else open_gpu(job.gpu_index, job.gpu_uuid)
        telemetry = Telemetry(gpu, SystemCpu(), now_ns, job.interval_s)
        job.report.send(Ready())
        telemetry.watch(job.window, job.report, _wait)
        write_samples(telemetry.samples, job.samples_path)
        message: object = telemetry.result()
    except HeadraceError as error:
        message = ChildFailed(error)
    try:
        job.report.send(message)
    except OSError:  # the supervisor is gone: nobody is left to tell
        return


class Telemetry:
    """Polls, and marks the window's ends."""

    def __init__(self, gpu: Gpu | None, cpu: Cpu, clock: Clock, interval_s: float) -> None:
        self._gpu = gpu
        self._cpu = cpu
        self._clock = clock
        self._interval_ns = round(interval_s * NS_PER_S)
        self._opened: End | None = None
        self._closed: End | None = None
        self._first_gpm: GpmSample | None = None
        self._last_gpm: GpmSample | None = None
        self._previous: CpuTimes | None = None
        self.samples: list[Sample] = []

    def watch(self, window: Connection, report: Connection, wait_for: Wait) -> None:
        """Poll at every interval and answer marks at once, until `report` says stop or ends.

        A `window` that ends is a dead load generator, which is the supervisor's to notice. Polls that were
        missed are not made up for.
        """
        listening = [window, report]
        due_ns = self._clock()
        while True:
            ready = wait_for(listening, max(0.0, seconds(due_ns - self._clock())))
            if window in ready and not self._answer_marks(window):
                listening = [report]
            if report in ready:
                with suppress(EOFError, OSError):
                    report.recv()  # the supervisor's only word is stop, and its end means the same
                if window in listening:
                    self._answer_marks(window)  # one may have come since the wait
                return
            if self._clock() >= due_ns:
                self.poll()
                due_ns += self._interval_ns
                if due_ns <= (polled_ns := self._clock()):
                    due_ns = polled_ns + self._interval_ns

    def poll(self) -> None:
        at_ns, cpu = self._clock(), self._cpu.times()
        state = self._gpu.state() if self._gpu else GpuState()
        self.samples.append(
            Sample(
                at_ns=at_ns,
                gpu_utilization_pct=state.utilization_pct,
                gpu_memory_used_bytes=state.memory_used_bytes,
                sm_clock_mhz=state.sm_clock_mhz,
                memory_clock_mhz=state.memory_clock_mhz,
                power_w=state.power_w,
                temperature_c=state.temperature_c,
                throttle_reasons=state.throttle_reasons,
                cpu_utilization_pct=cpu_utilization_pct(self._previous, cpu) if self._previous else None,
            )
        )
        self._previous = cpu

    def mark(self, word: str) -> None:
        """Take an end sample. What takes long is outside the window: GPM 0.1 to 0.2 s, the energy 3 to 7 ms.

        Raises ValueError for another word than "open" and "close": our own bug.
        """
        if word not in ("open", "close"):
            raise ValueError(f'the load generator sent {word!r}, which is neither "open" nor "close"')
        if word == "open":
            self._first_gpm = self._gpu.gpm_sample() if self._gpu else None
            energy_mj = self._energy_mj()
            self._opened = End(at_ns=self._clock(), cpu=self._cpu.times(), energy_mj=energy_mj)
        else:
            self._closed = End(at_ns=self._clock(), cpu=self._cpu.times(), energy_mj=self._energy_mj())
            self._last_gpm = self._gpu.gpm_sample() if self._gpu else None

    def result(self) -> TelemetryResult:
        """Summarise the window; all is None unless it was opened and closed."""
        opened, closed = self._opened, self._closed
        if opened is None or closed is None:
            return TelemetryResult(activity=Activity())
        gpm = GpmMetrics()
        if self._gpu and self._first_gpm and self._last_gpm:
            gpm = self._gpu.gpm_metrics(self._first_gpm, self._last_gpm)
        return TelemetryResult(activity=summarise(self.samples, opened, closed, gpm))

    def _energy_mj(self) -> int | None:
        return self._gpu.energy_mj() if self._gpu else None

    def _answer_marks(self, window: Connection) -> bool:
        """Handle every mark that has come. False once no more can."""
        try:
            while window.poll():
                word = window.recv()
                self.mark(word)
                window.send(word)
        except (EOFError, OSError):
            return False
        return True


def summarise(samples: Sequence[Sample], opened: End, closed: End, gpm: GpmMetrics) -> Activity:
    """Compute a window's activity from its two ends, GPM's means around it, and the polled samples within.

    Samples at the ends count as within; the others are ignored.
    """
    within = [sample for sample in samples if opened.at_ns <= sample.at_ns <= closed.at_ns]
    utilization = _known(sample.gpu_utilization_pct for sample in within)
    clocks = _known(sample.sm_clock_mhz for sample in within)
    interval_s = seconds(closed.at_ns - opened.at_ns)
    gpm = over_window(gpm, interval_s)
    energy_j = _energy_j(opened, closed)
    return Activity(
        interval_s=interval_s,
        gpu_utilization_pct=_mean(utilization),
        gpu_utilization_samples=len(utilization),
        sm_activity_pct=gpm.sm_activity_pct,
        sm_occupancy_pct=gpm.sm_occupancy_pct,
        tensor_activity_pct=gpm.tensor_activity_pct,
        dram_activity_pct=gpm.dram_activity_pct,
        pcie_rx_bytes_per_s=gpm.pcie_rx_bytes_per_s,
        pcie_tx_bytes_per_s=gpm.pcie_tx_bytes_per_s,
        gpu_memory_used_bytes=max(_known(sample.gpu_memory_used_bytes for sample in within), default=None),
        energy_j=energy_j,
        power_w=None if energy_j is None else energy_j / interval_s,
        sm_clock_mhz_mean=_mean(clocks),
        sm_clock_mhz_min=min(clocks, default=None),
        throttle_reasons=_throttled(within),
        cpu_utilization_pct=cpu_utilization_pct(opened.cpu, closed.cpu),
    )


def over_window(gpm: GpmMetrics, interval_s: float) -> GpmMetrics:
    """Refer GPM's means to the window, which lies within GPM's own interval.

    No request is under way between the ends of the one and of the other, so all activity is the window's.
    """
    if gpm.interval_s is None or interval_s <= 0:
        return GpmMetrics()
    factor = gpm.interval_s / interval_s

    def share(percent: float | None) -> float | None:
        return None if percent is None else min(100.0, percent * factor)

    def rate(per_s: float | None) -> float | None:
        return None if per_s is None else per_s * factor

    return GpmMetrics(
        interval_s=interval_s,
        sm_activity_pct=share(gpm.sm_activity_pct),
        sm_occupancy_pct=share(gpm.sm_occupancy_pct),
        tensor_activity_pct=share(gpm.tensor_activity_pct),
        dram_activity_pct=share(gpm.dram_activity_pct),
        pcie_rx_bytes_per_s=rate(gpm.pcie_rx_bytes_per_s),
        pcie_tx_bytes_per_s=rate(gpm.pcie_tx_bytes_per_s),
    )


def cpu_utilization_pct(before: CpuTimes, after: CpuTimes) -> float | None:
    """Return the busy share of all CPUs' time between two readings, 0 to 100; None if no time passed."""
    total_s = after.total_s - before.total_s
    if total_s <= 0:
        return None
    # The kernel's count of waiting for disks can step back, and with it the share leave its bounds. Source:
    # proc_stat(5), iowait.
    return min(100.0, max(0.0, 100.0 * (after.busy_s - before.busy_s) / total_s))


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write Parquet (zstd), nulls for what is unknown. Raises OutputError if the file cannot be written."""
    columns = {name: [getattr(sample, name) for sample in samples] for name in SCHEMA.names}
    with writing(path, "choose another output folder"):
        pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")


def _known(values: Iterable[Number | None]) -> list[Number]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _energy_j(opened: End, closed: End) -> float | None:
    if opened.energy_mj is None or closed.energy_mj is None:
        return None
    if closed.at_ns - opened.at_ns < ENERGY_MIN_S * NS_PER_S:
        return None
    return (closed.energy_mj - opened.energy_mj) / 1000


def _throttled(samples: Iterable[Sample]) -> tuple[str, ...]:
    """Name every reason that any sample saw, each once."""
    masks = _known(sample.throttle_reasons for sample in samples)
    return throttle_words(functools.reduce(operator.or_, masks, 0))


def _wait(connections: list[Connection], timeout_s: float) -> list[Connection]:
    ready = wait(connections, timeout_s)
    return [connection for connection in connections if connection in ready]
