"""Shared memory that clients made and named: registered by name, read and written by descriptor, for HTTP and gRPC.

A client's file is never mapped: one that is shortened later would end a process that has it mapped, while a read by
descriptor finds a part missing, which is an error like others. Each tensor is copied once, between the file and the
rows of the ring, as it is from a body.
"""

from __future__ import annotations

import asyncio
import os
import stat
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.control import ChangeRegions, RegionsChanged, RegionSpec
from headrace.errors import HeadraceError, InvalidRequest, NotOffered
from headrace.wire.elements import fill
from headrace.wire.places import RegionPlace

if TYPE_CHECKING:
    from headrace.tensors import TensorSpec

FOLDER = Path("/dev/shm")  # noqa: S108  where shm_open(3) puts what it names
MAX_REGIONS = 256  # each is an open file of every frontend
MAX_NAME = 255  # characters of a name or a key
LARGEST_OFFSET = 2**63 - 1  # of a file
UNDER_WAY = 4  # changes of a frontend at once: fewer than its pipe holds, so that nobody waits to be heard
# Names that this process, PyTorch and multiprocessing give to memory of their own: no client has a use for it.
OUR_PREFIXES = ("headrace", "torch_", "sem.")
NO_CUDA_MEMORY = "this server takes no CUDA memory of clients; send tensors raw, or in system shared memory"


class Regions:
    """The registered regions of one process. Names, keys and numbers come from clients and are checked here."""

    def __init__(self, *, offered: bool, folder: Path = FOLDER) -> None:
        self.offered = offered  # else all are refused
        self._folder = folder
        self._regions: dict[str, _Region] = {}

    def restore(self, specs: Iterable[RegionSpec]) -> None:
        """Register what other processes have already; what is no longer there stays unknown here."""
        for spec in specs:
            with suppress(InvalidRequest):
                self.register(spec)

    def register(self, spec: RegionSpec) -> None:
        """Make a region known. Raises NotOffered, or InvalidRequest, which names the value and the limit."""
        self.require_offered()
        require_sane(spec)
        if spec.name in self._regions:
            raise InvalidRequest(f"shared memory region {spec.name} is registered already; unregister it first")
        if len(self._regions) >= MAX_REGIONS:
            raise InvalidRequest(f"{MAX_REGIONS} shared memory regions are registered, which is the limit")
        self._regions[spec.name] = _Region(spec, _open(spec, self._folder))

    def unregister(self, name: str | None) -> None:
        """Forget a region, or all of them; requests that use it end as if it were there. Unknown names are no error."""
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: str | None) -> list[RegionSpec]:
        """Return a region, or all of them. Raises InvalidRequest if it is not registered."""
        if name is None:
            return [region.spec for region in self._regions.values()]
        return [self._region(name).spec]

    def window(self, place: RegionPlace) -> Window:
        """Return a part of a region. It stays usable when the region is unregistered. Raises InvalidRequest."""
        self.require_offered()
        region = self._region(place.region)
        if place.offset + place.byte_size > region.spec.byte_size:
            raise InvalidRequest(
                f"shared memory region {place.region} has {region.spec.byte_size} bytes; {place.byte_size} from"
                f" {place.offset} on are not within it"
            )
        return Window(region, region.spec.offset + place.offset, place.byte_size)

    def read(self, place: RegionPlace, rows: memoryview) -> None:
        """Copy an input of a region into a call's rows. Raises InvalidRequest."""
        self.window(place).read_into(rows)

    def read_tensor(self, place: RegionPlace, rows: memoryview, spec: TensorSpec) -> None:
        """Do what `read` does, for elements of BYTES too, which are copied twice."""
        if not spec.is_bytes:
            self.read(place, rows)
            return
        packed = memoryview(bytearray(place.byte_size))
        self.read(place, packed)
        fill(rows, packed, spec)

    def output(self, place: RegionPlace, needed: int) -> Window:
        """Return where an output of at least `needed` bytes is to be written. Raises InvalidRequest for less."""
        if place.byte_size < needed:
            raise InvalidRequest(
                f"an output has {needed} bytes, and its place in shared memory region {place.region} has"
                f" {place.byte_size}"
            )
        return self.window(place)

    def _region(self, name: str) -> _Region:
        try:
            return self._regions[name]
        except KeyError:
            raise InvalidRequest(f"there is no shared memory region {name[:MAX_NAME]}; register it first") from None

    def require_offered(self) -> None:
        """Raise NotOffered where the server was started without shared memory of clients."""
        if not self.offered:
            raise NotOffered("this server takes no shared memory of clients; start it with --system-shared-memory")


