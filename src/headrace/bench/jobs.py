"""What the processes of a run are given, and what they report to the supervisor. No torch: all of them import it."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

from headrace.bench.prepared import Prepared
from headrace.bench.record import Records
from headrace.bench.summary import AnswerCheck, Limits, TorchFacts
from headrace.config import ClientKind, DesignConfig, InputConfig, LanesConfig, LoadConfig, ModelConfig
from headrace.placement import Place
from headrace.transport.pair import QueuePair, RingPair


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareJob:
    """Find or make the checkpoint, and the eager model's answer to every distinct row."""

    model: ModelConfig
    inputs: InputConfig
    num_requests: int
    device: str
    folder: Path  # where to keep the answers,
    name: str  # and under which name
    report: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """Send the planned requests, stamp and check the answers."""

    inputs: InputConfig
    load: LoadConfig
    backend_on_cpu: bool
    tolerance: float  # of an answer: relative L2 error of a row
    queues: QueuePair
    over_ring: bool
    client: ClientKind  # over a ring: copies each batch in, or has them there
    report: Connection
    windows: tuple[Connection, ...]  # to the telemetry processes
    progress: SynchronizedArray[int]  # requests issued, answered; one writer each, for display
    answers: Path | None  # where to keep the answers, if anywhere
    lanes: int = 1  # of each engine, where there are several
    largest_batch: int = 1  # likewise, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone:
    records: Records
    check: AnswerCheck | None  # None without any answer
    workers_warmed: int  # predict threads that had answered before the measured requests
    first_error: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostJob:
    """Hold the backend."""

    design: DesignConfig
    lanes: LanesConfig
    model: ModelConfig
    place: Place
    queues: QueuePair
    report: Connection
    trace: Path | None  # where to write the profiler's trace, if anywhere
    uint8: bool  # requests carry uint8 images
    limits_bucket: int | None  # measure the limits of batches of so many rows, after serving


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDone:
    marks: tuple[tuple[str, int], ...]  # (what was finished, when), in order, until the model was loaded
    facts: TorchFacts
    limits: Limits | None
    notes: tuple[str, ...]  # what the design says of itself
    wall_clock_offset_ns: int  # wall clock - the one clock: places records in the profiler's trace


@dataclass(frozen=True, slots=True)
class Go:
    """The supervisor's word to load generator and host: everything is ready, the clock may start."""

    prepared: Prepared
    ring: RingPair | None  # what lies between them, if not the queues that they have been given
    more_rings: tuple[RingPair, ...] = ()  # to the other engines, for the load generator

    @property
    def ring_rows(self) -> int:
        return sum(ring.layout.rows for ring in (self.ring, *self.more_rings) if ring is not None)
