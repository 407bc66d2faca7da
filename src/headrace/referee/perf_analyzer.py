"""NVIDIA's perf_analyzer as another load generator: where it is, how it is called, and what it writes."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.config import LoadConfig, TargetConfig
from headrace.errors import InvalidOption, RunFailed
from headrace.referee.found import Found, Printed, Requests, of_requests

NAME = "perf_analyzer"
VERSION_S = 30.0
SLACK_S = 60.0  # beyond three times its windows, for its start and its end
WINDOWS = 3  # it reports after three windows that agree,
ANY_SPREAD = "1000000000"  # in percent: here any three do
WINDOW_SHARE = 1.2  # a window is so much longer than it is told to be (measured with 2.48)
MOST_EXPORTED = 300_000_000  # bytes: it writes the tensors of every request into its export, escaped
ESCAPED = 6  # bytes of the export for a byte of a tensor, at most
LEAST_EXPORTED = 12_000  # bytes of a request, answer and all
EXPORT, CSV, LOG, INTERVALS = "export.json", "report.csv", "log.txt", "intervals.txt"
REMEDY = (
    "pip install --no-deps --target DIR tritonclient==2.48.0 nvidia-cuda-runtime-cu12==12.9.79 and, on Debian,"
    " apt-get install libb64-0d; then name it with --perf-analyzer DIR/bin/perf_analyzer"
)


@dataclass(frozen=True, slots=True)
class PerfAnalyzer:
    """A binary that runs here."""

    binary: Path
    version: str

    def run(self, options: Sequence[str], folder: Path, limit_s: float) -> None:
        """Run it, its words in `LOG`. Raises RunFailed where it fails, or does not end in time."""
        with (folder / LOG).open("w") as log:
            try:
                status = subprocess.run(
                    [str(self.binary), *options],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env=_environ(self.binary),
                    timeout=limit_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise RunFailed(f"perf_analyzer did not end within {limit_s:g} s") from error
        lines = list(dict.fromkeys((folder / LOG).read_text(errors="replace").splitlines()))
        (folder / LOG).write_text("".join(f"{line}\n" for line in lines))  # it repeats a warning with every request
        if status or not (folder / CSV).exists():
            raise RunFailed(f"perf_analyzer ended with {status} and without a report: {' '.join(lines[-1:])[:200]}")


def find(given: Path | None) -> PerfAnalyzer:
    """Return perf_analyzer: the one given, or on PATH, or where `make conformance` puts it. Raises InvalidOption."""
    usual = Path(sys.prefix) / NAME / "bin" / NAME
    on_path = shutil.which(NAME)
    binary = given or (Path(on_path) if on_path else usual)
    if not binary.is_file():
        raise InvalidOption(f"perf_analyzer is not at {binary}: {REMEDY}")
    binary = binary.resolve()
    try:
        told = subprocess.run(
            [str(binary), "--version"],
            capture_output=True,
            text=True,
            env=_environ(binary),
            timeout=VERSION_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidOption(f"perf_analyzer cannot run ({error}): {REMEDY}") from error
    found = re.search(r"Version (\d[\d.]*)", told.stdout + told.stderr)
    if told.returncode or found is None:
        raise InvalidOption(f"perf_analyzer cannot run ({told.stderr.strip()[:200]}): {REMEDY}")
    return PerfAnalyzer(binary, found[1])


def _environ(binary: Path) -> dict[str, str]:
    """Add the CUDA runtime that lies beside a binary which pip installed."""
    libraries = binary.parent.parent / "nvidia/cuda_runtime/lib"
    before = os.environ.get("LD_LIBRARY_PATH")
    path = ":".join([str(libraries), *([before] if before else [])])
    return os.environ | {"LD_LIBRARY_PATH": path} if libraries.is_dir() else dict(os.environ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One measurement: the target under a load."""

    url: str
    target: TargetConfig
    load: LoadConfig
    samples: int  # rows of a request
    duration_s: float
    payload_bytes: float  # that it exports: inputs of float32 it leaves out
    requests: int  # about so many it will send
    wait: bool = False  # its default for HTTP: a thread waits for each answer

    @property
    def exports(self) -> bool:
        """Tell whether what it writes of each request stays within bounds."""
        return self.requests * (LEAST_EXPORTED + self.payload_bytes * ESCAPED) < MOST_EXPORTED


