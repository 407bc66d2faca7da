"""mlcommons-loadgen as the sender of a run: it decides when, and our own connections carry what it decides.

LoadGen calls us in its own thread; that hands the query over and returns. A second thread sends and receives, as a
generator of ours does, and tells LoadGen of each answer. So connections, payloads and the comparison of answers are
those of our own runs, and what differs is who keeps the time.
"""

from __future__ import annotations

import gc
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from headrace.clock import NS_PER_S, now_ns
from headrace.errors import RunFailed
from headrace.processes import Ready, allow_open_files, become_child, describe, failures_reported, keep_freed_memory
from headrace.target.counters import words_of
from headrace.target.expected import load_expected
from headrace.target.generator import GeneratorDone, finish
from headrace.target.http_load import HttpLoad
from headrace.target.kept import KeptAnswers
from headrace.target.recorder import Recorder
from headrace.target.sending import GeneratorJob, GoAt, Sending
from headrace.wire.v2_call import decode_answer

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]
SWITCH_S = 1e-4  # the longest that one of the two threads may keep the interpreter from the other
LATENCY_BOUND_NS = 10**11  # of LoadGen's own verdict, which is not asked for
EXPECTED_NS = 50_000  # so that LoadGen makes enough queries beforehand for any server


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadgenJob:
    generator: GeneratorJob
    scenario: Scenario
    samples: int  # of a query, which travels as one request of so many rows
    logs: Path
    seed: int


class Query(Protocol):
    id: int
    index: int


Complete = Callable[[Sequence[int]], None]


class QuerySending(Sending):
    """What is sent when LoadGen says so: `add` in its thread, everything else in the one that sends."""

    def __init__(self, job: GeneratorJob, answers: KeptAnswers, words: memoryview, complete: Complete) -> None:
        super().__init__(job, answers, words)
        self.offsets = None
        self.concurrency = 0
        self.recorder = Recorder(None)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._complete = complete
        self._added: deque[tuple[int, int, tuple[int, ...]]] = deque()
        self._open: dict[int, tuple[int, ...]] = {}
        self._payloads: list[int] = []
        self._over = False
        self._dead = False

    def add(self, index: int, ids: tuple[int, ...]) -> None:
        """Take a query: its samples' ids, which are answered together, and what it carries."""
        self._added.append((now_ns(), index % self._distinct, ids))
        if self._dead:
            self._drain()

    def awake(self) -> None:
        os.eventfd_write(self.wake, 1)

    def end(self) -> None:
        """Say that no more queries come."""
        self._over = True
        self.awake()

    def give_up(self) -> None:
        """Answer all that LoadGen waits for, which would else wait for ever, and all that is still to come."""
        self._dead = True
        waiting = list(self._open.values())
        self._open.clear()
        for ids in waiting:
            self._complete(ids)
        self._drain()

    def payload(self, number: int) -> int:
        return self._payloads[number]

    def next_due_ns(self) -> int | None:
        return 0 if self._added else None

    def may_follow(self, now_ns: int) -> bool:  # noqa: ARG002  LoadGen says when
        return False

    def begin(self, due_ns: int) -> int:  # noqa: ARG002  it was due when it was handed over
        handed_ns, index, ids = self._added.popleft()
        number = super().begin(handed_ns)
        self._payloads.append(index)
        self._open[number] = ids
        return number

    def answered(self, number: int, now_ns: int, body: bytes, header_bytes: int | None) -> None:
        self._told(number)
        super().answered(number, now_ns, body, header_bytes)

    def failed(self, number: int, now_ns: int, text: str, *, shed: bool = False) -> None:
        self._told(number)
        super().failed(number, now_ns, text, shed=shed)

    def lost(self, text: str) -> None:
        super().lost(text)
        self.give_up()

    def finished(self, now_ns: int) -> bool:  # noqa: ARG002
        return self._over and not self._added and not self.outstanding

    def payloads(self) -> npt.NDArray[np.int32]:
        return np.asarray(self._payloads[: self.issued], dtype=np.int32)

    def _drain(self) -> None:
        """Answer what has not been sent. Both threads may be here: each takes what the other has not."""
        while self._added:
            try:
                _, _, ids = self._added.popleft()
            except IndexError:
                return
            self._complete(ids)

    def _told(self, number: int) -> None:
        ids = self._open.pop(number, None)
        if ids is not None:
            self._complete(ids)


