"""Whether a run was steady: whether its response times grew while it went on, as they do where work piles up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCKS = 10  # few and long, so that their means hardly depend on each other although the response times do
LEAST_REQUESTS = 20 * BLOCKS
SIGNIFICANCE = 0.01  # one-sided: only growth is a fault
GROWTH = 0.5  # of the mean response time, over the run; less is no backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class Steadiness:
    """`steady` is None where the run cannot tell."""

    steady: bool | None
    reason: str
    growth: float | None = None  # over the run, as a share of the mean response time
    p: float | None = None  # chance of block means as ordered as these, were there no growth


def is_steady(scheduled_ns: npt.NDArray[np.int64], response_ns: npt.NDArray[np.int64]) -> Steadiness:
    """Judge one run's measured and answered requests, in any order; both arrays have one value per request.

    Two things must come together for "not steady": the means of 10 blocks of requests rise (Mann and Kendall's test,
    exact, one-sided at 1 %), and a straight line through them rises by half the mean response time or more. An
    overloaded queue shows both; so does a run that is too short for its queue to have filled. Neither counts.

    `validity.backlog` takes a run's latencies away, and is another test: it sees requests without an answer, and runs
    of 40 requests, and is wrong less often in short runs; of 5 to 10 % overload this one sees more.
    `benchmarks/coverage.py` measures both on the same queues.

    Source: H. B. Mann, "Nonparametric tests against trend", Econometrica 13 (1945); of blocks, since successive
    response times of a queue depend on each other: `benchmarks/coverage.py` measures how often steady queues are
    called otherwise.
    """
    if len(scheduled_ns) < LEAST_REQUESTS:
        return Steadiness(steady=None, reason=f"{len(scheduled_ns)} requests are too few; it takes {LEAST_REQUESTS}")
    order = np.argsort(scheduled_ns, kind="stable")
    times = (scheduled_ns[order] - scheduled_ns[order[0]]).astype(np.float64)
    responses = response_ns[order].astype(np.float64)
    if times[-1] < responses.max() / 100:
        return Steadiness(steady=None, reason="all requests were scheduled at once, so each waits for those before it")
    means, centres = _block_means(responses), _block_means(times)
    slope = float(np.polyfit(centres - centres.mean(), means, 1)[0])
    growth = slope * float(times[-1]) / float(responses.mean())
    p = growth_p_value(means)
    numbers = f"{growth:+.0%} of the mean response time over the run, p = {p:.2g}"
    if growth >= GROWTH and p <= SIGNIFICANCE:
        reason = f"response times grew ({numbers}): more was asked than was served, or the run is too short"
        return Steadiness(steady=False, reason=reason, growth=growth, p=p)
    return Steadiness(steady=True, reason=f"no growth beyond chance ({numbers})", growth=growth, p=p)


def growth_p_value(values: npt.NDArray[np.float64]) -> float:
    """Return the chance that as many pairs of values in a random order would rise (Kendall's distribution, exact)."""
    rises = sum(int((values[i + 1 :] > value).sum()) for i, value in enumerate(values))
    ways = np.ones(1)
    for size in range(2, len(values) + 1):  # orders of `size` values, by how many pairs rise
        ways = np.convolve(ways, np.ones(size))
    return float(ways[rises:].sum() / ways.sum())


def _block_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.array([block.mean() for block in np.array_split(values, BLOCKS)])
