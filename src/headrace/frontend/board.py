"""The server's counters, in shared memory: every frontend writes rows of its own, and any of them reads the sums.

    header | models: name, version, restarts | frontend 0: a row for each model | frontend 1: ... | ...

Nothing is locked between processes: a word of 8 bytes has one writing process and is stored whole (see
`transport.descriptors` for why through a memoryview). A reader may so see a request in one sum and not yet in another.
A frontend that is started anew goes on in its predecessor's rows, so counters only grow while the server lives.

A request knows how many rows its batch had, not when another request of the batch ends. So batches are counted in
parts: a request of r rows in a batch of b is r/b of a batch, and the parts of a batch, once all are answered, make 1.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import TYPE_CHECKING

import numpy as np

from headrace.clock import now_ns
from headrace.errors import InvalidOption
from headrace.frontend.scale import BATCH_ROWS, RESPONSE_NS

if TYPE_CHECKING:
    from headrace.transport.descriptors import Descriptor

MODELS = 64  # names and versions that have counters of their own; what is beyond shares the last
LANES = 64  # likewise, of all engines of a version together
ENGINES = 64  # likewise
MORE_MODELS = "(more models)"
NAME_BYTES = 248

# How a request can fail. "full": no room. "lost": the backend ended. "unavailable": no backend was ready.
FAILURES = ("full", "invalid", "deadline", "cancelled", "model", "lost", "unavailable", "internal")
# Where an answered request's time went. "before": in the frontend and in the ring until the backend took it. "queue":
# until its batch was launched. "compute": until its outputs lay in the ring. "respond": until they were announced.
# "after": until the frontend had done with it. They follow each other without a gap.
STAGES = ("before", "queue", "compute", "respond", "after")

_HEADER = np.dtype([("started_ns", "i8"), ("frontends", "i8"), ("models", "i8")])
_MODEL = np.dtype([("name", f"S{NAME_BYTES}"), ("version", "S56"), ("restarts", "i8")])
_ROW = np.dtype(
    [
        ("in_flight", "i8"),  # a gauge, as are the next two
        ("rows_free", "i8"),
        ("rows_room", "i8"),
        ("requests", "i8"),  # answered well
        ("rows", "i8"),
        ("last_ns", "i8"),
        ("stage_ns", "i8", (len(STAGES),)),
        ("failure_count", "i8", (len(FAILURES),)),
        ("failure_ns", "i8", (len(FAILURES),)),
        ("response_counts", "i8", (RESPONSE_NS.buckets,)),
        ("batch_counts", "f8", (BATCH_ROWS.buckets,)),
        ("batch_ns", "f8", (BATCH_ROWS.buckets,)),
        ("lane_batches", "f8", (LANES,)),
        ("lane_ns", "f8", (LANES,)),
        ("engine_requests", "i8", (ENGINES,)),
        ("engine_rows", "i8", (ENGINES,)),
    ]
)
_ROW_WORDS = -(-_ROW.itemsize // 64) * 8  # whole cache lines, so that frontends do not take lines from each other
_TABLE = 64  # bytes; where the models begin
_ROWS = _TABLE + MODELS * _MODEL.itemsize + -(MODELS * _MODEL.itemsize) % 64


def _word(field: str) -> int:
    assert _ROW.fields is not None
    return _ROW.fields[field][1] // 8


_IN_FLIGHT, _ROWS_FREE, _ROWS_ROOM = _word("in_flight"), _word("rows_free"), _word("rows_room")
_REQUESTS, _ROWS_DONE, _LAST = _word("requests"), _word("rows"), _word("last_ns")
_BEFORE, _QUEUE, _COMPUTE, _RESPOND, _AFTER = (_word("stage_ns") + number for number in range(len(STAGES)))
_FAILURE_COUNT, _FAILURE_NS = _word("failure_count"), _word("failure_ns")
_RESPONSES, _BATCHES, _BATCH_NS = _word("response_counts"), _word("batch_counts"), _word("batch_ns")
_LANE_BATCHES, _LANE_NS = _word("lane_batches"), _word("lane_ns")
_ENGINE_REQUESTS, _ENGINE_ROWS = _word("engine_requests"), _word("engine_rows")


class Row:
    """What one frontend has counted of one model. Its writer is one thread of one process."""

    __slots__ = ("_floats", "_integers", "lanes")

    def __init__(self, data: memoryview) -> None:
        self.lanes = 1  # of each engine: the lanes of all are numbered through
        self._integers = data.cast("q")
        self._floats = data.cast("d")

    def succeeded(self, began_ns: int, ended_ns: int, rows: int, told: Descriptor, engine: int = 0) -> None:
        """Count a request that was answered well; `told` is what the backend, an engine of its version, said of it."""
        integers, floats = self._integers, self._floats
        integers[_REQUESTS] += 1
        integers[_ROWS_DONE] += rows
        integers[_LAST] = ended_ns
        integers[_BEFORE] += told.received_ns - began_ns
        integers[_QUEUE] += told.started_ns - told.received_ns
        compute_ns = told.computed_ns - told.started_ns
        integers[_COMPUTE] += compute_ns
        integers[_RESPOND] += told.responded_ns - told.computed_ns
        integers[_AFTER] += ended_ns - told.responded_ns
        integers[_RESPONSES + RESPONSE_NS.index(ended_ns - began_ns)] += 1
        part = rows / told.batch_rows
        size = BATCH_ROWS.index(told.batch_rows)
        floats[_BATCHES + size] += part
        floats[_BATCH_NS + size] += part * compute_ns
        engine = min(engine, ENGINES - 1)
        integers[_ENGINE_REQUESTS + engine] += 1
        integers[_ENGINE_ROWS + engine] += rows
        lane = min(engine * self.lanes + told.lane, LANES - 1)
        floats[_LANE_BATCHES + lane] += part
        floats[_LANE_NS + lane] += part * compute_ns

    def failed(self, kind: str, took_ns: int) -> None:
        """Count a request that ended otherwise; `kind` is one of FAILURES."""
        number = FAILURES.index(kind)
        self._integers[_FAILURE_COUNT + number] += 1
        self._integers[_FAILURE_NS + number] += took_ns

    def hold(self, in_flight: int, rows_free: int, rows_room: int) -> None:
        """Say how many requests are under way, and how much room the ring has."""
        self._integers[_IN_FLIGHT] = in_flight
        self._integers[_ROWS_FREE] = rows_free
        self._integers[_ROWS_ROOM] = rows_room


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTotals:
    """The sums over all frontends of one model; times in nanoseconds, lists by bucket of their scale."""

    name: str
    version: str
    restarts: int  # of its backend
    in_flight: int
    rows_free: int
    rows_room: int
    requests: int  # answered well
    rows: int  # of those
    last_ms: int  # when the last one was, in milliseconds since 1970; 0: never
    stage_ns: dict[str, int]
    failure_count: dict[str, int]
    failure_ns: dict[str, int]
    response_counts: list[int]  # by RESPONSE_NS
    batch_counts: list[float]  # by BATCH_ROWS
    batch_ns: list[float]  # sum of the batches' times on a lane
    lane_batches: list[float]
    lane_ns: list[float]
    engine_requests: list[int]
    engine_rows: list[int]

    @property
    def request_ns(self) -> int:
        return sum(self.stage_ns.values())

    @property
    def batches(self) -> int:
        return sum(map(round, self.batch_counts))  # so that it is the sum of what is told of each size


def make_board(frontends: int) -> int:
    """Return a descriptor of memory for so many frontends: all of it there, and of a size that nobody can change."""
    size = _ROWS + frontends * MODELS * _ROW_WORDS * 8
    fd = os.memfd_create("headrace-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    with mmap(fd, size) as memory:
        np.frombuffer(memory, _HEADER, 1)[0] = (now_ns(), frontends, 0)
    return fd


class Board:
    """A process's view of the counters."""

    def __init__(self, memory: mmap) -> None:
        self._memory = memory
        self._header = memoryview(memory)[: _HEADER.itemsize].cast("q")
        self._models = np.frombuffer(memory, _MODEL, MODELS, _TABLE)
        self._words = np.frombuffer(memory, "i8", self.frontends * MODELS * _ROW_WORDS, _ROWS)

    @classmethod
    def attach(cls, fd: int) -> Board:
        """Map the memory; the descriptor may be closed then."""
        return cls(mmap(fd, os.fstat(fd).st_size))

    @classmethod
    def private(cls) -> Board:
        """Return a board that this process keeps for itself."""
        fd = make_board(1)
        try:
            return cls.attach(fd)
        finally:
            os.close(fd)

    @property
    def started_ns(self) -> int:
        return self._header[0]

    @property
    def frontends(self) -> int:
        return self._header[1]

    @property
    def models(self) -> int:
        """How many slots are taken."""
        return self._header[2]

    def slot(self, name: str, version: str) -> int:
        """Return the slot of a model's version, and take one if it has none.

        One process takes slots: the supervisor does, before it tells a frontend of the model. With all taken, the rest
        share the last. Raises InvalidOption for a name that does not fit.
        """
        texts = name.encode(), version.encode()
        if len(texts[0]) > NAME_BYTES:
            raise InvalidOption(
                f"the model's name has {len(texts[0])} bytes; --name must have at most {NAME_BYTES}: {name[:40]}..."
            )
        for number, model in enumerate(self._models[: self.models]):
            if (model["name"], model["version"]) == texts:
                return number
        number = min(self.models, MODELS - 1)
        self._models[number]["name"], self._models[number]["version"] = (
            texts if number < MODELS - 1 else (MORE_MODELS.encode(), b"")
        )
        self._header[2] = number + 1  # only now readers see it
        return number

    def restarted(self, slot: int) -> None:
        """Count a backend that was started anew. The supervisor's to call."""
        self._models["restarts"][slot] += 1

    def row(self, frontend: int, slot: int) -> Row:
        begin = _ROWS + (frontend * MODELS + slot) * _ROW_WORDS * 8
        return Row(memoryview(self._memory)[begin : begin + _ROW_WORDS * 8])

    def forget_held(self, frontend: int) -> None:
        """A frontend holds nothing: it has ended, or begins."""
        for slot in range(self.models):
            self.row(frontend, slot).hold(0, 0, 0)

    def totals(self) -> Sequence[ModelTotals]:
        """Return what has been counted, of each model that has a slot."""
        return [self._totals(slot) for slot in range(self.models)]

    def _totals(self, slot: int) -> ModelTotals:
        rows = self._words.reshape(self.frontends, MODELS, _ROW_WORDS)[:, slot, : _ROW.itemsize // 8].copy().view(_ROW)
        model = self._models[slot]
        one = {field: rows[field].sum(axis=(0, 1)).tolist() for field in _ROW.names or ()}
        del one["last_ns"]
        last_ns = int(rows["last_ns"].max())
        one["last_ms"] = (time.time_ns() - now_ns() + last_ns) // 1_000_000 if last_ns else 0
        for field, keys in (("stage_ns", STAGES), ("failure_count", FAILURES), ("failure_ns", FAILURES)):
            one[field] = dict(zip(keys, one[field], strict=True))
        return ModelTotals(
            name=model["name"].decode(), version=model["version"].decode(), restarts=int(model["restarts"]), **one
        )
