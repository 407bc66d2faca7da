"""NVIDIA's management library, as far as telemetry and the environment record need it.

What NVML does not answer is None, never 0. `pynvml` is an argument of everything here, so that tests can give
another, and so that nothing looks for the driver's library before it is wanted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, TypeVar

from headrace.clock import NS_PER_S, Clock, now_ns, seconds
from headrace.errors import DeviceUnavailable

Answer = TypeVar("Answer")
BYTES_PER_MIB = 1 << 20

# Measured on an H100 (driver 580): GPM's counters move once in 100 ms and then show what had been some 70 ms
# before, so that two samples at the very ends of 0.12 s of work described mostly the work before it. The
# second refresh after a moment has all that happened until then.
GPM_REFRESHES = 2
GPM_REFRESH_TIMEOUT_S = 0.25  # of one
GPM_LOOK_S = 0.001  # between two looks; one takes 0.1 ms

# Bits of the clock event reasons that hold the clock below what it could be. Two bits are not among them: 0x1
# (idle) and 0x2 (clocks that an administrator chose). Source: NVML API reference, nvmlClocksEventReasons.
THROTTLE_WORDS = {
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
_NOT_THROTTLING = 0x1 | 0x2


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One poll."""

    utilization_pct: float | None = None  # share of NVML's own sample period (up to 1 s) with any kernel running
    memory_used_bytes: int | None = None  # by every process; without what the driver reserves
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle_reasons: int | None = None  # bit mask, idle included


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What does not change during a run."""

    name: str | None = None
    count: int = 0  # of GPUs in the machine
    memory_bytes: int | None = None
    driver: str | None = None
    power_limit_w: float | None = None  # the lowest of all limits in force
    max_sm_clock_mhz: int | None = None
    max_memory_clock_mhz: int | None = None
    pcie_generation: int | None = (
        None  # best of GPU and slot together: an idle link trains down, so not the current one
    )
    pcie_width: int | None = None  # current: it stays when idle, and shows a badly seated card


@dataclass(frozen=True, slots=True)
class GpmSample:
    """The GPU's hardware counters at one moment; it can only be read against another one of the same GPU."""

    buffer: object
    at_ns: int  # when the driver had refreshed them


@dataclass(frozen=True, slots=True, kw_only=True)
class GpmMetrics:
    """Means between two samples. Percentages are 0 to 100."""

    interval_s: float | None = None  # between the samples
    sm_activity_pct: float | None = None
    sm_occupancy_pct: float | None = None
    tensor_activity_pct: float | None = None
    dram_activity_pct: float | None = None
    pcie_rx_bytes_per_s: float | None = None  # the GPU receives: host to device
    pcie_tx_bytes_per_s: float | None = None  # the GPU transmits: device to host


class Gpu(Protocol):
    """One GPU, asked while it works. Each may raise DeviceUnavailable, if the GPU is lost."""

    def state(self) -> GpuState: ...

    def energy_mj(self) -> int | None:
        """Return millijoules since the driver was loaded."""

    def gpm_sample(self) -> GpmSample | None:
        """Return the counters with all that has happened so far; on an H100 that takes 0.1 to 0.2 s.

        None before Hopper, and for a MIG slice.
        """

    def gpm_metrics(self, first: GpmSample, last: GpmSample) -> GpmMetrics: ...


def throttle_words(mask: int) -> tuple[str, ...]:
    """Name the reasons in a bit mask, lowest bit first, without those that are no throttling."""
    bits = (1 << position for position in range(mask.bit_length()))
    return tuple(
        THROTTLE_WORDS.get(bit, f"unknown_{bit:#x}") for bit in bits if mask & bit and not bit & _NOT_THROTTLING
    )


def open_gpu(cuda_index: int, uuid: str | None = None) -> NvmlGpu | None:
    """Open the GPU that CUDA calls `cuda_index` in a process with our environment, or the one of that UUID.

    None if there is no NVML, no such device, or no telling which device CUDA means (see `cuda_uuid`).
    Raises DeviceUnavailable if NVML breaks while it is asked.
    """
    import pynvml  # noqa: PLC0415 - only a run on a GPU needs it

    return find_gpu(pynvml, cuda_index, uuid, os.environ)


