"""What `headrace.Client` gets out of a running server: `python benchmarks/client_rate.py URL`.

    headrace serve resnet18 --image-size 250 --max-batch-size 128 --frontends 4 ...

Threads of one process call in a closed loop, so from some rate on this process is the limit: see its own CPU time.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from headrace import Client

ROWS = 32


def measure(call: Callable[[], object], threads: int, seconds: float) -> str:
    """Return the rate and the percentiles of a closed loop with so many threads."""
    times_s: list[float] = []
    end = time.perf_counter() + seconds

    def loop() -> None:
        while time.perf_counter() < end:
            began = time.perf_counter()
            call()
            times_s.append(time.perf_counter() - began)

    callers = [threading.Thread(target=loop) for _ in range(threads)]
    busy = time.process_time()
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    p50, p99 = 1000 * np.percentile(times_s, (50, 99))
    cores = (time.process_time() - busy) / seconds
    return (
        f"{len(times_s) / seconds:,.0f} requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, {cores:.1f} cores of the client"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure headrace.Client against a running server.")
    parser.add_argument("url")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=250, metavar="PIXELS")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load")
    args = parser.parse_args()
    many = np.random.default_rng(0).standard_normal((ROWS, 3, args.side, args.side), dtype=np.float32)
    answers = {}
    for transport, options in (("ring", {}), ("http", {"ring": "off"})):
        with Client(args.url, **options) as client:
            (answers[transport],) = client.infer(args.model, many).values()
            loads = {
                "1 thread, 1 row": (1, lambda c=client: c.infer(args.model, many[:1])),
                "32 threads, 1 row": (32, lambda c=client: c.infer(args.model, many[:1])),
                f"8 threads, {ROWS} rows": (8, lambda c=client: c.infer(args.model, many)),
            }
            if client.transport == "ring":
                loads[f"8 threads, {ROWS} rows made in the ring"] = (8, lambda c=client: _in_place(c, args.model))
            for name, (threads, call) in loads.items():
                sys.stdout.write(f"{client.transport}, {name}: {measure(call, threads, args.seconds)}\n")
    sys.stdout.write(f"largest difference of the answers: {np.abs(answers['ring'] - answers['http']).max()}\n")


def _in_place(client: Client, model: str) -> None:
    with client.allocate(model, rows=ROWS) as call:
        call.infer()


if __name__ == "__main__":
    main()
