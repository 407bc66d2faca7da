"""A load generator for HTTP inference servers: a closed loop over N connections, in several processes.

Every request is one write of bytes that were made before (head and body); of a response the status, the length and,
on a sample, the answer are looked at. Needs numpy and uvloop only: `python load.py --help`.

It shares no code with `headrace bench --url`. Tried on that one's connections, over 1, 16 and 128 of them to the null
server, it made 0.97, 0.97 and 1.00 times as many requests/s for 1.04, 1.02 and 1.02 times the CPU time each (two busy
CPUs, medians of 20 alternating pairs; the same code twice differed by as much). But those connections only send and
parse. The window, pauses after a refusal, reconnecting, draining and the sampled check would stay here, and need timers
that the event loop has: nothing gets shorter. Apart, neither can hide a fault of the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np
import numpy.typing as npt
import uvloop

HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
HEAD_BYTES = 64 << 10  # of a response, with whatever JSON stands before its numbers
RECONNECT_S = 0.05
REFUSED_PAUSE_S = 0.005  # before a request that follows an error: a server that refuses at once is not stormed
START_DELAY_NS = 100_000_000
BUSY = 0.8  # share of a core from which on the client may be what limits

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


class LoadError(Exception):
    """The load cannot be run as asked; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    host: str
    port: int
    path: str
    headers: tuple[str, ...]  # "Name: value"
    body_prefix: str  # in front of the rows' bytes
    rows: int  # of each request
    connections: int
    processes: int
    warmup_s: float
    seconds: float  # measured
    drain_s: float  # for what is under way at the end
    check_every: int  # answers of a connection, beside its first; 0: none is looked at
    tolerance: float  # largest relative L2 error of a right answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Payloads:
    """Made once, before the processes are: they share them."""

    requests: list[bytes]
    expected: list[Floats]  # [rows, outputs] for each request

    @property
    def answer_bytes(self) -> int:
        return self.expected[0].nbytes


@dataclass(slots=True)
class Tally:
    """What one process saw."""

    completed_ns: list[int] = field(default_factory=list)
    latency_ns: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # within the measured window
    early_errors: Counter[str] = field(default_factory=Counter)  # before it
    checked: int = 0
    wrong: int = 0
    max_error: float = 0.0
    cpu_s: float = 0.0  # within the window
    window_s: float = 0.0  # as this process met it


class Loop:
    """What the connections of one process share."""

    def __init__(self, plan: Plan, payloads: Payloads) -> None:
        self.plan = plan
        self.payloads = payloads
        self.tally = Tally()
        self.issuing = False
        self.measuring = False
        self.under_way = 0
        self.idle = asyncio.Event()

    def error(self, what: str) -> None:
        (self.tally.errors if self.measuring else self.tally.early_errors)[what] += 1

    def begun(self) -> None:
        self.under_way += 1
        self.idle.clear()

    def ended(self) -> None:
        self.under_way -= 1
        if not self.under_way:
            self.idle.set()

    def check(self, number: int, answer: bytes) -> None:
        """Compare an answer with the model's; `number` says to which request."""
        expected = self.payloads.expected[number]
        self.tally.checked += 1
        if len(answer) != expected.nbytes:
            self.tally.wrong += 1
            self.error("answer of another size")
            return
        error = largest_error(np.frombuffer(answer, np.float32).reshape(expected.shape), expected)
        self.tally.max_error = max(self.tally.max_error, error)
        if not error <= self.plan.tolerance:
            self.tally.wrong += 1
            self.error("wrong answer")


