"""What the harness itself is worth on a machine: measured against a server of known law, and kept for later runs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.errors import OutputError
from headrace.files import write_whole

SCHEMA_VERSION = 1
AT_REST_S = 50e-6  # p99 of the slip on an idle core


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """One law, and how far what was measured is from what the server itself logged; errors are relative."""

    law: str
    rate: float  # requests/s, Poisson
    payload_bytes: int
    requests: int
    true_p50_s: float
    true_p99_s: float
    p50_error: float
    p99_error: float
    throughput_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slip:
    """How much later than planned requests were sent, in seconds."""

    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What generators and a server that does nothing reach together, and the latency of one request by itself."""

    payload_bytes: int
    requests_per_s: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    schema_version: int
    machine: str  # see `machine_key`
    made_at: str  # UTC, ISO 8601
    headrace: str
    generators: int
    recovered: tuple[Recovered, ...]
    slip: Slip
    ceilings: tuple[Ceiling, ...]  # by payload, ascending
    transport: str = "http"  # or "grpc"

    @property
    def warning(self) -> str | None:
        """Say that the machine was not at rest, if it was not."""
        if self.slip.p99 <= AT_REST_S:
            return None
        return (
            f"requests were sent up to {self.slip.p99 * 1e6:,.0f} us late (p99; {AT_REST_S * 1e6:g} on an idle core):"
            " the machine was busy with something else; calibrate again when it is not"
        )

    def ceiling(self, payload_bytes: float) -> Ceiling:
        """Return what holds for a payload: times grow along a line between the sizes that were measured."""
        sizes = [each.payload_bytes for each in self.ceilings]
        return Ceiling(
            payload_bytes=int(payload_bytes),
            requests_per_s=1 / _along(payload_bytes, sizes, [1 / each.requests_per_s for each in self.ceilings]),
            p50_s=_along(payload_bytes, sizes, [each.p50_s for each in self.ceilings]),
            p99_s=_along(payload_bytes, sizes, [each.p99_s for each in self.ceilings]),
        )


def machine_key(cpu_model: str, cpus: int) -> str:
    """Name a machine by what decides how fast a harness is there. No host name: results are published."""
    version = ".".join(platform.python_version_tuple()[:2])
    return hashlib.sha256(repr((cpu_model, cpus, platform.release(), version)).encode()).hexdigest()[:12]


def default_path(machine: str, environ: Mapping[str, str] = os.environ, *, transport: str = "http") -> Path:
    """Return where a machine's calibration over a transport lies. Source: XDG Base Directory Specification."""
    state = environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if state.startswith("/") else Path(environ.get("HOME", "/")) / ".local/state"
    suffix = "" if transport == "http" else f"-{transport}"
    return folder / "headrace" / f"calibration-{machine}{suffix}.json"


def load(path: Path) -> Calibration | None:
    """Return the calibration of a file; None where there is none. Raises OutputError for a file that is no such."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        return msgspec.json.decode(data, type=Calibration)
    except msgspec.MsgspecError as error:
        raise OutputError(
            f"{path}: is no calibration of version {SCHEMA_VERSION} ({error}); calibrate again"
        ) from error


def save(calibration: Calibration, path: Path) -> None:
    """Write whole or not at all. Raises OutputError."""
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n"
    write_whole(path, text, "name another with --output")


def _along(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Interpolate, and go on as steep as at the end; below the first place, its value."""
    if at <= places[0] or len(places) == 1:
        return values[0]
    right = next((number for number, place in enumerate(places) if place >= at), len(places) - 1)
    slope = (values[right] - values[right - 1]) / (places[right] - places[right - 1])
    return max(values[right - 1] + slope * (at - places[right - 1]), min(values))
