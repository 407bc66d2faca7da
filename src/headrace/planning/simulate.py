"""One engine as a discrete-event simulation: arrivals, dispatcher, lanes, a device that the lanes share.

What is decided when is decided as the dispatcher does it: batches by `pipeline.batch` itself; the lane with the fewest
batches, among those the one that has waited longest; batches answered in the order of their launch. simpy keeps the
clock and the events.

A pause stops the host and not the device: nothing is taken, launched or answered until it is over. A pause of the host
can begin while another lasts; then it ends with the later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import simpy

from headrace.pipeline.batch import may_start, take
from headrace.planning.calibrate import Calibrated
from headrace.planning.observe import Seconds, Setup
from headrace.planning.seen import level_of

_DONE_S = 1e-9  # what rounding may leave of a batch's time


class Service(Protocol):
    """What the simulation asks of the world. All times are seconds."""

    def before(self) -> float:
        """From the issue of requests, of those at one moment together, until the engine has them."""

    def after(self) -> float:
        """From a batch's end, as the host sees it, until the requests in it are answered."""

    def again(self) -> float:
        """From a batch's answers until a client in a closed loop has sent as many requests."""

    def work_s(self, rows: int) -> float:
        """What a batch takes of a full device."""

    def at(self, rows: int, running: float) -> float:
        """Of a batch, while so many like it run."""

    def noise(self, running: float) -> float:
        """Factor of a batch's time that begins beside so many like it."""

    def idle_s(self, rows: int) -> float:
        """What a batch takes longer that finds its lane idle."""

    def next_pause(self) -> tuple[float, float] | None:
        """How long until the next pause begins, and how long it is; None: there is no further one."""


