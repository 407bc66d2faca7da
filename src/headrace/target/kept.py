"""Answers, kept while the clock runs and compared when it has stopped: equal ones once, however many there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headrace.errors import TransportFailed
from headrace.target.expected import Expected, Tally
from headrace.wire.v2_call import Output

MOST_BYTES = 256 << 20  # of answers that differ; what comes after them is compared at once
RIGHT, FALSE = -1, -2  # answers that have been compared already

Decode = Callable[[bytes, int | None], tuple[Output, ...]]
Numbers = npt.NDArray[np.int32]


class KeptAnswers:
    def __init__(self, expected: Expected, decode: Decode) -> None:
        self.compared_at_once = 0
        self._expected = expected
        self._decode = decode
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._whole: list[tuple[int, bytes, int | None]] = []
        self._bytes = 0
        self._tally = Tally()

    def add(self, payload: int, body: bytes, header_bytes: int | None) -> int:
        """Keep the answer to a payload; return its number, which equal answers share.

        Only what follows the JSON is looked at: some servers put a new id into each answer.
        """
        key = (payload, body[header_bytes:] if header_bytes else body)
        number = self._numbers.get(key)
        if number is not None:
            return number
        if self._bytes > MOST_BYTES:
            self.compared_at_once += 1
            tally = self._compare(payload, body, header_bytes)
            self._tally.add(tally)
            return FALSE if tally.wrong_rows else RIGHT
        number = self._numbers[key] = len(self._whole)
        self._whole.append((payload, body, header_bytes))
        self._bytes += 2 * len(body)
        return number

    def finish(self, answers: Numbers) -> tuple[npt.NDArray[np.bool_], Tally]:
        """Return which of these answers, by number, are wrong, and what comparing them has shown."""
        wrong = np.zeros(len(self._whole) + 2, dtype=np.bool_)  # the last two stand for FALSE and RIGHT
        wrong[FALSE] = True
        times = np.bincount(answers[answers >= 0], minlength=len(self._whole))
        for number, whole in enumerate(self._whole):
            tally = self._compare(*whole)
            wrong[number] = tally.wrong_rows > 0
            self._tally.add(tally, int(times[number]))
        return wrong[answers], self._tally

    def _compare(self, payload: int, body: bytes, header_bytes: int | None) -> Tally:
        try:
            return self._expected.compare(payload, self._decode(body, header_bytes))
        except TransportFailed:  # no answer of the protocol: as wrong as can be
            return self._expected.compare(payload, ())
