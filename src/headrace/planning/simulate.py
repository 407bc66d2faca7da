"""One engine as a discrete-event simulation: arrivals, dispatcher, lanes, a device that the lanes share.

What is decided when is decided as the dispatcher does it: batches by `pipeline.batch` itself; the lane with the fewest
batches, among those the one that has waited longest; batches answered in the order of their launch. simpy keeps the
clock and the events.

A pause stops the host and not the device: nothing is taken, launched or answered until it is over. A pause of the host
can begin while another lasts; then it ends with the later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simpy

from headrace.pipeline.batch import bucket_of, may_start, take
from headrace.planning.calibrate import Calibrated
from headrace.planning.observe import Seconds, Setup

_DONE_S = 1e-9  # what rounding may leave of a batch's time


class Service(Protocol):
    """What the simulation asks of the world. All times are seconds."""

    def before(self) -> float:
        """From a request's issue until the engine has it."""

    def after(self) -> float:
        """From a batch's end, as the host sees it, until a request in it is answered."""

    def again(self) -> float:
        """From an answer until a client in a closed loop has sent its next request."""

    def at(self, rows: int, running: int) -> float:
        """Of a batch, while so many run."""

    def noise(self) -> float:
        """Factor of a batch's time."""

    def idle_s(self, rows: int) -> float:
        """What a batch takes longer that finds its lane idle."""

    def next_pause(self) -> tuple[float, float] | None:
        """How long until the next pause begins, and how long it is; None: there is no further one."""


class Fitted:
    """The world as it was measured: values are drawn from those that were seen, with a seed."""

    def __init__(self, model: Calibrated, rows: int, requests_per_s: float, seed: int) -> None:
        """Take the transport of requests of so many rows at such a rate."""
        self._model = model
        self._random = np.random.default_rng(seed)
        transport = model.alike(rows, requests_per_s, self._random)
        self._pauses = model.pauses
        self._when = np.random.default_rng((seed, 1))  # apart, so that pauses come alike at every rate
        self._before = _Drawn(transport.before, self._random)
        self._after = _Drawn(transport.after, self._random)
        self._again = _Drawn(transport.again, self._random)
        self._noise = _Drawn(model.noise, self._random)

    def before(self) -> float:
        return self._before()

    def after(self) -> float:
        return self._after()

    def again(self) -> float:
        return self._again()

    def noise(self) -> float:
        return self._noise()

    def at(self, rows: int, running: int) -> float:
        return self._model.law.at(rows, running)

    def idle_s(self, rows: int) -> float:
        return self._model.idle(rows)

    def next_pause(self) -> tuple[float, float] | None:
        pauses = self._pauses
        if not pauses.per_s:
            return None
        return float(self._when.exponential(1 / pauses.per_s)), float(self._when.choice(pauses.lengths))


class _Drawn:
    """Draws many at once, which costs little of each."""

    def __init__(self, values: Seconds, random: np.random.Generator) -> None:
        self._values = values
        self._random = random
        self._drawn: list[float] = []

    def __call__(self) -> float:
        if not self._drawn:
            self._drawn = self._random.choice(self._values, 4096).tolist()
        return self._drawn.pop()


@dataclass(frozen=True, slots=True)
class Simulated:
    """Of each request, in the order of issue: when it was issued and answered."""

    issued_s: Seconds
    completed_s: Seconds
    rows: int

    @property
    def latency_s(self) -> Seconds:
        return self.completed_s - self.issued_s

    @property
    def window_s(self) -> float:
        return float(self.completed_s.max() - self.issued_s.min())

    @property
    def samples_per_s(self) -> float:
        return len(self.issued_s) * self.rows / self.window_s


class Happened(Protocol):
    """An event of simpy that was given a value."""

    value: Any


class _Batch:
    __slots__ = ("count", "done", "first", "lane", "left", "noise", "rows")

    def __init__(self, first: int, count: int, rows: int, lane: _Lane, noise: float) -> None:
        self.first, self.count = first, count
        self.rows = rows  # of its bucket
        self.lane = lane
        self.noise = noise
        self.left = 1.0  # of its work
        self.done = False


class _Lane:
    __slots__ = ("launched", "queue")

    def __init__(self) -> None:
        self.launched = 0  # batches, until the host has seen their end
        self.queue: deque[_Batch] = deque()  # until the device has done them


