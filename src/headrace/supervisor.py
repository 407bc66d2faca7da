"""The parent of a server: starts backend and frontends, brings them together, starts anew what dies, stops them all.

Frontends listen from the first moment and say that they are not ready until the backend is warm. A backend that dies
is noticed by the frontends themselves, which answer what it held with an error at once and are not ready until the next
one is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from headrace.backend_job import BackendJob
from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.config import ServeConfig
from headrace.control import Attach, BackendReady, Connect, Listening, ServedModel, Stop
from headrace.door import DoorLimits, open_door
from headrace.errors import HeadraceError, InvalidOption, NotReady, RunFailed
from headrace.frontend_job import FrontendJob
from headrace.processes import ChildFailed, children_deaf_to_ctrl_c, enter
from headrace.transport.layout import Layout
from headrace.transport.pair import DupFdHolder, RingPair

FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30.0  # before a process is started anew; twice as long each time
STEADY_S = 60.0  # a process that lived so long begins anew with the first delay
KILL_AFTER_S = 5.0  # beyond the drain limit
BACKLOG = 1024


@dataclass(slots=True, eq=False)
class _Child:
    """A process that must be there; `process` is None while it waits to be started anew."""

    name: str
    target: str
    make_job: Callable[[Connection], object]
    process: SpawnProcess | None = None
    control: Connection | None = None
    started_ns: int = 0
    due_ns: int = 0
    delay_s: float = FIRST_DELAY_S


class Supervisor:
    """One server. `tell` gets sentences for the person who started it."""

    def __init__(self, config: ServeConfig, tell: Callable[[str], None]) -> None:
        self._config = config
        self._tell = tell
        self._context = multiprocessing.get_context("spawn")
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signals = _Signals()
        self._model: ServedModel | None = None
        self._was_ready = False

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM. Raises HeadraceError if the server cannot be started."""
        listener = self._listen()
        limits = DoorLimits(rows=self._config.queue_rows, total_bytes=self._config.ring_bytes)
        self._door = open_door(self._config.ring_socket, self.address, limits, self._tell)
        self._backend = _Child("backend", "headrace.backend.process:run_backend", self._backend_job)
        self._frontends = [
            _Child(
                f"frontend {number}",
                "headrace.frontend.process:run_frontend",
                lambda control: self._frontend_job(listener, control),
            )
            for number in range(self._config.frontends)
        ]
        try:
            with self._signals.caught():
                for child in (*self._frontends, self._backend):
                    self._start(child)
                while not self._signals.count:
                    self._look()
                self._stop()
        finally:
            self._door.close()
            self._kill_all()
            listener.close()

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

    def _backend_job(self, control: Connection) -> BackendJob:
        config = self._config
        return BackendJob(
            name=config.name,
            version=config.version,
            model=config.model,
            device=config.device,
            num_lanes=config.num_lanes,
            lanes=config.lanes,
            image_size=config.image_size,
            wake=DupFdHolder(self._wake_fd),
            control=control,
        )

    def _frontend_job(self, listener: socket.socket, control: Connection) -> FrontendJob:
        return FrontendJob(
            name=self._config.name,
            listener=listener,
            control=control,
            max_body_bytes=self._config.max_body_bytes,
            body_timeout_s=self._config.body_timeout_s,
            drain_timeout_s=self._config.drain_timeout_s,
        )

    def _start(self, child: _Child) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=enter, args=(child.target, child.make_job(theirs)), name=child.name)
        with children_deaf_to_ctrl_c():
            process.start()
        theirs.close()
        child.process, child.control, child.started_ns = process, ours, now_ns()

    def _look(self) -> None:
        """Wait for words, deaths, signals and restarts that are due, and act."""
        children = [self._backend, *self._frontends]
        alive = [child for child in children if child.process is not None]
        watched: dict[object, _Child] = {}
        for child in alive:
            assert child.process is not None
            watched[child.process.sentinel] = child
            if child.control is not None:
                watched[child.control] = child
        due = [child.due_ns for child in children if child.process is None]
        timeout_s = max(0.0, seconds(min(due) - now_ns())) if due else None
        ready = wait([*watched, self._signals.fd, self._door.fd], timeout_s)  # type: ignore[list-item]
        if self._door.fd in ready:
            self._let_in()
        for child in alive:
            if child.control in ready:
                self._hear(child)
        for child in alive:
            if child.process is not None and child.process.sentinel in ready:
                self._bury(child)
        for child in children:
            if child.process is None and now_ns() >= child.due_ns:
                self._start(child)

    def _hear(self, child: _Child) -> None:
        assert child.control is not None
        try:
            word = child.control.recv()
        except (EOFError, OSError):
            child.control.close()
            child.control = None
            return
        if isinstance(word, ChildFailed):
            self._failed(word.error)
        elif isinstance(word, BackendReady):
            self._backend_ready(word)
        elif isinstance(word, Listening) and self._model is not None:
            self._connect(child)

    def _failed(self, error: HeadraceError) -> None:
        """A backend that cannot even be started the first time ends the server; later it is tried again."""
        if not self._was_ready:
            raise error
        self._tell(f"the backend could not be started anew: {error}")

    def _backend_ready(self, word: BackendReady) -> None:
        self._model = word.model
        if self._backend.process is not None and self._backend.process.pid is not None:
            self._door.offer(word.model, self._backend.process.pid, self._wake_fd)
        for note in word.notes:
            self._tell(note)
        for frontend in self._frontends:
            if frontend.process is not None:
                self._connect(frontend)
        if not self._was_ready:
            self._tell(f"ready: http://{self.address[0]}:{self.address[1]}/v2/models/{word.model.name}")
        else:
            self._tell("ready again")
        self._was_ready = True

    def _connect(self, frontend: _Child) -> None:
        """Give backend and frontend the two ends of a ring."""
        if self._model is None or self._backend.control is None or frontend.control is None:
            return
        model = self._model
        layout = Layout(rows=self._config.queue_rows, inputs=model.inputs, outputs=model.outputs)
        ring = RingPair.create(layout, self._wake_fd)
        try:
            self._backend.control.send(Attach(ring))
            frontend.control.send(Connect(ring, model))
        except OSError:  # it has just died, which the next look sees
            return
        finally:
            ring.close()

    def _let_in(self) -> None:
        """Give the backend the rings of clients that have come to the door."""
        for knock in self._door.knocks():
            try:
                if self._backend.control is None:
                    raise BrokenPipeError
                self._backend.control.send(Attach(knock.ring))
            except OSError:  # it has just died, which the next look sees
                knock.refuse(NotReady(f"model {knock.model.name} is not ready; try again"))
            else:
                knock.grant()

    def _bury(self, child: _Child) -> None:
        """Note a death, and when the process is to be started anew."""
        assert child.process is not None
        child.process.join()
        code = child.process.exitcode
        if child is self._backend and not self._was_ready:
            self._hear_last_words(child)
            raise RunFailed(f"the backend ended with exit code {code} before it was ready")
        if seconds(now_ns() - child.started_ns) > STEADY_S:
            child.delay_s = FIRST_DELAY_S
        self._tell(f"the {child.name} process ended (exit code {code}); it is started anew in {child.delay_s:g} s")
        child.due_ns = now_ns() + int(child.delay_s * NS_PER_S)
        child.delay_s = min(2 * child.delay_s, LAST_DELAY_S)
        if child.control is not None:
            child.control.close()
        child.process, child.control = None, None
        if child is self._backend and self._model is not None:
            self._door.withdraw(self._model.name, self._model.version)
            self._model = None

    def _hear_last_words(self, child: _Child) -> None:
        while child.control is not None and child.control.poll():
            self._hear(child)

    def _stop(self) -> None:
        """Let frontends answer what they have taken, then the backend end; a second signal ends it all at once."""
        self._tell(f"stopping: answering what was taken, for at most {self._config.drain_timeout_s:g} s")
        self._door.close()
        limit_ns = now_ns() + int((self._config.drain_timeout_s + KILL_AFTER_S) * NS_PER_S)
        for children in (self._frontends, [self._backend]):
            for child in children:
                self._say_stop(child)
            while any(child.process is not None and child.process.is_alive() for child in children):
                sentinels = [child.process.sentinel for child in children if child.process is not None]
                wait([*sentinels, self._signals.fd], 0.1)
                if self._signals.count > 1 or now_ns() > limit_ns:
                    return

    def _say_stop(self, child: _Child) -> None:
        try:
            if child.control is not None:
                child.control.send(Stop())
        except OSError:  # it has ended already
            return

    def _kill_all(self) -> None:
        for child in (*self._frontends, self._backend):
            if child.process is not None and child.process.is_alive():
                child.process.kill()
                child.process.join()
        os.close(self._wake_fd)


@dataclass(slots=True)
class _Signals:
    """SIGINT and SIGTERM as something to wait for."""

    count: int = 0
    _pipe: tuple[int, int] = field(default_factory=os.pipe)

    @property
    def fd(self) -> int:
        return self._pipe[0]

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._pipe[1], b".")
