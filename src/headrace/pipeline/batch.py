"""When a batch closes, and which bucket it runs in: pure rules, the clock is an argument.

A full batch starts as soon as any lane has room, also behind one that is still running. A part of one starts only on a
lane that is idle: while all are busy it waits, and grows. So no free lane idles while requests wait, one busy client of
single rows fills large buckets by itself, and a lone request starts at once. `max_queue_delay_us` makes a part wait
that long, counted from its oldest request, even for an idle lane: larger batches for latency.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORTH_PADDING = 0.75  # a bucket filled less than this runs as a smaller, full one, and the rest follows


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """Field names follow Triton's dynamic batcher. Values are those that `config.LanesConfig` has let pass."""

    buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # rows that the model is prepared for, ascending
    max_queue_delay_us: int = 0  # 0: never let a lane idle while requests wait

    @property
    def max_batch_size(self) -> int:
        return self.buckets[-1]


def powers_of_two(max_batch_size: int) -> tuple[int, ...]:
    """Return the usual buckets: 1, 2, 4, ... and `max_batch_size` itself."""
    below = [1 << power for power in range(max_batch_size.bit_length()) if 1 << power < max_batch_size]
    return (*below, max_batch_size)


def bucket_of(rows: int, config: BatchingConfig) -> int:
    """Return the smallest bucket that holds `rows`, which admission has kept within the largest."""
    return config.buckets[bisect_left(config.buckets, rows)]


def may_start(waiting_rows: int, config: BatchingConfig, *, lane_idle: bool) -> bool:
    """Tell cheaply whether `take` could return anything but 0, by the sum of all waiting rows."""
    return waiting_rows > 0 and (lane_idle or waiting_rows >= config.max_batch_size)


def take(waiting: Iterable[int], waited_us: float, config: BatchingConfig, *, lane_idle: bool) -> int:
    """Return how many requests from the head make up the next batch; 0 means keep waiting.

    `waiting` are the requests' rows, oldest first; `waited_us` is the oldest one's time. Admission has refused any
    request larger than the largest bucket.
    """
    sums: list[int] = []
    total = 0
    for rows in waiting:
        total += rows
        if total >= config.max_batch_size:
            return len(sums) + (total == config.max_batch_size)
        sums.append(total)
    if not sums or not lane_idle or waited_us < config.max_queue_delay_us:
        return 0
    return _worth_padding(sums, config)


def _worth_padding(sums: Sequence[int], config: BatchingConfig) -> int:
    """Return how many requests to run now so that little of the bucket is padding."""
    rows = sums[-1]
    if rows >= WORTH_PADDING * bucket_of(rows, config):
        return len(sums)
    smaller = config.buckets[bisect_left(config.buckets, rows) - 1] if rows > config.buckets[0] else 0
    fitting = bisect_left(sums, smaller + 1)
    return fitting or len(sums)
