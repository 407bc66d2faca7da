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
    def entries(self) -> tuple[int, int]:
        """Descriptors that the rings of requests and of responses hold; none is ever full.

        Of each row at most three can be unread on their way to the backend: the cancellation of a request that has
        been answered meanwhile, the next request in that row, and its cancellation; the backend reads the first before
        it can answer the second. One more closes. Of each row at most one answer is unread.
        """
        return 3 * self.rows + 1, self.rows

    @property
    def texts_offset(self) -> int:
        return self.ring_offset(2)

    @property
    def tensors_offset(self) -> int:
        return _up(self.texts_offset + self.rows * TEXT, PAGE)

    @property
    def total_bytes(self) -> int:
        return self.tensors_offset + sum(self._region_bytes(spec) for spec in (*self.inputs, *self.outputs))

    def ring_offset(self, direction: int) -> int:
        """Return where the ring of requests (0) or responses (1) begins; they end at 2."""
        return PAGE + sum(COUNTERS + entries * DESCRIPTOR for entries in self.entries[:direction])

    def text_offset(self, row: int) -> int:
        return self.texts_offset + row * TEXT

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