class Connection(asyncio.BufferedProtocol):
    """One request after another."""

    transport: asyncio.Transport

    def __init__(self, shared: Loop, number: int) -> None:
        self._shared = shared
        self._number = number
        self._buffer = memoryview(bytearray(HEAD_BYTES + shared.payloads.answer_bytes))
        self._filled = 0
        self._body = 0  # where the response's begins
        self._end = 0  # of the response; 0 until its head has come
        self._status = b""
        self._sent = 0
        self._request = 0
        self._issued_ns = 0
        self._pending = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        if self._shared.issuing:
            self.issue()

    def issue(self) -> None:
        """Send the next request, if the window is open and the connection too."""
        if not self._shared.issuing or self.transport.is_closing():
            return
        self._request = (self._number + self._sent) % len(self._shared.payloads.requests)
        self._sent += 1
        self._pending = True
        self._shared.begun()
        self._issued_ns = time.perf_counter_ns()
        self.transport.write(self._shared.payloads.requests[self._request])

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        if self._filled == len(self._buffer):
            self.transport.abort()
            return memoryview(bytearray(1))
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if not self._end:
            self._read_head()
        if self._end and self._filled >= self._end:
            self._complete(time.perf_counter_ns())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._pending:
            self._pending = False
            self._shared.error(f"connection lost{f' ({type(exc).__name__})' if exc else ''}")
            self._shared.ended()
        if self._shared.issuing:
            asyncio.get_running_loop().create_task(self._reconnect())

    async def _reconnect(self) -> None:
        plan = self._shared.plan
        self._filled = self._end = 0
        while self._shared.issuing:
            await asyncio.sleep(RECONNECT_S)
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, plan.host, plan.port)
            except OSError as error:
                self._shared.error(f"no connection ({type(error).__name__})")
            else:
                return

    def _read_head(self) -> None:
        head, found, _ = bytes(self._buffer[: min(self._filled, HEAD_BYTES)]).partition(HEAD_END)
        if not found:
            return
        self._status = head[9:12]
        length = LENGTH.search(head)
        if length is None:
            self._shared.error("response without Content-Length")
            self.transport.abort()
            return
        self._body = len(head) + len(HEAD_END)
        self._end = self._body + int(length[1])
        if self._end > len(self._buffer):
            self._shared.error("response too large")
            self.transport.abort()

    def _complete(self, now_ns: int) -> None:
        shared = self._shared
        self._pending = False
        shared.ended()
        if self._status == b"200":
            shared.tally.completed_ns.append(now_ns)
            shared.tally.latency_ns.append(now_ns - self._issued_ns)
            every = shared.plan.check_every
            if every and (self._sent - 1) % every == 0:
                # KServe v2 puts JSON in front of the numbers.
                begin = max(self._body, self._end - shared.payloads.answer_bytes)
                shared.check(self._request, bytes(self._buffer[begin : self._end]))
        else:
            shared.error(f"status {self._status.decode()}")
        fine = self._status == b"200"
        self._filled = self._end = 0
        if fine:
            self.issue()
        else:
            asyncio.get_running_loop().call_later(REFUSED_PAUSE_S, self.issue)


def largest_error(answer: Floats, expected: Floats) -> float:
    """Return the largest relative L2 error of a row; NaN stays NaN, and is no right answer."""
    difference = np.linalg.norm(answer.astype(np.float64) - expected, axis=-1)
    return float(np.max(difference / np.linalg.norm(expected.astype(np.float64), axis=-1)))


def nearest_distinct(expected: Floats) -> float:
    """Return how unlike the two most alike of the model's answers are, as a check would see one taken for the other."""
    distances = [
        largest_error(expected[one : one + 1], expected[other : other + 1])
        for one in range(len(expected))
        for other in range(len(expected))
        if one != other
    ]
    return min(distances)


def make_payloads(plan: Plan, inputs: Floats, expected: Floats) -> Payloads:
    """Make as many different requests as there are inputs: number i has rows i, i + 1, ... in turn."""
    count = len(inputs)
    rows = [(np.arange(plan.rows) + first) % count for first in range(count)]
    return Payloads(
        requests=[_request(plan, plan.body_prefix.encode() + inputs[chosen].tobytes()) for chosen in rows],
        expected=[np.ascontiguousarray(expected[chosen]) for chosen in rows],
    )


def _request(plan: Plan, body: bytes) -> bytes:
    lines = [
        f"POST {plan.path} HTTP/1.1",
        f"Host: {plan.host}:{plan.port}",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
        *plan.headers,
    ]
    return "\r\n".join(lines).encode() + HEAD_END + body


