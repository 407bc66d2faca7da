from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.summary import Activity
from headrace.bench.telemetry import (
    SCHEMA,
    CpuTimes,
    End,
    Sample,
    SystemCpu,
    Telemetry,
    TelemetryJob,
    TelemetryResult,
    cpu_utilization_pct,
    over_window,
    run_telemetry,
    summarise,
    write_samples,
)
from headrace.clock import NS_PER_S
from headrace.errors import DeviceUnavailable, OutputError
from headrace.nvml import GpmMetrics, GpmSample, GpuState
from headrace.processes import ChildFailed, Ready

SPAWN_TIMEOUT_S = 60.0


class FakeClock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, by_s: float) -> None:
        self.now_ns += round(by_s * NS_PER_S)


class FakeCpu:
    """Four CPUs, one of them busy."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock

    def times(self) -> CpuTimes:
        now_s = self._clock() / NS_PER_S
        return CpuTimes(busy_s=now_s, total_s=4 * now_s)


class FakeGpu:
    """200 W; its k-th poll reads k times ten percent; GPM takes a quarter of a second, and counts seconds."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.polls = 0
        self.lost = False
        self.energy_takes_s = 0.0

    def state(self) -> GpuState:
        if self.lost:
            raise DeviceUnavailable("NVML failed: GPU is lost")
        self.polls += 1
        return GpuState(
            utilization_pct=10.0 * self.polls,
            memory_used_bytes=1000 + self.polls,
            sm_clock_mhz=2000 - self.polls,
            memory_clock_mhz=2600,
            power_w=200.0,
            temperature_c=40,
            throttle_reasons=0x1 if self.polls == 1 else 0x4,
        )

    def energy_mj(self) -> int | None:
        self._clock.advance(self.energy_takes_s)
        return self._clock() * 200 * 1000 // NS_PER_S

    def gpm_sample(self) -> GpmSample | None:
        self._clock.advance(0.25)
        return GpmSample(buffer=None, at_ns=self._clock())

    def gpm_metrics(self, first: GpmSample, last: GpmSample) -> GpmMetrics:
        interval_s = (last.at_ns - first.at_ns) / NS_PER_S
        return GpmMetrics(interval_s=interval_s, sm_activity_pct=70.0 / interval_s)


class Scene:
    """A Telemetry between two pipes. Its waits cost fake time, in which a script of events happens."""

    def __init__(self, gpu: bool = True) -> None:
        self.clock = FakeClock()
        self.gpu = FakeGpu(self.clock)
        self.telemetry = Telemetry(self.gpu if gpu else None, FakeCpu(self.clock), self.clock, interval_s=1.0)
        self.window, self._window = multiprocessing.Pipe()
        self.report, self._report = multiprocessing.Pipe()
        self.events: list[tuple[float, Callable[[], object]]] = []  # at which second, what

    def at(self, second: float, event: Callable[[], object]) -> None:
        self.events.append((second, event))

    def play(self) -> TelemetryResult:
        self.telemetry.watch(self._window, self._report, self._wait)
        return self.telemetry.result()

    def _wait(self, connections: list[Connection], timeout_s: float) -> list[Connection]:
        due_s = self.clock() / NS_PER_S + timeout_s
        if self.events and self.events[0][0] <= due_s:
            second, event = self.events.pop(0)
            self.clock.advance(max(0.0, second - self.clock() / NS_PER_S))
            event()
        else:
            self.clock.advance(timeout_s)
        return [connection for connection in connections if connection.poll()]

    def close(self) -> None:
        for connection in (self.window, self._window, self.report, self._report):
            connection.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with contextlib.closing(Scene()) as made:
        yield made


@pytest.fixture
def scene_without_gpu() -> Iterator[Scene]:
    with contextlib.closing(Scene(gpu=False)) as made:
        yield made


def play_window(scene: Scene) -> TelemetryResult:
    """Polls at 0, 1, 2, 3 and 4 s. GPM takes until 1.75 s, when the window opens; two polls lie within."""
    scene.at(1.5, lambda: scene.window.send("open"))
    scene.at(3.5, lambda: scene.window.send("close"))
    scene.at(4.5, lambda: scene.report.send("stop"))
    return scene.play()


