"""JPEG files against the tensors that are in them, side by side: `python benchmarks/jpeg_rate.py`.

One server has a network that costs next to nothing twice: for float32 [rows, 3, 224, 224], and for the files of which
such tensors are made. The two take turns; the medians of all rounds are printed: requests per second, and the CPU time
of all processes for each, the client's too, which tells more on a machine that is busy with other work.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import skimage.data
from PIL import Image

from headrace import Client

HERE = Path(__file__).parent
DEPLOYMENT = """
[server]
http_port = 0
grpc = false

[[models]]
source = "{here}/tiny_jpeg.py:build"
name = "jpeg"
device = "cpu"

[[models]]
source = "{here}/tiny_model.py:build"
name = "tensors"
device = "cpu"
"""


def photograph() -> bytes:
    """Return a photograph of 500 x 375 pixels as a JPEG file, as large as ImageNet's are."""
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()[:375, :500]).save(file, "JPEG", quality=90)
    return file.getvalue()


class Measured(NamedTuple):
    per_s: float
    cpu_ms: float  # of each


def cpu_s(server: psutil.Process) -> float:
    """Return the CPU time of a server's processes and of this one."""
    times = [each.cpu_times() for each in (server, *server.children(recursive=True))]
    return sum(each.user + each.system for each in times) + time.process_time()


def rate(call: Callable[[], object], threads: int, seconds: float, server: psutil.Process) -> Measured:
    """Measure a closed loop with so many threads."""
    counts = [0] * threads
    before_s = cpu_s(server)
    end = time.perf_counter() + seconds

    def loop(number: int) -> None:
        while time.perf_counter() < end:
            call()
            counts[number] += 1

    callers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return Measured(sum(counts) / seconds, 1000 * (cpu_s(server) - before_s) / sum(counts))


def measure(url: str, rounds: int, seconds: float, server: psutil.Process) -> None:
    jpeg = [photograph()]
    tensors = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    sys.stdout.write(f"a file of {len(jpeg[0]):,} bytes, a tensor of {tensors.nbytes:,}\n")
    for ring, threads in ((None, 1), (None, 8), ("off", 1), ("off", 8)):
        with Client(url, ring=ring) as client:
            calls = {name: partial(client.infer, name, rows) for name, rows in (("jpeg", jpeg), ("tensors", tensors))}
            found: dict[str, list[Measured]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    found[name].append(rate(call, threads, seconds, server))
            for name, measured in found.items():
                per_s, cpu_ms = (statistics.median(values) for values in zip(*measured, strict=True))
                sys.stdout.write(
                    f"{client.transport}, {threads} threads, {name}: {per_s:,.0f} requests/s, {cpu_ms:.2f} ms of CPU\n"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure JPEG files against float32 tensors.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as deployment:
        deployment.write(DEPLOYMENT.format(here=HERE))
        deployment.flush()
        command = [sys.executable, "-m", "headrace", "serve", "--config", deployment.name]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        found = (re.search(r"ready: (http://[\d.:]+)/", line) for line in server.stderr)
        url = next(match.group(1) for match in found if match)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            measure(url, args.rounds, args.seconds, psutil.Process(server.pid))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