def find_gpu(nvml: ModuleType, cuda_index: int, uuid: str | None, environ: Mapping[str, str]) -> NvmlGpu | None:
    """Do what `open_gpu` says, by this `pynvml` and in this environment."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no library, no driver, no permission: all mean that this machine has no NVML for us
        return None
    if uuid is None:
        uuid = cuda_uuid(cuda_index, environ, list_devices(nvml))
    elif not uuid.startswith(("GPU-", "MIG-")):
        uuid = f"GPU-{uuid}"  # torch leaves the prefix out
    if uuid is None:
        return None
    try:
        return NvmlGpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return None


@dataclass(frozen=True, slots=True)
class ListedGpu:
    uuid: str
    name: str


def cuda_uuid(cuda_index: int, environ: Mapping[str, str], gpus: Sequence[ListedGpu]) -> str | None:
    """Return the UUID of CUDA's device `cuda_index`, given all GPUs in the order of their PCI addresses.

    None where the process sees no such device. None also where unlike GPUs are chosen by number: CUDA then
    numbers them by its own idea of speed, and another GPU's activity is worse than none;
    CUDA_DEVICE_ORDER=PCI_BUS_ID settles it. Source: CUDA C++ programming guide, environment variables.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    by_number = visible is None or any(entry.strip().isdecimal() for entry in visible.split(","))
    alike = len({gpu.name for gpu in gpus}) <= 1
    if by_number and not alike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return None
    uuids = [gpu.uuid for gpu in gpus]
    seen = tuple(uuids) if visible is None else visible_uuids(visible, uuids)
    return seen[cuda_index] if cuda_index < len(seen) else None


