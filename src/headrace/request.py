"""What travels: a request to the backend, and its answer back. State travels with the batch, nothing is looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Timeline:
    """When one request passed each stage of the backend, in nanoseconds of the one clock; 0: not reached."""

    received_ns: int = 0  # taken from the request queue
    started_ns: int = 0  # forward called
    computed_ns: int = 0  # forward returned; on CUDA the kernels may still run
    responded_ns: int = 0  # answer on the CPU and handed to the response queue
    worker: int = 0  # which predict thread


@dataclass(slots=True)
class Request:
    """One batch on its way through the backend. One stage owns it at a time."""

    index: int
    inputs: Tensor  # [rows, *features], on the CPU, in shared memory
    slot: int = -1  # of a ring, where the inputs lie; -1 where the transport has none
    timeline: Timeline = field(default_factory=Timeline)


@dataclass(slots=True)
class Response:
    """How a request ended: with an output [rows, *features] on the CPU, or with an error."""

    index: int
    timeline: Timeline
    output: Tensor | None = None
    error: str | None = None
