"""What HTTP and gRPC generators share: which request is next, and what is written down of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.bench import arrivals
from headrace.clock import NS_PER_S
from headrace.config import LoadConfig, TargetConfig
from headrace.target.access import Access
from headrace.target.counters import ANSWERED, FAILED, ISSUED, SHED, bucket
from headrace.target.handshake import Endpoint
from headrace.target.kept import KeptAnswers
from headrace.target.payloads import Place
from headrace.target.recorder import ERROR, OK, Recorder
from headrace.target.recorder import SHED as REFUSED

SHOWN = 200  # characters of a server's error


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorJob:
    number: int
    url: str
    target: TargetConfig
    load: LoadConfig
    bodies_path: str
    places: list[Place]
    expected: Path
    output: Path
    report: Connection
    counters: Any  # of counters.shared_words
    access: Access = field(default_factory=Access)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.access)


@dataclass(frozen=True, slots=True)
class GoAt:
    """The moment at which the plan begins."""

    start_ns: int


class Sending:
    """One generator's share of the load, and what it writes down. One thread at a time."""

    def __init__(self, job: GeneratorJob, answers: KeptAnswers, words: memoryview) -> None:
        plan = arrivals.planned(job.load)
        generators = job.target.generators
        self.offsets = None if plan is None else arrivals.share(plan, job.number, generators)
        self.concurrency = _share(job.load.concurrency or 0, job.number, generators)
        self.most = self._most(job, generators)
        self.recorder = Recorder(None if job.load.duration_s and plan is None else self.most)
        self.first_error: str | None = None
        self.issued = 0  # requests that were due and have been begun, or wait for a connection
        self.ended = 0
        self._duration_ns = None if job.load.duration_s is None else int(job.load.duration_s * NS_PER_S)
        self._number, self._generators, self._distinct = job.number, generators, len(job.places)
        self._answers = answers
        self._hide = job.access.hide
        self._words = words
        self._end_ns: int | None = None
        self._due: memoryview | None = None

    def _most(self, job: GeneratorJob, generators: int) -> int:
        if self.offsets is not None:
            return len(self.offsets)
        total = arrivals.MOST_REQUESTS if job.load.duration_s else job.load.num_iters
        return _share(total, job.number, generators)

    def start(self, start_ns: int) -> None:
        """Begin at that moment."""
        if self.offsets is not None:
            self._due = (self.offsets + start_ns).data
        elif self._duration_ns is not None:
            self._end_ns = start_ns + self._duration_ns

    def payload(self, number: int) -> int:
        """Return what request `number` carries: all generators together send the payloads in turn."""
        return (number * self._generators + self._number) % self._distinct

    def next_due_ns(self) -> int | None:
        """Return when the next request of the plan is due; None when none is left, and in a closed loop."""
        if self._due is None or self.issued == self.most:
            return None
        return self._due[self.issued]

    def may_follow(self, now_ns: int) -> bool:
        """Tell whether a closed loop sends another request now."""
        return self._due is None and self.issued < self.most and (self._end_ns is None or now_ns < self._end_ns)

    def begin(self, due_ns: int) -> int:
        """Take the next request; return its number."""
        number = self.issued
        self.issued = number + 1
        self.recorder.scheduled[number] = due_ns
        return number

    def sent(self, number: int, now_ns: int) -> None:
        self.recorder.issued[number] = now_ns
        self._words[ISSUED] += 1

    def answered(self, number: int, now_ns: int, body: bytes, header_bytes: int | None) -> None:
        self.ended += 1
        recorder = self.recorder
        recorder.completed[number] = now_ns
        recorder.answer[number] = self._answers.add(self.payload(number), body, header_bytes)
        recorder.status[number] = OK
        self._words[ANSWERED] += 1
        self._words[bucket(now_ns - recorder.scheduled[number])] += 1

    def failed(self, number: int, now_ns: int, text: str, *, shed: bool = False) -> None:
        """An answer that is an error, or a refusal for want of room."""
        self.ended += 1
        self.recorder.completed[number] = now_ns
        self.recorder.status[number] = REFUSED if shed else ERROR
        self._words[SHED if shed else FAILED] += 1
        if not shed:
            self._tell(text)

    def lost(self, text: str) -> None:
        """No answer: the connection is gone, or the time is up."""
        self.ended += 1
        self._words[FAILED] += 1
        self._tell(text)

    @property
    def outstanding(self) -> int:
        return self.issued - self.ended

    def finished(self, now_ns: int) -> bool:
        return not self.outstanding and self.next_due_ns() is None and not self.may_follow(now_ns)

    def payloads(self) -> npt.NDArray[np.int32]:
        """Return what each request carried."""
        numbers = np.arange(self.issued, dtype=np.int64) * self._generators + self._number
        return (numbers % self._distinct).astype(np.int32)

    def _tell(self, text: str) -> None:
        if self.first_error is None:
            self.first_error = self._hide(text)[:SHOWN]


def _share(total: int, number: int, generators: int) -> int:
    return total // generators + (number < total % generators)