class _Engine:
    def __init__(self, setup: Setup, service: Service, count: int) -> None:
        self.env = simpy.Environment()
        self._setup, self._service = setup, service
        self._levels: list[deque[_Lane]] = [deque() for _ in range(setup.depth + 1)]
        self._levels[0].extend(_Lane() for _ in range(setup.lanes))
        self._waiting: deque[tuple[int, float]] = deque()  # place in the order of arrival, and when the engine had it
        self._launched: deque[_Batch] = deque()
        self._order: list[int] = []  # requests in the order of arrival
        self._running: list[_Batch] = []
        self._advanced_s = 0.0
        self._by_running: dict[int, dict[int, float]] = {}
        self._timer = 0  # number of the one that counts
        self._paused_until_s = 0.0
        self._left = count
        self.issued = np.zeros(count)
        self.completed = np.zeros(count)
        self.closed: deque[int] = deque()  # requests that are issued when one is answered
        self._pause_next()

    def after(self, delay_s: float, act: Callable[[Any], None], value: float | None = None) -> None:
        """Call `act(event)` later, the event with this value."""
        event = self.env.timeout(delay_s, value)
        event.callbacks.append(act)

    def issue(self, request: int) -> None:
        self.issued[request] = self.env.now
        self.after(self._service.before(), self._arrive, request)

    def _issue(self, event: Happened) -> None:
        self.issue(event.value)

    def _arrive(self, event: Happened) -> None:
        self._waiting.append((len(self._order), self.env.now))
        self._order.append(event.value)
        self._act()

    def _act(self, _event: object = None) -> None:
        """Do what the host does whenever it looks: answer what is done, launch what may be launched."""
        if self.env.now < self._paused_until_s:
            return
        while self._launched and self._launched[0].done:
            self._answer(self._launched.popleft())
        self._pump()

    def _pump(self) -> None:
        batching, rows = self._setup.batching, self._setup.rows
        while self._waiting:
            level = next((number for number, lanes in enumerate(self._levels[:-1]) if lanes), None)
            if level is None or not may_start(len(self._waiting) * rows, batching, lane_idle=level == 0):
                return
            waited_us = (self.env.now - self._waiting[0][1]) * 1e6 + 1e-3  # what rounding may take
            count = take(repeat(rows, len(self._waiting)), waited_us, batching, lane_idle=level == 0)
            if not count:
                self._look_again(batching.max_queue_delay_us - waited_us)
                return
            self._launch(level, count)

    def _look_again(self, wait_us: float) -> None:
        if wait_us > 0:
            self.after(wait_us / 1e6, self._act)

    def _launch(self, level: int, count: int) -> None:
        lane = self._levels[level].popleft()
        first = self._waiting[0][0]
        for _ in range(count):
            self._waiting.popleft()
        bucket = bucket_of(count * self._setup.rows, self._setup.batching)
        batch = _Batch(first, count, bucket, lane, self._service.noise())
        lane.launched += 1
        self._levels[lane.launched].append(lane)
        self._launched.append(batch)
        lane.queue.append(batch)
        if len(lane.queue) == 1:
            self._advance()
            # Starting costs time and no share of the device; it is told as work, at the present speed.
            usual_s = self._service.at(bucket, len(self._running) + 1)
            batch.left += self._service.idle_s(bucket) / (usual_s * batch.noise)
            self._running.append(batch)
            self._set_timer()

    def _answer(self, batch: _Batch) -> None:
        lane = batch.lane
        self._levels[lane.launched].remove(lane)
        lane.launched -= 1
        self._levels[lane.launched].append(lane)
        for request in self._order[batch.first : batch.first + batch.count]:
            self.after(self._service.after(), self._complete, request)

    def _complete(self, event: Happened) -> None:
        self.completed[event.value] = self.env.now
        self._left -= 1
        if self.closed:
            self.after(self._service.again(), self._issue, self.closed.popleft())

    def _advance(self) -> None:
        """Let what runs get on up to now."""
        passed_s = self.env.now - self._advanced_s
        self._advanced_s = self.env.now
        running = len(self._running)
        times = self._times(running)
        for batch in self._running:
            batch.left -= passed_s / (times[batch.rows] * batch.noise)

    def _times(self, running: int) -> dict[int, float]:
        """Return what each bucket takes beside so many; every event asks for it."""
        found = self._by_running.get(running)
        if found is None:
            found = {rows: self._service.at(rows, running) for rows in self._setup.batching.buckets}
            self._by_running[running] = found
        return found

    def _set_timer(self) -> None:
        """Look again when the first of what runs ends, unless that changes before."""
        running = len(self._running)
        self._timer += 1
        if running:
            times = self._times(running)
            next_s = min([batch.left * times[batch.rows] * batch.noise for batch in self._running])
            self.after(max(0.0, next_s), self._device, self._timer)

    def _device(self, event: Happened) -> None:
        if event.value != self._timer:
            return
        self._advance()
        times = self._times(len(self._running))
        ended = [batch for batch in self._running if batch.left * times[batch.rows] * batch.noise <= _DONE_S]
        for batch in ended:
            batch.done = True
            batch.lane.queue.popleft()
            self._running.remove(batch)
            if batch.lane.queue:
                self._running.append(batch.lane.queue[0])
        self._set_timer()
        self._act()

    def _pause_next(self) -> None:
        following = self._service.next_pause()
        if following is not None:
            self.after(following[0], self._pause, following[1])

    def _pause(self, event: Happened) -> None:
        if not self._left:
            return  # else the events would never end
        self._paused_until_s = max(self._paused_until_s, self.env.now + event.value)
        self.after(event.value, self._act)
        self._pause_next()


def simulate_open(setup: Setup, service: Service, offsets_s: Seconds) -> Simulated:
    """Run requests that are issued at these moments, ascending, whatever comes back."""
    engine = _Engine(setup, service, len(offsets_s))
    engine.env.process(_issuing(engine, offsets_s))
    engine.env.run()
    return Simulated(engine.issued, engine.completed, setup.rows)


def simulate_closed(setup: Setup, service: Service, count: int, concurrency: int) -> Simulated:
    """Run `count` requests, `concurrency` at once, the next one issued when one is answered."""
    engine = _Engine(setup, service, count)
    at_once = min(count, concurrency)
    engine.closed.extend(range(at_once, count))
    for request in range(at_once):
        engine.issue(request)
    engine.env.run()
    return Simulated(engine.issued, engine.completed, setup.rows)


def _issuing(engine: _Engine, offsets_s: Seconds) -> simpy.events.ProcessGenerator:
    for request, at_s in enumerate(offsets_s.tolist()):
        if at_s > engine.env.now:
            yield engine.env.timeout(at_s - engine.env.now)
        engine.issue(request)


def poisson(rate: float, count: int, seed: int) -> Seconds:
    """Return `count` moments of independent arrivals at `rate`/s."""
    gaps: npt.NDArray[np.float64] = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps)
