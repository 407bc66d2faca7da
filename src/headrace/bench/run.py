"""One run, from options to files: the supervisor starts the processes, gives the word, and writes what they report.

Processes: the load generator, the telemetry, the host of the backend, and before the clock starts one that prepares
the checkpoint and the eager model's answers. The supervisor itself only waits and draws; it imports no torch.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np

from headrace import nvml
from headrace.bench import answers, arrivals, environment, prepared, stats, trace, validity
from headrace.bench.crew import Crew, Member
from headrace.bench.jobs import Go, HostDone, HostJob, LoadDone, LoadJob, PrepareJob
from headrace.bench.output import output_folder
from headrace.bench.prepared import Prepared
from headrace.bench.record import STATUSES, Records, measured, write_records
from headrace.bench.summary import FILE_NAME, SCHEMA_VERSION, Efficiency, EngineShare, RunSummary, encode
from headrace.bench.telemetry import TelemetryJob, TelemetryResult
from headrace.clock import NS_PER_S
from headrace.config import RunConfig
from headrace.errors import RunFailed, WrongAnswers
from headrace.gpus import choose_gpus, require_free_memory, unlike_note
from headrace.placement import Place, inherited, on_cpus, places
from headrace.processes import Ready
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout
from headrace.transport.pair import QueuePair, RingPair

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TELEMETRY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 60.0
SLOW_END_TIMEOUT_S = 1800.0  # a large trace, or a slow model's limits


class Watcher(Protocol):
    """Shows a run to whoever waits for it."""

    def tell(self, text: str) -> None:
        """A sentence worth reading."""

    def stage(self, text: str) -> None:
        """What is happening from now on."""

    def progress(self, issued: int, answered: int, total: int) -> None:
        """Called about ten times a second while requests are under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Where a run writes, and what it may take over from another run."""

    output_dir: Path
    overwrite: bool = False
    reference_cache: Path | None = None  # folder of reference answers that runs of a sweep share
    exclusive: Path | None = None  # lock file; runs that share it prepare side by side, and measure one at a time


def run_benchmark(config: RunConfig, files: RunFiles, command: Sequence[str], watcher: Watcher) -> RunSummary:
    """Measure once and write the run's folder; return its summary, whose `error` says if the run does not count.

    Raises InvalidOption, ModelError, InputError, DeviceUnavailable, OutputError or RunFailed where there is nothing to
    write; the folder is then left as it was.
    """
    config.validate()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with output_folder(files.output_dir, overwrite=files.overwrite) as folder:
        reported = _Run(config, folder, files, watcher).execute()
        summary = _summarise(config, reported, command, started_at)
        write_records(reported.load.records, folder / "requests.parquet")
        (folder / FILE_NAME).write_bytes(encode(summary))
    return summary


def raise_for(summary: RunSummary) -> None:
    """Raise RunFailed or WrongAnswers if the run does not count."""
    if summary.error is not None:
        raise (WrongAnswers if summary.metrics.wrong else RunFailed)(summary.error)


@dataclass(frozen=True, slots=True)
class _Reported:
    prepared: Prepared
    load: LoadDone
    hosts: tuple[HostDone, ...]  # one for each engine
    telemetry: tuple[TelemetryResult, ...]  # one for each GPU; on the CPU one
    places: tuple[Place, ...]

    @property
    def host(self) -> HostDone:
        """The first engine's, which gets the first request."""
        return self.hosts[0]


