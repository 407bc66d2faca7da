"""Measures one GPU, the other, and both together, and what the death of one engine costs: for a machine with two GPUs.

    python benchmarks/two_gpus.py --output-dir DIR [--time-limit 220]     about 4 minutes
    python benchmarks/two_gpus.py --output-dir DIR --device cpu           the same with two small engines, to try it
    python benchmarks/two_gpus.py --report DIR                            the report again, from the records

Batch 32 over the ring, the data being there already (`--client zero-copy`), in bf16 compiled and in TF32; the three are
measured in turn, repeat by repeat, as long as the time limit allows. Then a server with both GPUs answers HTTP clients
while one of its engines is killed. DIR gets each run's summary.json and requests.parquet, failure/requests.parquet (a
row per request), failure/events.json and report.md.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 32
REPEATS = 5  # at most
FAILURE_S = 75.0  # kept for the last part
RUN_S = 20.0  # what a run needs at least
BEFORE_S, AFTER_S = 4.0, 4.0  # under load before the kill, and after the engine has come back
END_S = 12.0  # for the clients' records, and for the server to end
BIN_S = 0.25
PROCESSES, THREADS = 4, 8  # of the HTTP clients
HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how `headrace` is told so."""

    cases: dict[str, list[str]]
    targets: dict[str, list[str]]
    common: list[str]
    serve: list[str]
    size: int  # pixels of the served model's images

    @classmethod
    def of(cls, device: str, cache: Path) -> Plan:
        if device == "cpu":
            return cls(
                cases={"float32": []},
                targets={"one": ["--engines-per-device", "1"], "both": ["--engines-per-device", "2"]},
                common=["--device", "cpu", "--image-size", "64", "--num-iters", "8", "--reference-cache", str(cache)],
                serve=["--device", "cpu", "--engines-per-device", "2", "--image-size", "64", "--frontends", "1"],
                size=64,
            )
        return cls(
            cases={
                "bf16-compiled": ["--precision", "bf16", "--compile", "--compile-cache", str(cache / "programs")],
                "tf32": ["--precision", "tf32"],
            },
            targets={"gpu0": ["--gpus", "0"], "gpu1": ["--gpus", "1"], "both": ["--gpus", "0,1"]},
            common=["--reference-cache", str(cache), "--no-limits"],
            serve=[
                *("--gpus", "0,1", "--precision", "bf16", "--image-size", "224"),  # not compiled: it starts sooner
                *("--frontends", "4", "--buckets", "8", "32"),
            ],
            size=224,
        )


class Clock:
    """What is left of the time limit."""

    def __init__(self, limit_s: float) -> None:
        self._end_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end_s - time.monotonic()


def measure(plan: Plan, folder: Path, clock: Clock) -> None:
    """Run every case on every target, in turn, as often as the time allows."""
    for repeat in range(REPEATS):
        for case, case_options in plan.cases.items():
            names = list(plan.targets)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                if clock.left_s < RUN_S + FAILURE_S:
                    tell(f"no time for {case} on {name}, repeat {repeat}")
                    return
                run(plan, folder / "runs" / f"{case}-{name}-{repeat}", case_options + plan.targets[name], clock)


def run(plan: Plan, output_dir: Path, options: list[str], clock: Clock) -> None:
    command = [
        *(sys.executable, "-m", "headrace", "bench", "--design", "lanes", "--batch-size", str(BATCH)),
        *("--client", "zero-copy", "--no-download", "--output-dir", str(output_dir), "--json"),
        *(*plan.common, *options),
    ]
    began_s = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(1.0, clock.left_s - FAILURE_S), check=False
        )
    except subprocess.TimeoutExpired:
        tell(f"{output_dir.name}: no time left")
        return
    if done.returncode:
        tell(f"{output_dir.name}: failed\n{done.stderr[-2000:]}")
        return
    summary = json.loads(done.stdout)
    shares = ", ".join(f"{each['place']} {each['share']:.3f}" for each in summary["engines"])
    rate = summary["metrics"]["throughput_samples_per_s"] or 0.0
    tell(f"{output_dir.name}: {rate:,.0f} samples/s ({shares or 'one engine'}), {time.monotonic() - began_s:.0f} s")