def options(asked: Asked, offsets_ns: Sequence[int] | None, folder: Path) -> list[str]:
    """Return its command line, and write the file of intervals that a plan becomes."""
    parts = urlsplit(asked.url)
    given = ["-m", asked.target.model, "-u", parts.netloc, "-i", parts.scheme, "-b", str(asked.samples)]
    given += ["--sync"] if asked.wait else ["--async"]
    if asked.target.version:
        given += ["-x", asked.target.version]
    for name, shape in asked.target.shapes.items():
        given += ["--shape", f"{name}:{','.join(map(str, shape[1:]))}"]
    if offsets_ns is None:
        given += ["--concurrency-range", str(asked.load.concurrency)]
    else:
        (folder / INTERVALS).write_text("".join(f"{gap}\n" for gap in intervals_us(offsets_ns)))
        given += ["--request-intervals", INTERVALS]
    window_ms = round(asked.duration_s * 1e3 / WINDOWS / WINDOW_SHARE)
    given += [
        "--measurement-interval",
        str(window_ms),
        "--max-trials",
        str(WINDOWS),
        "--stability-percentage",
        ANY_SPREAD,
    ]
    given += ["-f", CSV, "--verbose-csv"]
    return [*given, "--profile-export-file", EXPORT] if asked.exports else given


def intervals_us(offsets_ns: Sequence[int]) -> list[int]:
    """Return what comes before each arrival in whole microseconds: their sum is never more than one off the plan.

    The first one is what it waits before it begins.
    """
    moments = np.rint(np.asarray(offsets_ns, dtype=np.float64) / 1e3).astype(np.int64)
    gaps: list[int] = np.diff(moments).tolist()
    return [1, *gaps]


def measure(tool: str, found: PerfAnalyzer, asked: Asked, offsets_ns: Sequence[int] | None, folder: Path) -> Found:
    """Run it once into `folder`, and read what it wrote. Whatever goes wrong is the result's `error`."""
    folder.mkdir(parents=True)
    given = options(asked, offsets_ns, folder)
    facts = {"version": found.version, "command": " ".join([NAME, *given])}
    try:
        found.run(given, folder, 3 * asked.duration_s + SLACK_S)
        printed = read_csv((folder / CSV).read_text())
    except RunFailed as error:
        return Found(tool=tool, error=str(error), facts=facts)
    if not asked.exports:
        facts["note"] = "it would have written every request's tensors, too many: only what it prints is there"
        return Found(tool=tool, printed=printed, facts=facts)
    requests = read_export((folder / EXPORT).read_bytes(), asked.samples)
    (folder / EXPORT).unlink()  # mostly the tensors of every request; what is of use is kept
    pq.write_table(
        pa.table({"issued_ns": requests.issued, "completed_ns": requests.completed}), folder / "requests.parquet"
    )
    return of_requests(tool, requests, printed=printed, facts=facts)


def read_csv(text: str) -> Printed:
    """Read its report: one row, of microseconds. Raises RunFailed."""
    rows = list(csv.DictReader(text.splitlines()))
    try:
        (row,) = rows
        rate = float(row["Inferences/Second"])
        p50, p90, p99, mean = (float(row[f"{name} latency"]) / 1e6 for name in ("p50", "p90", "p99", "Avg"))
    except (ValueError, KeyError) as error:
        raise RunFailed(f"perf_analyzer's report cannot be read ({error})") from error
    return Printed(throughput=rate, p50=p50, p90=p90, p99=p99, mean=mean)


class _Request(msgspec.Struct):
    timestamp: int
    response_timestamps: list[int]


class _Experiment(msgspec.Struct):
    requests: list[_Request]


class _Export(msgspec.Struct):
    experiments: list[_Experiment]


def read_export(data: bytes, samples: int) -> Requests:
    """Read its export: when each request was sent, and answered. Raises RunFailed.

    Its tensors are raw bytes in quotes, which are not UTF-8; they are read as Latin-1, and left.
    """
    text = data.decode("latin-1")
    try:
        export = msgspec.json.decode(text, type=_Export)
    except msgspec.MsgspecError as error:
        raise RunFailed(f"perf_analyzer's export cannot be read ({error})") from error
    answered = [each for run in export.experiments for each in run.requests if each.response_timestamps]
    moments = np.asarray([(each.timestamp, each.response_timestamps[-1]) for each in answered], dtype=np.int64)
    moments = moments.reshape(-1, 2)[np.argsort(moments.reshape(-1, 2)[:, 0], kind="stable")]
    return Requests(moments[:, 0], moments[:, 1], None, samples)