async def _run(plan: Plan, payloads: Payloads, numbers: Sequence[int], pipe: Pipe) -> Tally:
    loop = asyncio.get_running_loop()
    shared = Loop(plan, payloads)
    connections = [Connection(shared, number) for number in numbers]
    for connection in connections:
        await loop.create_connection(lambda found=connection: found, plan.host, plan.port)
    pipe.send("connected")
    start_ns: int = await loop.run_in_executor(None, pipe.recv)
    await _sleep_until(start_ns)
    shared.issuing = True
    for connection in connections:
        connection.issue()
    await _sleep_until(start_ns + round(plan.warmup_s * 1e9))
    shared.measuring = True
    began_s, cpu_s = time.perf_counter(), _cpu_s()
    await _sleep_until(start_ns + round((plan.warmup_s + plan.seconds) * 1e9))
    shared.tally.cpu_s, shared.tally.window_s = _cpu_s() - cpu_s, time.perf_counter() - began_s
    shared.issuing = False
    await _drain(shared)
    for connection in connections:
        connection.transport.abort()
    return shared.tally


async def _drain(shared: Loop) -> None:
    if not shared.under_way:
        return
    try:
        await asyncio.wait_for(shared.idle.wait(), shared.plan.drain_s)
    except TimeoutError:
        shared.tally.errors["unanswered"] += shared.under_way


