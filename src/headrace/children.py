"""The supervisor's processes as it sees them, and its signals as something to wait for."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType

from headrace.clock import now_ns
from headrace.processes import children_deaf_to_ctrl_c, enter

_spawn = multiprocessing.get_context("spawn")


@dataclass(slots=True, eq=False)
class Child:
    """A running process and the pipe to it; `control` is None when the process has closed its end."""

    process: SpawnProcess
    control: Connection | None
    started_ns: int

    @classmethod
    def start(cls, name: str, target: str, make_job: Callable[[Connection], object]) -> Child:
        ours, theirs = _spawn.Pipe()
        process = _spawn.Process(target=enter, args=(target, make_job(theirs)), name=name)
        with children_deaf_to_ctrl_c():
            process.start()
        theirs.close()
        return cls(process, ours, now_ns())

    def send(self, word: object) -> None:
        """Say something; to one that has just died, which is seen elsewhere, in vain."""
        if self.control is not None:
            with suppress(OSError):
                self.control.send(word)

    def words(self) -> Iterator[object]:
        """Yield what it has said and nobody has heard yet."""
        while self.control is not None:
            try:
                if not self.control.poll():
                    return
                word = self.control.recv()
            except (EOFError, OSError):
                self.control.close()
                self.control = None
                return
            yield word

    def bury(self) -> int | None:
        """Let go of an ended process and return its exit code."""
        self.process.join()
        if self.control is not None:
            self.control.close()
            self.control = None
        return self.process.exitcode

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()


@dataclass(slots=True)
class Signals:
    """SIGINT and SIGTERM as something to wait for."""

    count: int = 0
    _pipe: tuple[int, int] = field(default_factory=os.pipe)

    @property
    def fd(self) -> int:
        return self._pipe[0]

    def forget(self) -> None:
        """Make `fd` wait for the next one; `count` goes on."""
        os.read(self._pipe[0], 4096)

    @contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        os.write(self._pipe[1], b".")