class _Run:
    """The processes of one run."""

    def __init__(self, config: RunConfig, folder: Path, files: RunFiles, watcher: Watcher) -> None:
        self._config = config
        self._folder = folder
        self._references = files.reference_cache or folder
        self._exclusive = files.exclusive
        self._watcher = watcher
        self._progress = RawArray("q", 2)
        self._num_requests = num_requests(config)  # once: it may take a whole plan to know
        self._crew = Crew(self._draw)
        gpus = choose_gpus(",".join(map(str, config.gpus))) if config.gpus else ()
        require_free_memory(gpus)
        self._unlike = unlike_note(gpus)
        self._places = places(config.device, gpus, config.engines_per_device)

    def execute(self) -> _Reported:
        """Start everybody, give the word, and collect what they report. Leaves no process behind."""
        try:
            reported = self._execute()
        finally:
            self._crew.stop()
        if self._references == self._folder:
            for path in self._folder.glob("prepared-*"):
                path.unlink()
        if self._config.profile:
            trace.add_requests(self._folder / "trace.json", reported.load.records, reported.host.wall_clock_offset_ns)
        return reported

    def _execute(self) -> _Reported:
        self._watcher.stage("preparing the requests and the eager model's answers")
        telemetry, load = self._start_observers()
        hosts = [self._start_host(number, place) for number, place in enumerate(self._places)]
        ready = self._prepare()
        for note in (*ready.notes, *filter(None, [self._unlike])):
            self._watcher.tell(note)
        for each in telemetry:
            self._crew.expect(each, Ready, TELEMETRY_TIMEOUT_S)
        self._crew.expect(load, Ready)
        for host in hosts:
            self._crew.expect(host, Ready)
        with self._alone():
            self._watcher.stage("loading the model and warming up")
            rings = self._make_rings(ready)
            for number, host in enumerate(hosts):
                host.report.send(Go(ready, rings[number] if rings else None))
            load.report.send(Go(ready, rings[0] if rings else None, tuple(rings[1:])))
            for ring in rings:
                ring.close()  # what was sent are descriptors of their own
            load_done = self._crew.expect(load, LoadDone)
        self._watcher.stage("finishing")
        slow_end = self._config.profile or self._config.limits
        end_s = SLOW_END_TIMEOUT_S if slow_end else END_TIMEOUT_S
        done = tuple(self._crew.expect(host, HostDone, end_s) for host in hosts)
        for each in telemetry:
            each.report.send("stop")
        told = tuple(self._crew.expect(each, TelemetryResult, END_TIMEOUT_S) for each in telemetry)
        return _Reported(ready, load_done, done, told, self._places)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock file, if there is one, while the clock runs."""
        if self._exclusive is None:
            yield
            return
        self._exclusive.parent.mkdir(parents=True, exist_ok=True)
        with self._exclusive.open("w") as lock:
            self._watcher.stage("waiting for another run to finish measuring")
            while not _try_lock(lock):
                self._crew.tick()
            yield

    def _make_rings(self, ready: Prepared) -> list[RingPair]:
        """Make a ring to each engine that holds so many requests and the eager model's answers to them."""
        config = self._config
        if config.transport.name != "ring":
            return []
        features = np.load(ready.reference, mmap_mode="r").shape[1:]
        rows = config.inputs.batch_size
        layout = Layout(
            rows=config.transport.ring_slots * rows,
            inputs=(TensorSpec(name="input", dtype=config.inputs.wire, features=config.row_features),),
            outputs=(TensorSpec(name="output", dtype="float32", features=features),),
        )
        rings = []
        for place in self._places:
            with on_cpus(place.cpus):
                rings.append(RingPair.create(layout))
        return rings

    def _start_observers(self) -> tuple[list[Member], Member]:
        """Start telemetry and load generator, which talk to each other about the window."""
        context, config = self._crew.context, self._config
        self._queues = QueuePair(context.Queue(), context.Queue())
        uuids = list(dict.fromkeys(place.gpu_uuid for place in self._places))
        pipes = [context.Pipe() for _ in uuids]

        def telemetry_job(number: int, report: Connection) -> TelemetryJob:
            return TelemetryJob(
                window=pipes[number][1],
                report=report,
                gpu_index=config.gpu_index,
                gpu_uuid=uuids[number],
                interval_s=config.telemetry_interval_s,
                samples_path=self._folder / f"telemetry{f'-{number}' if number else ''}.parquet",
            )

        def load_job(report: Connection) -> LoadJob:
            return LoadJob(
                inputs=config.inputs,
                load=config.load,
                backend_on_cpu=config.device_kind == "cpu",
                tolerance=answers.tolerance(config.device_kind, config.model.precision, compiled=config.model.compile),
                queues=self._queues,
                over_ring=config.transport.name == "ring",
                client=config.transport.client,
                report=report,
                windows=tuple(ours for ours, _ in pipes),
                progress=self._progress,
                answers=self._folder / "answers.npy" if config.load.keep_answers else None,
                lanes=config.design.num_workers,
                largest_batch=config.lanes.buckets[-1],
            )

        telemetry = [
            self._crew.start("telemetry", "headrace.bench.telemetry:run_telemetry", partial(telemetry_job, number))
            for number in range(len(uuids))
        ]
        load = self._crew.start("load generator", "headrace.bench.loadgen:run_load_generator", load_job)
        for each in (end for pipe in pipes for end in pipe):
            each.close()
        return telemetry, load

    def _prepare(self) -> Prepared:
        """Take over what another run prepared, or have it made, and wait until the process that did has gone."""
        config, folder = self._config, self._references
        name = prepared.key(config.model, config.inputs, self._num_requests, config.device)
        found = prepared.find(folder, name)
        if found is not None:
            return found

        def job(report: Connection) -> PrepareJob:
            return PrepareJob(
                model=config.model,
                inputs=config.inputs,
                num_requests=self._num_requests,
                device=config.device,
                folder=folder,
                name=name,
                report=report,
            )

        preparer = self._crew.start("preparing", "headrace.bench.prepare:run_prepare", job)
        made = self._crew.expect(preparer, Prepared)
        preparer.process.join()
        return made

    def _start_host(self, number: int, place: Place) -> Member:
        config = self._config

        def job(report: Connection) -> HostJob:
            return HostJob(
                design=config.design,
                lanes=config.lanes,
                model=config.model,
                place=place,
                queues=self._queues,
                report=report,
                trace=self._folder / "trace.json" if config.profile else None,
                uint8=config.inputs.wire == "uint8",
                limits_bucket=config.lanes.buckets[-1] if config.limits else None,
            )

        name = f"backend {number}" if len(self._places) > 1 else "backend"
        with inherited(place):
            return self._crew.start(name, "headrace.bench.host:run_host", job)

    def _draw(self) -> None:
        issued, answered = self._progress
        self._watcher.progress(issued, answered, self._num_requests)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def num_requests(config: RunConfig) -> int:
    """Return how many requests a run sends in all; of a closed loop for a duration, at most."""
    return 1 + config.load.warmup_iters + arrivals.count(config.load)


