"""The answers of a run: kept to its end where memory allows, otherwise compared as they come. None goes unchecked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from headrace.bench.answers import Checker
from headrace.bench.record import STATUSES, Records
from headrace.bench.summary import AnswerCheck

SHARE_OF_MEMORY = 0.25  # of what is free, for answers kept to the end
UNKNOWN = -1  # which batch a request carries, while its sender has not said so

Indexes = npt.NDArray[np.int64]
Outputs = npt.NDArray[np.generic]


class KeptAnswers:
    """Comparing takes the receiver's time, so it is done after the run, unless there are too many answers for that.

    `checker` is needed then, and for `finish`.
    """

    def __init__(self, records: Records, checker: Checker | None = None, *, keep_all: bool = False) -> None:
        self.all: npt.NDArray[np.float32] | None = None  # [requests, rows, ...]; NaN where there is none
        self._records = records
        self._checker = checker
        self._keep_all = keep_all
        self._to_compare: list[tuple[Indexes, Outputs]] = []
        self._started = False

    def add(self, indexes: Indexes, outputs: Outputs) -> None:
        """Take the answers [answers, rows, ...] to the requests `indexes`."""
        if not self._started:
            self._start(outputs.shape[1:])
        if self.all is not None:
            self.all[indexes] = outputs
            return
        self._to_compare.append((indexes, outputs))
        self._compare()

    def finish(self, count: int) -> AnswerCheck | None:
        """Mark which of the first `count` requests were answered wrongly; None where nothing was answered."""
        if not self._started:
            return None
        assert self._checker is not None
        if self.all is not None:
            answered = np.flatnonzero(self._records["status"][:count] == STATUSES.index("ok"))
            self._to_compare.append((answered, self.all[answered]))
        self._compare()
        return self._checker.summary()

    def save(self, path: Path, count: int) -> None:
        if self.all is not None:
            np.save(path, self.all[:count])

    def _start(self, shape: Sequence[int]) -> None:
        """Take memory for all answers at the first one, if they are not too many."""
        self._started = True
        count = len(self._records)
        most = psutil.virtual_memory().available * SHARE_OF_MEMORY
        if self._keep_all or self._checker is None or count * int(np.prod(shape)) * 4 <= most:
            self.all = np.full((count, *shape), np.nan, dtype=np.float32)

    def _compare(self) -> None:
        """Compare what has come. An answer may be here before its sender has noted what it sent: that one waits."""
        assert self._checker is not None
        waiting = []
        for indexes, outputs in self._to_compare:
            batches = self._records["batch"][indexes]
            if (batches == UNKNOWN).any():
                waiting.append((indexes, outputs))
                continue
            wrong = self._checker.add(outputs, batches)
            self._records["status"][indexes[wrong]] = STATUSES.index("wrong")
        self._to_compare = waiting
