"""A backend's link that answers when it is told to, on the event loop of a test."""

import asyncio
from dataclasses import dataclass, field

from headrace.control import ServedModel
from headrace.frontend.service import Service
from headrace.tensors import TensorSpec

MODEL = ServedModel(
    name="served",
    version="1",
    inputs=(TensorSpec(name="x", dtype="uint8", features=()),),
    outputs=(TensorSpec(name="y", dtype="uint8", features=()),),
    max_batch_size=4,
)


@dataclass(eq=False)
class FakeCall:
    """A request: `y` is `x`, once it is answered. It fails with what its answer is set to, if that is an exception."""

    rows: int
    deadline_ns: int
    priority: int
    begun: asyncio.Event
    answered: asyncio.Future
    cancelled: asyncio.Event
    told: object = None  # what the backend says of it
    data: bytearray = field(default_factory=lambda: bytearray(4))

    def input(self, number):
        return memoryview(self.data)[: self.rows]

    def output(self, number):
        return self.input(number)

    async def answer(self):
        self.begun.set()
        try:
            await self.answered
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def close(self):
        pass


class FakeLink:
    """Holds every call until `release`, or answers at once."""

    def __init__(self, *, at_once=False):
        self.model = MODEL
        self.calls = []
        self._at_once = at_once
        self._changed = asyncio.Event()

    in_flight = 0

    def admit(self, rows, deadline_ns=0, priority=0):
        future = asyncio.get_running_loop().create_future()
        if self._at_once:
            future.set_result(None)
        call = FakeCall(rows, deadline_ns, priority, asyncio.Event(), future, asyncio.Event())
        self.calls.append(call)
        self._changed.set()
        return call

    async def held(self, count):
        """Wait until so many calls have come, and return the last."""
        while len(self.calls) < count:
            self._changed.clear()
            await self._changed.wait()
        await self.calls[count - 1].begun.wait()
        return self.calls[count - 1]


def service_of(link):
    """Return a service with this link and no other."""
    service = Service(("served",))
    service.add(link)
    return service
