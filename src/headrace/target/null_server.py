"""A server whose law is known: what a load generator says of it can be compared with what happened.

One process, one thread: requests are read whole, queue by `law.Queue`, and are answered at the moment that it says,
whose last stretch is spun. Every request is logged: when its last byte was read, when it was due, when it was answered.
"""

from __future__ import annotations

import heapq
import io
import socket
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import httptools
import msgspec
import numpy as np
import numpy.typing as npt

from headrace.clock import now_ns
from headrace.errors import InvalidOption
from headrace.processes import allow_open_files, become_child, failures_reported
from headrace.target.law import DRAWS, MODEL, Fate, Law, Queue
from headrace.target.null_model import NullModel, Reply
from headrace.target.polling import BROKEN, IN, OUT, Poller

RECEIVED_BYTES = 1 << 18  # at once, so that nobody who is due waits longer than that takes
RESET_PATH, LOG_PATH = "/v2/null/reset", "/v2/null/log"
LOG_DTYPE = np.dtype(
    [
        ("arrived_ns", np.int64),  # the last byte was read
        ("service_ns", np.int64),
        ("due_ns", np.int64),  # 0: dropped
        ("answered_ns", np.int64),  # 0: not, or not yet
        ("fate", np.int64),
    ]
)
LOGGED = 5  # numbers of a request
_REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 503: b"Service Unavailable"}
_SERVER = b'{"name":"headrace-null","version":"1","extensions":["binary_tensor_data","statistics"]}'
_HEADER_LENGTH = b"inference-header-content-length"

Log = npt.NDArray[np.void]  # of LOG_DTYPE


@dataclass(frozen=True, slots=True, kw_only=True)
class NullJob:
    law: Law
    report: Connection


@dataclass(frozen=True, slots=True)
class Listening:
    port: int


