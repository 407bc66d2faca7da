"""The load generator: a process of its own that sends the planned requests and stamps what comes back.

One thread sends, one receives; both touch only records, batches and answers that were made before the clock started.
Three phases: the first request alone (its response time is the warm-up latency), some more to warm every predict
thread, then the published burst: all measured requests at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from headrace.bench import answers, in_flight
from headrace.bench.inputs import Inputs, make_inputs
from headrace.bench.jobs import Go, LoadDone, LoadJob
from headrace.bench.record import PHASES, STATUSES, empty_records
from headrace.bench.summary import AnswerCheck
from headrace.clock import Clock, now_ns
from headrace.config import LoadConfig
from headrace.errors import HeadraceError, RunFailed
from headrace.processes import ChildFailed, Ready, become_child
from headrace.transport.queue import QueueClient
from headrace.transport.ring import RingClient

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import SynchronizedArray

    import numpy.typing as npt
    from torch import Tensor

    from headrace.request import Response

POLL_S = 0.5
ACK_TIMEOUT_S = 10.0


class Client(Protocol):
    """A way to the backend; `transport.queue.QueueClient` is one."""

    def send(self, index: int, batch: Tensor) -> None: ...

    def receive(self, timeout_s: float) -> Response | None: ...

    def close(self) -> None: ...


def run_load_generator(job: LoadJob) -> None:
    """Prepare, wait for the word, send, verify, report. The target of the process."""
    become_child()
    if job.backend_on_cpu:
        torch.set_num_threads(1)  # the cores are the backend's; else they all copy into shared memory, as published
    client: Client | None = None
    try:
        plan = plan_phases(job.load)
        inputs = make_inputs(job.inputs, len(plan))
        job.report.send(Ready())
        go = job.report.recv()
        assert isinstance(go, Go)
        client = RingClient(go.ring) if go.ring else QueueClient(job.queues)
        limit, note = _in_flight_limit(job, go, inputs)
        generator = Generator(plan, inputs, client, job.load.stall_timeout_s, job.progress)
        generator.run(limit, lambda edge: _mark_window(job.window, edge))
        notes = tuple(text for text in (inputs.note, note) if text)
        job.report.send(_verify(job, Path(go.prepared.reference), generator, inputs, notes))
    except HeadraceError as error:
        job.report.send(ChildFailed(error))
    finally:
        if client is not None:
            client.close()


def _in_flight_limit(job: LoadJob, go: Go, inputs: Inputs) -> tuple[int, str | None]:
    if go.ring is not None:
        slots = go.ring.layout.slots
        note = f"at most {slots} of {job.load.num_iters} requests were in flight at once (the ring's slots)"
        return slots, note if slots < job.load.num_iters else None
    return in_flight.in_flight_limit(
        job.load.num_iters,
        inputs.batches[0].nbytes,
        in_flight.free_shared_memory(),
        in_flight.descriptor_limit(),
    )


def plan_phases(load: LoadConfig) -> npt.NDArray[np.int8]:
    """Return the phase of every request, in the order of sending."""
    counts = (1, load.warmup_iters, load.num_iters)
    return np.repeat(np.arange(len(PHASES), dtype=np.int8), counts)


def _mark_window(window: Connection, edge: str) -> None:
    """Have telemetry take its end sample now. A dead telemetry process is the supervisor's to notice."""
    try:
        window.send(edge)
        if window.poll(ACK_TIMEOUT_S):
            window.recv()
    except (OSError, EOFError):
        return


def _verify(job: LoadJob, reference: Path, generator: Generator, inputs: Inputs, notes: tuple[str, ...]) -> LoadDone:
    """Compare every answer with the reference and mark the wrong ones in the records."""
    records, given = generator.records, generator.answers
    check: AnswerCheck | None = None
    if given is not None:
        answered = records["status"] == STATUSES.index("ok")
        wrong, check = answers.check(
            given[answered], records["batch"][answered], inputs.row_index, np.load(reference), job.tolerance
        )
        records["status"][np.flatnonzero(answered)[wrong]] = STATUSES.index("wrong")
        if job.answers is not None:
            np.save(job.answers, given)
    return LoadDone(
        records=records,
        check=check,
        workers_warmed=generator.workers_warmed(),
        first_error=generator.first_error,
        notes=notes,
    )


