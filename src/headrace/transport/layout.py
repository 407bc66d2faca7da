"""How a ring's shared memory is divided. Pure arithmetic, alike on both sides; no torch, since the supervisor needs it.

    header | requests | responses | error texts | input 0: rows | ... | output 0: rows | ...

The tensors are a *table of rows*: row r of every input and of every output belong to each other. A request leases
consecutive rows, so its inputs are ready-made batches, and requests that lie side by side are copied to the device as
one. Requests of any size share the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.tensors import TensorSpec

PAGE = 4096  # tensors begin on pages, so that their memory can be registered with a device
LINE = 64  # a counter has a cache line of its own
DESCRIPTOR = 64  # bytes; see transport.descriptors
COUNTERS = 3 * LINE  # written, read, reader asleep
TEXT = 256  # bytes of an error's text


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a ring whose table holds `rows` rows of these tensors."""

    rows: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def entries(self) -> int:
        """Descriptors in each direction: a request has at least one row; one more to close."""
        return self.rows + 1

    @property
    def ring_bytes(self) -> int:
        return COUNTERS + self.entries * DESCRIPTOR

    @property
    def texts_offset(self) -> int:
        return PAGE + 2 * self.ring_bytes

    @property
    def tensors_offset(self) -> int:
        return _up(self.texts_offset + self.entries * TEXT, PAGE)

    @property
    def total_bytes(self) -> int:
        return self.tensors_offset + sum(self._region_bytes(spec) for spec in (*self.inputs, *self.outputs))

    def ring_offset(self, direction: int) -> int:
        """Return where the ring of requests (0) or responses (1) begins."""
        return PAGE + direction * self.ring_bytes

    def text_offset(self, entry: int) -> int:
        return self.texts_offset + entry * TEXT

    def tensor_offsets(self) -> Iterator[int]:
        """Yield where each tensor's rows begin: the inputs, then the outputs."""
        offset = self.tensors_offset
        for spec in (*self.inputs, *self.outputs):
            yield offset
            offset += self._region_bytes(spec)

    def _region_bytes(self, spec: TensorSpec) -> int:
        return _up(self.rows * spec.row_bytes, PAGE)


def _up(size: int, step: int) -> int:
    """Return `size` rounded up to whole steps, at least one."""
    return max(1, -(-size // step)) * step