def test_activity_of_a_window_is_what_a_hand_computes(scene):
    assert play_window(scene) == TelemetryResult(
        activity=Activity(
            interval_s=1.75,
            gpu_utilization_pct=35.0,
            gpu_utilization_samples=2,
            sm_activity_pct=pytest.approx(40.0),  # 35 % of the 2 s between GPM's samples
            gpu_memory_used_bytes=1004,
            energy_j=350.0,
            power_w=pytest.approx(200.0),
            sm_clock_mhz_mean=1996.5,
            sm_clock_mhz_min=1996,
            throttle_reasons=("sw_power_cap",),
            cpu_utilization_pct=pytest.approx(25.0),
        ),
    )


def seconds_of(samples: list[Sample]) -> list[float]:
    return [sample.at_ns / NS_PER_S for sample in samples]


def test_polls_keep_the_interval_whatever_comes_between(scene):
    play_window(scene)
    assert seconds_of(scene.telemetry.samples) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_without_a_gpu_its_fields_are_none_and_the_cpu_is_still_watched(scene_without_gpu):
    result = play_window(scene_without_gpu)
    assert result.activity == Activity(interval_s=2.0, cpu_utilization_pct=pytest.approx(25.0))
    assert len(scene_without_gpu.telemetry.samples) == 5


def test_every_mark_comes_back_as_its_acknowledgement(scene):
    play_window(scene)
    assert [scene.window.recv(), scene.window.recv()] == ["open", "close"]
    assert not scene.window.poll()


def test_a_mark_is_answered_before_the_next_poll(scene):
    answered = []
    scene.at(1.1, lambda: scene.window.send("open"))
    scene.at(1.9, lambda: answered.append(scene.window.poll()))
    scene.at(1.95, lambda: scene.report.send("stop"))
    scene.play()
    assert answered == [True]


@pytest.mark.parametrize("words", [(), ("open",), ("close",)], ids=["never opened", "never closed", "only closed"])
def test_stop_without_a_whole_window_gives_an_activity_of_nones(scene, words):
    for word in words:
        scene.window.send(word)
    scene.report.send("stop")
    assert scene.play() == TelemetryResult(activity=Activity())


def test_a_close_that_comes_with_the_stop_is_counted(scene):
    for word in ("open", "close"):
        scene.window.send(word)
    scene.report.send("stop")
    assert scene.play().activity.interval_s is not None


def test_a_dead_load_generator_leaves_telemetry_watching(scene):
    scene.at(0.5, scene.window.close)
    scene.at(2.5, lambda: scene.report.send("stop"))
    scene.play()
    assert seconds_of(scene.telemetry.samples) == [0.0, 1.0, 2.0]


def test_a_dead_supervisor_ends_it(scene):
    scene.at(1.5, scene.report.close)
    scene.play()
    assert len(scene.telemetry.samples) == 2


def test_a_poll_that_comes_late_is_not_made_up_for(scene):
    scene.at(0.5, lambda: scene.clock.advance(5.0))
    scene.at(8.0, lambda: scene.report.send("stop"))
    scene.play()
    assert seconds_of(scene.telemetry.samples) == [0.0, 5.5, 6.5, 7.5]


def test_what_marking_itself_takes_is_not_in_the_window(scene):
    scene.gpu.energy_takes_s = 0.005
    scene.telemetry.mark("open")
    scene.telemetry.mark("close")
    assert scene.telemetry.result().activity.interval_s == 0.0


def test_an_unknown_mark_is_our_own_bug(scene):
    with pytest.raises(ValueError, match="pause"):
        scene.telemetry.mark("pause")


def test_a_lost_gpu_is_not_recorded_as_an_idle_one(scene):
    scene.gpu.lost = True
    with pytest.raises(DeviceUnavailable):
        scene.play()


def sample(at_ns: int, **known: object) -> Sample:
    return Sample(**(dict.fromkeys(SCHEMA.names) | {"at_ns": at_ns} | known))


