"""The load generator: a process of its own that sends the planned requests and stamps what comes back.

One thread sends, one receives, or one that never sleeps does both in turn (`Generator.spin`); they touch only records,
batches and answers that were made before the clock started.
Three phases: the first request alone (its response time is the warm-up latency), some more to warm every predict
thread, then the measured ones, by the load that was asked for (`bench.pacing`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np
import torch

from headrace.bench import arrivals, in_flight
from headrace.bench.answers import Checker
from headrace.bench.inputs import Inputs, make_inputs
from headrace.bench.jobs import Go, LoadDone, LoadJob
from headrace.bench.kept import UNKNOWN, KeptAnswers
from headrace.bench.pacing import Closed, Pace, Planned
from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.bench.senders import CopyingSender, InPlaceSender, JoinedSender, QueueSender, Received, Sender
from headrace.clock import NS_PER_S, Clock, now_ns
from headrace.config import LoadConfig
from headrace.errors import HeadraceError, RunFailed
from headrace.processes import ChildFailed, Ready, become_child
from headrace.transport.queue import QueueClient
from headrace.transport.ring import RingClient

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import SynchronizedArray

    import numpy.typing as npt
POLL_S = 0.5
ACK_TIMEOUT_S = 10.0
COPY_THREADS = 8


def run_load_generator(job: LoadJob) -> None:
    """Prepare, wait for the word, send, verify, report. The target of the process."""
    become_child()
    if job.backend_on_cpu:
        torch.set_num_threads(1)  # the cores are the backend's
    elif job.over_ring:
        # More threads copy no faster on an H100's host. The queue's copies stay as published: on all cores.
        torch.set_num_threads(min(COPY_THREADS, max(1, len(os.sched_getaffinity(0)) // 2)))
    sender: Sender | None = None
    try:
        plan = plan_phases(job.load)
        pace = make_pace(job.load)
        inputs = make_inputs(job.inputs, len(plan))
        job.report.send(Ready())
        go = job.report.recv()
        assert isinstance(go, Go)
        sender = _make_sender(job, go, inputs)
        measured = int((plan == PHASES.index("measured")).sum())
        limit, note = _in_flight_limit(job, go, inputs, job.load.concurrency or measured)
        checker = Checker(inputs.row_index, np.load(go.prepared.reference), job.tolerance)
        generator = Generator(plan, sender, job.load.stall_timeout_s, job.progress)
        generator.spin = job.over_ring and not job.backend_on_cpu and job.load.kind != "burst"
        generator.kept = KeptAnswers(generator.records, checker, keep_all=job.answers is not None)
        generator.records["rows"] = job.inputs.batch_size
        generator.run(limit, lambda edge: _mark_windows(job.windows, edge), pace)
        notes = tuple(text for text in (inputs.note, note) if text)
        job.report.send(_done(job, generator, notes))
    except HeadraceError as error:
        job.report.send(ChildFailed(error))
    finally:
        if sender is not None:
            sender.close()


def _make_sender(job: LoadJob, go: Go, inputs: Inputs) -> Sender:
    if go.ring is None:
        return QueueSender(QueueClient(job.queues), inputs.batches)
    kind = InPlaceSender if job.client == "zero-copy" else CopyingSender
    senders = [kind(RingClient(ring), inputs.batches) for ring in (go.ring, *go.more_rings)]
    if len(senders) == 1:
        return senders[0]
    return JoinedSender(senders, job.inputs.batch_size, job.largest_batch, job.lanes, skip=1 + job.load.warmup_iters)


def _in_flight_limit(job: LoadJob, go: Go, inputs: Inputs, wanted: int) -> tuple[int, str | None]:
    if go.ring is not None:
        fit = go.ring_rows // job.inputs.batch_size
        whose = "rings hold" if go.more_rings else "ring holds"
        note = f"at most {fit} of {wanted} requests were in flight at once (as many as the {whose})"
        return fit, note if fit < wanted else None
    return in_flight.in_flight_limit(
        wanted,
        inputs.batches[0].nbytes,
        in_flight.free_shared_memory(),
        in_flight.descriptor_limit(),
    )


def plan_phases(load: LoadConfig) -> npt.NDArray[np.int8]:
    """Return the phase of every request, in the order of sending."""
    counts = (1, load.warmup_iters, arrivals.count(load))
    return np.repeat(np.arange(len(PHASES), dtype=np.int8), counts)


def make_pace(load: LoadConfig) -> Pace:
    """Return what paces the measured requests. Raises InvalidOption for arrivals that cannot be replayed."""
    offsets = arrivals.planned(load)
    if offsets is not None:
        return Planned(offsets)
    assert load.concurrency is not None
    return Closed(arrivals.count(load), load.concurrency, load.duration_s)


def _mark_windows(windows: Sequence[Connection], edge: str) -> None:
    """Have telemetry take its end samples now. A dead telemetry process is the supervisor's to notice."""
    for window in windows:
        with suppress(OSError):
            window.send(edge)
    for window in windows:
        with suppress(OSError, EOFError):
            if window.poll(ACK_TIMEOUT_S):
                window.recv()


