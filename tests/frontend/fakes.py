"""A backend that answers at once, or when it is told to; and a network that a test holds in its hands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from headrace.control import ServedModel
from headrace.errors import QueueFull
from headrace.frontend.http.front import make_front
from headrace.frontend.regions import Regions, SharedRegions
from headrace.frontend.service import Service
from headrace.frontend_job import AccessSettings, HttpSettings
from headrace.tensors import TensorSpec
from headrace.transport.leases import RowLeases

INPUTS = (
    TensorSpec(name="x", dtype="float32", features=(4,)),
    TensorSpec(name="n", dtype="int64", features=()),
)


class FakeCall:
    def __init__(self, link, rows, first, deadline_ns, priority):
        self.rows, self.deadline_ns, self.priority = rows, deadline_ns, priority
        self.told = None
        self._link, self._first, self._open = link, first, True

    def input(self, number):
        return self._of(self._link.tensors[number], self._link.model.inputs[number])

    def output(self, number):
        return self.input(number)  # outputs are the inputs

    @property
    def free_share(self):
        return self._link.free_share

    async def answer(self):
        self._link.asked.append(self)
        if self._link.gate is not None:
            await self._link.gate.wait()
        if self._link.error is not None:
            raise self._link.error

    def close(self):
        if self._open:
            self._open = False
            self._link.leases.release(self._first, self.rows)

    def _of(self, memory, spec):
        return memory[self._first * spec.row_bytes : (self._first + self.rows) * spec.row_bytes]


class FakeLink:
    """A link whose model returns its inputs. `gate`, where there is one, holds answers back until it is set."""

    def __init__(self, rows=8, inputs=INPUTS, gate=None):
        self.model = ServedModel(name="m", version="1", inputs=inputs, outputs=inputs, max_batch_size=rows)
        self.engine = 0
        self.total = rows
        self.leases = RowLeases(rows)
        self.tensors = [memoryview(bytearray(rows * spec.row_bytes)) for spec in inputs]
        self.gate = gate
        self.error = None
        self.asked: list[FakeCall] = []

    def admit(self, rows, deadline_ns, priority):
        first = self.leases.lease(rows) if rows <= self.total else None
        if first is None:
            raise QueueFull(f"no {rows} rows are free: try again")
        return FakeCall(self, rows, first, deadline_ns, priority)

    @property
    def free_share(self):
        return self.leases.free_rows / self.total

    @property
    def in_flight(self):
        return self.total - self.leases.free_rows

    def close(self):
        pass


def service_of(link):
    service = Service(("m",))
    service.add(link)
    return service


def no_regions():
    return SharedRegions(Regions(offered=False), send=[].append)


def front_of(link, access=None, regions=None, **settings):
    return make_front(service_of(link), regions or no_regions(), HttpSettings(**settings), access or AccessSettings())


@dataclass
class FakeTransport:
    """A client at the other end, which gets bytes in and sees what was written. It takes `room` bytes at once."""

    protocol: asyncio.BufferedProtocol
    room: int | None = None  # None: everything
    written: bytearray = field(default_factory=bytearray)
    waiting: list = field(default_factory=list)
    is_reading: bool = True
    is_closed: bool = False
    wrote_eof: bool = False

    def feed(self, data):
        """Have the protocol receive bytes, as far as it reads; return what it did not take."""
        data = memoryview(data)
        while data and self.is_reading and not self.is_closed:
            buffer = self.protocol.get_buffer(-1)
            assert len(buffer)
            size = min(len(buffer), len(data))
            buffer[:size] = data[:size]
            self.protocol.buffer_updated(size)
            data = data[size:]
        return data

    def set_write_buffer_limits(self, high):
        assert high == 0

    def pause_reading(self):
        assert self.is_reading
        self.is_reading = False

    def resume_reading(self):
        assert not self.is_reading
        self.is_reading = True

    def write(self, data):
        self.writelines([data])

    def writelines(self, pieces):
        assert not self.wrote_eof
        assert not self.waiting
        for piece in pieces:
            taken = len(piece) if self.room is None else min(self.room, len(piece))
            self.written += piece[:taken]
            if self.room is not None:
                self.room -= taken
            if taken < len(piece):
                self.waiting.append(memoryview(piece)[taken:])
        if self.waiting:
            self.protocol.pause_writing()

    def take(self):
        """Take all that is waiting to be written."""
        self.room = None
        for piece in self.waiting:
            self.written += piece
        if self.waiting:
            self.waiting.clear()
            self.protocol.resume_writing()

    def is_closing(self):
        return self.is_closed

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.wrote_eof = True

    def close(self):
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


async def settle():
    """Let everything happen that can happen without another event."""
    for _ in range(20):
        await asyncio.sleep(0)
