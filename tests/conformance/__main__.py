"""perf_analyzer, NVIDIA's load generator for KServe v2, against a real server on the CPU: `make conformance`.

It is the strictest client that there is: it asks for configuration and statistics before and after, registers shared
memory, compares every answer with the one it was told to expect, and ends where anything is missing.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.serving import Server

TIMEOUT_S = 60
MODEL = """
import torch

class Model(torch.nn.Module):
    def forward(self, values, ids):
        return {"doubled": values * 2, "sum": ids.sum(1)}

def build():
    return Model()

def example_inputs():
    return {"values": torch.zeros(2, 3), "ids": torch.zeros(2, 4, dtype=torch.int64)}
"""
EXPECTED = {
    "data": [{"values": [0.5, -1.0, 3.25], "ids": [1, 2, 3, 4]}],
    "validation_data": [{"doubled": [1.0, -2.0, 6.5], "sum": [10]}],
}
# Short windows, and any spread between them: what is asked here is whether it works, not how fast.
MEASURE = ("--measurement-interval", "400", "--stability-percentage", "999", "--max-trials", "3")
SHARED = ("--shared-memory", "system", "--output-shared-memory-size", "64")


@dataclass(frozen=True, slots=True)
class Combination:
    """One way to ask. Answers are compared where perf_analyzer can see them: not in shared memory."""

    name: str
    protocol: str
    options: tuple[str, ...]

    @property
    def is_compared(self) -> bool:
        return "--shared-memory" not in self.options


COMBINATIONS = (
    Combination("HTTP, waiting for each answer", "http", ("--sync",)),
    Combination("HTTP, asynchronous", "http", ("--async",)),
    Combination("HTTP, shared memory", "http", ("--async", *SHARED)),
    Combination("gRPC, waiting for each answer", "grpc", ("--sync",)),
    Combination("gRPC, asynchronous", "grpc", ("--async",)),
    Combination("gRPC, streams", "grpc", ("--async", "--streaming")),
    Combination("gRPC, shared memory", "grpc", ("--async", *SHARED)),
)


@dataclass(frozen=True, slots=True)
class PerfAnalyzer:
    """Where it was installed, by `pip install --target`."""

    folder: Path

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        libraries = self.folder / "nvidia/cuda_runtime/lib"
        return subprocess.run(
            [str(self.folder / "bin/perf_analyzer"), *options],
            capture_output=True,
            text=True,
            env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
            timeout=TIMEOUT_S,
            check=False,
        )

    def require(self) -> None:
        """Exit, saying how to install what is missing, if it cannot run here."""
        tried = self.run("--version")
        if tried.returncode:
            sys.exit(
                f"{tried.stderr.strip()}\nperf_analyzer cannot run: it needs libb64 (Debian: apt-get install libb64-0d)"
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    requests_per_s: float
    faults: tuple[str, ...]  # empty: it worked


def ask(combination: Combination, perf_analyzer: PerfAnalyzer, server: Server, folder: Path) -> Outcome:
    before = _counts(server)
    table = folder / "table.csv"
    table.unlink(missing_ok=True)
    data = ("--input-data", str(folder / "data.json")) if combination.is_compared else ()
    address = server.address if combination.protocol == "http" else server.grpc_address
    run = perf_analyzer.run(
        *("-m", "served", "-u", address, "-i", combination.protocol, "-b", "1", "--concurrency-range", "4"),
        *("-f", str(table), *MEASURE, *data, *combination.options),
    )
    after = _counts(server)
    rate = _rate(table)
    faults = []
    if run.returncode:
        faults.append(f"it ended with {run.returncode}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    if rate <= 0:
        faults.append("it reports no throughput")
    if after["fail"] != before["fail"]:
        faults.append(f"{after['fail'] - before['fail']} requests failed")
    if after["success"] == before["success"]:
        faults.append("the server answered no request")
    return Outcome(rate, tuple(faults))


def _counts(server: Server) -> dict[str, int]:
    told = json.loads(server.call("/v2/models/served/stats")[2])["model_stats"][0]["inference_stats"]
    return {name: told[name]["count"] for name in ("success", "fail")}


def _rate(table: Path) -> float:
    """Return requests per second, as perf_analyzer reports them; 0 where it reports nothing."""
    if not table.exists():
        return 0.0
    with table.open() as lines:
        return sum(float(row["Inferences/Second"]) for row in csv.DictReader(lines))


def main(installed: str) -> int:
    perf_analyzer = PerfAnalyzer(Path(installed).resolve())
    perf_analyzer.require()
    folder = Path(tempfile.mkdtemp(prefix="headrace-conformance-"))
    (folder / "data.json").write_text(json.dumps(EXPECTED))
    server = Server(folder, "--system-shared-memory", "--frontends", "2", "--queue-rows", "64", model=MODEL)
    faults = 0
    try:
        sys.stdout.write(f"{'perf_analyzer over':32} {'requests/s':>10}  answers\n")
        for combination in COMBINATIONS:
            outcome = ask(combination, perf_analyzer, server, folder)
            verdict = "; ".join(outcome.faults) or ("compared" if combination.is_compared else "counted")
            sys.stdout.write(f"{combination.name:32} {outcome.requests_per_s:10.0f}  {verdict}\n")
            sys.stdout.flush()
            faults += bool(outcome.faults)
    finally:
        code = server.stop()
        shutil.rmtree(folder)
    if code:
        sys.stdout.write(f"the server ended with {code}\n")
    return 1 if faults or code else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
