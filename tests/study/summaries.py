"""Makes run summaries, and what a sweep's child would leave on disk, without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from headrace.bench.stats import Distribution, Metrics
from headrace.bench.summary import (
    FILE_NAME,
    SCHEMA_VERSION,
    Activity,
    Environment,
    RunSummary,
    TorchFacts,
    encode,
)
from headrace.config import DesignConfig, DesignName, InputConfig, LoadConfig, ModelConfig, RunConfig
from headrace.study.plan import PlannedRun

GPU = Environment(
    headrace="0.1.0",
    git_revision="abcdef0123456789",
    git_dirty=False,
    python="3.12.3",
    platform="Linux 6.1 glibc-2.36 x86_64",
    cpu_model="Test CPU",
    cpu_count=16,
    memory_bytes=1 << 36,
    gpu_name="Test GPU",
    gpu_count=1,
    gpu_driver="580.1",
)
TORCH = TorchFacts(
    torch="2.11.0",
    torchvision="0.26.0",
    cuda="13.0",
    cudnn=91000,
    device_name="Test GPU",
    cudnn_tf32=True,
    matmul_tf32=False,
    threads=16,
)


def distribution(mean: float) -> Distribution:
    return Distribution(
        mean=mean, min=mean / 10, p50=mean, p90=mean * 1.5, p95=mean * 1.6, p99=mean * 1.8, max=mean * 2
    )


def metrics(*, warmup: float = 5.0, latency: float = 2.0, throughput: float | None = 1000.0, wrong: int = 0) -> Metrics:
    answered = throughput is not None
    return Metrics(
        requests=100,
        rows=3200 if answered else 0,
        errors=0,
        wrong=wrong,
        unanswered=0,
        warmup_latency_s=warmup,
        window_s=3.2,
        throughput_samples_per_s=throughput,
        response_time=distribution(latency) if answered else None,
        service_time=distribution(latency) if answered else None,
        issue_delay=distribution(0.001) if answered else None,
    )


def summary(
    *,
    design: DesignName = "original",
    workers: int = 1,
    batch_size: int = 32,
    compiled: bool = False,
    numbers: Metrics | None = None,
    gpu_utilization: float | None = 40.0,
    sm_activity: float | None = None,
    error: str | None = None,
    environment: Environment = GPU,
) -> RunSummary:
    options = RunConfig(
        device="cuda",
        model=ModelConfig(compile=compiled),
        design=DesignConfig(name=design, num_workers=workers),
        inputs=InputConfig(batch_size=batch_size),
        load=LoadConfig(num_iters=100, warmup_iters=2 * workers),
    )
    return RunSummary(
        schema_version=SCHEMA_VERSION,
        experiment=options.design.experiment,
        started_at="2025-01-01T00:00:00+00:00",
        options=options,
        command=("headrace", "bench"),
        metrics=numbers or metrics(throughput=None if error else 1000.0),
        warmup_parts_s={},
        workers_warmed=workers,
        activity=Activity(gpu_utilization_pct=gpu_utilization, sm_activity_pct=sm_activity),
        answers=None,
        environment=environment,
        torch=TORCH,
        error=error,
    )


def throughputs(values: Iterable[float], run: RunSummary) -> list[RunSummary]:
    """Return the run once per throughput."""
    return [replace(run, metrics=metrics(throughput=value)) for value in values]


def of_planned(planned: PlannedRun, error: str | None = None) -> RunSummary:
    return summary(
        design=planned.design,
        workers=planned.num_workers,
        batch_size=planned.batch_size,
        compiled=planned.compile,
        error=error,
    )


def write_run(run_dir: Path, run: RunSummary) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / FILE_NAME).write_bytes(encode(run))


class FakeClock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def advance(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)


Outcome = str | BaseException | None  # failed with a summary, raises, good
Script = Callable[[int, PlannedRun], Outcome]


def always_good(count: int, planned: PlannedRun) -> Outcome:
    return None


@dataclass
class FakeExecutor:
    """Leaves what a child would leave: a good summary, one with an error, or, if it raises, half a folder."""

    script: Script = always_good  # by how many were started before, and which
    clock: FakeClock = field(default_factory=FakeClock)
    run_s: float = 10.0
    started: list[str] = field(default_factory=list)

    def __call__(self, planned: PlannedRun, run_dir: Path) -> str | None:
        outcome = self.script(len(self.started), planned)
        self.started.append(planned.name)
        self.clock.advance(self.run_s)
        if isinstance(outcome, BaseException):
            run_dir.with_name(run_dir.name + ".partial").mkdir()
            raise outcome
        write_run(run_dir, of_planned(planned, error=outcome))
        return outcome and f"exit code 1 ({outcome})"


@dataclass
class LostExecutor(FakeExecutor):
    """A child that is killed: no summary, only a reason."""

    def __call__(self, planned: PlannedRun, run_dir: Path) -> str | None:
        outcome = self.script(len(self.started), planned)
        if outcome is None:
            return super().__call__(planned, run_dir)
        self.started.append(planned.name)
        return str(outcome)
