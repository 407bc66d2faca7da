"""The parent of a server: starts backends and frontends, brings them together, starts anew what dies, stops them all.

Frontends listen from the first moment and say that they are not ready until every model is. A backend that dies is
noticed by the frontends themselves, which answer what it held with an error at once: they have its pidfd, and a pipe
that is closed here as soon as its end begins (`transport.ending`). Where it was the only engine of a version they are
not ready until the next one is; other engines, and other models, go on. Which backends there are, and when frontends
switch from one to another, is decided in `lifecycle`; this is what does it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait

from headrace.backend_job import BackendJob
from headrace.children import Child, Signals
from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.control import (
    Attach,
    BackendReady,
    Change,
    Changed,
    ChangeRegions,
    Connect,
    Listening,
    Models,
    Notice,
    RegionsChanged,
    Retire,
    Retired,
    Seen,
    ServedModel,
    Stop,
)
from headrace.door import Backend, Door, DoorLimits, Part, open_door
from headrace.errors import HeadraceError, InvalidOption, NotReady
from headrace.frontend.board import Board, make_board
from headrace.frontend_job import FrontendJob, access_settings, http_settings, tracing_settings
from headrace.lifecycle import Asked, BackOff, Lifecycle
from headrace.placement import Place, inherited, on_cpus, places
from headrace.ports import reserve_port
from headrace.processes import ChildFailed
from headrace.region_changes import RegionChanges
from headrace.repository import Found, Repository
from headrace.serve_config import ServeConfig
from headrace.transport import ending
from headrace.transport.layout import Layout
from headrace.transport.pair import DupFdHolder, RingPair

KILL_AFTER_S = 5.0  # beyond the drain limit
BACKLOG = 4096


@dataclass(slots=True, eq=False)
class _Backend:
    child: Child
    found: Found
    engine: int  # which of the version's
    place: Place
    wake_fd: int  # all its rings'
    end_fd: int  # a pidfd of its own, for those who must hear of its death before they have heard of it
    ending: ending.Watch  # for the same, an earlier word
    model: ServedModel | None = None  # once it is ready
    is_ending: bool = False

    def close(self) -> None:
        """It must have ended."""
        os.close(self.wake_fd)
        os.close(self.end_fd)
        self.ending.close()

    def told_to(self, ring: RingPair) -> RingPair:
        """Return a client's end of a ring, with what tells it of the backend's end."""
        return replace(ring, peer_fd=self.end_fd, ending_fd=self.ending.fd)

    @property
    def part(self) -> Part:
        return Part(self.found.name, self.found.version, self.engine)


@dataclass(slots=True, eq=False)
class _Frontend:
    """One that must be there; `child` is None while it waits to be started anew."""

    child: Child | None = None
    due_ns: int = 0
    back_off: BackOff = field(default_factory=BackOff)


class Supervisor:
    """One server. `tell` gets sentences for the person who started it."""

    def __init__(self, config: ServeConfig, tell: Callable[[str], None]) -> None:
        self._config = config
        self._tell = tell
        self._board_fd = make_board(config.frontends)
        self._board = Board.attach(self._board_fd)
        self._died: set[Part] = set()  # engines that have ended by themselves
        self._signals = Signals()
        self._repository = Repository(config)
        self._backends: dict[int, _Backend] = {}
        self._frontends = [_Frontend() for _ in range(config.frontends)]
        self._has_told = False
        self._noticed: set[str] = set()  # topics
        self._regions = RegionChanges()
        self._grpc: socket.socket | None = None  # holds the port on which the frontends listen

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM. Raises HeadraceError if the server cannot be started."""
        names = self._repository.names()
        if not names:
            raise InvalidOption("there is no model in the folder; it needs NAME/VERSION/model.py or model.pt2")
        self._listener = self._listen()
        if self._config.grpc:
            self._grpc = reserve_port("--grpc-port", self._config.host, self._config.grpc_port)
        limits = DoorLimits(rows_of=self._config.queue_rows_of, total_bytes=self._config.ring_bytes)
        self._door = open_door(self._config.ring_socket, self.address, limits, self._tell)
        self._hands = _Hands(self._backends, self._frontends, self._door, self._config.queue_rows_of, self._tell)
        limit_s = self._config.drain_timeout_s + KILL_AFTER_S
        self._lifecycle = Lifecycle(self._hands, self._repository.look, limit_s, now_ns)
        try:
            with self._signals.caught():
                for number in range(len(self._frontends)):
                    self._start_frontend(number)
                self._lifecycle.begin(names)
                while not self._signals.count:
                    self._look()
                    self._tell_once_ready()
                self._stop()
        finally:
            self._door.close()
            self._kill_all()
            self._listener.close()
            if self._grpc is not None:
                self._grpc.close()

    def _listen(self) -> socket.socket:
        config = self._config
        try:
            listener = socket.create_server((config.host, config.http_port), backlog=BACKLOG)
        except OSError as error:
            raise InvalidOption(
                f"--http-port {config.http_port} on {config.host}: cannot listen there ({error.strerror}); choose"
                " another port or address, or stop what uses it"
            ) from error
        listener.setblocking(False)
        self.address = listener.getsockname()[:2]
        return listener

    def _start_frontend(self, number: int) -> None:
        frontend = self._frontends[number]
        target = "headrace.frontend.process:run_frontend"
        frontend.child = Child.start(f"frontend {number}", target, partial(self._frontend_job, number))

    def _frontend_job(self, number: int, control: Connection) -> FrontendJob:
        return FrontendJob(
            number=number,
            names=self._repository.names(),
            explicit_control=self._config.model_control == "explicit",
            board=DupFdHolder(self._board_fd),
            devices=self._config.watched_devices,
            listener=self._listener,
            control=control,
            http=http_settings(self._config),
            access=access_settings(self._config),
            drain_timeout_s=self._config.drain_timeout_s,
            grpc_address=self._grpc_address(),
            system_shared_memory=self._config.system_shared_memory,
            regions=tuple(self._regions.regions.values()),
            tracing=tracing_settings(self._config),
        )

    def _grpc_address(self) -> tuple[str, int] | None:
        return self._grpc.getsockname()[:2] if self._grpc is not None else None

    def _look(self) -> None:
        """Wait for words, deaths, signals and what is due, and act."""
        children = [child for child in self._children() if child is not None]
        controls = [child.control for child in children if child.control is not None]
        sentinels = [child.process.sentinel for child in children]
        endings = [backend.ending.fd for backend in self._backends.values() if not backend.is_ending]
        others = [*endings, self._signals.fd, self._door.fd]
        ready = set[object](wait([*controls, *sentinels, *others], self._timeout_s()))
        for number, frontend in enumerate(self._frontends):
            if frontend.child is not None:
                self._look_at_frontend(number, frontend, frontend.child, ready)
        for number, backend in list(self._backends.items()):
            self._look_at_backend(number, backend, ready)
        for number, frontend in enumerate(self._frontends):
            if frontend.child is None and now_ns() >= frontend.due_ns:
                self._start_frontend(number)
        if self._door.fd in ready:
            self._let_in()
        self._lifecycle.tick()

    def _let_in(self) -> None:
        """Give backends the rings of clients that have come to the door."""
        for knock in self._door.knocks():
            backend = next((each for each in self._backends.values() if each.child.process.pid == knock.pid), None)
            if backend is None:
                knock.refuse(NotReady(f"model {knock.model.name} is not ready; try again"))
            else:
                backend.child.send(Attach(knock.ring))
                knock.grant()

    def _timeout_s(self) -> float | None:
        due = [frontend.due_ns for frontend in self._frontends if frontend.child is None]
        backends_due_ns = self._lifecycle.due_ns()
        due += [] if backends_due_ns is None else [backends_due_ns]
        return max(0.0, seconds(min(due) - now_ns())) if due else None

    def _look_at_frontend(self, number: int, frontend: _Frontend, child: Child, ready: set[object]) -> None:
        if child.control in ready:
            for word in child.words():
                self._heard_frontend(number, child, word)
        if child.process.sentinel not in ready:
            return
        code = child.bury()
        delay_s = frontend.back_off.delay_s(seconds(now_ns() - child.started_ns))
        self._tell(f"frontend {number} ended (exit code {code}); it is started anew in {delay_s:g} s")
        frontend.child, frontend.due_ns = None, now_ns() + int(delay_s * NS_PER_S)
        self._board.forget_held(number)
        self._regions.gone(child)
        self._lifecycle.frontend_ended(number)

    def _heard_frontend(self, number: int, child: Child, word: object) -> None:
        if isinstance(word, Listening):
            self._lifecycle.frontend_listening(number)
        elif isinstance(word, Seen):
            self._lifecycle.seen(number, word.serial)
        elif isinstance(word, Retired):
            self._lifecycle.retired(number, word.backend)
        elif isinstance(word, ChangeRegions):
            self._regions.asked(child, word, [each.child for each in self._frontends if each.child is not None])
        elif isinstance(word, RegionsChanged):
            self._regions.made(child, word)
        elif isinstance(word, Change):
            self._lifecycle.change(word.verb, word.name, Asked(number, word.number))
        elif isinstance(word, Notice) and word.topic not in self._noticed:
            self._noticed.add(word.topic)
            self._tell(word.text)

    def _look_at_backend(self, number: int, backend: _Backend, ready: set[object]) -> None:
        child = backend.child
        has_ended = child.process.sentinel in ready
        if backend.ending.fd in ready:  # the next one may start when memory and GPU are free again
            backend.is_ending = True
            self._hands.withdraw(backend)
        if child.control in ready or has_ended:
            for word in child.words():
                self._heard_backend(number, backend, word)
        if has_ended:
            code = child.bury()
            backend.close()
            del self._backends[number]
            self._hands.withdraw(backend)
            if code and backend.model is not None:
                self._died.add(backend.part)
            self._lifecycle.backend_ended(number, code)

    def _heard_backend(self, number: int, backend: _Backend, word: object) -> None:
        if isinstance(word, ChildFailed):
            self._lifecycle.backend_failed(number, word.error)
        elif isinstance(word, BackendReady):
            backend.model = word.model
            self._count(backend.part)
            where = f" on {backend.place.label}" if backend.place.label else ""
            for note in word.notes:
                self._tell(f"{word.model.name} {word.model.version}{where}: {note}")
            self._lifecycle.backend_ready(number)

    def _count(self, part: Part) -> None:
        """Give a version its place on the board, and count an engine that has come back."""
        slot = self._board.slot(part.name, part.version)
        if part in self._died:
            self._died.remove(part)
            self._board.restarted(slot)

    def _tell_once_ready(self) -> None:
        if self._has_told or not self._lifecycle.has_begun:
            return
        self._has_told = True
        models = sorted((each.model.name, int(each.model.version)) for each in self._backends.values() if each.model)
        host, port = self.address
        address = self._grpc_address()
        grpc = f", gRPC on {address[0]}:{address[1]}" if address is not None else ""
        for name in dict.fromkeys(name for name, _ in models):
            versions = ", ".join(str(version) for version in sorted({each[1] for each in models if each[0] == name}))
            self._tell(f"ready: http://{host}:{port}/v2/models/{name} (version {versions}){grpc}")

    def _children(self) -> list[Child | None]:
        return [*(frontend.child for frontend in self._frontends), *(each.child for each in self._backends.values())]

    def _stop(self) -> None:
        """Let frontends answer what they have taken, then the backends end; a second signal ends it all at once."""
        self._tell(f"stopping: answering what was taken, for at most {self._config.drain_timeout_s:g} s")
        limit_ns = now_ns() + int((self._config.drain_timeout_s + KILL_AFTER_S) * NS_PER_S)
        self._signals.forget()
        self._door.close()
        for backend in self._backends.values():
            if backend.model is None:  # still loading, and deaf meanwhile
                backend.child.kill()
        backends = [backend.child for backend in self._backends.values()]
        for children in ([frontend.child for frontend in self._frontends if frontend.child is not None], backends):
            for child in children:
                child.send(Stop())
            if not self._all_ended(children, limit_ns):
                return

    def _all_ended(self, children: Iterable[Child], limit_ns: int) -> bool:
        """Wait for all to end; return False at the limit, or at a second signal."""
        while alive := [child.process.sentinel for child in children if child.process.is_alive()]:
            wait([*alive, self._signals.fd], 0.1)
            if self._signals.count > 1 or now_ns() > limit_ns:
                return False
        return True

    def _kill_all(self) -> None:
        children = [child for child in self._children() if child is not None]
        for child in children:
            child.kill()
        for child in children:
            child.bury()
        for backend in self._backends.values():
            backend.close()
        os.close(self._board_fd)


