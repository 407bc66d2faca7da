"""What many connections cost `headrace serve`: throughput, latency and the frontends' memory, with a null model.

`python benchmarks/servers/connections.py --output DIR`; see the README beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from null_model import INPUTS, OUTPUTS
from settings import VARIABLE, Settings
from tree import Sample, Tree, cores

from headrace.bench import environment

HERE = Path(__file__).parent
DISTINCT = 64  # rows that take turns
BASE = 64  # connections that the others are compared with
POLL_S = 0.1
START_S = 60.0
PATH = "/v2/models/model/infer"
HEAD = (
    "| server | connections | requests/s | to that of 64 | requests per s of frontends' CPU time | to that of 64"
    " | frontends: ran + waited for a core | server's CPU of a request, us | p50 ms | p99 ms"
    " | frontends' RSS MiB | PSS MiB | PSS of a connection beyond 64, KiB | server's cores | busiest client process"
    " | others' cores | errors | checked, wrong |\n|" + "---|" * 17
)
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all frontends together, in bytes."""

    rss: int
    pss: int


@dataclass(frozen=True, slots=True)
class Started:
    """A server that has answered."""

    port: int
    tree: Tree
    frontends: tuple[psutil.Process, ...]

    def ran(self) -> Sample:
        """Return what the frontends have run."""
        return self._scheduled(0)

    def waited(self) -> Sample:
        """Return how long they had work and no core, as if it were CPU time."""
        return self._scheduled(1)

    def _scheduled(self, column: int) -> Sample:
        """Source: Linux, Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat; of every thread."""
        files = (path for each in self.frontends for path in Path(f"/proc/{each.pid}/task").glob("*/schedstat"))
        spent_ns = sum(int(path.read_text().split()[column]) for path in files)
        return Sample(time.perf_counter_ns(), len(self.frontends), 0, spent_ns / 1e9)

    def memory(self) -> Memory:
        found = [process.memory_full_info() for process in self.frontends]
        return Memory(sum(info.rss for info in found), sum(info.pss for info in found))


@contextmanager
def headrace(args: argparse.Namespace, log: Path) -> Iterator[Started]:
    """Start `headrace serve` with room for a request of each connection in either frontend."""
    rows = 1 << (max(args.connections) - 1).bit_length()
    command = [sys.executable, "-m", "headrace", "serve", f"{HERE / 'null_model.py'}:build", "--name", "model"]
    command += ["--device", "cpu", "--no-compile", "--no-grpc", "--http-port", "0", "--ring-socket", "off"]
    command += ["--frontends", str(args.frontends), "--queue-rows", str(rows), "--max-batch-size", "64"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    tree = Tree(process.pid)
    try:
        port = _port(process, log)
        yield Started(port, tree, _frontends(process.pid))
    finally:
        tree.end()


@contextmanager
def null(args: argparse.Namespace, log: Path) -> Iterator[Started]:
    """Start the server that answers without a look: what the client reaches with so many connections."""
    settings = Settings(
        port=_free_port(),
        model="",
        folder="",
        info_folder="",
        device="cpu",
        precision="float32",
        compile=False,
        compile_mode="",
        buckets=(1,),
        workers=1,
        frontends=args.frontends,
        delay_ms=0.0,
    )
    command = [sys.executable, str(HERE / "null_server.py")]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {VARIABLE: settings.to_json()}
        )
    tree = Tree(process.pid)
    try:
        until = time.monotonic() + START_S
        while len(tree.members()) < args.frontends or not _listens(settings.port):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"the null server is not ready: {log.read_text()}")
            time.sleep(POLL_S)
        yield Started(settings.port, tree, tuple(tree.members()))
    finally:
        tree.end()


SERVERS = {"headrace": headrace, "null": null}


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"ready: .*http://[\d.]+:(\d+)/", log.read_text())
        if found is not None:
            return int(found[1])
        time.sleep(POLL_S)
    sys.exit(f"the server is not ready: {log.read_text()}")


