"""JPEG files against the tensors that are in them, side by side: `python benchmarks/jpeg_rate.py`.

One server has a network that costs next to nothing twice: for float32 [rows, 3, 224, 224], and for the files of which
such tensors are made. Client, frontend and backend share the machine's CPUs, so it is their CPU time that is compared.
The two take turns; the medians of all rounds are printed.
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
from pathlib import Path

import numpy as np
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


def rate(call: Callable[[], object], threads: int, seconds: float) -> float:
    """Return the calls per second of a closed loop with so many threads."""
    counts = [0] * threads
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
    return sum(counts) / seconds


def measure(url: str, rounds: int, seconds: float) -> None:
    jpeg = [photograph()]
    tensors = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    sys.stdout.write(f"a file of {len(jpeg[0]):,} bytes, a tensor of {tensors.nbytes:,}\n")
    for ring, threads in ((None, 1), (None, 8), ("off", 1), ("off", 8)):
        with Client(url, ring=ring) as client:
            found: dict[str, list[float]] = {"jpeg": [], "tensors": []}
            for _ in range(rounds):
                for name, rows in (("jpeg", jpeg), ("tensors", tensors)):
                    found[name].append(rate(lambda name=name, rows=rows: client.infer(name, rows), threads, seconds))
            files, arrays = (statistics.median(found[name]) for name in ("jpeg", "tensors"))
            sys.stdout.write(
                f"{client.transport}, {threads} threads: {files:,.0f} files/s, {arrays:,.0f} tensors/s,"
                f" ratio {files / arrays:.2f}\n"
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
            measure(url, args.rounds, args.seconds)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
