"""Which backends a server has: what is started, connected, retired and ended, and when. It decides, and does nothing.

A backend is the process of one engine of a version of a model; a version has one engine, or one on each of several
GPUs. It is *starting* until its lanes are warm, then *ready*, and if it dies it is *waiting* to be started anew: of
several, that one alone. A version that is no longer wanted is *retiring* until no frontend needs its
backend any more, then *ending*.

Changes of one model, to load or to unload it, come one after the other. A change first starts what is to be there and
is not. Only when all of that is ready are frontends connected to it, and only then is the rest retired, in this order,
so a request finds a version at every moment. If anything fails before, what was there stays as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from headrace.clock import NS_PER_S, Clock, seconds
from headrace.control import Models, Verb, VersionState, VersionStatus
from headrace.errors import EngineStopped, HeadraceError, QueueFull, RunFailed, UnknownModel
from headrace.repository import Found, Versions

FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30.0  # before a process is started anew; twice as long each time
STEADY_S = 60.0  # a process that lived so long begins anew with the first delay
MAX_CHANGES = 16  # of one model that are under way or wait
NOT_LOADED, UNLOADED = "not loaded", "unloaded"

State = Literal["starting", "ready", "waiting", "retiring", "ending"]


class Hands(Protocol):
    """What is done as decided. Backends and frontends are numbers here, and processes there."""

    def start(self, backend: int, found: Found, engine: int) -> None:
        """Start the process of one of a version's engines, numbered from 0."""

    def offer(self, backend: int) -> None:
        """Let clients that come to the door have it too, in place of its predecessor."""

    def connect(self, backend: int, frontend: int) -> None:
        """Give both the ends of a ring. Raises TransportFailed if it cannot be made."""

    def retire(self, backend: int, frontend: int) -> None: ...

    def publish(self, frontend: int, models: Models) -> None: ...

    def stop(self, backend: int) -> None: ...

    def kill(self, backend: int) -> None: ...

    def answer(self, asked: Asked, error: HeadraceError | None) -> None: ...

    def tell(self, text: str) -> None: ...


@dataclass(slots=True)
class BackOff:
    """How long to wait before a process that died is started anew."""

    _next_s: float = FIRST_DELAY_S

    def delay_s(self, lived_s: float) -> float:
        delay_s = FIRST_DELAY_S if lived_s > STEADY_S else self._next_s
        self._next_s = min(2 * delay_s, LAST_DELAY_S)
        return delay_s


@dataclass(frozen=True, slots=True)
class Asked:
    """Who wants to hear how a change ended."""

    frontend: int
    number: int


@dataclass(slots=True, eq=False)
class _Backend:
    number: int
    found: Found
    engine: int  # which of the version's
    started_ns: int
    required: bool  # the server is not ready without it
    state: State = "starting"
    is_live: bool = False  # frontends are connected to it while it is ready
    connected: set[int] = field(default_factory=set)  # frontends
    error: HeadraceError | None = None  # its last words
    reason: str = ""
    due_ns: int | None = None  # when it is started anew, or killed
    back_off: BackOff = field(default_factory=BackOff)

    @property
    def label(self) -> str:
        engine = f" (engine {self.engine})" if self.found.served.num_engines > 1 else ""
        return f"{self.found.name} version {self.found.version}{engine}"

    @property
    def part(self) -> tuple[Found, int]:
        """What it is for: no other one need be started for the same."""
        return self.found, self.engine

    def shown_state(self) -> VersionState:
        if self.state == "ready":
            return "READY" if self.is_live else "LOADING"
        if self.state == "starting":
            return "LOADING"
        return "UNAVAILABLE" if self.state == "waiting" else "UNLOADING"


@dataclass(slots=True, eq=False)
class _Change:
    verb: Verb
    name: str
    asked: Asked | None
    is_first: bool = False  # of the server's start, which fails with it
    fresh: list[_Backend] = field(default_factory=list)
    kept: list[_Backend] = field(default_factory=list)
    loading: set[int] = field(default_factory=set)
    serial: int | None = None  # of what frontends must have seen
    awaiting: set[int] = field(default_factory=set)  # frontends


