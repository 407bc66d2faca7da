"""`headrace limits` as a whole: starts the processes that measure, waits, and writes what they report. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from headrace import nvml
from headrace.bench import environment, limits_picture
from headrace.bench.crew import Crew, Member
from headrace.bench.limits_jobs import RING_LAYOUT, EchoJob, LimitsDone, LimitsJob, Said, Step
from headrace.bench.limits_report import (
    PICTURE_NAME,
    REPORT_NAME,
    SCHEMA_VERSION,
    BatchLimits,
    LimitsConfig,
    LimitsReport,
)
from headrace.bench.output import output_folder
from headrace.bench.summary import encode
from headrace.clock import now_ns, seconds
from headrace.transport.pair import RingPair


class StepWatcher(Protocol):
    """Shows the steps to whoever waits."""

    def step(self, text: str, number: int, of: int) -> None:
        """It begins with this, having done `number` of so many."""


@dataclass(frozen=True, slots=True)
class LimitsOutcome:
    """What was found, and which files tell of it."""

    report: LimitsReport
    drawn: bool  # False: matplotlib is not installed

    @property
    def files(self) -> tuple[str, ...]:
        return (REPORT_NAME, PICTURE_NAME) if self.drawn else (REPORT_NAME,)

    @property
    def missing(self) -> tuple[str, ...]:
        """Say what could not be made, and how to get it."""
        how = f"{PICTURE_NAME} was not drawn, since matplotlib is not installed: pip install 'headrace[plots]'"
        return () if self.drawn else (how,)


def run_limits(
    config: LimitsConfig, output_dir: Path, command: Sequence[str], watcher: StepWatcher, *, overwrite: bool
) -> LimitsOutcome:
    """Measure, and write limits.json and the picture; the folder appears whole or not at all.

    Raises InvalidOption, DeviceUnavailable, ModelError, OutputError, TransportFailed or RunFailed.
    """
    config.validate()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with output_folder(output_dir, overwrite=overwrite) as folder:
        began = now_ns()
        done = _measure(config, watcher)
        gpu = config.gpu_index
        report = LimitsReport(
            schema_version=SCHEMA_VERSION,
            started_at=started_at,
            took_s=seconds(now_ns() - began),
            command=tuple(command),
            config=config,
            form=done.form,
            memcpy_buffer_bytes=done.memcpy_buffer_bytes,
            ring=done.ring,
            batches=tuple(BatchLimits.of(each, done.ring) for each in done.limits),
            environment=environment.collect(None if gpu is None else nvml.open_gpu(gpu)),
            torch=done.facts,
            notes=done.notes,
        )
        (folder / REPORT_NAME).write_bytes(encode(report))
        drawn = limits_picture.draw(report, folder / PICTURE_NAME)
    return LimitsOutcome(report, drawn)


def _measure(config: LimitsConfig, watcher: StepWatcher) -> LimitsDone:
    """Run the processes to their end. Leaves none behind."""
    crew = Crew(lambda: None)
    ring = RingPair.create(RING_LAYOUT)
    try:
        crew.start("echo", "headrace.bench.ring_rate:run_echo", lambda report: EchoJob(ring=ring, report=report))

        def job(report: Connection) -> LimitsJob:
            return LimitsJob(config=config, ring=ring, report=report)

        member = crew.start("measuring", "headrace.bench.limits_host:run_limits_host", job)
        return _listen(crew, member, watcher)
    finally:
        crew.stop()
        ring.close()


def _listen(crew: Crew, member: Member, watcher: StepWatcher) -> LimitsDone:
    while not isinstance(said := crew.expect(member, Said), LimitsDone):
        assert isinstance(said, Step)
        watcher.step(said.text, said.number, said.of)
    return said