class Fitted:
    """The world as it was measured: values are drawn from those that were seen, with a seed."""

    def __init__(self, model: Calibrated, rows: int, requests_per_s: float, seed: int, *, closed: bool = False) -> None:
        """Take the habits of requests of so many rows at such a rate, in a closed loop or an open one."""
        self._model = model
        self._random = np.random.default_rng(seed)
        self._alike = model.alike(rows, requests_per_s, self._random, closed=closed)
        self._pauses = model.pauses
        self._when = np.random.default_rng((seed, 1))  # apart, so that pauses come alike at every rate
        self._before = _Drawn(self._alike.before(), self._random)
        self._after = _Drawn(self._alike.after(), self._random)
        self._again = _Drawn(self._alike.again(), self._random)
        self._noise: dict[int, _Drawn] = {}  # by level

    def before(self) -> float:
        return self._before()

    def after(self) -> float:
        return self._after()

    def again(self) -> float:
        return self._again()

    def noise(self, running: float) -> float:
        level = level_of(running)
        drawn = self._noise.get(level)
        if drawn is None:
            drawn = self._noise[level] = _Drawn(self._alike.noise(running), self._random)
        return drawn()

    def work_s(self, rows: int) -> float:
        return self._model.law.work_s.at(rows)

    def at(self, rows: int, running: float) -> float:
        return self._model.law.at(rows, running)

    def idle_s(self, rows: int) -> float:
        return self._model.idle.at(rows)

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
    __slots__ = ("count", "done", "first", "lane", "left", "noise", "ready_s", "rows", "work_s")

    def __init__(
        self, first: int, count: int, rows: int, lane: _Lane, *, work_s: float, noise: float, ready_s: float
    ) -> None:
        self.first, self.count = first, count
        self.rows = rows  # that are computed
        self.work_s = work_s  # what it takes of a full device
        self.lane = lane
        self.noise = noise
        self.ready_s = ready_s  # when its beginning is over, and it can run
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
        self._work: dict[int, float] = {}  # by rows
        self._by_load: dict[tuple[float, int], float] = {}
        self._timer = 0  # number of the one that counts
        self._paused_until_s = 0.0
        self._left = count
        self.issued = np.zeros(count)
        self.completed = np.zeros(count)
        self.closed: deque[int] = deque()  # requests that are issued when one is answered
        self._pause_next()

    def after(self, delay_s: float, act: Callable[[Any], None], value: object = None) -> None:
        """Call `act(event)` later, the event with this value."""
        event = self.env.timeout(delay_s, value)
        event.callbacks.append(act)

    def issue(self, requests: Sequence[int]) -> None:
        """Issue these now, and together."""
        for request in requests:
            self.issued[request] = self.env.now
        self.after(self._service.before(), self._arrive, requests)

    def _issue(self, event: Happened) -> None:
        self.issue(event.value)

    def _arrive(self, event: Happened) -> None:
        for request in event.value:
            self._waiting.append((len(self._order), self.env.now))
            self._order.append(request)
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
        if wait_us > 0:  # at least a nanosecond: less may be nothing, beside what the clock says, and would never pass
            self.after(max(wait_us, 1e-3) / 1e6, self._act)

    def _launch(self, level: int, count: int) -> None:
        lane = self._levels[level].popleft()
        first = self._waiting[0][0]
        for _ in range(count):
            self._waiting.popleft()
        rows = self._setup.computed(count * self._setup.rows)
        work_s, ready_s = self._work_s(rows), self.env.now + self._service.idle_s(rows)
        noise = self._service.noise((self._load() + work_s) / work_s)
        batch = _Batch(first, count, rows, lane, work_s=work_s, noise=noise, ready_s=ready_s)
        lane.launched += 1
        self._levels[lane.launched].append(lane)
        self._launched.append(batch)
        lane.queue.append(batch)
        if len(lane.queue) == 1:
            self._start(batch)

    def _start(self, batch: _Batch) -> None:
        """Let the first of a lane run as soon as its beginning is over, which goes on while it waits behind another."""
        if batch.ready_s > self.env.now:
            self.after(batch.ready_s - self.env.now, self._begin, batch)
        else:
            self._run(batch)

    def _begin(self, event: Happened) -> None:
        self._run(event.value)

    def _run(self, batch: _Batch) -> None:
        self._advance()
        self._running.append(batch)
        self._set_timer()

    def _answer(self, batch: _Batch) -> None:
        lane = batch.lane
        self._levels[lane.launched].remove(lane)
        lane.launched -= 1
        self._levels[lane.launched].append(lane)
        self.after(self._service.after(), self._complete, self._order[batch.first : batch.first + batch.count])

    def _complete(self, event: Happened) -> None:
        for request in event.value:
            self.completed[request] = self.env.now
        self._left -= len(event.value)
        following = [self.closed.popleft() for _ in range(min(len(event.value), len(self.closed)))]
        if following:
            self.after(self._service.again(), self._issue, following)

    def _advance(self) -> None:
        """Let what runs get on up to now."""
        passed_s = self.env.now - self._advanced_s
        self._advanced_s = self.env.now
        load = self._load()
        for batch in self._running:
            batch.left -= passed_s / self._takes(batch, load)

    def _work_s(self, rows: int) -> float:
        found = self._work.get(rows)
        if found is None:
            found = self._work[rows] = self._service.work_s(rows)
        return found

    def _load(self) -> float:
        """Return the work of all that run."""
        return sum([batch.work_s for batch in self._running])

    def _takes(self, batch: _Batch, load: float) -> float:
        """Return what a batch that runs takes as a whole beside such a load; every event asks for it."""
        found = self._by_load.get((load, batch.rows))
        if found is None:
            found = self._service.at(batch.rows, load / batch.work_s)
            self._by_load[load, batch.rows] = found
        return found * batch.noise

    def _set_timer(self) -> None:
        """Look again when the first of what runs ends, unless that changes before."""
        self._timer += 1
        if self._running:
            load = self._load()
            next_s = min([batch.left * self._takes(batch, load) for batch in self._running])
            self.after(max(0.0, next_s), self._device, self._timer)

    def _device(self, event: Happened) -> None:
        if event.value != self._timer:
            return
        self._advance()
        load = self._load()
        ended = [batch for batch in self._running if batch.left * self._takes(batch, load) <= _DONE_S]
        for batch in ended:
            batch.done = True
            batch.lane.queue.popleft()
            self._running.remove(batch)
        self._set_timer()
        for batch in ended:
            if batch.lane.queue:
                self._start(batch.lane.queue[0])
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
    engine.issue(range(at_once))
    engine.env.run()
    return Simulated(engine.issued, engine.completed, setup.rows)


def _issuing(engine: _Engine, offsets_s: Seconds) -> simpy.events.ProcessGenerator:
    moments, first = np.unique(offsets_s, return_index=True)
    for at_s, begin, end in zip(moments.tolist(), first, (*first[1:], len(offsets_s)), strict=True):
        if at_s > engine.env.now:
            yield engine.env.timeout(at_s - engine.env.now)
        engine.issue(range(begin, end))


def poisson(rate: float, count: int, seed: int) -> Seconds:
    """Return `count` moments of independent arrivals at `rate`/s."""
    gaps: npt.NDArray[np.float64] = np.random.default_rng(seed).exponential(1 / rate, count)
    return np.cumsum(gaps)
