"""Run folders as a report takes them in: found, read whole, and refused by name where a file is damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.bench.record import RECORD_DTYPE, Records, read_records
from headrace.bench.summary import FILE_NAME, RunSummary, load_summary
from headrace.config import LoadConfig
from headrace.errors import OutputError

RECORDS_NAME = "requests.parquet"
TELEMETRY_NAME = "telemetry.parquet"
LATER_COLUMNS = ("batch_rows", "generator")  # which records of older versions lack
BURST = "burst"
WITHOUT_PLAN = (BURST, "closed")  # loads whose next request waits for room or for an answer

Content = TypeVar("Content")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """A summary's metrics as they are written: versions differ in which they have."""

    metrics: dict[str, object] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run's folder, and what its summary says. `name` is relative to what the user named."""

    name: str
    folder: Path
    summary: RunSummary
    facts: Facts

    @property
    def load(self) -> LoadConfig:
        return self.summary.options.load


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A run that is in no table and no plot, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Polled samples. Each array is float64 [samples], NaN where the machine did not say."""

    at_ns: npt.NDArray[np.int64]
    gpu_pct: npt.NDArray[np.float64]
    cpu_pct: npt.NDArray[np.float64]
    power_w: npt.NDArray[np.float64]


def find_folders(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return name and folder of every run at or below `paths`, each once, by name. Raises OutputError for none."""
    found: dict[Path, str] = {}
    for path in paths:
        below = sorted({file.parent for name in (FILE_NAME, RECORDS_NAME) for file in path.rglob(name)})
        if not below:
            raise OutputError(
                f"{path}: no finished run there; name the folder of a run (it holds {FILE_NAME} and {RECORDS_NAME}),"
                " of a sweep, or of several"
            )
        for folder in below:
            name = folder.relative_to(path).as_posix() if folder != path else folder.resolve().name
            found.setdefault(folder.resolve(), name)
    return sorted((name, folder) for folder, name in found.items())


def read_run(name: str, folder: Path) -> Run:
    """Read a run's summary. Raises OutputError."""
    summary = load_summary(folder)
    path = folder / FILE_NAME
    try:
        facts = msgspec.json.decode(path.read_bytes(), type=Facts)
    except msgspec.MsgspecError as error:
        raise OutputError(f"{path}: has metrics that no report understands ({error}); measure again") from error
    return Run(name=name, folder=folder, summary=summary, facts=facts)


def records_of(run: Run) -> Records:
    """Read a run's records. Raises OutputError where they are missing, damaged, or lack a column."""
    path = run.folder / RECORDS_NAME
    expected = set(RECORD_DTYPE.names or ()) - set(LATER_COLUMNS)
    missing = expected - set(_parquet(path, pq.read_schema).names)
    if missing:
        raise OutputError(f"{path}: has no column {', '.join(sorted(missing))}; measure the run again")
    return _parquet(path, read_records)


def telemetry_of(run: Run) -> Telemetry | None:
    """Read a run's samples; None where it has none. Raises OutputError where they are damaged."""
    path = run.folder / TELEMETRY_NAME
    if not path.is_file():
        return None
    table = _parquet(path, pq.read_table)

    def column(name: str) -> npt.NDArray[np.float64]:
        if name not in table.column_names:
            return np.full(table.num_rows, np.nan)
        values: npt.NDArray[np.float64] = table.column(name).cast(pa.float64()).to_numpy()
        return values

    at_ns = table.column("at_ns").to_numpy() if "at_ns" in table.column_names else np.empty(0, np.int64)
    names = ("gpu_utilization_pct", "cpu_utilization_pct", "power_w")
    return Telemetry(at_ns, *(column(name) for name in names)) if len(at_ns) else None


def _parquet(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        return read(path)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        line = str(error).partition("\n")[0]
        raise OutputError(
            f"{path}: cannot be read as Parquet ({line}); copy it again from where the run was made, or measure the run"
            " again"
        ) from error