OPENED = End(at_ns=100, cpu=CpuTimes(0.0, 0.0), energy_mj=5000)
CLOSED = End(at_ns=200, cpu=CpuTimes(1.0, 8.0), energy_mj=8000)


def test_samples_outside_the_window_are_ignored_and_its_ends_belong_to_it():
    samples = [
        sample(99, gpu_utilization_pct=100.0, gpu_memory_used_bytes=9, sm_clock_mhz=1, throttle_reasons=0x8),
        sample(100, gpu_utilization_pct=20.0, gpu_memory_used_bytes=5, sm_clock_mhz=500, throttle_reasons=0x4),
        sample(200, gpu_utilization_pct=40.0, gpu_memory_used_bytes=4, sm_clock_mhz=700, throttle_reasons=0x40),
        sample(201, gpu_utilization_pct=100.0, gpu_memory_used_bytes=9, sm_clock_mhz=1, throttle_reasons=0x8),
    ]
    activity = summarise(samples, OPENED, CLOSED, GpmMetrics())
    assert (activity.gpu_utilization_pct, activity.gpu_utilization_samples) == (30.0, 2)
    assert activity.gpu_memory_used_bytes == 5
    assert (activity.sm_clock_mhz_mean, activity.sm_clock_mhz_min) == (600.0, 500)
    assert activity.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown")


def test_unknown_values_are_left_out_of_means_and_a_true_0_is_not():
    samples = [sample(110), sample(120, gpu_utilization_pct=0.0), sample(130, gpu_utilization_pct=50.0)]
    activity = summarise(samples, OPENED, CLOSED, GpmMetrics())
    assert (activity.gpu_utilization_pct, activity.gpu_utilization_samples) == (25.0, 2)
    assert (activity.gpu_memory_used_bytes, activity.sm_clock_mhz_mean) == (None, None)


def test_a_window_without_a_sample_still_has_its_ends():
    activity = summarise([], OPENED, CLOSED, GpmMetrics(interval_s=1e-7, dram_activity_pct=7.0))
    assert activity == Activity(interval_s=1e-7, dram_activity_pct=7.0, cpu_utilization_pct=12.5)


@pytest.mark.parametrize(
    ("after_s", "energy_mj", "expected"),
    [
        pytest.param(1.0, 8000, (3.0, 3.0), id="a second"),
        pytest.param(4.0, 8000, (3.0, 0.75), id="four seconds"),
        pytest.param(1.0, None, (None, None), id="unknown at one end"),
        pytest.param(0.9, 8000, (None, None), id="too short for the counter's steps"),
    ],
)
def test_energy_and_power(after_s, energy_mj, expected):
    closed = End(at_ns=OPENED.at_ns + round(after_s * NS_PER_S), cpu=CLOSED.cpu, energy_mj=energy_mj)
    activity = summarise([], OPENED, closed, GpmMetrics())
    assert (activity.energy_j, activity.power_w) == expected


GPM = GpmMetrics(interval_s=2.0, tensor_activity_pct=30.0, sm_activity_pct=60.0, pcie_rx_bytes_per_s=1e9)


@pytest.mark.parametrize(
    ("gpm", "interval_s", "expected"),
    [
        pytest.param(
            GPM,
            1.0,
            GpmMetrics(interval_s=1.0, tensor_activity_pct=60.0, sm_activity_pct=100.0, pcie_rx_bytes_per_s=2e9),
            id="half as long: twice as much, 100 % at most",
        ),
        pytest.param(GPM, 2.0, GPM, id="as long: the same"),
        pytest.param(GPM, 0.0, GpmMetrics(), id="no time passed"),
        pytest.param(GpmMetrics(), 1.0, GpmMetrics(), id="no GPM"),
    ],
)
def test_gpm_is_referred_to_the_window(gpm, interval_s, expected):
    assert over_window(gpm, interval_s) == expected


