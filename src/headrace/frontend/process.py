"""A frontend's process: accepts connections on the server's socket; the supervisor tells it where the backend is."""

from __future__ import annotations

import asyncio
import signal

from aiohttp import web

from headrace.control import Connect, Listening, Stop
from headrace.frontend.board import Board
from headrace.frontend.gpu import GpuWatch, read_gpu
from headrace.frontend.http_v2 import make_app
from headrace.frontend.ledger import Ledger
from headrace.frontend.link import BackendLink
from headrace.frontend.observe import Observer
from headrace.frontend.service import Service
from headrace.frontend_job import FrontendJob
from headrace.processes import become_child

SAMPLE_S = 0.25  # between two looks at what is under way, for the board


def run_frontend(job: FrontendJob) -> None:
    """Serve until told to stop. The target of the process."""
    become_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor's to hear
    asyncio.run(_Frontend(job).run())


class _Frontend:
    def __init__(self, job: FrontendJob) -> None:
        self._job = job
        self._service = Service((job.name,), totals=Ledger(Board.attach(job.board.fd), job.number))
        self._stop = asyncio.Event()

    async def run(self) -> None:
        runner = web.AppRunner(self._app(), handler_cancellation=True)
        await runner.setup()
        site = web.SockSite(runner, self._job.listener)
        await site.start()
        control = self._job.control
        asyncio.get_running_loop().add_reader(control.fileno(), self._hear)
        control.send(Listening())
        self._sample()
        await self._stop.wait()
        await site.stop()
        await self._drain()
        await runner.cleanup()
        self._service.close()

    def _app(self) -> web.Application:
        observer = Observer(self._service, GpuWatch(read_gpu(self._job.device)))
        return make_app(self._service, observer, self._job.max_body_bytes, self._job.body_timeout_s)

    def _sample(self) -> None:
        self._service.sample()
        asyncio.get_running_loop().call_later(SAMPLE_S, self._sample)

    def _hear(self) -> None:
        """Take the supervisor's words; its end means stop."""
        control = self._job.control
        try:
            while control.poll():
                word = control.recv()
                if isinstance(word, Connect):
                    self._connect(word)
                elif isinstance(word, Stop):
                    self._end()
        except (EOFError, OSError):
            self._end()

    def _connect(self, word: Connect) -> None:
        link = BackendLink(word.ring, word.model, self._service.remove)
        link.start()
        self._service.add(link)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._job.control.fileno())
        self._service.draining = True
        self._stop.set()

    async def _drain(self) -> None:
        """Wait until what was taken has been answered, within the limit."""
        deadline = asyncio.get_running_loop().time() + self._job.drain_timeout_s
        while self._service.in_flight:
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.01)
