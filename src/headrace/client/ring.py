"""A client's rings: rows of memory that the server's backend reads and writes itself. Asked for at the server's door.

`frontend.link.BackendLink` is the ring's whole protocol, and a frontend's end of it; what a client adds stands here: it
waits for room, and asks for a new ring when the old one has ended or the server wants it to. Where a version has
several engines, there is a ring to each, and a request takes the one where it is answered first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.client.arrays import Array, Rows, as_output, as_rows, require_fixed_size, view_of
from headrace.client.failures import NotTaken
from headrace.client.knock import Ring, ask_for_models, ask_for_ring
from headrace.clock import NS_PER_S, now_ns, seconds
from headrace.door_messages import Ask, Trust, trusts_user
from headrace.errors import DeadlineExceeded, EngineStopped, HeadraceError, NotReady, QueueFull, UnknownModel
from headrace.frontend.link import BackendLink
from headrace.routing import Spread
from headrace.wire.elements import fill_cells

if TYPE_CHECKING:
    import asyncio

    from headrace.client.request import Sent
    from headrace.client.waiting import Waits
    from headrace.control import ServedModel
    from headrace.frontend.link import Call
    from headrace.tensors import TensorSpec

FIRST_PAUSE_S, LAST_PAUSE_S = 0.25, 30.0  # before a door that refused is asked again; twice as long each time


@dataclass(slots=True, eq=False)
class _Place:
    """A place in the line for room."""

    turn: asyncio.Future[Any]


class ClientLink(BackendLink):
    """A ring as a client uses it."""

    def __init__(self, ring: Ring, waits: Waits) -> None:
        super().__init__(ring.pair, ring.model, lambda _: None, waits, ring.engine)
        self._waits = waits
        self._connection = ring.connection
        self._line: deque[_Place] = deque()
        self.is_retired = False  # the server takes nothing more from this ring, or is gone

    def start(self) -> None:
        """The lock is held by whoever calls this and all below but `room`."""
        self._connection.setblocking(False)
        self._waits.add_reader(self._connection.fileno(), self.retire)
        super().start()

    def retire(self) -> None:
        """Send nothing more, and close when all that is under way has ended. Safe to call again."""
        if not self.is_retired:
            self.is_retired = True
            self._waits.remove_reader(self._connection.fileno())
            self._next_in_line()
        if not self.in_flight:
            self.close()

    def release(self, first: int, rows: int) -> None:
        super().release(first, rows)
        self._next_in_line()
        if self.is_retired and not self.in_flight:
            self.close()

    def close(self) -> None:
        if self._closed:
            return
        if not self.is_retired:
            self.is_retired = True
            self._waits.remove_reader(self._connection.fileno())
        super().close()
        self._connection.close()
        self._next_in_line()

    def abandon(self) -> None:
        """Close at once. Requests under way end with EngineStopped."""
        held, self._held = self._held, {}
        for each in held.values():
            if not each.answered.done():
                each.answered.set_exception(EngineStopped("the client was closed while it waited for this answer"))
        self.close()

    async def room(self, rows: int, sent: Sent) -> Call:
        """Lease rows, in order of arrival, and wait for them as long as the request may.

        Raises InvalidRequest, QueueFull when the time is over, EngineStopped.
        """
        with self._waits.lock:
            if not self._line:
                try:
                    return self._admit(rows, sent)
                except QueueFull:
                    pass
            place = _Place(self._waits.create_future())
            self._line.append(place)
        try:
            while True:
                await self._waits.wait(_until(place.turn), sent.left_s())
                with self._waits.lock:
                    place.turn = self._waits.create_future()
                    try:
                        return self._admit(rows, sent)
                    except QueueFull:
                        continue
        except TimeoutError:
            raise QueueFull(
                f"no {rows} of the ring's {self.ring.layout.rows} rows were free for {sent.timeout_s:g} s; try again"
                " later, or ask for a larger ring"
            ) from None
        finally:
            with self._waits.lock:
                self._line.remove(place)
                self._next_in_line()

    def try_room(self, rows: int, sent: Sent) -> Call | None:
        """Lease rows if they are free now, and nobody waits for some. Raises InvalidRequest."""
        try:
            return None if self._line else self._admit(rows, sent)
        except (QueueFull, EngineStopped):
            return None

    def _admit(self, rows: int, sent: Sent) -> Call:
        if self.is_retired:
            raise EngineStopped("the server has closed this ring: ask for another one")
        return self.admit(rows, sent.deadline_ns or 0, sent.priority)

    def _next_in_line(self) -> None:
        if self._line and not self._line[0].turn.done():
            self._line[0].turn.set_result(None)


class RingRoom:
    """Rows of a ring for one request at a time: write `inputs`, then `answer`, as often as wanted, then `close`.

    Arrays are views of the ring, [rows, *features], of the dtypes that travel: bfloat16's bits as uint16.
    """

    def __init__(self, link: ClientLink, call: Call, waits: Waits) -> None:
        self._link = link
        self._call = call
        self._waits = waits
        self._given_up = False
        self.inputs = {} if _has_elements(link.model) else _views(call, link.model.inputs, call.input)
        self._outputs: dict[str, Array] | None = None  # views, of use again and again unless some are BYTES

    async def answer(self, sent: Sent) -> dict[str, Array]:
        """Hand over the inputs, wait, and return the outputs' views.

        Raises DeadlineExceeded, EngineStopped, ModelFailed.
        """
        if self._given_up:
            raise DeadlineExceeded("a request on these rows was given up, and may still be computed; allocate anew")
        try:
            await self._waits.wait(self._call.answer(), sent.left_s())
        except TimeoutError:
            self._given_up = True
            raise DeadlineExceeded(f"no answer within {sent.timeout_s:g} s; allow more time") from None
        except BaseException as error:
            self._given_up = not isinstance(error, HeadraceError)
            raise
        return self._read()

    def write(self, given: Rows) -> None:
        """Copy a request's inputs into the rows. Raises InvalidRequest if an element of BYTES is too long."""
        for number, (array, spec) in enumerate(zip(given.arrays, self._link.model.inputs, strict=True)):
            if spec.is_bytes:
                fill_cells(self._call.input(number), array.flat, spec)
            else:
                view = self.inputs[spec.name] if self.inputs else view_of(self._call.input(number), spec, array.shape)
                np.copyto(view, array, casting="no")

    def _read(self) -> dict[str, Array]:
        outputs = self._outputs
        if outputs is None:
            specs = self._link.model.outputs
            outputs = _views(self._call, specs, self._call.output)
            if not any(spec.is_bytes for spec in specs):
                self._outputs = outputs
        return outputs

    async def close(self) -> None:
        """Give the rows back. The views must not be used any more."""
        with self._waits.lock:
            self._call.close()


