"""The processes of one run, and the supervisor's side of what they report."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TypeVar

from headrace.clock import now_ns
from headrace.errors import RunFailed
from headrace.processes import ChildFailed, children_deaf_to_ctrl_c, enter

Message = TypeVar("Message")
TICK_S = 0.1  # between two looks at the progress
STOP_TIMEOUT_S = 3.0


@dataclass(slots=True)
class Member:
    name: str
    process: SpawnProcess
    report: Connection
    inbox: list[object]
    may_end: bool = False  # its end is no failure any more


class Crew:
    """Starts children, waits for what they say, and stops them all, however the run ends.

    Whoever waits here is woken at once by a child's failure or death, so no wait outlives its reason.
    """

    def __init__(self, idle: Callable[[], None]) -> None:
        self.context: SpawnContext = multiprocessing.get_context("spawn")
        self._idle = idle  # called about every TICK_S while waiting
        self._members: list[Member] = []

    def start(self, name: str, target: str, make_job: Callable[[Connection], object]) -> Member:
        """Start `target` ("module:function", so that the supervisor need not import it) as a process.

        `make_job` gets the child's end of the pipe to us, and returns the function's only argument.
        """
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=enter, args=(target, make_job(theirs)), name=name)
        member = Member(name, process, ours, [])
        with children_deaf_to_ctrl_c():
            process.start()
            self._members.append(member)
        theirs.close()
        return member

    def expect(self, member: Member, kind: type[Message], timeout_s: float | None = None) -> Message:
        """Return the next message of `kind` from `member`.

        Raises the error that any child reports, RunFailed if one dies or `timeout_s` passes.
        """
        deadline_ns = None if timeout_s is None else now_ns() + int(timeout_s * 1e9)
        while True:
            for message in member.inbox:
                if isinstance(message, kind):
                    member.inbox.remove(message)
                    return message
            if member.may_end and (member.report.closed or not member.report.poll()):
                raise RunFailed(f"the {member.name} process ended without reporting; the run does not count")
            if deadline_ns is not None and now_ns() > deadline_ns:
                raise RunFailed(f"the {member.name} process said nothing for {timeout_s:g} s")
            self.tick()

    def tick(self) -> None:
        """Wait a moment for words or deaths. Raises as `expect` does."""
        self._listen()
        self._idle()

    def _listen(self) -> None:
        """Wait up to a tick for words or deaths. Words first: a child that reports its failure ends right after."""
        reports: list[object] = [member.report for member in self._members if not member.report.closed]
        sentinels: list[object] = [m.process.sentinel for m in self._members if not m.may_end]
        ready = wait([*reports, *sentinels], TICK_S)  # type: ignore[list-item]
        for member in self._members:
            if member.report in ready:
                self._read(member)
        for member in self._members:
            if member.process.sentinel in ready and not member.may_end:
                self._ended(member)

    def _read(self, member: Member) -> None:
        try:
            message = member.report.recv()
        except (EOFError, ConnectionResetError):
            member.report.close()
            return
        if isinstance(message, ChildFailed):
            raise message.error
        member.inbox.append(message)

    def _ended(self, member: Member) -> None:
        while not member.report.closed and member.report.poll():
            self._read(member)
        member.process.join()
        member.may_end = True
        code = member.process.exitcode or 0
        if code:
            signal = -code if code < 0 else code - 128
            how = f"was killed by signal {signal}" if signal > 0 else f"ended with exit code {code}"
            raise RunFailed(f"the {member.name} process {how} in the middle of the run; the run does not count")

    def stop(self) -> None:
        """End every child that is still there. Safe to call at any time."""
        for member in self._members:
            if member.process.is_alive():
                member.process.terminate()
        for member in self._members:
            member.process.join(STOP_TIMEOUT_S)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.report.close()
