"""Load HTTP inference servers one after the other, with the same model, the same client and the same machine.

`python benchmarks/servers/compare.py --servers headrace litserve mosec --output DIR`; see the README beside this file.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from catalog import SERVERS, Server
from load import largest_error
from settings import VARIABLE, Settings
from tree import Sample, Tree, cores

import report
from headrace import nvml
from headrace.bench import environment
from headrace.bench.answers import tolerance

HERE = Path(__file__).parent
POLL_S = 0.2
OVERHEAD_S = 3.0  # of a cell, beside its warm-up and window: the client's start, payloads, the last answers
STOP_S = 8.0  # for the last server to end
START_S = 15.0  # reserved for a server to start
SLACK_S = 10.0  # of a client, beyond which it hangs
PROBE_S = 60.0  # for the first answer
LOG_CHARACTERS = 2000
ASK_VERSIONS = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


class StartFailedError(Exception):
    """A server was not ready in time, or ended, or gave a wrong answer."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One load."""

    rows: int
    connections: int


@dataclass(frozen=True, slots=True)
class Visit:
    """One server, started once."""

    repeat: int
    server: Server
    settings: Settings


@dataclass(frozen=True, slots=True)
class Bench:
    """What all visits share."""

    args: argparse.Namespace
    work: Path
    tolerance: float
    deadline_s: float  # time.monotonic

    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def until(self, visits: int, loads: int) -> float:
        """Return when the next of so many visits must be over: the others keep their time, or an equal share of it."""
        reserved_s = (visits - 1) * (START_S + STOP_S + loads * self.cell_s)
        return time.monotonic() + max(self.left_s() - reserved_s, self.left_s() / visits)

    @property
    def cell_s(self) -> float:
        return float(self.args.warmup + self.args.seconds + OVERHEAD_S)

    def python(self, server: Server) -> str:
        return str(self.args.python.get(server.name, sys.executable))

    def log(self, visit: Visit) -> Path:
        """Return where a server's own words go."""
        return self.work / f"r{visit.repeat}-{visit.server.name}.log"

    def write(self, record: Mapping[str, object]) -> None:
        """Append a line to the raw results, and say on the screen what it is."""
        with (self.args.output / "cells.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        sys.stderr.write(report.one_line(record) + "\n")


def run(bench: Bench) -> None:
    """Visit every server, `repeats` times, in turning order; what does not fit the deadline is skipped and said."""
    visits = planned(bench)
    for number, visit in enumerate(visits):
        pending = list(cells(bench.args))
        until = bench.until(len(visits) - number, len(pending))
        try:
            with started(bench, visit, until) as server:
                while pending and until - time.monotonic() > bench.cell_s:
                    server.measure(pending[0])
                    pending.pop(0)
            reason = "no time left for it before the deadline"
        except StartFailedError as failure:
            reason = str(failure)
        for cell in pending:
            bench.write(heading(visit) | asdict(cell) | {"status": "skipped", "reason": reason})


def planned(bench: Bench) -> list[Visit]:
    """Return the visits in order: every other repeat goes backwards, so that none is always first."""
    visits = []
    for repeat in range(bench.args.repeats):
        names = bench.args.servers if repeat % 2 == 0 else bench.args.servers[::-1]
        visits += [Visit(repeat, SERVERS[name], settings_of(bench, SERVERS[name])) for name in names]
    return visits


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    yield from (Cell(1, connections) for connections in args.connections)
    yield from (Cell(args.large_rows, connections) for connections in args.large_connections)


def heading(visit: Visit) -> dict[str, object]:
    return {"server": visit.server.name, "repeat": visit.repeat}


def settings_of(bench: Bench, server: Server) -> Settings:
    """Return the catalog's numbers, scaled down to this machine, or what `--set` says instead."""
    args = bench.args
    cpus = len(os.sched_getaffinity(0))
    on_cpu = args.device == "cpu"
    settings = Settings(
        port=_free_port(),
        model=args.model,
        folder=str(bench.work),
        info_folder="",
        device=args.device,
        precision=args.precision,
        compile=args.compile,
        compile_mode=args.compile_mode,
        buckets=tuple(args.buckets),
        workers=1 if on_cpu else server.workers,
        frontends=min(server.frontends * args.engines, max(1, cpus // 2)),
        delay_ms=server.delay_ms,
        engines=args.engines,
    )
    changes = {key: value for (name, key), value in args.set.items() if name == server.name}
    return replace(settings, **changes)


class Running:
    """A server that is ready."""

    def __init__(self, bench: Bench, visit: Visit, tree: Tree) -> None:
        self._bench = bench
        self._visit = visit
        self._tree = tree

    def measure(self, cell: Cell) -> None:
        """Load it, and write what came of it."""
        bench, visit, args = self._bench, self._visit, self._bench.args
        name = f"r{visit.repeat}-{visit.server.name}-rows{cell.rows}-c{cell.connections}"
        summary_path, raw_path = bench.work / f"{name}.json", args.output / "requests" / f"{name}.npz"
        command = [sys.executable, str(HERE / "load.py"), *self._options(cell)]
        command += ["--json", str(summary_path), "--raw", str(raw_path)]
        began = os.getloadavg()[0]
        limit_s = min(args.warmup + args.seconds + args.drain + SLACK_S, bench.left_s())
        until = time.monotonic() + limit_s
        client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        samples = [self._tree.sample()]
        while client.poll() is None and time.monotonic() < until:
            time.sleep(POLL_S)
            samples.append(self._tree.sample())
        if client.poll() is None:
            os.killpg(client.pid, signal.SIGKILL)
            client.wait()
        record = heading(visit) | asdict(cell) | {"load_average": began}
        if client.returncode:
            said = client.stderr.read().strip() if client.stderr else ""
            said = said or f"the client ended with {client.returncode}"
            bench.write(record | {"status": "failed", "reason": said[-LOG_CHARACTERS:]})
            return
        summary = json.loads(summary_path.read_text())
        bench.write(record | {"status": "measured"} | summary | self._used(samples, summary))

    def _options(self, cell: Cell) -> list[str]:
        bench, server = self._bench, self._visit.server
        args = bench.args
        given: dict[str, object] = {
            "port": self._visit.settings.port,
            "path": server.path,
            "inputs": bench.work / "inputs.npy",
            "expected": bench.work / "expected.npy",
            "tolerance": bench.tolerance,
            "rows": cell.rows,
            "connections": cell.connections,
            "warmup": args.warmup,
            "seconds": args.seconds,
            "client-processes": args.client_processes,
            "drain": args.drain,
        }
        if server.is_null:
            given["check-every"] = 0
        options = [f"--{key}={value}" for key, value in given.items()]
        options.append(f"--body-prefix={server.prefix(cell.rows)}")
        return options + [f"--header={header}" for header in server.headers_for(cell.rows)]

    def _used(self, samples: list[Sample], summary: Mapping[str, int]) -> dict[str, object]:
        return {
            "processes": samples[-1].processes,
            "rss_bytes": max(sample.rss_bytes for sample in samples),
            "pss_bytes": self._tree.pss_bytes(),
            "server_cores": cores(samples, summary["begin_ns"], summary["end_ns"]),
        }


@contextmanager
def started(bench: Bench, visit: Visit, until: float) -> Iterator[Running]:
    """Start a server, give it once it has answered rightly, and end all of its processes. Raises StartFailedError."""
    server = visit.server
    if until - time.monotonic() < bench.cell_s:
        raise StartFailedError("no time left for it before the deadline")
    with _folder() as temporary, _folder() as info_folder:
        settings = replace(visit.settings, info_folder=info_folder)
        environ = dict(os.environ) | server.environment | {VARIABLE: settings.to_json()}
        environ["TMPDIR"] = temporary
        environ["TORCHINDUCTOR_CACHE_DIR"] = str(bench.work / "inductor-cache")
        log = bench.log(visit)
        began = time.monotonic()
        command = server.command(bench.python(server), settings)
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, cwd=bench.work)
        tree = Tree(process.pid)
        try:
            timeout_s = min(bench.args.start_timeout, until - began - bench.cell_s)
            try:
                told = _wait_until_ready(bench, replace(visit, settings=settings), process, timeout_s)
            except StartFailedError as failure:
                raise StartFailedError(f"{failure}; its last words: {log.read_text()[-LOG_CHARACTERS:]}") from failure
            facts = {"status": "ready", "ready_s": time.monotonic() - began, "workers_said": told}
            bench.write(heading(visit) | facts)
            yield Running(bench, visit, tree)
        finally:
            tree.end()


def _wait_until_ready(
    bench: Bench, visit: Visit, process: subprocess.Popen[bytes], timeout_s: float
) -> list[dict[str, object]]:
    """Return what its workers told, when all have and one answer was right. Raises StartFailedError."""
    until = time.monotonic() + timeout_s
    info = Path(visit.settings.info_folder)
    wanted = visit.settings.engines * visit.settings.workers if visit.server.tells else 0
    why = f"{wanted} workers were to be warm"
    while time.monotonic() < until:
        if process.poll() is not None:
            raise StartFailedError(f"it ended with {process.returncode}")
        if len(list(info.glob("*.json"))) >= wanted and visit.server.says in bench.log(visit).read_text():
            why = _probe(bench, visit)
            if not why:
                time.sleep(POLL_S)
                return [json.loads(path.read_text()) for path in sorted(info.glob("*.json"))]
        time.sleep(POLL_S)
    raise StartFailedError(f"not ready after {timeout_s:.0f} s ({why})")


def _probe(bench: Bench, visit: Visit) -> str:
    """Return what is wrong with an answer to one row; empty if nothing is."""
    rows = np.load(bench.work / "inputs.npy", mmap_mode="r")
    expected = np.load(bench.work / "expected.npy")
    headers = dict(header.split(": ", 1) for header in visit.server.headers_for(1))
    body = visit.server.prefix(1).encode() + rows[0].tobytes()
    connection = http.client.HTTPConnection("127.0.0.1", visit.settings.port, timeout=PROBE_S)
    try:
        connection.request("POST", visit.server.path, body, headers | {"Content-Type": "application/octet-stream"})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    if response.status != http.client.OK:
        return f"status {response.status}: {answer[:200]!r}"
    if visit.server.is_null:
        return ""
    found = np.frombuffer(answer[-expected[0].nbytes :], np.float32)
    if found.size != expected[0].size:
        return f"an answer of {len(answer)} bytes"
    error = largest_error(found, expected[0])
    return "" if error <= bench.tolerance else f"a wrong answer, off by {error:.2g}"


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # a server may still be tidying up there


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def describe(bench: Bench, command: Sequence[str]) -> dict[str, object]:
    """Return where and how the comparison runs, with each server's versions and settings."""
    gpu = nvml.open_gpu(0) if bench.args.device == "cuda" else None
    servers = {}
    for name in bench.args.servers:
        server = SERVERS[name]
        asked = [bench.python(server), "-c", ASK_VERSIONS, *server.packages]
        versions = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
        settings = asdict(settings_of(bench, server))
        for place in ("port", "folder", "info_folder"):
            del settings[place]
        servers[name] = {"versions": versions, "settings": settings, "environment": server.environment}
    return {
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": list(command),
        "tolerance": bench.tolerance,
        "load_average": os.getloadavg(),
        "servers": servers,
        "environment": asdict(environment.collect(gpu)),
    }


def _python(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text}: give SERVER=PATH")
    # A link's own name matters: a virtual environment's python is a link to the one that it was made from.
    return name, str(Path(path).absolute())


def _setting(text: str) -> tuple[tuple[str, str], float]:
    where, _, value = text.partition("=")
    name, _, key = where.partition(".")
    kinds = {"workers": int, "frontends": int, "delay_ms": float}
    if name not in SERVERS or key not in kinds or not value:
        raise argparse.ArgumentTypeError(f"{text}: give SERVER.KEY=NUMBER, KEY one of {', '.join(kinds)}")
    return (name, key), kinds[key](value)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="Compare HTTP inference servers.")
    add = found.add_argument
    add("--servers", nargs="+", choices=sorted(SERVERS), default=["headrace", "litserve", "mosec"])
    add("--output", type=Path, required=True, metavar="DIR", help="raw results and the table go there")
    add("--work", type=Path, metavar="DIR", help="keeps weights, compiled code and logs (default: a temporary folder)")
    add("--python", nargs="+", type=_python, default=[], metavar="SERVER=PATH", help="its interpreter (default: ours)")
    setting = "workers, frontends or delay_ms; what is set again, counts"
    add("--set", nargs="+", action="extend", type=_setting, default=[], metavar="SERVER.KEY=N", help=setting)
    add("--model", choices=("resnet18", "tiny"), default="resnet18")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--engines", type=int, default=1, metavar="N", help="one on each of so many GPUs; on the CPU, so many")
    add("--precision", choices=("float32", "tf32", "bf16", "fp16"), default="float32")
    add("--compile", action=argparse.BooleanOptionalAction, default=False)
    add("--compile-mode", default="default", help="of torch.compile, where a script of ours calls it")
    add("--buckets", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], metavar="ROWS")
    add("--connections", type=int, nargs="*", default=[1, 8, 64, 128, 256], metavar="N", help="requests of one row")
    add("--large-connections", type=int, nargs="*", default=[8, 32], metavar="N", help="requests of many rows")
    add("--large-rows", type=int, default=32, metavar="ROWS")
    add("--seconds", type=float, default=5.0, metavar="S", help="measured, of each load")
    add("--warmup", type=float, default=1.0, metavar="S", help="before it, of the same load")
    add("--drain", type=float, default=5.0, metavar="S", help="after it, for what is under way")
    add("--repeats", type=int, default=1, metavar="N")
    add("--client-processes", type=int, default=max(1, min(8, len(os.sched_getaffinity(0)) // 2)), metavar="N")
    add("--start-timeout", type=float, default=180.0, metavar="S")
    add("--deadline", type=float, default=3600.0, metavar="S", help="the whole comparison ends before")
    return found


def main() -> None:
    args = parser().parse_args()
    args.python, args.set = dict(args.python), dict(args.set)
    began = time.monotonic()
    if args.engines > 1 and (lone := [name for name in args.servers if not SERVERS[name].spreads]):
        sys.exit(f"--engines {args.engines}: {', '.join(lone)} would use one GPU; leave them out")
    (args.output / "requests").mkdir(parents=True, exist_ok=True)
    if (args.output / "cells.jsonl").exists():
        sys.exit(f"{args.output} holds results already; choose another folder")
    if paths := os.environ.get("PYTHONPATH"):  # servers run in a folder of their own
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(path).absolute()) for path in paths.split(os.pathsep))
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        prepare = [sys.executable, str(HERE / "prepare.py"), "--model", args.model, "--folder", str(work)]
        subprocess.run(prepare, check=True)
        allowed = tolerance(args.device, args.precision, compiled=args.compile)
        bench = Bench(args, work, allowed, began + args.deadline - STOP_S)
        command = [
            re.sub(r"[^=]*/", "", arg) for arg in sys.argv
        ]  # results are published, without this machine's paths
        (args.output / "environment.json").write_text(json.dumps(describe(bench, command), indent=1) + "\n")
        run(bench)
    (args.output / "table.md").write_text(report.table(args.output))


if __name__ == "__main__":
    main()
