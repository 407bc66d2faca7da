"""Runs commands as a user does, in processes of their own, on the CPU, with models small enough to be quick.

What a command says before it has started anything can be had here, in the tests' own process, in a tenth of the time.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import psutil

import headrace
from headrace.cli import main

ROOT = Path(__file__).parents[1]
LIMIT_S = 120

TINY = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 5, stride=3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 10),
    )
"""

QUICK = (
    *("--device", "cpu", "--image-size", "48", "--distinct-images", "12", "--num-iters", "6"),
    *("--batch-size", "4", "--no-download"),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended. `message` is the one line that tells the error."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("headrace: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def environment() -> dict[str, str]:
    """Return this process's environment, with this very package importable, and terminals wide enough for a line."""
    source = str(Path(headrace.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}


class Started(subprocess.Popen[str]):
    """A command under way, in a session of its own. As a context, it does not outlive its block."""

    def __exit__(self, *details: object) -> None:
        if self.poll() is None:
            self.kill()  # its children die with it
        super().__exit__(*details)  # type: ignore[arg-type]

    def members(self) -> list[psutil.Process]:
        """Return every process of its session, also those whose parent has gone."""
        return [process for process in psutil.process_iter() if _session(process) == self.pid]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:  # it ended meanwhile
        return None


def start(*words: object, cwd: Path, limit_bytes: int | None = None) -> Started:
    """Start `headrace WORDS` (or `server.py WORDS`) in `cwd`."""
    program = [str(ROOT / "server.py")] if words[0] == "server.py" else ["-m", "headrace", str(words[0])]
    # A shell starts commands in the background deaf to Ctrl-C, and these tests with them.
    command = ["env", "--default-signal=INT", sys.executable, *program, *map(str, words[1:])]
    if limit_bytes is not None:
        command = ["prlimit", f"--fsize={limit_bytes}", *command]
    return Started(
        command,
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def run(*words: object, cwd: Path, limit_bytes: int | None = None) -> Ended:
    """Run to the end. A command that hangs, or leaves a process behind, fails the test."""
    with start(*words, cwd=cwd, limit_bytes=limit_bytes) as process:
        out, err = process.communicate(timeout=LIMIT_S)
    assert all_gone(process.members()), err
    return Ended(process.returncode, out, err)


def call(*words: object, cwd: Path, entry: Callable[[Sequence[str]], None] = main) -> Ended:
    """Run what ends before it starts a process, as an option that is refused, within this one."""
    out, err = io.StringIO(), io.StringIO()
    before, terminate = multiprocessing.active_children(), signal.getsignal(signal.SIGTERM)
    code: object = 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, COLUMNS="200"),
    ):
        try:
            entry(list(map(str, words)))
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, terminate)
    assert set(multiprocessing.active_children()) <= set(before), "it started a process"
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def model_file(folder: Path, source: str = TINY, name: str = "tiny.py") -> str:
    """Write a model file; return what --model takes."""
    (folder / name).write_text(source)
    return f"{folder / name}:build"


def all_gone(processes: list[psutil.Process], within_s: float = 15.0) -> bool:
    """Return whether all processes have ended (or only wait to be collected) within the time."""
    limit = time.monotonic() + within_s
    while any(map(_is_alive, processes)):
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended meanwhile
        return False