class _Region:
    """A region's open file, closed with the last that uses it."""

    def __init__(self, spec: RegionSpec, fd: int) -> None:
        self.spec = spec
        self.fd = fd
        weakref.finalize(self, os.close, fd)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a region, which lives at least as long."""

    _region: _Region
    _at: int  # in the file
    byte_size: int

    def read_into(self, destination: memoryview) -> None:
        """Fill `destination` from the window's begin. Raises InvalidRequest."""
        self._move(os.preadv, destination)

    def write(self, data: memoryview) -> None:
        """Write `data` at the window's begin. Raises InvalidRequest, also if the window is too small for it."""
        if len(data) > self.byte_size:
            raise InvalidRequest(
                f"an output has {len(data)} bytes, and its place in shared memory region {self._region.spec.name} has"
                f" {self.byte_size}; make it larger"
            )
        self._move(os.pwritev, data)

    def _move(self, call: Callable[[int, list[memoryview], int], int], data: memoryview) -> None:
        done = 0
        assert len(data) <= self.byte_size
        while done < len(data):
            try:
                moved = call(self._region.fd, [data[done:]], self._at + done)
            except OSError:
                moved = 0
            if not moved:
                raise InvalidRequest(
                    f"shared memory region {self._region.spec.name} ended before its tensor; keep its file as it was"
                    " when it was registered"
                )
            done += moved


@dataclass(slots=True)
class SharedRegions:
    """The regions of all frontends: a change has been made in each of them before its caller hears of it.

    A client's connections may end in any frontend, so one's own regions are not enough. The supervisor brings changes
    to all, in one order (`headrace.region_changes`).
    """

    own: Regions
    send: Callable[[object], None]  # to the supervisor
    _numbers: count[int] = field(default_factory=count)
    _waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UNDER_WAY))

    async def register(self, spec: RegionSpec) -> None:
        """Register a region everywhere, or nowhere. Raises as `Regions.register` does."""
        self.own.require_offered()
        require_sane(spec)
        await self._change(spec.name, spec)

    async def unregister(self, name: str | None) -> None:
        """Unregister a region, or all of them, everywhere."""
        if self.own.offered:
            await self._change(name, None)

    def heard(self, word: ChangeRegions | RegionsChanged) -> None:
        """Take the supervisor's word: to make a change, or that one of our own has been made everywhere."""
        if isinstance(word, ChangeRegions):
            self.send(RegionsChanged(word.number, self._apply(word)))
            return
        waiting = self._waiting.pop(word.number)
        self._room.release()
        if waiting.done():  # the caller has gone away
            return
        if word.error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(word.error)

    async def _change(self, name: str | None, spec: RegionSpec | None) -> None:
        await self._room.acquire()  # given back by the answer, also where the caller does not wait for it
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(ChangeRegions(number, name, spec))
        await self._waiting[number]

    def _apply(self, word: ChangeRegions) -> HeadraceError | None:
        try:
            if word.spec is None:
                self.own.unregister(word.name)
            else:
                self.own.register(word.spec)
        except HeadraceError as error:
            return error
        return None


def require_sane(spec: RegionSpec) -> None:
    """Raise InvalidRequest if these can be no region, whatever memory there is."""
    if not 1 <= len(spec.name) <= MAX_NAME:
        raise InvalidRequest(f"a region's name has {len(spec.name)} characters; it must have 1 to {MAX_NAME}")
    name = spec.key.removeprefix("/")
    if not 1 <= len(name) <= MAX_NAME or "/" in name or "\0" in name or name in (".", ".."):
        raise InvalidRequest(
            f"key {spec.key[:MAX_NAME]!r} of region {spec.name} is no name of shared memory: one name, without / but"
            " for one at its begin"
        )
    if name.startswith(OUR_PREFIXES):
        raise InvalidRequest(
            f"key {spec.key} of region {spec.name} begins as memory of the server does; choose another"
        )
    if spec.byte_size < 1 or spec.offset < 0 or spec.offset + spec.byte_size > LARGEST_OFFSET:
        raise InvalidRequest(
            f"region {spec.name} is to have {spec.byte_size} bytes from {spec.offset} on; it needs at least 1 byte, and"
            f" to end before {LARGEST_OFFSET}"
        )


def _open(spec: RegionSpec, folder: Path) -> int:
    """Return a descriptor of a region's file. Nothing but a plain file in the folder itself is ever opened."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(folder / spec.key.removeprefix("/"), flags)
    except (OSError, ValueError):  # which of them is no client's business
        raise InvalidRequest(f"shared memory {spec.key} of region {spec.name} cannot be opened") from None
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and spec.offset + spec.byte_size <= found.st_size:
        return fd
    os.close(fd)
    raise InvalidRequest(
        f"shared memory {spec.key} of region {spec.name} has no {spec.byte_size} bytes from {spec.offset} on"
    )