_SHOWN_FIRST: tuple[VersionState, ...] = ("READY", "LOADING", "UNAVAILABLE", "UNLOADING")


class Lifecycle:
    """All backends of a server. One thread calls it, with what has happened.

    `look` says what there is of a model; `retire_limit_s` is how long frontends may take to let go of a backend.
    """

    def __init__(self, hands: Hands, look: Callable[[str], Versions], retire_limit_s: float, clock: Clock) -> None:
        self._hands = hands
        self._look = look
        self._retire_limit_ns = int(retire_limit_s * NS_PER_S)
        self._clock = clock
        self._backends: dict[int, _Backend] = {}
        self._started = 0
        self._changes: dict[str, deque[_Change]] = {}
        self._known: dict[str, tuple[str, ...]] = {}  # versions by name, whatever has been seen of them
        self._reasons: dict[tuple[str, str], str] = {}  # why a version is not there
        self._listening: set[int] = set()
        self._serial = 0
        self._first: set[str] = set()

    @property
    def has_begun(self) -> bool:
        """Tell whether all models of the start have been loaded."""
        return not self._first

    def begin(self, names: Iterable[str]) -> None:
        """Load the first models. Raises, now or later, what any of them fails with."""
        self._first = set(names)
        for name in sorted(self._first):
            self._queue(_Change("load", name, None, is_first=True))

    def change(self, verb: Verb, name: str, asked: Asked) -> None:
        self._queue(_Change(verb, name, asked))

    def backend_ready(self, number: int) -> None:
        backend = self._backends[number]
        if backend.state != "starting":
            return
        backend.state = "ready"
        change = self._change_with(backend)
        if change is not None:
            change.loading.discard(number)
            if not change.loading:
                self._switch(change)
            return
        self._connect_or_kill(backend, self._listening)
        self._hands.offer(number)
        self._publish()
        self._hands.tell(f"{backend.label}: ready again")

    def backend_failed(self, number: int, error: HeadraceError) -> None:
        """Note a backend's last words; its end follows."""
        self._backends[number].error = error

    def backend_ended(self, number: int, code: int | None) -> None:
        backend = self._backends[number]
        backend.connected.clear()
        if backend.state in ("retiring", "ending"):
            self._forget(backend)
            return
        change = self._change_with(backend)
        if change is not None:
            del self._backends[number]
            self._fail(change, backend, code)
            return
        delay_s = backend.back_off.delay_s(seconds(self._clock() - backend.started_ns))
        said = f" ({backend.error})" if backend.error else ""
        self._hands.tell(
            f"the backend of {backend.label} ended (exit code {code}){said}; it is started anew in {delay_s:g} s"
        )
        backend.state, backend.due_ns = "waiting", self._clock() + int(delay_s * NS_PER_S)
        backend.reason = f"the backend ended (exit code {code}), and is started anew"
        backend.error = None
        self._publish()

    def frontend_listening(self, frontend: int) -> None:
        self._listening.add(frontend)
        for backend in self._live():
            self._connect_or_kill(backend, {frontend})
        self._hands.publish(frontend, self._models())

    def frontend_ended(self, frontend: int) -> None:
        self._listening.discard(frontend)
        for backend in list(self._backends.values()):
            self.retired(frontend, backend.number)
        for changes in list(self._changes.values()):
            for change in list(changes):
                if change.asked and change.asked.frontend == frontend:
                    change.asked = None
                change.awaiting.discard(frontend)
                self._settle(change)

    def retired(self, frontend: int, number: int) -> None:
        """A frontend has let go of a backend."""
        backend = self._backends.get(number)
        if backend is not None:
            backend.connected.discard(frontend)
            self._stop_if_idle(backend)

    def seen(self, frontend: int, serial: int) -> None:
        for changes in list(self._changes.values()):
            change = changes[0]
            if change.serial is not None and serial >= change.serial:
                change.awaiting.discard(frontend)
                self._settle(change)

    def tick(self) -> None:
        """Do what is due."""
        for backend in list(self._backends.values()):
            if backend.due_ns is None or self._clock() < backend.due_ns:
                continue
            backend.due_ns = None
            if backend.state == "waiting":
                backend.state, backend.started_ns = "starting", self._clock()
                self._hands.start(backend.number, *backend.part)
                self._publish()
            else:
                self._hands.tell(f"the backend of {backend.label} did not end in time; it is killed")
                self._hands.kill(backend.number)

    def due_ns(self) -> int | None:
        """Return when `tick` is to be called next."""
        return min((each.due_ns for each in self._backends.values() if each.due_ns is not None), default=None)

    def _queue(self, change: _Change) -> None:
        changes = self._changes.setdefault(change.name, deque())
        if change.asked and len(changes) >= MAX_CHANGES:
            self._hands.answer(change.asked, QueueFull(f"{len(changes)} changes of this model wait already: try again"))
            return
        changes.append(change)
        if len(changes) == 1:
            self._begin(change)

    def _begin(self, change: _Change) -> None:
        try:
            if change.verb == "load":
                self._begin_load(change)
            elif change.name not in self._known:
                raise UnknownModel(f"there is no model {change.name!r}; the repository's index says which there are")
        except HeadraceError as error:
            self._end(change, error)
            return
        if not change.loading:
            self._switch(change)

    def _begin_load(self, change: _Change) -> None:
        versions = self._look(change.name)
        self._known[change.name] = tuple(found.version for found in versions.found)
        live = [backend for backend in self._live() if backend.found.name == change.name]
        change.kept = [backend for backend in live if backend.found in versions.wanted]
        kept = [backend.part for backend in change.kept]
        wanted = [(found, engine) for found in versions.wanted for engine in range(found.served.num_engines)]
        for part in wanted:
            if part not in kept:
                self._started += 1
                backend = _Backend(self._started, *part, self._clock(), required=change.is_first)
                self._backends[self._started] = backend
                change.fresh.append(backend)
        change.loading = {backend.number for backend in change.fresh}
        for backend in change.fresh:
            self._hands.start(backend.number, *backend.part)
        self._publish()

    def _switch(self, change: _Change) -> None:
        """Bring in what is fresh, then let the rest go."""
        try:
            for backend in change.fresh:
                self._connect(backend, self._listening)
        except HeadraceError as error:
            self._give_up(change, error)
            return
        for backend in change.fresh:
            backend.required = backend.is_live = True
            self._hands.offer(backend.number)
            self._reasons.pop((change.name, backend.found.version), None)
        for backend in list(self._backends.values()):
            if backend.found.name == change.name and backend not in (*change.fresh, *change.kept):
                self._reasons[change.name, backend.found.version] = UNLOADED
                self._retire(backend)
        change.serial = self._publish()
        change.awaiting = set(self._listening)
        self._settle(change)

    def _settle(self, change: _Change) -> None:
        """End a change when all frontends have switched: from then on nobody is answered as before it."""
        changes = self._changes.get(change.name)
        if changes and changes[0] is change and change.serial is not None and not change.awaiting:
            self._end(change, None)

    def _fail(self, change: _Change, backend: _Backend, code: int | None) -> None:
        ended = f"the backend of {backend.label} ended with exit code {code} before it was ready"
        error = backend.error or (RunFailed(ended) if change.is_first else EngineStopped(ended))
        self._reasons[change.name, backend.found.version] = backend.found.public(str(error))
        self._give_up(change, error)

    def _give_up(self, change: _Change, error: HeadraceError) -> None:
        for backend in change.fresh:
            if backend.number in self._backends:
                self._retire(backend)
        self._publish()
        self._hands.tell(f"{change.name} was not loaded: {error}")
        public = type(error)(change.fresh[0].found.public(str(error)))
        self._end(change, error if change.is_first else public)

    def _end(self, change: _Change, error: HeadraceError | None) -> None:
        if change.is_first and error is not None:
            raise error
        self._first.discard(change.name)
        if change.asked is not None:
            self._hands.answer(change.asked, error)
            if error is None:
                self._hands.tell(f"{change.name}: {change.verb}ed")
        changes = self._changes[change.name]
        changes.popleft()
        if changes:
            self._begin(changes[0])
        else:
            del self._changes[change.name]

    def _change_with(self, backend: _Backend) -> _Change | None:
        """Return the change that waits for a backend, or for others that are to come in together with it."""
        changes = self._changes.get(backend.found.name)
        if changes and backend in changes[0].fresh and changes[0].serial is None:
            return changes[0]
        return None

    def _live(self) -> Iterator[_Backend]:
        """Yield the backends that frontends are to be connected to."""
        return (each for each in list(self._backends.values()) if each.state == "ready" and each.is_live)

    def _connect(self, backend: _Backend, frontends: Iterable[int]) -> None:
        for frontend in sorted(frontends):
            self._hands.connect(backend.number, frontend)
            backend.connected.add(frontend)

    def _connect_or_kill(self, backend: _Backend, frontends: Iterable[int]) -> None:
        """Connect; where there is no memory for it, try again as after a death."""
        try:
            self._connect(backend, frontends)
        except HeadraceError as error:
            backend.error = error
            self._hands.kill(backend.number)

    def _retire(self, backend: _Backend) -> None:
        """Let a backend go, as gently as its state allows."""
        backend.required = backend.is_live = False
        if backend.state == "waiting":
            self._forget(backend)
        elif backend.state == "starting" or (backend.state == "ready" and not backend.connected):
            backend.state, backend.due_ns = "ending", None
            self._hands.kill(backend.number)
        elif backend.state == "ready":
            backend.state, backend.due_ns = "retiring", self._clock() + self._retire_limit_ns
            for frontend in sorted(backend.connected):
                self._hands.retire(backend.number, frontend)

    def _stop_if_idle(self, backend: _Backend) -> None:
        if backend.state == "retiring" and not backend.connected:
            backend.state = "ending"
            self._hands.stop(backend.number)

    def _forget(self, backend: _Backend) -> None:
        del self._backends[backend.number]
        self._publish()

    def _publish(self) -> int:
        """Tell all frontends how the models are, and return the number by which they will say that they have heard."""
        self._serial += 1
        models = self._models()
        for frontend in sorted(self._listening):
            self._hands.publish(frontend, models)
        return self._serial

    def _models(self) -> Models:
        return Models(self._serial, self._statuses(), frozenset(backend.number for backend in self._live()))

    def _statuses(self) -> tuple[VersionStatus, ...]:
        statuses = []
        for name, known in sorted(self._known.items()):
            of_model = [backend for backend in self._backends.values() if backend.found.name == name]
            versions = {*known, *(backend.found.version for backend in of_model)}
            for version in sorted(versions, key=int):
                backends = [backend for backend in of_model if backend.found.version == version]
                statuses.append(self._status(name, version, backends))
        return tuple(statuses)

    def _status(self, name: str, version: str, backends: list[_Backend]) -> VersionStatus:
        required = any(backend.required for backend in backends)
        if not backends:
            reason = self._reasons.get((name, version), NOT_LOADED)
            return VersionStatus(name=name, version=version, state="UNAVAILABLE", reason=reason)
        shown = min(backends, key=lambda backend: _SHOWN_FIRST.index(backend.shown_state()))
        state = shown.shown_state()
        reason = shown.reason if state == "UNAVAILABLE" else ""
        serving = [backend for backend in backends if backend.shown_state() == "READY"]
        if serving:  # what comes in its place, or what goes, has engines of its own
            engines = serving[0].found.served.num_engines
            absent = [each.reason for each in backends if each.is_live and each.state != "ready" and each.reason]
            reason = f"{len(serving)} of {engines} engines: {absent[0]}" if len(serving) < engines and absent else ""
        else:
            engines = shown.found.served.num_engines
        return VersionStatus(
            name=name,
            version=version,
            state=state,
            reason=reason,
            required=required,
            engines=engines,
            engines_ready=len(serving),
        )
