"""A frontend's process: accepts connections on the server's socket; the supervisor tells it where the backend is."""

from __future__ import annotations

import asyncio
import os
import signal

import uvloop

from headrace.control import Connect, Listening, Stop
from headrace.frontend.http.front import Front, make_front
from headrace.frontend.link import BackendLink
from headrace.frontend.service import Service
from headrace.frontend_job import FrontendJob
from headrace.processes import become_child, keep_freed_memory


def run_frontend(job: FrontendJob) -> None:
    """Serve until told to stop. The target of the process."""
    become_child()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor's to hear
    keep_freed_memory()
    uvloop.run(_Frontend(job).run())


class _Frontend:
    def __init__(self, job: FrontendJob) -> None:
        self._job = job
        self._service = Service((job.name,))
        self._stop = asyncio.Event()

    async def run(self) -> None:
        front = make_front(self._service, self._job.http, self._job.access)
        await front.start(self._job.listener)
        control = self._job.control
        asyncio.get_running_loop().add_reader(control.fileno(), self._hear)
        os.set_blocking(control.fileno(), True)  # uvloop has made it otherwise, and words are to be read whole
        control.send(Listening())
        await self._stop.wait()
        front.stop_accepting()
        await self._drain(front)
        await front.close()
        self._service.close()

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

    async def _drain(self, front: Front) -> None:
        """Wait until what was taken has been answered, within the limit."""
        deadline = asyncio.get_running_loop().time() + self._job.drain_timeout_s
        while self._service.in_flight or front.in_flight:
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(0.01)