class Engines:
    """Rings to all engines of a version. The lock is held by whoever calls it."""

    def __init__(self, links: list[ClientLink]) -> None:
        self.links = links
        self._spread = Spread()

    @property
    def model(self) -> ServedModel:
        return self.links[0].model

    @property
    def is_whole(self) -> bool:
        """Whether the server wants none of these rings to be asked for anew."""
        return not any(link.is_retired for link in self.links)

    def best_first(self, rows: int) -> list[ClientLink]:
        """Return those that take requests, the one first that a request of so many rows should go to."""
        links = [link for link in self.links if not link.is_retired]
        return [links[number] for number in self._spread.order([link.load for link in links], rows, now_ns())]


class Rings:
    """All rings of a client: one for each model and version that it has asked for, and each of their engines."""

    def __init__(self, doors: tuple[str, ...], rows: int, waits: Waits, trusts: Trust = trusts_user) -> None:
        self._doors = doors
        self._rows = rows
        self._waits = waits
        self._trusts = trusts
        self._mutex = waits.mutex()  # one asks at a time
        self._engines: dict[tuple[str, str | None], Engines] = {}
        self._open: list[ClientLink] = []  # these, and older ones that still wait for answers
        self._pauses: dict[tuple[str, str | None], _Pause] = {}

    async def engines(self, model: str, version: str | None) -> Engines:
        """Return the rings to a model. Raises NotTaken where there is none now, with the reason."""
        key = model, version
        engines = self._engines.get(key)
        if engines is not None and engines.is_whole:
            return engines
        async with self._mutex:
            engines = self._engines.get(key)  # another caller may have got them meanwhile
            if engines is None or not engines.is_whole:
                engines = self._engines[key] = Engines(await self._join(key, engines))
            return engines

    async def infer(self, model: str, inputs: object, sent: Sent) -> dict[str, Array]:
        """Return the model's outputs, copied out of the ring. Raises as `allocate` and `RingRoom.answer` do."""
        engines = await self.engines(model, sent.version)
        given = as_rows(inputs, engines.model.inputs)
        room = await self._room(engines, given.rows, sent)
        try:
            room.write(given)
            views = await room.answer(sent)
            return {spec.name: as_output(views[spec.name], spec.dtype) for spec in engines.model.outputs}
        finally:
            await room.close()

    async def allocate(self, model: str, rows: int, sent: Sent) -> RingRoom:
        """Return rows to write into. Raises NotTaken, QueueFull, InvalidRequest."""
        engines = await self.engines(model, sent.version)
        require_fixed_size(engines.model.inputs)
        return await self._room(engines, rows, sent)

    async def models(self) -> tuple[ServedModel, ...]:
        """Return the versions that are ready. Raises NotTaken."""
        try:
            return await self._waits.in_thread(partial(ask_for_models, self._doors, self._trusts), lambda _: None)
        except HeadraceError as error:
            raise NotTaken(error) from error

    async def model(self, name: str, version: str | None) -> ServedModel:
        """Return what is known of a model. Raises NotTaken, UnknownModel."""
        found = {model.version: model for model in await self.models() if model.name == name}
        if not found:
            raise NotTaken(NotReady(f"model {name} is not ready, or there is none of that name"))
        wanted = max(found, key=int) if version is None else version
        if wanted not in found:
            raise UnknownModel(f"model {name} has no version {version}; it has {', '.join(found)}")
        return found[wanted]

    def close(self) -> None:
        """Close all rings. Requests under way end with EngineStopped."""
        with self._waits.lock:
            for link in self._open:
                link.abandon()

    async def _room(self, engines: Engines, rows: int, sent: Sent) -> RingRoom:
        """Lease rows of the best ring that has them; where none has, wait at the best."""
        with self._waits.lock:
            links = engines.best_first(rows)
            for link in links if len(links) > 1 else ():
                call = link.try_room(rows, sent)
                if call is not None:
                    return RingRoom(link, call, self._waits)
        stopped = EngineStopped("the server has closed its rings: ask for others")
        for link in links:
            try:
                return RingRoom(link, await link.room(rows, sent), self._waits)
            except EngineStopped as error:  # while we waited: another one may be there
                stopped = error
        raise NotTaken(stopped) from stopped

    async def _join(self, key: tuple[str, str | None], before: Engines | None) -> list[ClientLink]:
        """Return links to all engines that are ready: those that we have, and new ones."""
        links = [] if before is None else [link for link in before.links if not link.is_retired]
        if links:  # some engine has ended; a server where one has come back retires all rings
            return links
        pause = self._pauses.get(key)
        if pause is not None and now_ns() < pause.until_ns:
            raise NotTaken(pause.error, seconds(pause.until_ns - now_ns()))
        try:
            first = await self._ask(Ask(model=key[0], version=key[1], rows=self._rows))
        except HeadraceError as error:
            length_s = FIRST_PAUSE_S if pause is None else min(2 * pause.length_s, LAST_PAUSE_S)
            self._pauses[key] = _Pause(error, length_s, now_ns() + int(length_s * NS_PER_S))
            raise NotTaken(error, length_s) from error
        self._pauses.pop(key, None)
        links = [self._opened(first)]
        for engine in first.engines:
            if engine != first.engine:
                try:
                    other = await self._ask(Ask(model=key[0], version=key[1], rows=self._rows, engine=engine))
                except HeadraceError:  # it has ended meanwhile, or there is no memory for one more: the others do
                    continue
                links.append(self._opened(other))
                if other.model != first.model:  # another version is the newest now, and the first ring is retired
                    links[-1].retire()
        return links

    async def _ask(self, ask: Ask) -> Ring:
        return await self._waits.in_thread(partial(ask_for_ring, self._doors, ask, self._trusts), Ring.close)

    def _opened(self, ring: Ring) -> ClientLink:
        with self._waits.lock:
            link = ClientLink(ring, self._waits)
            link.start()
            self._open = [*(each for each in self._open if each.in_flight or not each.is_retired), link]
        return link


@dataclass(frozen=True, slots=True)
class _Pause:
    """A door that has refused is left alone for a while."""

    error: HeadraceError
    length_s: float
    until_ns: int


def _has_elements(model: ServedModel) -> bool:
    return any(spec.is_bytes for spec in model.inputs)


def _views(call: Call, specs: Sequence[TensorSpec], data: Callable[[int], memoryview]) -> dict[str, Array]:
    """Return views of rows; `data` gives the bytes of a tensor by its number. Elements of BYTES are copied out."""
    return {spec.name: view_of(data(number), spec, (call.rows, *spec.features)) for number, spec in enumerate(specs)}


async def _until(turn: asyncio.Future[Any]) -> None:
    await turn
