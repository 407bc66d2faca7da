"""What tracing costs a frontend: `python benchmarks/tracing_cost.py --before SRC --output FILE`.

Each arm is a frontend's HTTP in a process of its own, with a backend that answers at once. One client asks them in
turn, a burst each, over a connection that stays, and a collector takes all spans. SRC is the `src` of a checkout from
before tracing. The numbers: the frontend's CPU time per request, its exporting thread included, and the client's times.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import uvloop

from headrace.control import ServedModel
from headrace.frontend.http.front import make_front
from headrace.frontend.regions import Regions, SharedRegions
from headrace.frontend.service import Service
from headrace.frontend_job import AccessSettings, HttpSettings
from headrace.tensors import TensorSpec
from headrace.transport.descriptors import ANSWER, Descriptor

WARM_UP = 500  # requests
BURST = 100  # requests to one arm before the next has its turn
FLUSH_S = 1.0  # after a round, for some of its last spans to be sent
ARMS = {
    "before": None,
    "off": None,
    "off, again": None,
    "on, 0 %": 0.0,
    "on, 1 %": 0.01,
    "on, 100 %": 1.0,
}  # and which share is sampled
HEADER = json.dumps(
    {
        "inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "parameters": {"binary_data_size": 64}}],
        "parameters": {"binary_data_output": True},
    }
).encode()
REQUEST = (
    b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: %d\r\n"
    b"Content-Length: %d\r\n\r\n" % (len(HEADER), len(HEADER) + 64)
) + HEADER + struct.pack("<16f", *range(16))  # fmt: skip


class Link:
    """A backend whose model returns its input, at once."""

    def __init__(self) -> None:
        spec = TensorSpec(name="x", dtype="float32", features=(16,))
        self.model = ServedModel(name="m", version="1", inputs=(spec,), outputs=(spec,), max_batch_size=8)
        self.memory = memoryview(bytearray(64))
        self.in_flight, self.free_share = 0, 1.0

    def admit(self, rows: int, *_: int) -> object:
        assert rows == 1
        return Call(self)

    def close(self) -> None:
        pass


class Call:
    def __init__(self, link: Link) -> None:
        self.told: object = None
        self._link = link

    def input(self, _: int) -> memoryview:
        return self._link.memory

    def output(self, _: int) -> memoryview:
        return self._link.memory

    async def answer(self) -> None:
        now = time.perf_counter_ns()
        self.told = Descriptor(1, ANSWER, 0, 1, 0, 1, 0, now, now + 1, now + 2, now + 3)

    def close(self) -> None:
        pass


class Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def serve(ratio: float | None, endpoint: str) -> None:
    """Serve until standard input ends; say on which port."""
    more = ()
    if ratio is not None:
        spans = importlib.import_module("headrace.frontend.spans")  # which was not there before
        more = (spans.Tracer(SimpleNamespace(endpoint=endpoint, ratio=ratio), complain),)
    service = Service(("m",))
    service.add(Link())
    regions = SharedRegions(Regions(offered=False), send=[].append)
    front = make_front(service, regions, HttpSettings(), AccessSettings(), *more)
    listener = socket.create_server(("127.0.0.1", 0))
    await front.start(listener)
    say(str(listener.getsockname()[1]))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await front.close()


class Arm:
    """A frontend, and a connection to it."""

    def __init__(self, name: str, source: str, endpoint: str) -> None:
        command = [sys.executable, __file__, "--serve", name, "--endpoint", endpoint]
        environment = {**os.environ, "PYTHONPATH": source}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self._client = socket.create_connection(("127.0.0.1", int(self.process.stdout.readline())))
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ask(WARM_UP)

    def ask(self, count: int) -> list[float]:
        """Return the times of so many requests, in microseconds."""
        times_us = []
        for _ in range(count):
            began_ns = time.perf_counter_ns()
            self._client.sendall(REQUEST)
            answer = self._client.recv(65536)
            times_us.append((time.perf_counter_ns() - began_ns) / 1000)
            assert answer.startswith(b"HTTP/1.1 200"), answer
        return times_us

    def cpu_ns(self) -> int:
        """Return the CPU time of all its threads: Linux's clock of another process, see clock_getcpuclockid(3)."""
        return time.clock_gettime_ns((~self.process.pid << 3) | 2)

    def end(self) -> None:
        self._client.close()
        self.process.communicate()


def measure(arms: dict[str, Arm], requests: int) -> dict[str, dict[str, float]]:
    """Ask each arm so many requests, in bursts by turns; return what one took."""
    began = {name: arm.cpu_ns() for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(requests // BURST):
        for name in random.sample(list(arms), len(arms)):
            times[name] += arms[name].ask(BURST)
    time.sleep(FLUSH_S)
    found = {}
    for name, arm in arms.items():
        ordered = sorted(times[name])
        cpu_us = (arm.cpu_ns() - began[name]) / 1000 / len(ordered)
        found[name] = {"cpu_us": cpu_us, "p50_us": statistics.median(ordered), "p99_us": ordered[-len(ordered) // 100]}
    return found


def report(rounds: list[dict[str, dict[str, float]]]) -> str:
    lines = ["| tracing | CPU time per request | against off, in the same round | p50 | p99 |", "|---|---|---|---|---|"]
    for arm in rounds[0]:
        middle = {key: statistics.median(each[arm][key] for each in rounds) for key in rounds[0][arm]}
        ratios = sorted(each[arm]["cpu_us"] / each["off"]["cpu_us"] for each in rounds)
        quarter = len(ratios) // 4
        spread = f"{statistics.median(ratios):.3f} ({ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"
        lines.append(
            f"| {arm} | {middle['cpu_us']:.1f} us | {spread} | {middle['p50_us']:.0f} us | {middle['p99_us']:.0f} us |"
        )
    return "\n".join(lines)


def complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what tracing costs a frontend.")
    parser.add_argument("--before", metavar="SRC", help="the src folder of a checkout from before tracing")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON with every round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000, help="to each arm in a round")
    parser.add_argument("--serve", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(ARMS[args.serve], args.endpoint))
        return
    ours = str(Path(__file__).parents[1] / "src")
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
    names = [name for name in ARMS if name != "before" or args.before]
    arms = {name: Arm(name, args.before if name == "before" else ours, endpoint) for name in names}
    rounds = [measure(arms, args.requests) for _ in range(args.rounds)]
    for arm in arms.values():
        arm.end()
    say(report(rounds))
    if args.output is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
        content = {"machine": machine, "requests": args.requests, "rounds": rounds}
        args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
