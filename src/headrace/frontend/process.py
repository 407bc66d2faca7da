"""A frontend's process: accepts connections on the server's socket; the supervisor tells it where the backend is."""

from __future__ import annotations

import asyncio
import signal

from aiohttp import web

from headrace.control import ChangeRegions, Connect, Listening, RegionsChanged, Stop
from headrace.frontend.grpc_v2 import GrpcFront, GrpcSettings
from headrace.frontend.http_v2 import make_app
from headrace.frontend.link import BackendLink
from headrace.frontend.regions import Regions, SharedRegions
from headrace.frontend.service import Service
from headrace.frontend_job import FrontendJob
from headrace.processes import become_child


def run_frontend(job: FrontendJob) -> None:
    """Serve until told to stop. The target of the process."""
    become_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor's to hear
    asyncio.run(_Frontend(job).run())


class _Frontend:
    def __init__(self, job: FrontendJob) -> None:
        self._job = job
        self._service = Service((job.name,))
        self._regions = SharedRegions(Regions(offered=job.system_shared_memory), job.control.send)
        self._regions.own.restore(job.regions)
        self._grpc = GrpcFront(self._service, self._regions, GrpcSettings(max_message_bytes=job.max_body_bytes))
        self._stop = asyncio.Event()

    async def run(self) -> None:
        runner = web.AppRunner(self._app(), handler_cancellation=True)
        await runner.setup()
        site = web.SockSite(runner, self._job.listener)
        await site.start()
        if self._job.grpc_address is not None:
            await self._grpc.start(*self._job.grpc_address)
        control = self._job.control
        asyncio.get_running_loop().add_reader(control.fileno(), self._hear)
        control.send(Listening())
        await self._stop.wait()
        await site.stop()
        await asyncio.gather(self._drain(), self._grpc.stop(self._job.drain_timeout_s))
        await runner.cleanup()
        self._service.close()

    def _app(self) -> web.Application:
        return make_app(self._service, self._job.max_body_bytes, self._job.body_timeout_s)

    def _hear(self) -> None:
        """Take the supervisor's words; its end means stop."""
        control = self._job.control
        try:
            while control.poll():
                word = control.recv()
                if isinstance(word, Connect):
                    self._connect(word)
                elif isinstance(word, ChangeRegions | RegionsChanged):
                    self._regions.heard(word)
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
