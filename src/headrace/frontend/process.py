"""A frontend's process: accepts connections on the server's socket; the supervisor tells it where the backend is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import uvloop

from headrace.control import (
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
    Stop,
    Verb,
)
from headrace.errors import NotReady
from headrace.frontend.auth import Tokens
from headrace.frontend.board import Board
from headrace.frontend.gpu import GpuWatch, read_gpus
from headrace.frontend.grpc_v2 import GrpcFront, GrpcSettings, TlsFiles
from headrace.frontend.http.front import Front, make_front
from headrace.frontend.http.routes import add_pages
from headrace.frontend.ledger import Ledger
from headrace.frontend.link import BackendLink
from headrace.frontend.observe import Observer
from headrace.frontend.regions import Regions, SharedRegions
from headrace.frontend.service import Service
from headrace.frontend_job import FrontendJob
from headrace.processes import allow_open_files, become_child, keep_freed_memory

if TYPE_CHECKING:
    from headrace.frontend.spans import Tracer
    from headrace.frontend_job import TracingSettings

POLL_S = 0.01  # between two looks whether requests under way have ended

FLUSH_S = 2.0  # for the last traces to be sent; the supervisor waits for longer
SAMPLE_S = 0.25  # between two looks at what is under way, for the board


def run_frontend(job: FrontendJob) -> None:
    """Serve until told to stop. The target of the process."""
    become_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor's to hear
    keep_freed_memory()
    allow_open_files()
    uvloop.run(_Frontend(job).run())


class _Control:
    """Passes clients' changes of models on to the supervisor; see `service.ModelControl`."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._number = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def change(self, verb: Verb, name: str) -> None:
        self._number += 1
        number = self._number
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._control.send(Change(number, verb, name))
            await future
        except OSError as error:  # the supervisor has ended, and so do we
            raise NotReady("the server is stopping") from error
        finally:
            del self._waiting[number]

    def changed(self, word: Changed) -> None:
        future = self._waiting.get(word.number)  # none: its client has gone away
        if future is None or future.done():
            return
        if word.error is None:
            future.set_result(None)
        else:
            future.set_exception(word.error)

    def end(self) -> None:
        """Tell all who wait that they will not hear how it went."""
        for number in list(self._waiting):
            self.changed(Changed(number, NotReady("the server is stopping")))


def _grpc_settings(job: FrontendJob) -> GrpcSettings:
    access, tls = job.access, None
    if access.tls_cert is not None and access.tls_key is not None:
        authority = access.tls_client_ca
        tls = TlsFiles(
            key=access.tls_key.read_bytes(),
            certificates=access.tls_cert.read_bytes(),
            client_authority=None if authority is None else authority.read_bytes(),
        )
    return GrpcSettings(
        max_message_bytes=job.http.max_body_bytes,
        tls=tls,
        authorize=None if access.token_file is None else Tokens.read(access.token_file).allow,
    )


def _make_tracer(settings: TracingSettings, tell: Callable[[str], None]) -> Tracer:
    from headrace.frontend.spans import Tracer  # noqa: PLC0415  7 MB that only servers with traces need

    return Tracer(settings, tell)


class _Frontend:
    def __init__(self, job: FrontendJob) -> None:
        self._job = job
        self._control = _Control(job.control)
        self._service = Service(
            job.names,
            totals=Ledger(Board.attach(job.board.fd), job.number),
            control=self._control if job.explicit_control else None,
        )
        self._regions = SharedRegions(Regions(offered=job.system_shared_memory), job.control.send)
        self._regions.own.restore(job.regions)
        self._tracer = None if job.tracing is None else _make_tracer(job.tracing, self._notice)
        self._grpc = GrpcFront(self._service, self._regions, _grpc_settings(job), self._tracer)
        self._links: dict[int, BackendLink] = {}  # by backend
        self._retirements: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        front = make_front(self._service, self._regions, self._job.http, self._job.access, self._tracer)
        add_pages(front.routes, Observer(self._service, GpuWatch(read_gpus(self._job.devices))))
        await front.start(self._job.listener)
        if self._job.grpc_address is not None:
            await self._grpc.start(*self._job.grpc_address)
        control = self._job.control
        asyncio.get_running_loop().add_reader(control.fileno(), self._hear)
        os.set_blocking(control.fileno(), True)  # uvloop has made it otherwise, and words are to be read whole
        control.send(Listening())
        self._sample()
        await self._stop.wait()
        front.stop_accepting()
        await asyncio.gather(self._drain(front), self._grpc.stop(self._job.drain_timeout_s))
        await front.close()
        self._service.close()
        if self._tracer is not None:
            await self._flush(self._tracer)

    def _sample(self) -> None:
        self._service.sample()
        asyncio.get_running_loop().call_later(SAMPLE_S, self._sample)

    def _hear(self) -> None:
        """Take the supervisor's words; its end means stop."""
        control = self._job.control
        try:
            while not self._stop.is_set() and control.poll():
                self._heed(control.recv())
        except (EOFError, OSError):
            self._end()

    def _heed(self, word: object) -> None:
        if isinstance(word, Connect):
            self._connect(word)
        elif isinstance(word, Retire):
            self._let_go(word.backend, lambda: self._say(Retired(word.backend)))
        elif isinstance(word, Models):
            self._service.set_statuses(word.versions)
            self._drop_dead(word)
            self._say(Seen(word.serial))
        elif isinstance(word, Changed):
            self._control.changed(word)
        elif isinstance(word, ChangeRegions | RegionsChanged):
            self._regions.heard(word)
        elif isinstance(word, Stop):
            self._end()

    def _connect(self, word: Connect) -> None:
        link = BackendLink(word.ring, word.model, self._service.remove, engine=word.engine)
        link.start()
        self._service.add(link)
        self._links[word.backend] = link

    def _drop_dead(self, word: Models) -> None:
        """Let go of what has died, which its link has noticed by itself."""
        for backend in [backend for backend in self._links if backend not in word.live]:
            self._let_go(backend, lambda: None)

    def _let_go(self, backend: int, then: Callable[[], None]) -> None:
        link = self._links.pop(backend)
        self._service.retire(link)
        task = asyncio.get_running_loop().create_task(self._close_when_idle(link, then))
        self._retirements.add(task)
        task.add_done_callback(self._retirements.discard)

    async def _close_when_idle(self, link: BackendLink, then: Callable[[], None]) -> None:
        while link.in_flight:
            await asyncio.sleep(POLL_S)
        link.close()
        self._service.remove(link)
        then()

    def _say(self, word: object) -> None:
        with suppress(OSError):  # the supervisor has ended, and so do we
            self._job.control.send(word)

    def _notice(self, text: str) -> None:
        """Have the server's owner told of the traces. Called from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and so do we
            self._loop.call_soon_threadsafe(self._say, Notice("traces", text))

    def _end(self) -> None:
        if self._stop.is_set():
            return
        asyncio.get_running_loop().remove_reader(self._job.control.fileno())
        self._service.draining = True
        self._control.end()
        self._stop.set()

    async def _drain(self, front: Front) -> None:
        """Wait until what was taken has been answered, within the limit."""
        deadline = asyncio.get_running_loop().time() + self._job.drain_timeout_s
        while self._service.in_flight or front.in_flight:
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(POLL_S)

    async def _flush(self, tracer: Tracer) -> None:
        """Send the last traces, within the limit: a collector that does not answer holds up nobody."""
        thread = tracer.close()
        deadline = self._loop.time() + FLUSH_S
        while thread.is_alive() and self._loop.time() < deadline:
            await asyncio.sleep(POLL_S)
