"""The server's door: a Unix socket at which programs on the same host get a ring of their own to a model's backend.

A thread does all that may take time: it accepts, checks who it is, reads what is asked, makes the ring. The supervisor
is then told of a `Knock`, gives the ring to the backend, and grants it. A ring ends with its client: the backend
watches the connection, which the client's death closes. What is said stands in `headrace.door_messages`. No torch here.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.control import ServedModel
from headrace.door_messages import (
    LENGTH,
    MOST_ASKED_BYTES,
    Answer,
    Ask,
    Granted,
    Models,
    Refused,
    Trust,
    body_bytes,
    decode_ask,
    door_of,
    encode,
    peer_of,
    socket_address,
    trusts_user,
)
from headrace.errors import HeadraceError, InvalidOption, NotReady, QueueFull, TransportFailed, UnknownModel
from headrace.placement import on_cpus
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair

ASK_LIMIT_S = 2.0  # from accepting a connection to having all that it asks
MOST_GUESTS = 256  # connections at once
BATCHES = 2  # largest batches that a ring holds if the client does not say how many rows it wants


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorLimits:
    """What clients may have."""

    rows_of: Callable[[int], int]  # of one ring, by those of a model's largest batch
    total_bytes: int  # of all rings together; one process may have half of it


class Part(NamedTuple):
    """One of the engines of a model's version."""

    name: str
    version: str
    engine: int


