"""One run of a search, reduced to what decides whether its rate holds: read from its folder, and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from headrace.bench import validity
from headrace.bench.correlation import correlation_time
from headrace.bench.record import STATUSES, Records, measured, read_records
from headrace.bench.steady import is_steady
from headrace.bench.summary import RunSummary, load_summary
from headrace.clock import NS_PER_S
from headrace.config import LoadConfig, RunConfig
from headrace.errors import OutputError

TRIALS = "trials"  # in a search's folder
RECORDS = "requests.parquet"
LATE_S = 1e-3  # an issue delay beyond this,
LATE_SHARE = 0.05  # and beyond this share of the bound, is no plan that was kept
FULL = 0.9  # of the requests that can be in flight: who is late then waited for the server
LEAST_FOR_CORRELATION = 4

Kind = Literal["alone", "saturated", "rate", "level", "final"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLOSED: tuple[Kind, ...] = ("alone", "saturated")  # the others are sent by a plan
_NAME = re.compile(rf"(\d+)-({'|'.join(KINDS)})(-\S+)?")

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run: its measured requests. `failed` are errors, wrong answers and none at all."""

    name: str  # of its folder
    kind: Kind
    rate: float  # requests/s: planned, and of a closed loop measured
    seed: int
    rows: int  # of a request
    response_s: Seconds  # of the answered requests, in the order of the plan
    window_s: float = 0.0  # last answer - first planned sending
    failed: int = 0
    refused: int = 0  # shed
    unsteady: str = ""  # why it was not steady
    late: str = ""  # how the client did not keep its plan
    error: str = ""  # why the run does not count

    @property
    def requests(self) -> int:
        return len(self.response_s) + self.failed + self.refused

    def beyond(self, bound_s: float) -> int:
        """Return how many were answered after the bound."""
        return int((self.response_s > bound_s).sum())

    def goodput(self, bound_s: float) -> float:
        """Return the samples/s that were answered within the bound."""
        within = len(self.response_s) - self.beyond(bound_s)
        return within * self.rows / self.window_s if self.window_s else 0.0

    def worth(self, bound_s: float) -> float:
        """Return how many independent requests would say as much about the share beyond the bound.

        By how far response times depend on each other, or those beyond the bound if that is more.
        """
        count = len(self.response_s)
        if count < LEAST_FOR_CORRELATION:
            return float(min(count, 1))
        beyond = (self.response_s > bound_s).astype(np.float64)
        return count / max(correlation_time(self.response_s), correlation_time(beyond))


def trial_name(number: int, kind: Kind, detail: str = "") -> str:
    """Name a trial's folder. Numbers give the order."""
    return f"{number:03d}-{kind}" + (f"-{detail}" if detail else "")


def read_trials(folder: Path, bound_s: float) -> tuple[Trial, ...]:
    """Read every trial of a search's folder, in order. Raises OutputError for one that cannot be read."""
    found = sorted(path for path in (folder / TRIALS).glob("*") if _NAME.fullmatch(path.name))
    return tuple(read_trial(path, bound_s) for path in found)


def read_trial(folder: Path, bound_s: float) -> Trial:
    """Read a run's folder. Raises OutputError where it is none, or is named as no trial is."""
    matched = _NAME.fullmatch(folder.name)
    if matched is None:
        raise OutputError(f"{folder}: is not named as a trial of a search; name a folder under {TRIALS}/")
    summary = load_summary(folder)
    try:
        records = measured(read_records(folder / RECORDS))
    except (OSError, ValueError) as error:  # pyarrow's errors of damaged files are ValueErrors
        raise OutputError(f"{folder / RECORDS}: cannot be read ({error}); search again") from error
    return of_records(folder.name, summary, records, bound_s)


def of_records(name: str, summary: RunSummary, records: Records, bound_s: float) -> Trial:
    """Return the trial of a run's measured requests."""
    matched = _NAME.fullmatch(name)
    assert matched is not None
    kind = next(each for each in KINDS if each == matched[2])
    records = records[np.argsort(records["scheduled_ns"], kind="stable")]
    right = records[records["status"] == STATUSES.index("ok")]
    refused = int((records["status"] == STATUSES.index("shed")).sum())
    response_ns = right["completed_ns"] - right["scheduled_ns"]
    open_loop = kind not in CLOSED
    load = summary.options.load
    window_s = int(right["completed_ns"].max() - right["scheduled_ns"].min()) / NS_PER_S if len(right) else 0.0
    return Trial(
        name=name,
        kind=kind,
        rate=float(load.rate or 0) if open_loop else len(right) / window_s if window_s else 0.0,
        seed=load.seed,
        rows=int(right["rows"][0]) if len(right) else summary.options.inputs.batch_size,
        response_s=response_ns / NS_PER_S,
        window_s=window_s,
        failed=len(records) - len(right) - refused,
        refused=refused,
        unsteady=_unsteady(records, right, load) if open_loop else "",
        late=_late(records, bound_s, most_in_flight(summary.options)) if open_loop else "",
        error=summary.error or "",
    )


def most_in_flight(options: RunConfig) -> int | None:
    """Return how many requests the client can have in flight; None where nothing but the machine says."""
    if options.target is not None:
        return options.target.connections if not options.target.over_grpc else None
    return options.transport.ring_slots if options.transport.name == "ring" else None


def _unsteady(records: Records, right: Records, load: LoadConfig) -> str:
    """Say why the backlog grew, by the response times, and as any run is judged where these are too few."""
    judged = is_steady(right["scheduled_ns"], right["completed_ns"] - right["scheduled_ns"])
    if judged.steady is False:
        return judged.reason
    return validity.judge(records, load).verdict.overload


def _late(records: Records, bound_s: float, limit: int | None) -> str:
    """Say how late the client sent what it had room to send."""
    sent = records[records["issued_ns"] > 0]
    if not len(sent):
        return ""
    delay_s = (sent["issued_ns"] - sent["scheduled_ns"]) / NS_PER_S
    own = delay_s if limit is None else np.where(_had_no_room(sent, limit), 0.0, delay_s)
    p99, allowed = float(np.percentile(own, 99)), max(LATE_S, LATE_SHARE * bound_s)
    if p99 <= allowed:
        return ""
    return f"the client sent late: p99 of the issue delay is {p99 * 1e3:.3g} ms, {allowed * 1e3:.3g} ms are allowed"


def _had_no_room(sent: Records, limit: int) -> npt.NDArray[np.bool_]:
    """Tell which requests met as many in flight as there can be, at some time from when they were due until sent."""
    order = np.argsort(sent["issued_ns"], kind="stable")
    issued, numbers = sent["issued_ns"][order], np.arange(len(sent))
    ended = np.sort(sent["completed_ns"][sent["completed_ns"] > 0])
    in_flight = numbers + 1 - np.searchsorted(ended, issued, side="right")
    last_full = np.maximum.accumulate(np.where(in_flight >= FULL * limit, numbers, -1))
    due = np.searchsorted(issued, sent["scheduled_ns"][order], side="left")
    met: npt.NDArray[np.bool_] = np.empty(len(sent), dtype=bool)
    met[order] = last_full >= due
    return met


def pooled(trials: Sequence[Trial]) -> Seconds:
    """Return the response times of all trials together."""
    return np.concatenate([trial.response_s for trial in trials]) if trials else np.empty(0)