async def _sleep_until(at_ns: int) -> None:
    await asyncio.sleep(max(0.0, (at_ns - time.perf_counter_ns()) / 1e9))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _process(plan: Plan, payloads: Payloads, numbers: Sequence[int], pipe: Pipe) -> None:
    try:
        tally = uvloop.run(_run(plan, payloads, numbers, pipe))
    except OSError as error:
        pipe.send(LoadError(f"{plan.host}:{plan.port}: {error}"))
        return
    pipe.send(tally)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One measured window; `latency_us` and `completed_us` hold every request that ended in it."""

    summary: dict[str, object]
    completed_us: npt.NDArray[np.uint32]  # since the window began
    latency_us: npt.NDArray[np.uint32]


def run(plan: Plan, inputs: Floats, expected: Floats) -> Outcome:
    """Load the server that is there. Raises LoadError: no connection, or answers too alike to be checked."""
    nearest = nearest_distinct(expected)
    if plan.check_every and nearest <= 2 * plan.tolerance:
        raise LoadError(
            f"two of the model's answers differ by {nearest:.2g} only, which {plan.tolerance:.2g}, what a right"
            " answer may be off, does not tell apart; take other inputs"
        )
    payloads = make_payloads(plan, inputs, expected)
    shares = [range(first, plan.connections, plan.processes) for first in range(min(plan.processes, plan.connections))]
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for share in shares:
        ours, theirs = context.Pipe()
        process = context.Process(target=_process, args=(plan, payloads, share, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        _received(pipe)
    start_ns = time.perf_counter_ns() + START_DELAY_NS
    for pipe in pipes:
        pipe.send(start_ns)
    tallies = [_received(pipe) for pipe in pipes]
    for process in processes:
        process.join()
    return _outcome(plan, [tally for tally in tallies if isinstance(tally, Tally)], start_ns, nearest)


def _received(pipe: Pipe) -> object:
    try:
        word = pipe.recv()
    except EOFError:
        raise LoadError("a process of the load generator ended") from None
    if isinstance(word, LoadError):
        raise word
    return word


def _outcome(plan: Plan, tallies: Sequence[Tally], start_ns: int, nearest: float) -> Outcome:
    begin_ns = start_ns + round(plan.warmup_s * 1e9)
    end_ns = begin_ns + round(plan.seconds * 1e9)
    completed_ns = np.concatenate([np.asarray(tally.completed_ns, np.int64) for tally in tallies])
    latency_ns = np.concatenate([np.asarray(tally.latency_ns, np.int64) for tally in tallies])
    inside = (completed_ns >= begin_ns) & (completed_ns < end_ns)
    completed_ns, latency_ns = completed_ns[inside], latency_ns[inside]
    cpu = [tally.cpu_s / tally.window_s for tally in tallies]
    errors = sum((tally.errors for tally in tallies), Counter())
    checked, wrong = sum(tally.checked for tally in tallies), sum(tally.wrong for tally in tallies)
    per_s = len(completed_ns) / plan.seconds
    summary: dict[str, object] = {
        **{name: value for name, value in asdict(plan).items() if name not in ("host", "port", "body_prefix")},
        "begin_ns": begin_ns,
        "end_ns": end_ns,
        "requests": len(completed_ns),
        "requests_per_s": per_s,
        "samples_per_s": per_s * plan.rows,
        "halves_per_s": _halves(completed_ns, begin_ns, end_ns),
        **_latencies(latency_ns),
        # Little's law: 1 if every connection always had a request under way.
        "occupancy": per_s * float(latency_ns.mean()) / 1e9 / plan.connections if len(latency_ns) else 0.0,
        "errors": dict(errors),
        "early_errors": dict(sum((tally.early_errors for tally in tallies), Counter())),
        "checked": checked,
        "wrong": wrong,
        "max_error": max(tally.max_error for tally in tallies),
        "nearest_distinct": nearest,
        "client_cores": cpu,
        "client_busy": max(cpu) > BUSY,
    }
    return Outcome(
        summary=summary,
        completed_us=((completed_ns - begin_ns) // 1000).astype(np.uint32),
        latency_us=(latency_ns // 1000).astype(np.uint32),
    )


def _halves(completed_ns: Counts, begin_ns: int, end_ns: int) -> list[float]:
    """Return the throughput of either half of the window: unlike ones were not steady."""
    middle_ns = (begin_ns + end_ns) // 2
    first = int((completed_ns < middle_ns).sum())
    half_s = (end_ns - begin_ns) / 2e9
    return [first / half_s, (len(completed_ns) - first) / half_s]


def _latencies(latency_ns: Counts) -> dict[str, float | None]:
    """Return percentiles of all latencies, numpy's linear ones, in milliseconds."""
    names = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100}
    if not len(latency_ns):
        return dict.fromkeys(names)
    return {name: float(np.percentile(latency_ns, share)) / 1e6 for name, share in names.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Load an HTTP inference server in a closed loop.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--header", action="append", default=[], metavar="NAME: VALUE")
    parser.add_argument("--body-prefix", default="", metavar="TEXT", help="in front of the rows' bytes")
    parser.add_argument("--inputs", type=Path, required=True, metavar="FILE.npy", help="float32 [distinct, ...]")
    parser.add_argument("--expected", type=Path, required=True, metavar="FILE.npy", help="float32 [distinct, outputs]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative L2 error (default: 1e-4)")
    parser.add_argument("--rows", type=int, default=1, help="of each request (default: 1)")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--client-processes", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 4)))
    parser.add_argument("--warmup", type=float, default=1.0, metavar="S")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S")
    parser.add_argument("--drain", type=float, default=10.0, metavar="S", help="for what is under way at the end")
    parser.add_argument("--check-every", type=int, default=100, metavar="N", help="0: look at no answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there (default: to the screen)")
    parser.add_argument("--raw", type=Path, metavar="FILE.npz", help="write every request's end and latency there")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    plan = Plan(
        host=args.host,
        port=args.port,
        path=args.path,
        headers=tuple(args.header),
        body_prefix=args.body_prefix,
        rows=args.rows,
        connections=args.connections,
        processes=args.client_processes,
        warmup_s=args.warmup,
        seconds=args.seconds,
        drain_s=args.drain,
        check_every=args.check_every,
        tolerance=args.tolerance,
    )
    try:
        outcome = run(plan, np.load(args.inputs), np.load(args.expected))
    except LoadError as error:
        sys.exit(str(error))
    text = json.dumps(outcome.summary)
    if args.json:
        args.json.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")
    if args.raw:
        np.savez_compressed(args.raw, completed_us=outcome.completed_us, latency_us=outcome.latency_us)


if __name__ == "__main__":
    main()