class Generator:
    """Sends a plan and records what comes back. `client` and `clock` are seams for tests."""

    def __init__(
        self,
        plan: npt.NDArray[np.int8],
        inputs: Inputs,
        client: Client,
        stall_timeout_s: float,
        progress: SynchronizedArray[int] | list[int],
        clock: Clock = now_ns,
    ) -> None:
        self.records = empty_records(len(plan))
        self.records["phase"] = plan
        self.records["batch"] = np.arange(len(plan)) % len(inputs.batches)
        self.records["rows"] = [len(inputs.batches[batch]) for batch in self.records["batch"]]
        self.answers: npt.NDArray[np.float32] | None = None
        self.first_error: str | None = None
        self._batches = inputs.batches
        self._client = client
        self._stall_timeout_s = stall_timeout_s
        self._progress = progress
        self._clock = clock

    def run(self, max_in_flight: int, mark_window: Callable[[str], None]) -> None:
        """Send every phase and wait for its answers. A failed request before the measured ones ends the run."""
        for code, phase in enumerate(PHASES):
            indexes = np.flatnonzero(self.records["phase"] == code)
            if phase != "measured":
                self._burst(indexes, max_in_flight)
                self._require_success(phase)
            else:
                mark_window("open")
                self._burst(indexes, max_in_flight)
                mark_window("close")

    def workers_warmed(self) -> int:
        before = self.records[self.records["phase"] != PHASES.index("measured")]
        return len(np.unique(before["worker"]))

    def _require_success(self, phase: str) -> None:
        if self.first_error is not None:
            raise RunFailed(f"a {phase.replace('_', '-')} request failed: {self.first_error}")

    def _burst(self, indexes: npt.NDArray[np.intp], max_in_flight: int) -> None:
        """Schedule all at one moment, send as many as may be in flight, and receive until all are answered."""
        if not len(indexes):
            return
        credits_left = threading.Semaphore(max_in_flight)
        stop = threading.Event()
        self.records["scheduled_ns"][indexes] = self._clock()
        sender = threading.Thread(target=self._send, args=(indexes, credits_left, stop), name="send", daemon=True)
        sender.start()
        try:
            self._receive(len(indexes), credits_left)
        finally:
            stop.set()
            sender.join()

    def _send(self, indexes: npt.NDArray[np.intp], credits_left: threading.Semaphore, stop: threading.Event) -> None:
        for index in indexes.tolist():
            while not credits_left.acquire(timeout=POLL_S):
                if stop.is_set():
                    return
            batch = self._batches[self.records["batch"][index]]
            self.records["issued_ns"][index] = self._clock()
            self._client.send(index, batch)
            self._progress[0] += 1

    def _receive(self, count: int, credits_left: threading.Semaphore) -> None:
        last_ns = self._clock()
        received = 0
        while received < count:
            response = self._client.receive(POLL_S)
            at_ns = self._clock()
            if response is None:
                if at_ns - last_ns > self._stall_timeout_s * 1e9:
                    raise RunFailed(
                        f"no answer for {self._stall_timeout_s:g} s, with {count - received} of {count} requests"
                        " unanswered; raise --stall-timeout if the model is that slow"
                    )
                continue
            last_ns = at_ns
            received += 1
            credits_left.release()
            self._store(response, at_ns)
            self._progress[1] += 1

    def _store(self, response: Response, at_ns: int) -> None:
        index, timeline = response.index, response.timeline
        if self.records["completed_ns"][index]:
            raise RunFailed(f"request {index} was answered twice")
        self.records["completed_ns"][index] = at_ns
        for name in ("received_ns", "started_ns", "computed_ns", "responded_ns", "worker"):
            self.records[name][index] = getattr(timeline, name)
        if response.output is None:
            self.records["status"][index] = STATUSES.index("error")
            self.first_error = self.first_error or response.error
            return
        self.records["status"][index] = STATUSES.index("ok")
        self._keep(index, response.output)

    def _keep(self, index: int, output: Tensor) -> None:
        """Copy the answer out of its shared memory, which goes back to the system, to memory made at the first one."""
        if self.answers is None:
            self.answers = np.zeros((len(self.records), *output.shape), dtype=np.float32)
            self.answers.fill(np.nan)
        self.answers[index] = output.numpy()
