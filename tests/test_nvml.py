"""A fake pynvml: the functions are ours; constants, structures and errors are pynvml's."""

from __future__ import annotations

import ctypes
import math
from types import ModuleType, SimpleNamespace

import pynvml
import pytest

from headrace.errors import DeviceUnavailable
from headrace.nvml import (
    GpmMetrics,
    GpuFacts,
    GpuState,
    ListedGpu,
    NvmlGpu,
    cuda_uuid,
    find_gpu,
    open_gpu,
    throttle_words,
    visible_uuids,
)

ALIKE = ("GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3")
H100S = [ListedGpu(uuid, "H100") for uuid in ALIKE]
UNLIKE = [ListedGpu("GPU-aaaa-1", "T4"), ListedGpu("GPU-cccc-3", "H100")]

ANSWERS = {
    "nvmlInit": None,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlDeviceGetHandleByUUID": "handle",
    "nvmlDeviceGetUUID": "GPU-aaaa-1",
    "nvmlDeviceGetName": "NVIDIA H100",
    "nvmlSystemGetDriverVersion": "580.1",
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=75, memory=20),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=1000, total=8000),
    "nvmlDeviceGetClockInfo": 1980,
    "nvmlDeviceGetMaxClockInfo": 2619,
    "nvmlDeviceGetPowerUsage": 350_500,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTemperature": 41,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x8,
    "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetCurrPcieLinkWidth": 16,
    "nvmlDeviceGetTotalEnergyConsumption": 123_456,
    "nvmlGpmQueryDeviceSupport": SimpleNamespace(isSupportedDevice=1),
    "nvmlGpmSampleAlloc": None,
    "nvmlGpmSampleGet": None,
}


class FakeNvml(ModuleType):
    """pynvml with its functions replaced: each fails with its code in `errors`, or else gives its answer."""

    def __init__(self, errors: dict[str, int] | None = None, **answers: object) -> None:
        super().__init__("fake_pynvml")
        self._errors = errors or {}
        self._answers = ANSWERS | answers
        self.asked: list[tuple] = []

    def __getattr__(self, name: str):
        if name in self._answers or name in self._errors:
            return self._question(name)
        assert not name.startswith("nvmlGpm"), f"{name} would reach the real library"
        return getattr(pynvml, name)

    def _question(self, name: str):
        def question(*arguments):
            self.asked.append((name, *arguments))
            if name in self._errors:
                raise pynvml.NVMLError(self._errors[name])
            answer = self._answers[name]
            return answer(*arguments) if callable(answer) else answer

        question.__name__ = name
        return question


NO_ANSWERS = [
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        pytest.param("0,1,2", ALIKE, id="all in order"),
        pytest.param("2,0", (ALIKE[2], ALIKE[0]), id="reordered"),
        pytest.param(" 1 , 2", (ALIKE[1], ALIKE[2]), id="with blanks"),
        pytest.param("", (), id="empty hides all"),
        pytest.param("-1", (), id="negative hides all"),
        pytest.param("1,-1,0", (ALIKE[1],), id="negative hides the rest"),
        pytest.param("0,7,1", (ALIKE[0],), id="out of range hides the rest"),
        pytest.param("1,1", (), id="repeated hides all"),
        pytest.param("GPU-cccc-3,GPU-aaaa-1", (ALIKE[2], ALIKE[0]), id="UUIDs"),
        pytest.param("GPU-c", (ALIKE[2],), id="beginning of one UUID"),
        pytest.param("GPU-aa", (), id="beginning of two UUIDs"),
        pytest.param("MIG-1234", ("MIG-1234",), id="MIG slice"),
    ],
)
def test_visible_devices_are_read_as_cuda_does(visible, expected):
    assert visible_uuids(visible, ALIKE) == expected


@pytest.mark.parametrize(
    ("environ", "gpus", "index", "expected"),
    [
        pytest.param({}, H100S, 1, ALIKE[1], id="unset shows all"),
        pytest.param({}, H100S, 3, None, id="index too large"),
        pytest.param({}, [], 0, None, id="no GPU"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "2"}, H100S, 0, ALIKE[2], id="renumbered"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "2"}, H100S, 2, None, id="hidden"),
        pytest.param({}, UNLIKE, 0, None, id="unlike GPUs without an order"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "1"}, UNLIKE, 0, None, id="unlike GPUs by number"),
        pytest.param({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, UNLIKE, 1, "GPU-cccc-3", id="unlike GPUs in PCI order"),
        pytest.param({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, UNLIKE, 1, None, id="unlike GPUs in order of speed"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "GPU-cccc-3"}, UNLIKE, 0, "GPU-cccc-3", id="unlike GPUs by UUID"),
    ],
)
def test_cuda_index_finds_its_gpu_or_none(environ, gpus, index, expected):
    assert cuda_uuid(index, environ, gpus) == expected