@dataclass
class Server:
    """`headrace serve` under way; `lines` is what it has said, and when."""

    process: subprocess.Popen[str]
    lines: list[tuple[int, str]] = field(default_factory=list)
    said: threading.Condition = field(default_factory=threading.Condition)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.said:
                self.lines.append((time.monotonic_ns(), line.rstrip()))
                self.said.notify_all()

    def when(self, words: str, limit_s: float) -> tuple[int, str] | None:
        """Return when it said something with these words, and the line; None after the limit."""

        def found() -> tuple[int, str] | None:
            return next((each for each in self.lines if words in each[1]), None)

        with self.said:
            self.said.wait_for(lambda: found() is not None or self.process.poll() is not None, max(0.0, limit_s))
            return found()

    def engines(self) -> list[int]:
        """Return the processes that compute."""
        children = psutil.Process(self.process.pid).children()
        largest = sorted(children, key=lambda child: child.memory_info().rss)[-2:]  # the only ones with torch
        return sorted(child.pid for child in largest)


@contextmanager
def served(options: list[str]) -> Iterator[Server]:
    command = [
        *(sys.executable, "-m", "headrace", "serve", "resnet18", "--http-port", "0", "--no-grpc", "--no-download"),
        *options,
    ]
    server = Server(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    threading.Thread(target=server.read, daemon=True).start()
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(END_S)
        except subprocess.TimeoutExpired:
            server.process.kill()


def fail_one(plan: Plan, folder: Path, clock: Clock) -> None:
    """Kill one engine under load over HTTP, and write down every request and what happened when."""
    folder.mkdir(parents=True, exist_ok=True)
    with served(plan.serve) as server:
        ready = server.when("ready: ", clock.left_s - 20)
        if ready is None:
            tell("failure: the server was not ready in time\n" + "\n".join(line for _, line in server.lines[-20:]))
            return
        address = re.search(r"http://([\d.]+):(\d+)/", ready[1])
        assert address is not None
        host, port = address.groups()
        spawn = multiprocessing.get_context("spawn")
        stop, records = spawn.Event(), spawn.Queue()
        clients = [
            spawn.Process(target=client_process, args=(host, int(port), plan.size, number, stop, records))
            for number in range(PROCESSES if plan.size > 64 else 1)
        ]
        for client in clients:
            client.start()
        time.sleep(BEFORE_S + 2.0)  # 2 s for the clients to start
        victim = server.engines()[0]
        end = os.pidfd_open(victim)
        killed_ns = time.monotonic_ns()
        os.kill(victim, signal.SIGKILL)
        select.select([end], [], [], 10)
        ended_ns = time.monotonic_ns()
        os.close(end)
        noticed = server.when(" ended (exit code", 10)
        again = server.when("ready again", clock.left_s - AFTER_S - END_S)
        time.sleep(AFTER_S if again else 1.0)
        stop.set()
        rows = [row for _ in clients for row in records.get(timeout=20)]
        for client in clients:
            client.join(10)
    events = {"killed_ns": killed_ns, "ended_ns": ended_ns, "noticed": noticed, "ready_again": again}
    write_failure(folder, rows, {**events, "lines": server.lines})


def write_failure(folder: Path, rows: list[tuple[int, int, int, int, str]], events: dict[str, object]) -> None:
    names = ("client", "sent_ns", "completed_ns", "status", "error")
    columns = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    pq.write_table(pa.table(columns), folder / "requests.parquet", compression="zstd")
    (folder / "events.json").write_text(json.dumps(events, indent=1) + "\n")


def client_process(host: str, port: int, size: int, number: int, stop: object, records: object) -> None:
    """Ask all the time from several threads, one row at a time. The target of a process."""
    generator = np.random.default_rng(number)
    tensor = generator.standard_normal((1, 3, size, size), np.float32)
    name = json.loads(get(host, port, "/v2/models/resnet18"))["inputs"][0]["name"]
    given = {"name": name, "shape": list(tensor.shape), "datatype": "FP32"}
    head = {
        "inputs": [{**given, "parameters": {"binary_data_size": tensor.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    head_bytes = json.dumps(head).encode()
    body = head_bytes + tensor.tobytes()
    rows: list[tuple[int, int, int, int, str]] = []

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=30)
        while not stop.is_set():  # type: ignore[attr-defined]
            sent_ns, status, error = time.monotonic_ns(), 0, ""
            try:
                connection.request("POST", "/v2/models/resnet18/infer", body, {HEADER: str(len(head_bytes))})
                answer = connection.getresponse()
                told = answer.read()
                status, error = answer.status, "" if answer.status == 200 else told.decode(errors="replace")[:200]
            except OSError as broken:
                error = f"{type(broken).__name__}: {broken}"
                connection.close()
            rows.append((client, sent_ns, time.monotonic_ns(), status, error))

    threads = [threading.Thread(target=ask, args=(number * THREADS + thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records.put(rows)  # type: ignore[attr-defined]


def get(host: str, port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", path)
    return connection.getresponse().read()


def report(folder: Path) -> str:
    """Return the report, computed from the records."""
    parts = ["# Two engines, one per GPU", *throughput_lines(folder / "runs")]
    if (folder / "failure" / "requests.parquet").exists():
        parts += failure_lines(folder / "failure")
    return "\n".join(parts) + "\n"


def throughput_lines(folder: Path) -> Iterator[str]:
    rates: dict[tuple[str, str], list[float]] = {}
    shares: dict[str, list[list[float]]] = {}
    for path in sorted(folder.glob("*/summary.json")):
        case, target, _ = path.parent.name.rsplit("-", 2)
        summary = json.loads(path.read_bytes())
        rates.setdefault((case, target), []).append(summary["metrics"]["throughput_samples_per_s"] or 0.0)
        if summary["engines"]:
            shares.setdefault(case, []).append([each["share"] for each in summary["engines"]])
    yield ""
    yield f"Batch {BATCH} over the ring, the data being there already; samples/s, median (all) of the repeats."
    yield ""
    yield "| case | target | samples/s | of the sum of the single ones |"
    yield "|---|---|---|---|"
    for (case, target), values in rates.items():
        singles = [statistics.median(each) for (of, name), each in rates.items() if of == case and name != "both"]
        whole = sum(singles) * (2 if len(singles) == 1 else 1)  # on the CPU there is one
        ratio = f"{statistics.median(values) / whole:.3f}" if target == "both" and whole else ""
        told = ", ".join(f"{value:,.0f}" for value in values)
        yield f"| {case} | {target} | {statistics.median(values):,.0f} ({told}) | {ratio} |"
    for case, each in shares.items():
        yield ""
        yield f"{case}: shares of the rows: " + "; ".join(" / ".join(f"{share:.3f}" for share in run) for run in each)


def failure_lines(folder: Path) -> Iterator[str]:
    table = pq.read_table(folder / "requests.parquet").to_pydict()
    events = json.loads((folder / "events.json").read_bytes())
    killed_ns, again = events["killed_ns"], events["ready_again"]
    completed = np.array(table["completed_ns"])
    status = np.array(table["status"])
    sent = np.array(table["sent_ns"])
    failed = status != 200
    after_s = (completed - killed_ns) / 1e9
    yield ""
    yield "## One engine killed under load, over HTTP"
    yield ""
    held = (sent < killed_ns) & (completed > killed_ns)
    yield f"- requests: {len(status):,}, of which {int(failed.sum())} were not answered well"
    yield f"- under way at the kill: {int(held.sum())}, of which {int((held & failed).sum())} were lost"
    yield f"- sent after the kill and lost: {int((failed & ~held).sum())}"
    if failed.any():
        told = np.sort(after_s[failed])
        yield f"- told after the kill: first {told[0] * 1e3:.0f} ms, last {told[-1] * 1e3:.0f} ms"
        reasons = sorted({error for error in table["error"] if error})
        yield f"- reasons: {'; '.join(reasons[:5])}"
    if "ended_ns" in events:
        yield f"- the engine's process was over {(events['ended_ns'] - killed_ns) / 1e6:.0f} ms after the kill"
    back_s = None if again is None else (again[0] - killed_ns) / 1e9
    yield f"- the engine was back after {'(not within the time)' if back_s is None else f'{back_s:.1f} s'}"
    yield ""
    yield f"| seconds after the kill | requests/s (in {BIN_S} s) | failed |"
    yield "|---|---|---|"
    bins = np.floor(after_s / BIN_S).astype(int)
    for number in range(max(bins.min(), -8), bins.max()):
        inside = bins == number
        yield f"| {number * BIN_S:.2f} | {(inside & ~failed).sum() / BIN_S:,.0f} | {int((inside & failed).sum())} |"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, metavar="DIR")
    parser.add_argument("--time-limit", type=float, default=220.0, metavar="S")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--report", type=Path, metavar="DIR", help="only write the report of these records")
    args = parser.parse_args()
    folder = args.report or args.output_dir
    if folder is None:
        parser.error("give --output-dir or --report")
    if args.report is None:
        folder.mkdir(parents=True, exist_ok=True)
        clock = Clock(args.time_limit)
        with tempfile.TemporaryDirectory(prefix="headrace-") as cache:
            plan = Plan.of(args.device, Path(cache))
            measure(plan, folder, clock)
            fail_one(plan, folder / "failure", clock)
    (folder / "report.md").write_text(report(folder))
    tell(str(folder / "report.md"))


if __name__ == "__main__":
    main()
