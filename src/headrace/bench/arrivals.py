"""When requests are due: a plan that is made before the clock starts, and that nothing changes afterwards.

A rate is a rate: how many requests fall into a duration is the Poisson process's affair, and intervals are never
rescaled to a count. Times are offsets from the start of the measured phase, in nanoseconds, ascending.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from headrace.clock import NS_PER_S
from headrace.config import LoadConfig
from headrace.errors import InvalidOption

Offsets = npt.NDArray[np.int64]
MOST_REQUESTS = 50_000_000  # of one run: 4 GB of records
CLOSED_RATE = 60_000  # requests/s that a closed loop is prepared for: more than any ring has shown


def planned(load: LoadConfig) -> Offsets | None:
    """Return when each measured request is due; None for a closed loop, whose answers decide.

    Raises InvalidOption for a file of arrivals that cannot be replayed, and for more than `MOST_REQUESTS`.
    """
    match load.kind:
        case "burst":
            return np.zeros(load.num_iters, dtype=np.int64)
        case "constant":
            return _constant(_rate(load), _count(load))
        case "poisson":
            return _poisson(_rate(load), load)
        case "replay":
            assert load.arrivals is not None
            return read_arrivals(load.arrivals)
        case "closed":
            return None


def count(load: LoadConfig) -> int:
    """Return how many requests there are; of a closed loop for a duration, the most that are prepared for."""
    offsets = planned(load)
    if offsets is not None:
        return len(offsets)
    if load.duration_s is None:
        return load.num_iters
    return min(MOST_REQUESTS, max(load.num_iters, int(load.duration_s * CLOSED_RATE)))


def share(offsets: Offsets, generator: int, generators: int) -> Offsets:
    """Return the part of one of several generators: every `generators`-th arrival; all together keep the plan."""
    return offsets[generator::generators]


def read_arrivals(path: Path) -> Offsets:
    """Read a file of arrivals: Parquet with a column `scheduled_ns` (a run's own records do), or a number per line.

    Numbers are seconds, of any origin, ascending. The first arrival becomes offset 0. Raises InvalidOption.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            columns = set(table.column_names)
            times = table.column("scheduled_ns").to_numpy()
            if "phase" in columns:
                times = times[np.asarray(table.column("phase").to_pylist()) == "measured"]
            offsets = times.astype(np.int64)
        else:
            offsets = np.rint(np.loadtxt(path, dtype=np.float64, ndmin=1) * NS_PER_S).astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidOption(
            f"--arrivals {path}: cannot be replayed ({error}); give seconds, one per line, or Parquet with a column"
            " scheduled_ns"
        ) from error
    if not len(offsets):
        raise InvalidOption(f"--arrivals {path}: holds no arrival")
    back = np.flatnonzero(np.diff(offsets) < 0)
    if len(back):
        raise InvalidOption(f"--arrivals {path}: arrival {back[0] + 2} is before the one in front of it; sort the file")
    moved: Offsets = offsets - offsets[0]
    return moved


def _rate(load: LoadConfig) -> float:
    assert load.rate is not None
    count = load.num_iters if load.duration_s is None else load.rate * load.duration_s
    if count > MOST_REQUESTS:
        raise InvalidOption(
            f"{count:.3g} requests are more than the {MOST_REQUESTS} of one run; lower --rate or --duration"
        )
    return load.rate


def _count(load: LoadConfig) -> int:
    assert load.rate is not None
    return load.num_iters if load.duration_s is None else max(1, int(load.rate * load.duration_s))


def _constant(rate: float, count: int) -> Offsets:
    moments: Offsets = np.rint(np.arange(count) * (NS_PER_S / rate)).astype(np.int64)
    return moments


def _poisson(rate: float, load: LoadConfig) -> Offsets:
    generator = np.random.default_rng([load.seed, 0xA221])
    if load.duration_s is None:
        gaps = generator.exponential(1 / rate, load.num_iters)
        return np.rint(np.cumsum(gaps) * NS_PER_S).astype(np.int64)
    # Given their number, the moments of a Poisson process are independent and uniform (Ross, Stochastic Processes, 2.3)
    count = max(1, int(generator.poisson(rate * load.duration_s)))
    times = generator.uniform(0, load.duration_s, count)
    times.sort()
    return np.rint(times * NS_PER_S).astype(np.int64)
