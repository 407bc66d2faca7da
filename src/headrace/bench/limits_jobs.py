"""What the processes of `headrace limits` are given, and what they report to the supervisor. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from headrace.bench.limits_report import LimitsConfig, RingRates
from headrace.bench.summary import Limits, TorchFacts
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout
from headrace.transport.pair import RingPair

RING_ROWS = 256  # requests in flight at once
_BYTE = TensorSpec(name="byte", dtype="uint8", features=())
RING_LAYOUT = Layout(rows=RING_ROWS, inputs=(_BYTE,), outputs=(_BYTE,))


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoJob:
    """Answer every request at once."""

    ring: RingPair
    report: Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsJob:
    """Measure everything."""

    config: LimitsConfig
    ring: RingPair  # an echo at its other end
    report: Connection


@dataclass(frozen=True, slots=True)
class Said:
    """What the measuring process says."""


@dataclass(frozen=True, slots=True)
class Step(Said):
    """It begins with this."""

    text: str
    number: int  # from 0
    of: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsDone(Said):
    ring: RingRates
    limits: tuple[Limits, ...]  # by batch size
    memcpy_buffer_bytes: int
    form: str
    facts: TorchFacts
    notes: tuple[str, ...]
