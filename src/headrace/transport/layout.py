"""How a ring's shared memory is divided: two rings of descriptors, then slots. Pure arithmetic, alike on both sides.

    requests | responses | slot 0: input, output | slot 1: input, output | ...

A slot belongs to one request from the moment that the client leases it until the client has read its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 4096  # slots begin on pages, so that each can be registered with a device
LINE = 64  # a counter has a cache line of its own
DESCRIPTOR = 128  # bytes; see transport.descriptors
COUNTERS = 3 * LINE  # written, read, reader asleep


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a ring that carries requests of at most `input_bytes`, and answers of at most `output_bytes`."""

    slots: int
    input_bytes: int
    output_bytes: int

    @property
    def entries(self) -> int:
        """Descriptors in each direction: one per slot, and one to close."""
        return self.slots + 1

    @property
    def ring_bytes(self) -> int:
        return COUNTERS + self.entries * DESCRIPTOR

    @property
    def slots_offset(self) -> int:
        return _up(2 * self.ring_bytes, PAGE)

    @property
    def slot_bytes(self) -> int:
        return _up(self.input_bytes, PAGE) + _up(self.output_bytes, PAGE)

    @property
    def total_bytes(self) -> int:
        return self.slots_offset + self.slots * self.slot_bytes

    def ring_offset(self, direction: int) -> int:
        """Return where the ring of requests (0) or responses (1) begins."""
        return direction * self.ring_bytes

    def input_offset(self, slot: int) -> int:
        return self.slots_offset + slot * self.slot_bytes

    def output_offset(self, slot: int) -> int:
        return self.input_offset(slot) + _up(self.input_bytes, PAGE)


def _up(size: int, step: int) -> int:
    """Return `size` rounded up to whole steps, at least one."""
    return max(1, -(-size // step)) * step