def _done(job: LoadJob, generator: Generator, notes: tuple[str, ...]) -> LoadDone:
    """Compare the answers that are left to compare, and say what there is to report."""
    sent = generator.sent
    check = generator.kept.finish(sent)
    if job.answers is not None:
        generator.kept.save(job.answers, sent)
    return LoadDone(
        records=generator.records[:sent],
        check=check,
        workers_warmed=generator.workers_warmed(),
        first_error=generator.first_error,
        notes=notes,
    )


class _Credits:
    """How many requests may be sent now."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._changed = threading.Condition()

    def take(self, most: int, stop: threading.Event) -> int:
        """Wait for at least one and take up to `most`; 0 once `stop` is set."""
        with self._changed:
            while not self._left:
                if stop.is_set():
                    return 0
                self._changed.wait(POLL_S)
            taken = min(most, self._left)
            self._left -= taken
            return taken

    def give(self, count: int) -> None:
        with self._changed:
            self._left += count
            self._changed.notify()


class Generator:
    """Sends a plan and records what comes back. `sender` and `clock` are seams for tests."""

    def __init__(
        self,
        plan: npt.NDArray[np.int8],
        sender: Sender,
        stall_timeout_s: float,
        progress: SynchronizedArray[int] | list[int],
        clock: Clock = now_ns,
    ) -> None:
        self.records = empty_records(len(plan))
        self.records["phase"] = plan
        self.records["batch"] = UNKNOWN
        self.kept = KeptAnswers(self.records)
        self.sent = 0  # of all phases
        self.first_error: str | None = None
        # Measure with one busy thread: a thread that sleeps until an answer comes added 60 to 110 us on an H100's host,
        # for its waking and for as long as the sending thread holds the interpreter's lock.
        self.spin = False
        self._sender = sender
        self._stall_timeout_s = stall_timeout_s
        self._progress = progress
        self._clock = clock
        self._expected = self._sent_in_phase = 0

    def run(self, max_in_flight: int, mark_window: Callable[[str], None], pace: Pace | None = None) -> None:
        """Send every phase and wait for its answers. A failed request before the measured ones ends the run.

        `pace` is the measured requests'; without one they go all at once.
        """
        for code, phase in enumerate(PHASES):
            indexes = np.flatnonzero(self.records["phase"] == code)
            if phase != "measured":
                self._send_and_receive(indexes, max_in_flight, self._burst(indexes))
                self._require_success(phase)
            else:
                mark_window("open")
                send = self._take_turns if self.spin else self._send_and_receive
                send(indexes, max_in_flight, pace or self._burst(indexes))
                mark_window("close")

    def _burst(self, indexes: npt.NDArray[np.intp]) -> Pace:
        return Planned(np.zeros(len(indexes), dtype=np.int64), self._clock)

    def workers_warmed(self) -> int:
        before = self.records[self.records["phase"] != PHASES.index("measured")]
        return len(np.unique(before["worker"]))

    def _require_success(self, phase: str) -> None:
        if self.first_error is not None:
            raise RunFailed(f"a {phase.replace('_', '-')} request failed: {self.first_error}")

    def _send_and_receive(self, indexes: npt.NDArray[np.intp], max_in_flight: int, pace: Pace) -> None:
        """Send these requests as `pace` says, as many as may be in flight, and receive until all are answered."""
        if not len(indexes):
            return
        credits_left = _Credits(min(max_in_flight, pace.concurrency or max_in_flight))
        stop = threading.Event()
        self._expected, self._sent_in_phase = len(indexes), 0
        pace.start()
        sender = threading.Thread(target=self._send, args=(indexes, credits_left, stop, pace), name="send", daemon=True)
        sender.start()
        try:
            self._receive(credits_left)
        finally:
            stop.set()
            sender.join()
        self._end_phase(indexes, pace)

    def _end_phase(self, indexes: npt.NDArray[np.intp], pace: Pace) -> None:
        issued = indexes[: self._sent_in_phase]
        self.sent += len(issued)
        self.records["scheduled_ns"][issued] = pace.scheduled(self.records["completed_ns"][issued])

    def _take_turns(self, indexes: npt.NDArray[np.intp], max_in_flight: int, pace: Pace) -> None:
        """Send what is due and receive what has come, in one thread that never sleeps."""
        most = min(max_in_flight, pace.concurrency or max_in_flight)
        self._expected, self._sent_in_phase = len(indexes), 0
        received = 0
        pace.start()
        looked_ns = last_ns = self._clock()
        while received < self._sent_in_phase or not pace.over(self._sent_in_phase):
            done = self._sent_in_phase
            due = min(pace.due(done), received + most)
            if due > done:
                self._issue(indexes[done:due])
            now_ns = self._clock()
            if not self._sender.ready() and now_ns - looked_ns < POLL_S * NS_PER_S:
                continue
            looked_ns = now_ns
            answers = self._sender.receive(0.0)
            if answers is not None:
                received += len(answers.descriptors)
                self._store(answers, self._clock())
            if answers is not None or received == self._sent_in_phase:
                last_ns = now_ns
            self._require_answers(now_ns - last_ns, received)
        self._end_phase(indexes, pace)

    def _issue(self, chosen: npt.NDArray[np.intp]) -> int:
        """Send these requests, as many as there is room for, and return how many."""
        self.records["issued_ns"][chosen] = self._clock()
        batches = self._sender.send(chosen.tolist())
        sent = len(batches)
        self.records["batch"][chosen[:sent]] = batches
        self._sent_in_phase += sent
        self._progress[0] += sent
        return sent

    def _require_answers(self, silent_ns: int, received: int) -> None:
        if silent_ns > self._stall_timeout_s * NS_PER_S:
            raise RunFailed(
                f"no answer for {self._stall_timeout_s:g} s, with {self._sent_in_phase - received} of"
                f" {self._expected} requests unanswered; raise --stall-timeout if the model is that slow"
            )

    def _send(self, indexes: npt.NDArray[np.intp], credits_left: _Credits, stop: threading.Event, pace: Pace) -> None:
        while pace.wait(self._sent_in_phase, stop):
            done = self._sent_in_phase
            taken = credits_left.take(pace.due(done) - done, stop)
            if not taken:
                break
            sent = self._issue(indexes[done : done + taken])
            if sent < taken:
                credits_left.give(taken - sent)
        self._expected = self._sent_in_phase

    def _receive(self, credits_left: _Credits) -> None:
        last_ns = self._clock()
        received = 0
        while received < self._expected:
            answers = self._sender.receive(POLL_S)
            at_ns = self._clock()
            if answers is None:
                if received == self._sent_in_phase:
                    last_ns = at_ns  # there is nothing to wait for
                self._require_answers(at_ns - last_ns, received)
                continue
            last_ns = at_ns
            arrived = len(answers.descriptors)
            received += arrived
            credits_left.give(arrived)
            self._store(answers, at_ns)

    def _store(self, received: Received, at_ns: int) -> None:
        descriptors = received.descriptors
        indexes = descriptors["request"]
        self._progress[1] += len(descriptors)
        distinct, times = np.unique(indexes, return_counts=True)
        again = distinct[(times > 1) | (self.records["completed_ns"][distinct] > 0)]
        if len(again):
            raise RunFailed(f"request {again[0]} was answered twice")
        self.records["completed_ns"][indexes] = at_ns
        for name in ("received_ns", "started_ns", "computed_ns", "responded_ns", "batch_rows"):
            self.records[name][indexes] = descriptors[name]
        self.records["worker"][indexes] = descriptors["lane"]
        failed = received.failed
        self.records["status"][indexes] = np.where(failed, STATUSES.index("error"), STATUSES.index("ok"))
        self.first_error = self.first_error or received.first_error
        if received.outputs is not None and not failed.all():
            self.kept.add(indexes[~failed], received.outputs)
