"""Histograms whose buckets grow with the value: 32 to a doubling, so that a bucket is at most 1/32 of its values wide.

Source of the layout: HdrHistogram, which divides each power of two into equal parts, so that an index is a shift and an
addition. Bounds are inclusive above: a power of two is a bound of its own, and so is a batch of that many rows.
"""

from __future__ import annotations

import math

_STEPS = 32  # to a doubling
_BITS = 6  # of twice as many: values below are their own index


class Scale:
    """Buckets of whole values above 0, in units of 2^shift; the last bucket has no upper bound."""

    __slots__ = ("_last", "_shift", "buckets")

    def __init__(self, shift: int, doublings: int) -> None:
        """Make buckets for values up to 2^(shift + doublings), and one for larger ones."""
        self._shift = shift
        self._last = (doublings - _BITS + 2) * _STEPS
        self.buckets = self._last + 1

    def index(self, value: int) -> int:
        """Return the bucket of a value."""
        units = (value - 1) >> self._shift
        if units < 2 * _STEPS:
            return units if units > 0 else 0
        excess = units.bit_length() - _BITS
        index = excess * _STEPS + (units >> excess)
        return index if index < self._last else self._last

    def lower(self, index: int) -> int:
        """Return the bound that a bucket's values lie above."""
        if index < 2 * _STEPS:
            return index << self._shift
        return ((index % _STEPS) + _STEPS) << (index // _STEPS - 1 + self._shift)

    def upper(self, index: int) -> float:
        """Return the largest value of a bucket; infinite for the last."""
        return math.inf if index == self._last else self.lower(index + 1)

    def name(self, index: int) -> int:
        """Return the value that stands for a bucket in a list: its largest, and for the last bucket its smallest."""
        return self.lower(index) + 1 if index == self._last else self.lower(index + 1)


RESPONSE_NS = Scale(shift=8, doublings=29)  # to 137 s; from 10 us on a bucket is at most 3.2 % wide
BATCH_ROWS = Scale(shift=0, doublings=16)  # to 65536; exact up to 64, and at powers of two
