"""The summary of one run: what `--json` prints, `summary.json` holds, and sweep, compare and tables read.

Everything in it can be computed again from the raw files beside it. A field is None where the machine or the run does
not say; it is never 0 for "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.bench.calibration import Calibration
from headrace.bench.stats import Metrics
from headrace.config import RunConfig
from headrace.errors import OutputError

SCHEMA_VERSION = 1
FILE_NAME = "summary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the devices did from just before the first measured request was issued to just after the last answer.

    Percentages are 0 to 100. Sources: NVML's GPM metrics (deltas of two samples, at the driver's refreshes just outside
    the interval, referred to the interval's length), NVML's energy counter (delta; None below 1 s, since it moves every
    100 ms), the kernel's CPU times (delta); the rest is polled within the interval. NVML's own utilization and throttle
    reasons lag, and may tell of the time before an interval shorter than half a second.
    """

    interval_s: float | None = None  # true length between the two end samples
    gpu_utilization_pct: float | None = None  # mean of NVML utilization.gpu: share of time with any kernel running
    gpu_utilization_samples: int = 0
    sm_activity_pct: float | None = None
    sm_occupancy_pct: float | None = None
    tensor_activity_pct: float | None = None
    dram_activity_pct: float | None = None
    pcie_rx_bytes_per_s: float | None = None  # host to device
    pcie_tx_bytes_per_s: float | None = None  # device to host
    gpu_memory_used_bytes: int | None = None  # largest polled
    energy_j: float | None = None
    power_w: float | None = None  # energy_j / interval_s
    sm_clock_mhz_mean: float | None = None
    sm_clock_mhz_min: float | None = None
    throttle_reasons: tuple[str, ...] = ()  # every reason seen within the interval; idle is not one
    cpu_utilization_pct: float | None = None  # of all logical CPUs of the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCheck:
    """How the answers compared with the eager model's to the same rows, made by another process before the run."""

    checked_rows: int
    wrong_rows: int
    tolerance: float  # largest relative L2 error of a row that counts as right
    max_error: float  # largest seen
    nearest_distinct: float | None  # relative L2 distance of the two most alike reference answers: errors below half of
    # it can be told from an exchanged row; None with one row
    # Share of rows whose largest value stands where the eager model has its own; None unless a row is [classes].
    top1_agreement: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """What the backend process itself saw after the run."""

    torch: str
    torchvision: str
    cuda: str | None
    cudnn: int | None
    device_name: str
    cudnn_tf32: bool  # convolutions may round float32 to TF32
    matmul_tf32: bool
    threads: int  # intra-op


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where the run took place. No host name and no path: results are published."""

    headrace: str
    git_revision: str | None
    git_dirty: bool | None
    python: str
    platform: str
    cpu_model: str
    cpu_count: int  # logical CPUs that the process may use
    memory_bytes: int
    gpu_name: str | None = None
    gpu_count: int = 0
    gpu_memory_bytes: int | None = None
    gpu_driver: str | None = None
    gpu_power_limit_w: float | None = None
    gpu_max_sm_clock_mhz: int | None = None
    gpu_max_memory_clock_mhz: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    variables: dict[str, str] | None = None  # of the environment, those that steer torch, CUDA and OpenMP
    packages: dict[str, str] | None = None  # numpy, pyarrow, ... -> version

    def device_name(self, device: str) -> str:
        """Name what computes for "cpu", "cuda" or "cuda:N"."""
        if self.gpu_name and device != "cpu":
            return self.gpu_name
        return f"{self.cpu_model}, {self.cpu_count} CPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no server can exceed, measured in the run's own process right after it. None where there is no device."""

    bucket: int  # rows of the batches that the model ran with
    row_bytes: int  # of a request's row
    answer_bytes: int  # of an answer's row
    forward_samples_per_s: dict[int, float]  # the model alone, by the number of streams
    h2d_bytes_per_s: float | None
    d2h_bytes_per_s: float | None
    memcpy_bytes_per_s: dict[int, float]  # within the host's memory, by the number of threads

    def samples_per_s(self, *, client_copies: bool) -> dict[str, float]:
        """Return each limit as samples/s, by name."""
        limits = {"compute": max(self.forward_samples_per_s.values())}
        if self.h2d_bytes_per_s is not None:
            limits["copy in"] = self.h2d_bytes_per_s / self.row_bytes
        if self.d2h_bytes_per_s is not None:
            limits["copy out"] = self.d2h_bytes_per_s / self.answer_bytes
        if client_copies:
            limits["host memory"] = max(self.memcpy_bytes_per_s.values()) / self.row_bytes
        return limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """A run against the smallest limit of its own process."""

    binding: str  # which limit is the smallest
    limit_samples_per_s: float
    ratio: float  # throughput / limit

    @classmethod
    def of(cls, throughput: float, limits: Limits, *, client_copies: bool) -> Efficiency:
        by_name = limits.samples_per_s(client_copies=client_copies)
        binding = min(by_name, key=by_name.__getitem__)
        return cls(binding=binding, limit_samples_per_s=by_name[binding], ratio=throughput / by_name[binding])


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """Of a run against a server that was named by its URL."""

    inputs: dict[str, str]  # what a request carried: "float32 [1, 3, 224, 224]" by name
    payload_bytes: float  # of a request's body, mean
    payloads: int  # different ones
    compared_with: str  # what the answers had to be
    connections: int  # most at once, of all generators
    client_cpu_share: tuple[float, ...]  # of a core, by generator, while it sent
    server_success: int | None = None  # what the server counted meanwhile; None where it does not say
    server_fail: int | None = None
    repeated_speed: float | None = None  # a payload's first answer over its second, in time; what 9 of 10 exceed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShare:
    """What one of several engines did of the measured requests."""

    place: str  # where it computed
    requests: int  # answered rightly
    rows: int
    share: float | None  # of all rows that were answered
    samples_per_s: float | None  # over the run's window
    activity: Activity | None = None  # of its GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    schema_version: int
    experiment: str  # row name in the published tables
    started_at: str  # UTC, ISO 8601
    options: RunConfig
    command: tuple[str, ...]  # as typed, to run it again
    metrics: Metrics
    warmup_parts_s: dict[str, float]  # in order; they sum to the warm-up latency
    workers_warmed: int  # predict threads that had answered before the measured requests began
    activity: Activity
    answers: AnswerCheck | None
    environment: Environment
    torch: TorchFacts | None
    limits: Limits | None = None
    efficiency: Efficiency | None = None
    target: TargetFacts | None = None
    calibration: Calibration | None = None  # of the machine that a URL was measured from
    marks: tuple[str, ...] = ()  # why numbers must not be taken as they are: overload, a late or a limiting client
    engines: tuple[EngineShare, ...] = ()  # where there are several
    notes: tuple[str, ...] = ()  # what a reader must know: limits that applied, random weights, profiling
    error: str | None = None  # why the run does not count


def encode(value: object) -> bytes:
    """Return indented JSON. Paths become text; NaN and infinities do not occur."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_as_text), indent=2) + b"\n"


def load_summary(run_dir: Path) -> RunSummary:
    """Read the summary of a run's folder. Raises OutputError where there is none or it is of another version."""
    path = run_dir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunSummary, dec_hook=_from_text)
    except OSError as error:
        raise OutputError(f"{path}: no run summary there ({error.strerror}); name a run's output folder") from error
    except msgspec.MsgspecError as error:
        raise OutputError(
            f"{path}: not a run summary of version {SCHEMA_VERSION} ({error}); measure again with this Headrace"
        ) from error


def _as_text(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} in a summary")


def _from_text(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"{kind.__name__} in a summary")