class Backend(NamedTuple):
    """A child process of ours that serves, what wakes it, and what becomes readable when it begins to end.

    Its rings should lie near these CPUs, if any are told.
    """

    pid: int
    wake_fd: int
    ending_fd: int
    cpus: frozenset[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """An engine that is ready, with descriptors of our own: what wakes its backend, a pidfd of it, and `ending_fd`."""

    model: ServedModel
    engine: int
    pid: int
    cpus: frozenset[int] | None
    wake_fd: int
    backend_fd: int
    ending_fd: int

    @property
    def part(self) -> Part:
        return Part(self.model.name, self.model.version, self.engine)

    def close(self) -> None:
        os.close(self.wake_fd)
        os.close(self.backend_fd)
        os.close(self.ending_fd)

    def copy(self) -> _Offer:
        """Return the same, with descriptors of its own."""
        wake_fd, backend_fd, ending_fd = (os.dup(each) for each in (self.wake_fd, self.backend_fd, self.ending_fd))
        return replace(self, wake_fd=wake_fd, backend_fd=backend_fd, ending_fd=ending_fd)


@dataclass(slots=True, eq=False)
class _Guest:
    """A connection: it asks, waits for the backend, and holds a ring."""

    connection: socket.socket
    process: int  # 0 where it is in a namespace that we cannot see
    due_ns: int  # until when it may go on like this; 0: for ever
    received: bytearray = field(default_factory=bytearray)
    part: Part | None = None  # whose ring it has or waits for
    backend: int = 0  # its process
    by_default: bool = False  # it wanted the newest version, whichever that is
    ring_bytes: int = 0
    is_gone: bool = False

    def wants(self, model: ServedModel) -> bool:
        """Tell whether it would be given a ring to this version if it asked now."""
        part = self.part
        return part is not None and part.name == model.name and (self.by_default or part.version == model.version)

    def say(self, answer: Answer, descriptors: list[int]) -> None:
        """Never waits: the first answer always fits into an empty socket."""
        try:
            socket.send_fds(self.connection, [encode(answer)], descriptors)
        except OSError:  # it has gone, which the door's thread sees
            return

    def retire(self) -> None:
        """Have it ask again before its next request. What it has under way is answered."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:  # it has gone
            return


class Knock:
    """A client that is to have a ring: give `ring` to the backend with this `pid`, then `grant`; or `refuse`."""

    def __init__(self, door: Door, guest: _Guest, ring: RingPair, offer: _Offer) -> None:
        self._door = door
        self._guest = guest
        self._offer = offer
        self.model = offer.model
        self.pid = offer.pid
        self.ring = ring

    def grant(self) -> None:
        """Hand the client its end."""
        ring = self.ring
        told = [self._offer.backend_fd, self._offer.ending_fd]
        descriptors = [ring.memory_fd, ring.wake_backend_fd, ring.wake_client_fd, *told]
        engines = self._door.engines(self._offer.part)
        self._end(Granted(ring.layout.rows, self.model, self._offer.engine, engines), descriptors)

    def refuse(self, error: HeadraceError) -> None:
        self._end(_refusal(error), [])

    def _end(self, answer: Answer, descriptors: list[int]) -> None:
        self._door.answer(self._guest, answer, descriptors)
        self.ring.close()
        self._offer.close()


class Door:
    """All clients that have come through a listening Unix socket. None: nobody comes, and all else is the same.

    The supervisor's thread calls it; `fd` is readable when there are `knocks`.
    """

    def __init__(self, listener: socket.socket | None, limits: DoorLimits, trusts: Trust = trusts_user) -> None:
        self._listener = listener
        self._limits = limits
        self._trusts = trusts
        self._lock = threading.Lock()
        self._offers: dict[Part, _Offer] = {}
        self._guests: set[_Guest] = set()
        self._knocks: list[Knock] = []
        self._closing = False
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.fd = os.eventfd(0, flags)
        self._wake_fd = os.eventfd(0, flags)
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._serve, name="door", daemon=True)

    def open(self) -> None:
        if self._listener is not None:
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(self._wake_fd, selectors.EVENT_READ, lambda: None)
            self._thread.start()

    def offer(self, model: ServedModel, backend: Backend, engine: int = 0) -> None:
        """Say that an engine of a model is ready. Clients of the model ask again, so that they use this one too."""
        descriptors = os.dup(backend.wake_fd), os.pidfd_open(backend.pid), os.dup(backend.ending_fd)
        offer = _Offer(model, engine, backend.pid, backend.cpus, *descriptors)
        with self._lock:
            before = self._offers.pop(offer.part, None)
            self._offers[offer.part] = offer
            for guest in self._guests:
                if guest.wants(model):
                    guest.retire()
        if before is not None:
            before.close()

    def withdraw(self, pid: int) -> None:
        """Give no more rings to this backend, and have its clients ask again. Safe to call for any process."""
        with self._lock:
            offers = [offer for offer in self._offers.values() if offer.pid == pid]
            for offer in offers:
                del self._offers[offer.part]
            for guest in self._guests:
                if guest.backend == pid:
                    guest.retire()
        for offer in offers:
            offer.close()

    def engines(self, part: Part) -> tuple[int, ...]:
        """Return which engines of the same version are ready."""
        with self._lock:
            return tuple(sorted(each.engine for each in self._offers if each[:2] == part[:2]))

    def knocks(self) -> list[Knock]:
        """Return the clients that have come. Each must be granted or refused."""
        _drain(self.fd)
        with self._lock:
            knocks, self._knocks = self._knocks, []
        return knocks

    def answer(self, guest: _Guest, answer: Answer, descriptors: list[int]) -> None:
        """Say the one thing that a client hears. Without a ring, it then has to go."""
        with self._lock:
            if guest.is_gone:
                return
            if not isinstance(answer, Granted):
                guest.part, guest.backend, guest.ring_bytes = None, 0, 0
                guest.due_ns = now_ns() + int(ASK_LIMIT_S * NS_PER_S)
                os.eventfd_write(self._wake_fd, 1)
            guest.say(answer, descriptors)

    def close(self) -> None:
        """Let nobody in any more, and have all clients ask elsewhere. Their rings last until the backend ends."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for knock in self.knocks():
            knock.refuse(NotReady("the server is stopping"))
        for guest in list(self._guests):
            guest.retire()
            self._drop(guest)
        for offer in self._offers.values():
            offer.close()
        self._offers.clear()
        self._selector.close()
        if self._listener is not None:
            _remove(self._listener)
        os.close(self.fd)
        os.close(self._wake_fd)

    def _serve(self) -> None:
        while not self._closing:
            due_ns = min((guest.due_ns for guest in self._guests if guest.due_ns), default=0)
            timeout_s = max(0.0, seconds(due_ns - now_ns())) if due_ns else None
            for key, _ in self._selector.select(timeout_s):
                key.data()
            _drain(self._wake_fd)
            for guest in [guest for guest in self._guests if 0 < guest.due_ns <= now_ns()]:
                self._drop(guest)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it went away before, or no descriptor is free
            return
        peer = peer_of(connection)
        if not self._trusts(peer.user) or len(self._guests) >= MOST_GUESTS:
            connection.close()
            return
        connection.setblocking(False)
        guest = _Guest(connection, peer.process, now_ns() + int(ASK_LIMIT_S * NS_PER_S))
        with self._lock:
            self._guests.add(guest)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(guest))

    def _hear(self, guest: _Guest) -> None:
        """Read what there is of the question. Whatever comes after it, or is none, ends the connection."""
        try:
            data = guest.connection.recv(MOST_ASKED_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or guest.part is not None:
            if data:  # to the backend, which has this connection too, it is as if the client had gone
                guest.connection.shutdown(socket.SHUT_RDWR)
            self._drop(guest)
            return
        guest.received += data
        try:
            ask = _whole(guest.received)
        except TransportFailed:
            self._drop(guest)
            return
        if ask is not None:
            self._asked(guest, ask)

    def _asked(self, guest: _Guest, ask: Ask) -> None:
        if not ask.model:
            with self._lock:
                models = tuple({part[:2]: offer.model for part, offer in self._offers.items()}.values())
            self.answer(guest, Models(models), [])
            return
        try:
            knock = self._knock(guest, ask)
        except HeadraceError as error:
            self.answer(guest, _refusal(error), [])
            return
        with self._lock:
            self._knocks.append(knock)
        os.eventfd_write(self.fd, 1)

    def _knock(self, guest: _Guest, ask: Ask) -> Knock:
        """Make the ring. Raises UnknownModel, NotReady, QueueFull, TransportFailed."""
        with self._lock:
            found = self._find(ask)
            model = found.model
            wanted = ask.rows or BATCHES * model.max_batch_size
            rows = max(model.max_batch_size, min(wanted, self._limits.rows_of(model.max_batch_size)))
            layout = Layout(rows=rows, inputs=model.inputs, outputs=model.outputs)
            self._require_room(guest, layout.total_bytes)
            offer = found.copy()
            guest.part, guest.backend, guest.by_default = offer.part, offer.pid, ask.version is None
            guest.ring_bytes, guest.due_ns = layout.total_bytes, 0
        try:
            with on_cpus(offer.cpus):
                ring = RingPair.create(layout, offer.wake_fd)
        except HeadraceError:
            offer.close()
            raise
        return Knock(self, guest, replace(ring, peer_fd=os.dup(guest.connection.fileno())), offer)

    def _find(self, ask: Ask) -> _Offer:
        of_model = [part for part in self._offers if part.name == ask.model]
        versions = tuple(dict.fromkeys(part.version for part in of_model))
        if not versions:
            raise NotReady(f"model {ask.model} is not ready, or there is none of that name")
        version = max(versions, key=int) if ask.version is None else ask.version
        if version not in versions:
            raise UnknownModel(f"model {ask.model} has no version {version}; it has {', '.join(versions)}")
        engines = [part for part in of_model if part.version == version and ask.engine in (None, part.engine)]
        if not engines:
            raise NotReady(f"engine {ask.engine} of model {ask.model}, version {version}, is not ready")
        guests = [guest.part for guest in self._guests]
        return self._offers[min(engines, key=guests.count)]

    def _require_room(self, guest: _Guest, ring_bytes: int) -> None:
        for most, whose, held in (
            (self._limits.total_bytes, "all clients' rings", self._guests),
            (self._limits.total_bytes // 2, "this process's rings", self._of_process(guest.process)),
        ):
            size = sum(each.ring_bytes for each in held)
            if size + ring_bytes > most:
                raise QueueFull(
                    f"{whose} have {size} bytes of shared memory, and {ring_bytes} more would exceed {most}; ask for"
                    " fewer rows, or raise --ring-bytes"
                )

    def _of_process(self, process: int) -> list[_Guest]:
        return [guest for guest in self._guests if guest.process == process]

    def _drop(self, guest: _Guest) -> None:
        with self._lock:
            if guest.is_gone:
                return
            guest.is_gone = True
            self._guests.discard(guest)
            self._selector.unregister(guest.connection)
            guest.connection.close()


def open_door(where: str, address: tuple[str, int], limits: DoorLimits, tell: Callable[[str], None]) -> Door:
    """Return the door of a server that listens for HTTP on `address`, open.

    `where` is "auto" for the name that clients derive from the server's URL, "off", or a path. A derived name that is
    taken is told, and nobody comes then. Raises InvalidOption for a path where no socket can be.
    """
    name = door_of(*address) if where == "auto" else where
    listener = None
    if where != "off":
        try:
            listener = _listen(name)
        except OSError as error:
            reason = f"cannot listen there ({error.strerror or error})"
            if where != "auto":
                raise InvalidOption(f"--ring-socket {name}: {reason}; choose another path, or auto, or off") from error
            tell(f"clients on this host use HTTP, without shared memory: {name}: {reason}")
    door = Door(listener, limits)
    door.open()
    return door


def _listen(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not name.startswith("@"):
            _remove_left_over(Path(name))
        listener.bind(socket_address(name))
        listener.listen(MOST_GUESTS)
    except OSError:
        listener.close()
        raise
    return listener


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a server that was killed; leave one alone that answers, and any other file."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def _remove(listener: socket.socket) -> None:
    name = listener.getsockname()
    listener.close()
    if isinstance(name, str) and name:  # bytes where it is an abstract name
        Path(name).unlink(missing_ok=True)


def _whole(received: bytearray) -> Ask | None:
    """Return the question once all of it is there. Raises TransportFailed if it is none."""
    if len(received) < LENGTH.size:
        return None
    end = LENGTH.size + body_bytes(bytes(received[: LENGTH.size]), MOST_ASKED_BYTES)
    if len(received) > end:
        raise TransportFailed("more than one question")
    return decode_ask(bytes(received[LENGTH.size :])) if len(received) == end else None


def _refusal(error: HeadraceError) -> Refused:
    return Refused(type(error).__name__, str(error))


def _drain(eventfd: int) -> None:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return