@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_NO_PERMISSION,
    ],
)
def test_a_machine_without_nvml_has_no_gpu(code):
    assert find_gpu(FakeNvml({"nvmlInit": code}), 0, None, {}) is None


@pytest.mark.parametrize(
    ("uuid", "asked_for"),
    [
        pytest.param("GPU-bbbb", "GPU-bbbb", id="as NVML writes it"),
        pytest.param("bbbb", "GPU-bbbb", id="as torch writes it"),
        pytest.param("MIG-bbbb", "MIG-bbbb", id="MIG slice"),
        pytest.param(None, "GPU-aaaa-1", id="none given: by CUDA's index"),
    ],
)
def test_a_given_uuid_decides(uuid, asked_for):
    nvml = FakeNvml()
    assert find_gpu(nvml, 0, uuid, {}) is not None
    assert ("nvmlDeviceGetHandleByUUID", asked_for) in nvml.asked


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT])
def test_a_uuid_that_no_gpu_has_finds_none(code):
    assert find_gpu(FakeNvml({"nvmlDeviceGetHandleByUUID": code}), 0, "GPU-zzzz", {}) is None


def test_a_device_that_is_not_ours_to_use_is_not_counted():
    nvml = FakeNvml({"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_NO_PERMISSION})
    assert find_gpu(nvml, 0, None, {}) is None


def test_state_and_facts_convert_units():
    gpu = NvmlGpu(FakeNvml(), "handle")
    assert gpu.state() == GpuState(
        utilization_pct=75.0,
        memory_used_bytes=1000,
        sm_clock_mhz=1980,
        memory_clock_mhz=1980,
        power_w=350.5,
        temperature_c=41,
        throttle_reasons=0x4,
    )
    assert gpu.facts() == GpuFacts(
        name="NVIDIA H100",
        count=1,
        memory_bytes=8000,
        driver="580.1",
        power_limit_w=700.0,
        max_sm_clock_mhz=2619,
        max_memory_clock_mhz=2619,
        pcie_generation=5,
        pcie_width=16,
    )
    assert gpu.energy_mj() == 123_456
    assert gpu.uuid() == "GPU-aaaa-1"


@pytest.mark.parametrize("code", NO_ANSWERS)
def test_what_nvml_does_not_answer_is_none_and_never_0(code):
    gpu = NvmlGpu(FakeNvml(dict.fromkeys(ANSWERS, code)), "handle")
    assert gpu.state() == GpuState()
    assert gpu.facts() == GpuFacts()
    assert gpu.energy_mj() is None
    assert gpu.gpm_sample() is None


def test_an_older_driver_is_asked_for_throttling_by_the_older_name():
    newer = {"nvmlDeviceGetCurrentClocksEventReasons": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    assert NvmlGpu(FakeNvml(newer), "handle").state().throttle_reasons == 0x8


def test_a_lost_gpu_is_an_error_that_names_the_question():
    gpu = NvmlGpu(FakeNvml({"nvmlDeviceGetPowerUsage": pynvml.NVML_ERROR_GPU_IS_LOST}), "handle")
    with pytest.raises(DeviceUnavailable, match=r"nvmlDeviceGetPowerUsage: GPU is lost"):
        gpu.state()


def test_a_gpu_without_gpm_gives_no_sample():
    unsupported = SimpleNamespace(isSupportedDevice=0)
    assert NvmlGpu(FakeNvml(nvmlGpmQueryDeviceSupport=unsupported), "handle").gpm_sample() is None


class GpmDriver:
    """The driver's half of GPM: counters move every 100 ms, answers go into the caller's structure."""

    def __init__(self, failing: frozenset[int] = frozenset(), moves: bool = True) -> None:
        self.now_ns = 1_050_000_000
        self._failing = failing
        self._moves = moves
        self._refreshes: dict[int, int] = {}  # by address of the sample

    def clock(self) -> int:
        return self.now_ns

    def pause(self, for_s: float) -> None:
        self.now_ns += round(for_s * 1e9)

    def alloc(self):
        address = 64 * (1 + len(self._refreshes))
        self._refreshes[address] = 0
        return ctypes.cast(address, pynvml.c_nvmlGpmSample_t)  # never followed

    def fill(self, _handle, sample):
        self._refreshes[_address(sample)] = self.now_ns // 100_000_000 if self._moves else 1
        return sample

    def answer(self, question):
        assert question.version == 1
        elapsed = self._refreshes[_address(question.sample2)] - self._refreshes[_address(question.sample1)]
        for metric in question.metrics[: question.numMetrics]:
            failed = metric.metricId in self._failing
            metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if failed else pynvml.NVML_SUCCESS
            stuck = math.nan if metric.metricId == pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL else 0.0
            # Its own id, so that a mix-up shows.
            metric.value = 0.0 if failed else float(metric.metricId) if elapsed else stuck
        return question

    def gpu(self, errors: dict[str, int] | None = None) -> NvmlGpu:
        nvml = FakeNvml(
            errors,
            nvmlGpmSampleAlloc=self.alloc,
            nvmlGpmSampleGet=self.fill,
            nvmlGpmMetricsGet=self.answer,
        )
        return NvmlGpu(nvml, "handle", self.clock, self.pause)


def _address(sample) -> int:
    return ctypes.cast(sample, ctypes.c_void_p).value or 0


def gpm_metrics(gpu: NvmlGpu) -> GpmMetrics:
    first, last = gpu.gpm_sample(), gpu.gpm_sample()
    assert first is not None
    assert last is not None
    return gpu.gpm_metrics(first, last)


def test_gpm_metrics_are_the_named_ones_with_pcie_in_bytes():
    assert gpm_metrics(GpmDriver().gpu()) == GpmMetrics(
        interval_s=pytest.approx(0.2),
        sm_activity_pct=2.0,
        sm_occupancy_pct=3.0,
        tensor_activity_pct=5.0,
        dram_activity_pct=10.0,
        pcie_tx_bytes_per_s=20.0 * 1024 * 1024,
        pcie_rx_bytes_per_s=21.0 * 1024 * 1024,
    )


def test_a_gpm_sample_is_taken_at_the_second_refresh_from_now():
    sample = GpmDriver().gpu().gpm_sample()  # at 1.05 s; the counters move at 1.1 and 1.2 s
    assert sample is not None
    assert sample.at_ns == 1_200_000_000


@pytest.mark.parametrize(
    "driver",
    [
        pytest.param(GpmDriver(moves=False), id="counters that stand still"),
        pytest.param(GpmDriver(failing=frozenset({10})), id="no memory metric to see them move by"),
    ],
)
def test_waiting_for_a_refresh_that_cannot_be_seen_ends(driver):
    sample = driver.gpu().gpm_sample()
    assert sample is not None
    assert sample.at_ns == pytest.approx(1_050_000_000 + 2 * 250_000_000)


def test_counters_that_did_not_move_are_unknown_and_not_0():
    metrics = gpm_metrics(GpmDriver(moves=False).gpu())
    assert metrics == GpmMetrics(interval_s=metrics.interval_s)


def test_a_gpm_metric_that_failed_alone_is_none_alone():
    metrics = gpm_metrics(GpmDriver(failing=frozenset({5, 21})).gpu())
    assert (metrics.tensor_activity_pct, metrics.pcie_rx_bytes_per_s) == (None, None)
    assert (metrics.sm_activity_pct, metrics.dram_activity_pct) == (2.0, 10.0)


def test_gpm_that_answers_nothing_is_all_none():
    metrics = gpm_metrics(GpmDriver().gpu({"nvmlGpmMetricsGet": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    assert metrics == GpmMetrics(interval_s=metrics.interval_s)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        pytest.param(0x0, (), id="none"),
        pytest.param(0x1, (), id="idle is no throttling"),
        pytest.param(0x2, (), id="chosen clocks are no throttling"),
        pytest.param(0x4, ("sw_power_cap",), id="power cap"),
        pytest.param(0x1 | 0x20 | 0x80, ("sw_thermal_slowdown", "hw_power_brake_slowdown"), id="several"),
        pytest.param(0x8000, ("unknown_0x8000",), id="a bit of a later driver"),
    ],
)
def test_throttle_reasons_in_words(mask, words):
    assert throttle_words(mask) == words


@pytest.mark.gpu
def test_a_real_gpu_describes_itself():
    gpu = open_gpu(0)
    if gpu is None:
        pytest.skip("no NVML here")
    facts = gpu.facts()
    assert facts.name
    assert facts.count >= 1
    state = gpu.state()
    assert (
        state.memory_used_bytes is None
        or facts.memory_bytes is None
        or (0 <= state.memory_used_bytes <= facts.memory_bytes)
    )
