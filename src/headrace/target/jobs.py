"""What the process with the eager model is given, and what it says. No torch: the supervisor imports it."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from headrace.target.payloads import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    model: str  # file.py:callable
    payloads: list[Inputs]
    bfloat16: frozenset[str]  # inputs whose numbers are bits of bfloat16
    output: Path
    report: Connection


@dataclass(frozen=True, slots=True)
class Checked:
    """The answers have been written."""