def _frontends(pid: int) -> tuple[psutil.Process, ...]:
    """Return the children that hold the listening socket: the backend, which has torch, is the largest of all."""
    children = [each for each in psutil.Process(pid).children() if "spawn_main" in " ".join(each.cmdline())]
    largest = max(children, key=lambda child: child.memory_info().rss)
    return tuple(child for child in children if child.pid != largest.pid)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def measure(args: argparse.Namespace, folder: Path, server: Started, connections: int) -> dict[str, object]:
    """Load a server over so many connections, and return what came of it; memory is of the window's middle."""
    before = os.getloadavg()[0]
    client = _load(args, folder, server, connections)
    samples, machine, ran, waited = [server.tree.sample()], [_machine()], [server.ran()], [server.waited()]
    middle = time.monotonic() + args.warmup + args.seconds / 2
    memory = None
    while client.poll() is None:
        time.sleep(POLL_S)
        samples.append(server.tree.sample())
        machine.append(_machine())
        ran.append(server.ran())
        waited.append(server.waited())
        if memory is None and time.monotonic() > middle:
            memory = server.memory()
    if client.returncode or memory is None:
        sys.exit(f"the client ended with {client.returncode}")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["path"], summary["headers"]
    window = summary["begin_ns"], summary["end_ns"]
    used, busy, running, waiting = (_cores(found, *window) for found in (samples, machine, ran, waited))
    facts = {
        "load_average": before,
        "frontends_rss_bytes": memory.rss,
        "frontends_pss_bytes": memory.pss,
        "server_cores": used,
        "other_cores": busy - used - sum(summary["client_cores"]),  # what the machine did beside this
        "cpu_us": 1e6 * used / summary["requests_per_s"],  # of the server, for a request
        "frontend_cores": running,
        "frontend_waited_cores": waiting,  # had work, and waited for a core that others had
        "per_frontend_core_s": summary["requests_per_s"] / running,
    }
    return facts | summary


def _cores(samples: list[Sample], begin_ns: int, end_ns: int) -> float:
    """Return how many cores were busy in the window; where a busy machine left us no samples there, in all the time."""
    found = cores(samples, begin_ns, end_ns)
    found = cores(samples, samples[0].at_ns, samples[-1].at_ns) if found is None else found
    assert found is not None
    return found


def _machine() -> Sample:
    """Return the CPU time of the whole machine, as if it were one process."""
    times = psutil.cpu_times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return Sample(time.perf_counter_ns(), 1, 0, busy_s)


def _visit(args: argparse.Namespace, folder: Path, raw: Path, heading: Record) -> None:
    """Start a server, go up through the numbers of connections and down again, and write a line for each load."""
    with SERVERS[heading["server"]](args, folder / "server.log") as server:
        for way, order in (("up", sorted(args.connections)), ("down", sorted(args.connections, reverse=True))):
            for connections in order:
                record = {**heading, "way": way} | measure(args, folder, server, connections)
                with raw.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                sys.stderr.write(f"{record['server']}, {connections} connections: {record['requests_per_s']:.0f}/s\n")


def _load(args: argparse.Namespace, folder: Path, server: Started, connections: int) -> subprocess.Popen[bytes]:
    options = {
        "port": server.port,
        "path": PATH,
        "header": "Inference-Header-Content-Length: 0",
        "inputs": folder / "inputs.npy",
        "expected": folder / "expected.npy",
        "connections": connections,
        "client-processes": args.client_processes,
        "warmup": args.warmup,
        "seconds": args.seconds,
        "check-every": 0 if len(server.frontends) == len(server.tree.members()) else 100,
        "json": folder / "summary.json",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "load.py"), *(f"--{key}={value}" for key, value in options.items())]
    )


def table(records: Sequence[Record]) -> str:
    """Return Markdown: medians over all loads, with the least and the most of what is read as a ratio.

    Ratios are taken within a repeat, whose loads went up and down, so that what drifts meanwhile falls out.
    """
    lines = []
    for name in dict.fromkeys(record["server"] for record in records):
        of_server = [record for record in records if record["server"] == name]
        counts = sorted({record["connections"] for record in of_server})
        lines += [_line(name, count, of_server) for count in counts]
    return "\n".join([HEAD, *lines]) + "\n"