def run_loadgen(job: LoadgenJob) -> None:
    """Have LoadGen drive, then compare, write and report. The target of a process."""
    become_child()
    keep_freed_memory()
    allow_open_files()
    with failures_reported(job.generator.report, "mlcommons-loadgen failed"):
        job.generator.report.send(_drive(job))


def _drive(job: LoadgenJob) -> GeneratorDone:
    import mlperf_loadgen  # noqa: PLC0415  an extra

    own = job.generator
    answers = KeptAnswers(load_expected(own.expected, len(own.places), own.target.tolerance), decode_answer)
    response = mlperf_loadgen.QuerySampleResponse

    def complete(ids: Sequence[int]) -> None:
        mlperf_loadgen.QuerySamplesComplete([response(each, 0, 0) for each in ids])

    sending = QuerySending(own, answers, words_of(own.counters, own.number), complete)
    load = HttpLoad(own, sending)
    load.open()
    load.poller.epoll.register(sending.wake, select.EPOLLIN | select.EPOLLET)  # each write wakes; none is read
    gc.collect()
    gc.disable()
    sys.setswitchinterval(SWITCH_S)
    own.report.send(Ready())
    go: GoAt = own.report.recv()
    sender = _Sender(load, sending, go.start_ns)
    began_s, cpu_s = time.perf_counter(), time.process_time()
    sender.start()
    time.sleep(max(0, go.start_ns - now_ns()) / NS_PER_S)  # nothing is sent before that moment
    _test(mlperf_loadgen, job, sending)
    sending.end()
    sender.join()
    cpu_share = (time.process_time() - cpu_s) / max(time.perf_counter() - began_s, 1e-9)
    load.close()
    if sender.error is not None:
        raise RunFailed(f"the connections under mlcommons-loadgen failed: {describe(sender.error)}")
    return finish(own, sending, answers, load.most_connections, cpu_share)


class _Sender(threading.Thread):
    """Sends and receives. If it fails, LoadGen is answered all the same, since nothing else ends it."""

    def __init__(self, load: HttpLoad, sending: QuerySending, start_ns: int) -> None:
        super().__init__(name="sender")
        self.error: Exception | None = None
        self._load, self._sending, self._start_ns = load, sending, start_ns

    def run(self) -> None:
        try:
            self._load.run(self._start_ns)
        except Exception as error:  # noqa: BLE001  the run ends with it
            self.error = error
            self._sending.give_up()


def _test(loadgen: Any, job: LoadgenJob, sending: QuerySending) -> None:  # noqa: ANN401  a module without types
    """Run one test to its end."""
    job.logs.mkdir(parents=True, exist_ok=True)

    def issue(queries: Sequence[Query]) -> None:
        if job.scenario == "MultiStream":
            sending.add(queries[0].index, tuple(each.id for each in queries))
        else:
            for each in queries:
                sending.add(each.index, (each.id,))
        sending.awake()

    count = len(job.generator.places)
    sut = loadgen.ConstructSUT(issue, lambda: None)
    library = loadgen.ConstructQSL(count, count, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(sut, library, _settings(loadgen, job), _log_settings(loadgen, job.logs))
    finally:
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(sut)


def _settings(loadgen: Any, job: LoadgenJob) -> Any:  # noqa: ANN401
    """Return LoadGen's settings: as long, as fast and as many as our own run. Source: loadgen/test_settings.h."""
    load = job.generator.load
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, job.scenario)
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_query_count = 1
    settings.min_duration_ms = round((load.duration_s or 0) * 1e3)
    settings.schedule_rng_seed = settings.sample_index_rng_seed = settings.qsl_rng_seed = job.seed
    settings.server_target_latency_ns = LATENCY_BOUND_NS
    settings.multi_stream_samples_per_query = job.samples
    # How many queries are made beforehand follows from these; too few and LoadGen ends early.
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = EXPECTED_NS
    if job.scenario == "Server":
        settings.server_target_qps = load.rate
    if job.scenario == "Offline":
        settings.min_query_count = load.num_iters
    return settings


def _log_settings(loadgen: Any, folder: Path) -> Any:  # noqa: ANN401
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    settings = loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = True
    return settings