def warmup_parts_s(records: Records, host: HostDone) -> dict[str, float]:
    """Split the warm-up latency at the backend's marks. The parts sum to it.

    The word to go may reach the backend just before the first request is issued; what it did by then counts as 0.
    """
    first = records[0]
    steps = (
        *host.marks,
        ("first forward", int(first["computed_ns"])),
        ("answer", int(first["completed_ns"])),
    )
    parts: dict[str, float] = {}
    previous_ns = int(first["issued_ns"])
    for name, at_ns in steps:
        parts[name] = max(0, at_ns - previous_ns) / NS_PER_S
        previous_ns = max(previous_ns, at_ns)
    return parts


def _summarise(config: RunConfig, reported: _Reported, command: Sequence[str], started_at: str) -> RunSummary:
    load = reported.load
    judged = validity.judge(load.records, config.load)
    metrics, verdict = judged.metrics, judged.verdict
    gpu = config.gpu_index
    limits, throughput = reported.host.limits, metrics.throughput_samples_per_s
    copies = config.transport.client == "copy"
    first_answered = load.records["status"][0] == STATUSES.index("ok")
    return RunSummary(
        schema_version=SCHEMA_VERSION,
        experiment=config.experiment,
        started_at=started_at,
        options=config,
        command=tuple(command),
        metrics=metrics,
        warmup_parts_s=warmup_parts_s(load.records, reported.host) if first_answered else {},
        workers_warmed=load.workers_warmed,
        activity=reported.telemetry[0].activity,
        engines=_engines(config, reported),
        answers=load.check,
        environment=environment.collect(None if gpu is None else nvml.open_gpu(gpu)),
        torch=reported.host.facts,
        limits=limits,
        efficiency=Efficiency.of(throughput, limits, client_copies=copies) if limits and throughput else None,
        marks=verdict.marks,
        notes=_notes(config, reported),
        error=_error(load, metrics) or next(iter(verdict.voids), None),
    )


def _engines(config: RunConfig, reported: _Reported) -> tuple[EngineShare, ...]:
    """Return what each of several engines did of the measured requests. Telemetry is there once for each GPU."""
    if len(reported.places) == 1:
        return ()
    answered = measured(reported.load.records)
    answered = answered[answered["status"] == STATUSES.index("ok")]
    window, lanes = stats.window_ns(reported.load.records), config.design.num_workers
    window_s = (window[1] - window[0]) / NS_PER_S if window else 0.0
    all_rows = int(answered["rows"].sum())
    shares = []
    for number, place in enumerate(reported.places):
        own = answered[answered["worker"] // lanes == number]
        rows = int(own["rows"].sum())
        gpu = number // config.engines_per_device if config.gpus else None
        shares.append(
            EngineShare(
                place=place.label,
                requests=len(own),
                rows=rows,
                share=rows / all_rows if all_rows else None,
                samples_per_s=rows / window_s if window_s else None,
                activity=None if gpu is None else reported.telemetry[gpu].activity,
            )
        )
    return tuple(shares)


def _notes(config: RunConfig, reported: _Reported) -> tuple[str, ...]:
    load = reported.load
    several = len(reported.hosts) > 1
    notes = [*load.notes]
    for place, host in zip(reported.places, reported.hosts, strict=True):
        notes += [f"{place.label}: {note}" if several else note for note in host.notes]
    if reported.prepared.random_weights:
        notes.append("the weights are random: speed is real, labels mean nothing")
    if config.profile:
        notes.append("profiled: timings are disturbed")
    workers = config.num_engines * config.design.num_workers
    if config.load.warmup_iters and load.workers_warmed < workers:
        notes.append(
            f"only {load.workers_warmed} of {workers} predict threads had answered before the measured requests began"
        )
    if load.check:
        warning = answers.exchange_warning(load.check)
        notes.extend([warning] if warning else [])
    return tuple(notes)


def _error(load: LoadDone, metrics: stats.Metrics) -> str | None:
    """Say why a run does not count, the gravest reason first."""
    wrong = int((load.records["status"] == STATUSES.index("wrong")).sum())
    if wrong:
        check = load.check
        size = (
            f"; the largest relative error is {check.max_error:.3g}, allowed is {check.tolerance:.3g}" if check else ""
        )
        return f"{wrong} of {len(load.records)} answers are not the eager model's{size}; the run has no throughput"
    if metrics.errors:
        return f"{metrics.errors} of {metrics.requests} requests failed: {load.first_error}"
    if metrics.unanswered:
        return f"{metrics.unanswered} of {metrics.requests} requests were never answered"
    return None