def _line(name: str, connections: int, records: Sequence[Record]) -> str:
    found = [record for record in records if record["connections"] == connections]
    cells = [
        name,
        str(connections),
        f"{_median(found, 'requests_per_s'):,.0f}",
        _ratios(records, connections, "requests_per_s"),
        f"{_median(found, 'per_frontend_core_s'):,.0f}",
        _ratios(records, connections, "per_frontend_core_s"),
        f"{_median(found, 'frontend_cores'):.2f} + {_median(found, 'frontend_waited_cores'):.2f}",
        f"{_median(found, 'cpu_us'):.1f}",
        f"{_median(found, 'p50_ms'):.2f}",
        f"{_median(found, 'p99_ms'):.2f}",
        f"{_median(found, 'frontends_rss_bytes') / 2**20:.1f}",
        f"{_median(found, 'frontends_pss_bytes') / 2**20:.1f}",
        _growth(records, connections),
        f"{_median(found, 'server_cores'):.2f}",
        f"{max(max(record['client_cores']) for record in found):.2f}",
        f"{_median(found, 'other_cores'):.2f}",
        str(sum(sum(record["errors"].values()) for record in found)),
        f"{sum(record['checked'] for record in found)}, {sum(record['wrong'] for record in found)}",
    ]
    return f"| {' | '.join(cells)} |"


def _ratios(records: Sequence[Record], connections: int, key: str) -> str:
    """Return how a number compares with the base's of the same repeat: median, least, most."""
    found = [
        _mean(records, repeat, connections, key) / _mean(records, repeat, BASE, key)
        for repeat in sorted({record["repeat"] for record in records})
    ]
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def _mean(records: Sequence[Record], repeat: int, connections: int, key: str) -> float:
    wanted = (repeat, connections)
    return statistics.mean(record[key] for record in records if (record["repeat"], record["connections"]) == wanted)


def _growth(records: Sequence[Record], connections: int) -> str:
    """Return by how much a connection more than the base's made memory grow, on a server's way up, in KiB."""
    if connections <= BASE:
        return ""
    up = [record for record in records if record["way"] == "up"]
    found = [
        (_mean(up, repeat, connections, "frontends_pss_bytes") - _mean(up, repeat, BASE, "frontends_pss_bytes"))
        / (connections - BASE)
        / 1024
        for repeat in sorted({record["repeat"] for record in up})
    ]
    return f"{statistics.median(found):.1f}"


def _median(records: Sequence[Record], key: str) -> float:
    return statistics.median(record[key] for record in records)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Measure what many connections cost the server.")
    add = found.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="raw results and the table go there")
    add("--servers", nargs="+", choices=sorted(SERVERS), default=["headrace", "null"])
    add("--connections", type=int, nargs="+", default=[1, 64, 256, 1000], metavar="N")
    add("--frontends", type=int, default=max(1, min(8, len(os.sched_getaffinity(0)) // 2)), metavar="N")
    add("--client-processes", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)) // 4)), metavar="N")
    add("--repeats", type=int, default=5, metavar="N", help="a server is started for each")
    add("--seconds", type=float, default=3.0, metavar="S", help="measured, of each load")
    add("--warmup", type=float, default=1.0, metavar="S", help="before it, of the same load")
    return found


def main() -> None:
    args = parser().parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    raw = args.output / "cells.jsonl"
    if raw.exists():
        sys.exit(f"{args.output} holds results already; choose another folder")
    command = [re.sub(r"[^=]*/", "", arg) for arg in sys.argv]  # published, without this machine's paths
    described = {
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "frontends": args.frontends,
        "client_processes": args.client_processes,
        "load_average": os.getloadavg(),
        "environment": asdict(environment.collect(None)),
    }
    (args.output / "environment.json").write_text(json.dumps(described, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = np.random.default_rng(0).standard_normal((DISTINCT, INPUTS)).astype(np.float32)
        np.save(folder / "inputs.npy", inputs)
        np.save(folder / "expected.npy", inputs[:, :OUTPUTS] * 2)
        for repeat in range(args.repeats):
            for name in args.servers:
                _visit(args, folder, raw, {"repeat": repeat, "server": name})
    records = [json.loads(line) for line in raw.read_text().splitlines()]
    (args.output / "table.md").write_text(table(records))


if __name__ == "__main__":
    main()
