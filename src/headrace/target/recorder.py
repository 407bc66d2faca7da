"""What a generator writes down of every request, in memory made before the clock starts; joined to one file at the end.

29 bytes a request. Nothing passes through a pipe: each generator writes a file, and joining reads those piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from headrace.bench.arrivals import MOST_REQUESTS
from headrace.bench.record import PARQUET, PHASES, RECORD_DTYPE, STATUSES, Records, as_table

UNANSWERED, OK, ERROR, WRONG, SHED = range(len(STATUSES))
SENT_DTYPE = np.dtype(
    [
        ("scheduled_ns", np.int64),
        ("issued_ns", np.int64),
        ("completed_ns", np.int64),
        ("payload", np.int32),
        ("status", np.int8),
    ]
)
# What metrics are computed from: a third of a whole record, since a run may have millions.
SLIM_DTYPE = np.dtype(
    [
        ("phase", np.int8),
        ("status", np.int8),
        ("rows", np.int32),
        ("scheduled_ns", np.int64),
        ("issued_ns", np.int64),
        ("completed_ns", np.int64),
        ("generator", np.int16),
    ]
)
JOINED_ROWS = 1 << 19  # written at once

Sent = npt.NDArray[np.void]  # of SENT_DTYPE
Rows = npt.NDArray[np.int32]


class Recorder:
    """Columns of one generator. Their memory is touched where it is known how many rows there will be.

    A closed loop does not know: it has room for as many as a run may have, which the system makes real page by page.
    """

    def __init__(self, planned: int | None) -> None:
        self.capacity = MOST_REQUESTS if planned is None else planned
        times = np.zeros((3, self.capacity), dtype=np.int64)
        answers, statuses = np.zeros(self.capacity, dtype=np.int32), np.zeros(self.capacity, dtype=np.int8)
        if planned is not None:
            for column in (times, answers, statuses):
                column.fill(0)
        self._times, self._answers, self._statuses = times, answers, statuses
        self.scheduled, self.issued, self.completed = (column.data for column in times)
        self.answer, self.status = answers.data, statuses.data

    def save(self, path: Path, count: int, payload: Rows) -> None:
        """Write the first `count` rows; `payload` says what each carried."""
        sent = np.empty(count, dtype=SENT_DTYPE)
        for name, column in zip(("scheduled_ns", "issued_ns", "completed_ns"), self._times, strict=True):
            sent[name] = column[:count]
        sent["payload"] = payload
        sent["status"] = self._statuses[:count]
        np.save(path, sent)

    def statuses(self, count: int) -> npt.NDArray[np.int8]:
        return self._statuses[:count]

    def answers(self, count: int) -> npt.NDArray[np.int32]:
        return self._answers[:count]


def join(before: Records, paths: list[Path], rows_of_payload: Rows, output: Path) -> Records:
    """Write `before` (first and warm-up requests) and all that generators sent, in order of time, as a run's records.

    Returns what metrics are computed from (`SLIM_DTYPE`). Takes 60 bytes of memory a request.
    """
    parts: list[Sent] = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    scheduled = np.concatenate([part["scheduled_ns"] for part in parts])
    order = np.argsort(scheduled, kind="stable")
    del scheduled
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    slim = np.zeros(len(before) + len(order), dtype=SLIM_DTYPE)
    at = 0
    with pq.ParquetWriter(output, as_table(before[:0]).schema, **PARQUET) as writer:
        for records in _pieces(before, parts, order, starts, rows_of_payload):
            records["index"] = np.arange(at, at + len(records))
            for name in SLIM_DTYPE.names or ():
                slim[name][at : at + len(records)] = records[name]
            writer.write_table(as_table(records))
            at += len(records)
    return slim


def _pieces(
    before: Records,
    parts: list[Sent],
    order: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    rows_of_payload: Rows,
) -> Iterator[Records]:
    if len(before):
        yield before
    for begin in range(0, len(order), JOINED_ROWS):
        chosen = order[begin : begin + JOINED_ROWS]
        records = np.zeros(len(chosen), dtype=RECORD_DTYPE)
        records["phase"] = PHASES.index("measured")
        source = np.searchsorted(starts, chosen, side="right") - 1
        for number, part in enumerate(parts):
            mine = np.flatnonzero(source == number)
            sent = part[chosen[mine] - starts[number]]
            for name in ("scheduled_ns", "issued_ns", "completed_ns", "status"):
                records[name][mine] = sent[name]
            records["batch"][mine] = sent["payload"]
            records["rows"][mine] = rows_of_payload[sent["payload"]]
            records["generator"][mine] = number
        yield records
