"""The numbers that are read off one run and then tabled or compared, each with its unit and its direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headrace.bench.summary import RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """One number of a run. `read` returns None where the run does not say."""

    name: str
    unit: str
    read: Callable[[RunSummary], float | None]
    higher_is_better: bool | None = None  # None: neither; it describes, it does not rank
    percentile: float | None = None  # of response time: shown of all requests, with an interval only from 5 runs on

    @property
    def is_percentile(self) -> bool:
        return self.percentile is not None

    def values(self, runs: Iterable[RunSummary]) -> tuple[float, ...]:
        read = (self.read(run) for run in runs)
        return tuple(value for value in read if value is not None)


def _average_latency(run: RunSummary) -> float | None:
    return run.metrics.response_time.mean if run.metrics.response_time else None


def _p50(run: RunSummary) -> float | None:
    return run.metrics.response_time.p50 if run.metrics.response_time else None


def _p99(run: RunSummary) -> float | None:
    return run.metrics.response_time.p99 if run.metrics.response_time else None


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


WARMUP = Quantity(
    name="warm-up latency", unit="s", read=lambda run: run.metrics.warmup_latency_s, higher_is_better=False
)
AVERAGE = Quantity(name="average latency", unit="s", read=_average_latency, higher_is_better=False)
P50 = Quantity(name="p50 response time", unit="s", read=_p50, higher_is_better=False, percentile=50)
P99 = Quantity(name="p99 response time", unit="s", read=_p99, higher_is_better=False, percentile=99)
THROUGHPUT = Quantity(
    name="throughput",
    unit="samples/s",
    read=lambda run: run.metrics.throughput_samples_per_s,
    higher_is_better=True,
)
GPU_UTILIZATION = Quantity(name="GPU utilization", unit="%", read=lambda run: run.activity.gpu_utilization_pct)
SM_ACTIVITY = Quantity(name="SM activity", unit="%", read=lambda run: run.activity.sm_activity_pct)
TENSOR_ACTIVITY = Quantity(name="tensor activity", unit="%", read=lambda run: run.activity.tensor_activity_pct)
PCIE_RX = Quantity(name="PCIe in", unit="GB/s", read=lambda run: _giga(run.activity.pcie_rx_bytes_per_s))
PCIE_TX = Quantity(name="PCIe out", unit="GB/s", read=lambda run: _giga(run.activity.pcie_tx_bytes_per_s))
POWER = Quantity(name="power", unit="W", read=lambda run: run.activity.power_w)
CPU = Quantity(name="CPU", unit="%", read=lambda run: run.activity.cpu_utilization_pct)

PUBLISHED = (WARMUP, AVERAGE, THROUGHPUT, GPU_UTILIZATION)  # the columns of the published tables, in order
COMPARED = (WARMUP, AVERAGE, P99, THROUGHPUT, GPU_UTILIZATION, SM_ACTIVITY)
WIDE = (P50, P99, SM_ACTIVITY, TENSOR_ACTIVITY, PCIE_RX, PCIE_TX, POWER, CPU)