@given(
    at_ns=st.lists(st.integers(0, 300)),
    utilization=st.floats(0, 100),
    ends=st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted),
)
def test_a_mean_lies_within_its_samples_and_counts_each_once(at_ns, utilization, ends):
    opened, closed = (End(at_ns=end, cpu=CpuTimes(0.0, 0.0)) for end in ends)
    samples = [sample(each, gpu_utilization_pct=utilization) for each in at_ns]
    activity = summarise(samples, opened, closed, GpmMetrics())
    within = [each for each in at_ns if ends[0] <= each <= ends[1]]
    assert activity.gpu_utilization_samples == len(within)
    expected = pytest.approx(utilization) if within else None
    assert activity.gpu_utilization_pct == expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        pytest.param(CpuTimes(1.0, 10.0), CpuTimes(3.0, 14.0), 50.0, id="half busy"),
        pytest.param(CpuTimes(1.0, 10.0), CpuTimes(1.0, 14.0), 0.0, id="idle"),
        pytest.param(CpuTimes(1.0, 10.0), CpuTimes(1.0, 10.0), None, id="no time passed"),
        pytest.param(CpuTimes(1.0, 10.0), CpuTimes(6.0, 14.0), 100.0, id="iowait stepped back"),
    ],
)
def test_cpu_utilization(before, after, expected):
    assert cpu_utilization_pct(before, after) == expected


def test_the_systems_cpu_count_grows_and_busy_is_part_of_it():
    first, last = SystemCpu().times(), SystemCpu().times()
    assert 0 <= first.busy_s <= first.total_s <= last.total_s


def test_samples_are_kept_with_nulls_for_what_is_unknown(tmp_path):
    path = tmp_path / "telemetry.parquet"
    known = Sample(
        at_ns=1,
        gpu_utilization_pct=50.0,
        gpu_memory_used_bytes=80 << 30,
        sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        power_w=350.5,
        temperature_c=41,
        throttle_reasons=0x4,
        cpu_utilization_pct=12.5,
    )
    write_samples([known, sample(2)], path)
    rows = pq.read_table(path).to_pylist()
    assert [Sample(**row) for row in rows] == [known, sample(2)]


def test_no_samples_make_a_file_with_all_columns(tmp_path):
    write_samples([], tmp_path / "telemetry.parquet")
    assert pq.read_table(tmp_path / "telemetry.parquet").schema.names == SCHEMA.names


class Spawned:
    """run_telemetry in a process of its own, as the supervisor starts it."""

    def __init__(self, samples_path) -> None:
        context = multiprocessing.get_context("spawn")
        self.window, window = context.Pipe()
        self.report, report = context.Pipe()
        job = TelemetryJob(window=window, report=report, gpu_index=None, interval_s=0.01, samples_path=samples_path)
        self.process = context.Process(target=run_telemetry, args=(job,))
        self.process.start()
        window.close()
        report.close()

    def told(self, connection: Connection) -> object:
        assert connection.poll(SPAWN_TIMEOUT_S), "the process said nothing"
        return connection.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join(SPAWN_TIMEOUT_S)
        self.window.close()
        self.report.close()


def test_a_real_process_marks_a_window_and_reports(tmp_path):
    path = tmp_path / "telemetry.parquet"
    with contextlib.closing(Spawned(path)) as spawned:
        assert spawned.told(spawned.report) == Ready()
        for word in ("open", "close"):
            spawned.window.send(word)
            assert spawned.told(spawned.window) == word
        spawned.report.send("stop")
        result = spawned.told(spawned.report)
        spawned.process.join(SPAWN_TIMEOUT_S)
        assert spawned.process.exitcode == 0
    assert isinstance(result, TelemetryResult)
    assert result.activity.interval_s > 0
    assert result.activity.sm_activity_pct is None
    stamps = pq.read_table(path).column("at_ns").to_pylist()
    assert stamps
    assert stamps == sorted(stamps)


def test_a_file_that_cannot_be_written_is_the_runs_error(tmp_path):
    with contextlib.closing(Spawned(tmp_path / "missing" / "telemetry.parquet")) as spawned:
        assert spawned.told(spawned.report) == Ready()
        spawned.report.send("stop")
        failed = spawned.told(spawned.report)
    assert isinstance(failed, ChildFailed)
    assert isinstance(failed.error, OutputError)
    assert "telemetry.parquet" in str(failed.error)