def visible_uuids(visible: str, uuids: Sequence[str]) -> tuple[str, ...]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: an unknown entry ends it, a repeated one empties it."""
    seen: list[str] = []
    for entry in visible.split(","):
        uuid = _named_by(entry.strip(), uuids)
        if uuid is None:
            break
        if uuid in seen:
            return ()
        seen.append(uuid)
    return tuple(seen)


def _named_by(entry: str, uuids: Sequence[str]) -> str | None:
    if entry.startswith("MIG-"):
        return entry
    if entry.startswith("GPU-"):  # the beginning of a UUID is enough, if only one GPU's begins so
        matching = [uuid for uuid in uuids if uuid.startswith(entry)]
        return matching[0] if len(matching) == 1 else None
    return uuids[int(entry)] if entry.isdecimal() and int(entry) < len(uuids) else None


def list_devices(nvml: ModuleType) -> list[ListedGpu]:
    """Return all GPUs that we may use, in the order of their PCI addresses."""
    listed = []
    for index in range(ask(nvml, nvml.nvmlDeviceGetCount) or 0):
        handle = ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:  # None: not ours to use, so CUDA does not see it either
            uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
            listed.append(ListedGpu(uuid, name))
    return listed


def ask(nvml: ModuleType, question: Callable[..., Answer], *arguments: object) -> Answer | None:
    """Call one of NVML's functions; None if this GPU, driver or user gets no answer to it.

    Raises DeviceUnavailable for every other failure: a lost GPU must not look like one without sensors.
    """
    no_answer = (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_NO_PERMISSION,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # an older driver
        nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,  # likewise
        nvml.NVML_ERROR_INVALID_ARGUMENT,  # a MIG slice, asked what only the whole GPU knows
        nvml.NVML_ERROR_NO_DATA,
    )
    try:
        return question(*arguments)
    except nvml.NVMLError as error:
        if error.value in no_answer:
            return None
        raise DeviceUnavailable(
            f"NVML failed at {question.__name__}: {error}; see whether nvidia-smi still lists the GPU"
        ) from error


class NvmlGpu:
    """A Gpu by NVML. `handle` is NVML's for a device or a MIG slice."""

    def __init__(
        self,
        nvml: ModuleType,
        handle: object,
        clock: Clock = now_ns,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._nvml = nvml
        self._handle = handle
        self._clock = clock
        self._pause = pause

    def state(self) -> GpuState:
        nvml = self._nvml
        utilization = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlMemory_v2)
        return GpuState(
            utilization_pct=None if utilization is None else float(utilization.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            power_w=_thousandth(self._ask(nvml.nvmlDeviceGetPowerUsage)),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            throttle_reasons=self._throttle_reasons(),
        )

    def facts(self) -> GpuFacts:
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlMemory_v2)
        return GpuFacts(
            name=self._ask(nvml.nvmlDeviceGetName),
            count=ask(nvml, nvml.nvmlDeviceGetCount) or 0,
            memory_bytes=None if memory is None else int(memory.total),
            driver=ask(nvml, nvml.nvmlSystemGetDriverVersion),
            power_limit_w=_thousandth(self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)),
            max_sm_clock_mhz=self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            max_memory_clock_mhz=self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
            pcie_generation=self._ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
            pcie_width=self._ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        )

    def uuid(self) -> str | None:
        return self._ask(self._nvml.nvmlDeviceGetUUID)

    def energy_mj(self) -> int | None:
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def gpm_sample(self) -> GpmSample | None:
        """The buffers are never freed: a process takes two samples."""
        nvml = self._nvml
        support = self._ask(nvml.nvmlGpmQueryDeviceSupport)
        if support is None or not support.isSupportedDevice:
            return None
        known, fresh = ask(nvml, nvml.nvmlGpmSampleAlloc), ask(nvml, nvml.nvmlGpmSampleAlloc)
        if self._ask(nvml.nvmlGpmSampleGet, known) is None:
            return None
        for _ in range(GPM_REFRESHES):
            self._await_refresh(known, fresh)
            known, fresh = fresh, known
        return GpmSample(known, self._clock())

    def gpm_metrics(self, first: GpmSample, last: GpmSample) -> GpmMetrics:
        nvml = self._nvml
        ids = (
            nvml.NVML_GPM_METRIC_SM_UTIL,
            nvml.NVML_GPM_METRIC_SM_OCCUPANCY,
            nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
            nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
            nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC,
            nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC,
        )
        values = self._gpm_values(first.buffer, last.buffer, ids)
        sm, occupancy, tensor, dram, received_mib, transmitted_mib = values
        return GpmMetrics(
            interval_s=seconds(last.at_ns - first.at_ns),
            sm_activity_pct=sm,
            sm_occupancy_pct=occupancy,
            tensor_activity_pct=tensor,
            dram_activity_pct=dram,
            pcie_rx_bytes_per_s=None if received_mib is None else received_mib * BYTES_PER_MIB,
            pcie_tx_bytes_per_s=None if transmitted_mib is None else transmitted_mib * BYTES_PER_MIB,
        )

    def _await_refresh(self, known: object, fresh: object) -> None:
        """Fill `fresh` until it is newer than `known`, or time is up."""
        nvml = self._nvml
        deadline_ns = self._clock() + round(GPM_REFRESH_TIMEOUT_S * NS_PER_S)
        while True:
            self._pause(GPM_LOOK_S)
            self._ask(nvml.nvmlGpmSampleGet, fresh)
            newer = self._gpm_values(known, fresh, [nvml.NVML_GPM_METRIC_DRAM_BW_UTIL]) != [None]
            if newer or self._clock() >= deadline_ns:
                return

    def _gpm_values(self, first: object, last: object, ids: Sequence[int]) -> list[float | None]:
        """Return one value per id; all are None if both samples are of the same refresh.

        Each value has its own return code, which the call's success does not cover. Samples of the same
        refresh answer with success, 0 for most metrics, and 0/0 for the memory's.
        """
        nvml = self._nvml
        question = nvml.c_nvmlGpmMetricsGet_t()
        question.version = nvml.NVML_GPM_METRICS_GET_VERSION
        question.numMetrics = len(ids)
        question.sample1, question.sample2 = first, last
        for place, metric in enumerate(ids):
            question.metrics[place].metricId = metric
        if ask(nvml, nvml.nvmlGpmMetricsGet, question) is None:
            return [None] * len(ids)
        answers = [question.metrics[place] for place in range(len(ids))]
        values = [float(each.value) if each.nvmlReturn == nvml.NVML_SUCCESS else None for each in answers]
        return [None] * len(ids) if any(value is not None and math.isnan(value) for value in values) else values

    def _throttle_reasons(self) -> int | None:
        """Drivers before 535 know the question by its older name only."""
        reasons: int | None = self._ask(self._nvml.nvmlDeviceGetCurrentClocksEventReasons)
        if reasons is None:
            reasons = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return reasons

    def _ask(self, question: Callable[..., Answer], *arguments: object) -> Answer | None:
        return ask(self._nvml, question, self._handle, *arguments)


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1000
