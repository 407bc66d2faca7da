"""Runs one planned run as a fresh process, and leaves none behind, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from headrace.errors import RunFailed
from headrace.files import writing
from headrace.study.plan import PlannedRun, SweepConfig

CommandBuilder = Callable[[PlannedRun, Path], Sequence[str]]

_PREFIX = "headrace: "  # the command line puts it before every error
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class BenchCommand:
    """Builds the `headrace bench` command of a planned run, with the interpreter that runs us."""

    config: SweepConfig

    def __call__(self, planned: PlannedRun, run_dir: Path) -> Sequence[str]:
        return (
            *(sys.executable, "-m", "headrace", "bench"),
            *("--design", planned.design),
            *("--num-workers", str(planned.num_workers)),
            *("--batch-size", str(planned.batch_size)),
            *("--num-iters", str(self.config.num_iters)),
            "--compile" if planned.compile else "--no-compile",
            *("--output-dir", str(run_dir)),
            "--json",
            *("--reference-cache", str(run_dir.parent.with_name("references"))),
            *self.config.child_options,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SubprocessExecutor:
    """Starts the child in a session of its own: Ctrl-C reaches us alone, and we decide how the child ends."""

    command: CommandBuilder
    time_limit_s: float = 3600.0  # of one run
    grace_s: float = 10.0  # from SIGTERM to SIGKILL
    linger_s: float = 2.0  # for helpers that go by themselves, as multiprocessing's resource tracker

    def __call__(self, planned: PlannedRun, run_dir: Path) -> str | None:
        """Run to the end; return None if it ended well, else one line that says why not.

        Output goes to `NAME.log` beside the run's folder. Whatever is raised here while the child runs,
        Ctrl-C first of all, ends the child's whole process group before it passes on. Raises OutputError,
        RunFailed.
        """
        log_path = run_dir.with_name(run_dir.name + ".log")
        with _HeldSignals() as held:
            child = _start(self.command(planned, run_dir), log_path)
            try:
                held.release()
                code = child.wait(self.time_limit_s)
            except subprocess.TimeoutExpired:
                self._stop(child)
                return f"stopped after {self.time_limit_s:g} s, the limit of a run; raise it with --run-timeout"
            except BaseException:
                self._stop(child)
                raise
            finally:
                _end_group(child.pid, self.linger_s)
        return None if code == 0 else _why(code, log_path)

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        """Ask, wait, then insist. A second Ctrl-C while waiting insists at once."""
        child.send_signal(signal.SIGTERM)  # which it hears even where we were started deaf to SIGINT
        try:
            child.wait(self.grace_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()


class _HeldSignals:
    """Holds SIGINT and SIGTERM back until `release`, which delivers what came meanwhile.

    An exception between the child's start and the block that ends it would leave the child behind. A blocked
    or ignored signal would be inherited by the child; a handler is not.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object]] = {}
        self._arrived: list[int] = []

    def __enter__(self) -> _HeldSignals:
        if threading.current_thread() is threading.main_thread():  # no other is ever interrupted
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, lambda arrived, _: self._arrived.append(arrived))
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        for held, handler in self._before.items():
            signal.signal(held, handler)
        self._before.clear()
        arrived, self._arrived = self._arrived, []
        for number in arrived:
            signal.raise_signal(number)


def error_line(log_path: Path) -> str:
    """Return the line of a log that tells the error: the command's own message, else the last with text."""
    try:
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the exit code alone must do
        return ""
    filled = [line.strip() for line in lines if line.strip()]
    own = [line.removeprefix(_PREFIX) for line in filled if line.startswith(_PREFIX)]
    return (own or filled or [""])[-1]


def _start(command: Sequence[str], log_path: Path) -> subprocess.Popen[bytes]:
    with writing(log_path):
        log = log_path.open("wb")
    with log:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunFailed(f"{command[0]}: cannot be started ({error.strerror}); mend the installation") from error


def _why(code: int, log_path: Path) -> str:
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    line = error_line(log_path)
    return f"{line} ({ended})" if line else ended


def _end_group(group: int, linger_s: float) -> None:
    """Give what is left of the group a moment to go by itself, then kill it: it might hold the GPU.

    The group's number cannot belong to anyone else while a member is left; with none left there is nothing
    to do.
    """
    if not _is_gone(group, linger_s):
        _signal_group(group, signal.SIGKILL)
        _is_gone(group, linger_s)


def _is_gone(group: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while _signal_group(group, 0) and any(_is_alive(process, group) for process in psutil.process_iter()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _is_alive(process: psutil.Process, group: int) -> bool:
    """Return whether a process belongs to the group and still runs. Some containers never reap."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; return whether there was one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