@dataclass(frozen=True, slots=True)
class _Hands:
    """Does what the lifecycle decides, with processes and pipes; see `lifecycle.Hands`."""

    backends: dict[int, _Backend]
    frontends: list[_Frontend]
    door: Door
    queue_rows_of: Callable[[int], int]  # rows of a frontend's ring, by those of a largest batch
    tell_person: Callable[[str], None]

    def start(self, backend: int, found: Found, engine: int) -> None:
        served = found.served
        place = places(served.device, served.gpus, served.engines_per_device)[engine]
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        page_fd = ending.make_page()
        wake, end = DupFdHolder(wake_fd), DupFdHolder(page_fd)
        job = partial(BackendJob, served=served, place=place, wake=wake, ending=end)
        name, target = f"backend {found.name} {found.version}", "headrace.backend.process:run_backend"
        with inherited(place):
            child = Child.start(name, target, lambda control: job(control=control))
        assert child.process.pid is not None
        end_fd = os.pidfd_open(child.process.pid)
        watch = ending.Watch(page_fd)
        os.close(page_fd)
        self.backends[backend] = _Backend(child, found, engine, place, wake_fd, end_fd, watch)

    def connect(self, backend: int, frontend: int) -> None:
        there, client = self.backends[backend], self.frontends[frontend].child
        if client is None or there.model is None:
            return
        layout = Layout(
            rows=self.queue_rows_of(there.model.max_batch_size), inputs=there.model.inputs, outputs=there.model.outputs
        )
        with on_cpus(there.place.cpus):
            ring = RingPair.create(layout, there.wake_fd)
        try:
            there.child.send(Attach(ring))
            client.send(Connect(there.told_to(ring), there.model, backend, there.engine))
        finally:
            ring.close()

    def offer(self, backend: int) -> None:
        there = self.backends[backend]
        if there.model is not None and there.child.process.pid is not None:
            at = Backend(there.child.process.pid, there.wake_fd, there.ending.fd, there.place.cpus)
            self.door.offer(there.model, at, there.engine)

    def retire(self, backend: int, frontend: int) -> None:
        if backend in self.backends:
            self.withdraw(self.backends[backend])
        self._send(frontend, Retire(backend))

    def withdraw(self, backend: _Backend) -> None:
        """Give no client a ring to this backend any more."""
        if backend.child.process.pid is not None:
            self.door.withdraw(backend.child.process.pid)

    def publish(self, frontend: int, models: Models) -> None:
        self._send(frontend, models)

    def stop(self, backend: int) -> None:
        if backend in self.backends:
            self.backends[backend].child.send(Stop())

    def kill(self, backend: int) -> None:
        if backend in self.backends:
            self.backends[backend].child.kill()

    def answer(self, asked: Asked, error: HeadraceError | None) -> None:
        self._send(asked.frontend, Changed(asked.number, error))

    def tell(self, text: str) -> None:
        self.tell_person(text)

    def _send(self, frontend: int, word: object) -> None:
        child = self.frontends[frontend].child
        if child is not None:
            child.send(word)