def run_null_server(job: NullJob) -> None:
    """Serve until terminated. The target of a process."""
    become_child()
    with failures_reported(job.report, "the null server failed"):
        listener = listen("127.0.0.1", 0)
        job.report.send(Listening(listener.getsockname()[1]))
        NullServer(job.law, listener, honest=True).serve()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any that is free. Raises InvalidOption."""
    try:
        listener = socket.create_server((host, port), backlog=4096)
    except OSError as error:
        raise InvalidOption(f"--port {port}: cannot listen on {host} ({error.strerror}); name another") from error
    listener.setblocking(False)
    return listener


def read_log(data: bytes) -> Log:
    """Read what `LOG_PATH` answers with."""
    log: Log = np.load(io.BytesIO(data), allow_pickle=False)
    return log


class Course:
    """What the law says of each request in turn, and the log of it. One thread at a time.

    An honest one answers all and rightly until it begins anew, so that a run of ours can ask what is right beforehand.
    """

    def __init__(self, law: Law, *, honest: bool) -> None:
        self._law = law
        self._honest = honest
        self._services, self._fates = law.service_times_ns(), law.fates()
        self.begin()

    def begin(self) -> None:
        self._number = 0
        self._queue = Queue(self._law)
        self._log = array("q")
        self._seen: set[int] = set()

    def begin_anew(self) -> None:
        """Forget what was, and be as the law says from now on."""
        self._honest = False
        self.begin()

    def turn(self) -> tuple[Fate, int]:
        """Return what becomes of the next request, and its service time in nanoseconds."""
        number = self._number % DRAWS
        self._number += 1
        return Fate.ANSWER if self._honest else self._fates[number], self._services[number]

    def refuse(self, arrived_ns: int) -> int:
        """Log a request that is shed; return its place in the log."""
        return self._add(arrived_ns, 0, arrived_ns, Fate.SHED)

    def queue(self, fate: Fate, arrived_ns: int, service_ns: int, key: int) -> tuple[int, int]:
        """Return when a request that arrived after all before it is due, and its place; `key` tells inputs apart."""
        if self._law.cached and key in self._seen:
            service_ns, due_ns = 0, arrived_ns
        else:
            self._seen.add(key)
            due_ns = self._queue.due_ns(arrived_ns, service_ns)
        return due_ns, self._add(arrived_ns, service_ns, 0 if fate == Fate.DROP else due_ns, fate)

    def answered(self, place: int) -> None:
        self._log[place + 3] = now_ns()

    def as_npy(self) -> bytes:
        file = io.BytesIO()
        np.save(file, np.frombuffer(self._log.tobytes(), dtype=LOG_DTYPE))
        return file.getvalue()

    def _add(self, arrived_ns: int, service_ns: int, due_ns: int, fate: Fate) -> int:
        self._log.extend((arrived_ns, service_ns, due_ns, 0, fate))
        return len(self._log) - LOGGED


class NullServer:
    """Serves the law on a listening socket."""

    def __init__(self, law: Law, listener: socket.socket, *, honest: bool = False) -> None:
        allow_open_files()
        self._course = Course(law, honest=honest)
        self._model = NullModel(law.input_bytes)
        self._listener = listener
        self._poller = Poller()
        self._poller.epoll.register(listener, IN)
        self._connections: dict[int, _Connection] = {}
        self._due: list[tuple[int, int, _Connection, int, Reply]] = []
        self._number = 0
        self._answered = 0  # since the start: a server's statistics do not go back
        self._refused = 0

    def serve(self, until: Callable[[], bool] = lambda: False) -> None:
        """Serve until `until` says so, which is asked several times a second."""
        while not until():
            for descriptor, events in self._poller.wait(self._due[0][0] if self._due else None):
                self._answer_due()
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._connections:
                    self._connections[descriptor].ready(events)
            self._answer_due()

    def _reset(self) -> None:
        self._course.begin_anew()
        self._due = [(due_ns, number, connection, -1, reply) for due_ns, number, connection, _, reply in self._due]

    def _answer_due(self) -> None:
        while self._due and self._due[0][0] <= now_ns():
            _, _, connection, place, reply = heapq.heappop(self._due)
            self._answer(connection, place, reply)

    def _answer(self, connection: _Connection, place: int, reply: Reply) -> None:
        if place >= 0:
            self._course.answered(place)
        self._answered += reply.status == 200
        self._refused += reply.status != 200
        connection.send(reply)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            peer.setblocking(False)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections[peer.fileno()] = _Connection(peer, self._poller, self.take, self._connections.pop)
            self._poller.epoll.register(peer, IN)

    def take(self, connection: _Connection, path: str, body: bytes, header_bytes: int | None) -> None:
        """Take a request that has been read whole."""
        arrived_ns = now_ns()
        if path.endswith("/infer"):
            self._infer(connection, body, header_bytes, arrived_ns)
        else:
            connection.send(self._tell(path))

    def _infer(self, connection: _Connection, body: bytes, header_bytes: int | None, arrived_ns: int) -> None:
        fate, service_ns = self._course.turn()
        if fate == Fate.SHED:
            place = self._course.refuse(arrived_ns)
            self._answer(connection, place, Reply(503, b'{"error":"shed, as the law says"}'))
            return
        reply, key = self._model.answer(body, header_bytes, wrong=fate == Fate.WRONG)
        due_ns, place = self._course.queue(fate, arrived_ns, service_ns, key)
        if fate != Fate.DROP:
            self._number += 1
            heapq.heappush(self._due, (due_ns, self._number, connection, place, reply))

    def _tell(self, path: str) -> Reply:
        if path == RESET_PATH:
            self._reset()
            return Reply(200, b"{}")
        if path == LOG_PATH:
            return Reply(200, self._course.as_npy())
        if path.endswith("/stats"):
            return Reply(200, self._statistics())
        if path.startswith("/v2/health/") or path.endswith("/ready"):
            return Reply(200, b"")
        model = f"/v2/models/{MODEL}"
        known = {"/v2": _SERVER, model: self._model.metadata(), f"{model}/config": self._model.config()}
        told = known.get(path.replace("/versions/1", ""))
        return Reply(404, b'{"error":"there is no such thing here"}') if told is None else Reply(200, told)

    def _statistics(self) -> bytes:
        def times(count: int) -> dict[str, int]:
            return {"count": count, "ns": 0}

        stages = (
            "success",
            "queue",
            "compute_input",
            "compute_infer",
            "compute_output",
        )  # perf_analyzer wants all alike
        stats: dict[str, Any] = {name: times(self._answered) for name in stages} | {"fail": times(self._refused)}
        model = {"name": MODEL, "version": "1", "inference_count": self._answered, "execution_count": self._answered}
        return msgspec.json.encode({"model_stats": [{**model, "inference_stats": stats}]})


class _Connection:
    """A client's: one request after another. httptools calls the methods that begin with `on_`."""

    def __init__(
        self,
        peer: socket.socket,
        poller: Poller,
        take: Callable[[_Connection, str, bytes, int | None], None],
        forget: Callable[[int], object],
    ) -> None:
        self._peer = peer
        self._poller = poller
        self._take = take
        self._forget = forget
        self._parser = httptools.HttpRequestParser(self)
        self._unsent = b""
        self._begin()

    def __lt__(self, _other: _Connection) -> bool:
        return False

    def _begin(self) -> None:
        self._path = b""
        self._header_bytes: int | None = None
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == _HEADER_LENGTH:
            self._header_bytes = int(value)
        elif lower == b"expect":
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        self._body.append(part)

    def on_message_complete(self) -> None:
        path, body, header_bytes = self._path.decode().partition("?")[0], b"".join(self._body), self._header_bytes
        self._begin()
        self._take(self, path, body, header_bytes)

    def ready(self, events: int) -> None:
        if events & OUT:
            self._write(b"")
        if events & (IN | BROKEN):
            try:
                received = self._peer.recv(RECEIVED_BYTES)
                if received:
                    self._parser.feed_data(received)
                    return
            except BlockingIOError:
                return
            except (OSError, ValueError, httptools.HttpParserError):
                pass
            self.close()

    def send(self, reply: Reply) -> None:
        extra = b"" if reply.header_bytes is None else b"Inference-Header-Content-Length: %d\r\n" % reply.header_bytes
        head = b"HTTP/1.1 %d %s\r\n%sContent-Length: %d\r\n\r\n"
        self._write(head % (reply.status, _REASONS[reply.status], extra, len(reply.body)) + reply.body)

    def _write(self, data: bytes) -> None:
        waited = bool(self._unsent)
        self._unsent += data
        if self._peer.fileno() < 0:
            return
        try:
            self._unsent = self._unsent[self._peer.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # the client has gone
            self.close()
            return
        if waited != bool(self._unsent):
            self._poller.epoll.modify(self._peer, IN | OUT if self._unsent else IN)

    def close(self) -> None:
        if self._peer.fileno() >= 0:
            self._forget(self._peer.fileno())
            self._poller.epoll.unregister(self._peer)
            self._peer.close()
