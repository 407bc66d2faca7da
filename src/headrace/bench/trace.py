"""`--profile`: the profiler's trace of the backend, with our requests laid over it, for Perfetto or chrome://tracing.

The profiler shows what each thread called and what each CUDA stream ran. From the records we add what it cannot know:
for every request, how long it was on its way, waited, was computed and was answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import OutputError

if TYPE_CHECKING:
    from headrace.bench.record import Records

STAGES = (
    ("request queue", "issued_ns", "received_ns"),
    ("copy in and wait", "received_ns", "started_ns"),
    ("forward (host)", "started_ns", "computed_ns"),
    ("copy out", "computed_ns", "responded_ns"),
    ("response queue", "responded_ns", "completed_ns"),
)
PRIVATE_KEYS = ("host_name", "traceName")  # traces are published


def add_requests(path: Path, records: Records, wall_clock_offset_ns: int) -> None:
    """Add one line per stage of every request to the trace at `path`, on the profiler's own time axis."""
    try:
        trace = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{path.name}: the profiler left no readable trace ({error})") from error
    for key in PRIVATE_KEYS:
        trace.pop(key, None)
    base_ns = int(trace.get("baseTimeNanoseconds", 0))
    trace["traceEvents"] += request_events(records, wall_clock_offset_ns - base_ns)
    path.write_text(json.dumps(trace, separators=(",", ":")))


def request_events(records: Records, offset_ns: int) -> list[dict[str, object]]:
    """Return begin and end events, in microseconds, one asynchronous track per request with its stages nested."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": "requests", "args": {"name": "Headrace requests"}}
    ]
    for record in records:
        spans = [("request", int(record["issued_ns"]), int(record["completed_ns"]))]
        spans += [(name, int(record[begin]), int(record[end])) for name, begin, end in STAGES]
        for name, begin_ns, end_ns in spans:
            if 0 < begin_ns <= end_ns:
                common = {
                    "cat": "request",
                    "id": int(record["index"]),
                    "pid": "requests",
                    "tid": 0,
                    "name": name,
                }
                events.append({"ph": "b", "ts": (begin_ns + offset_ns) / 1000, **common})
                events.append({"ph": "e", "ts": (end_ns + offset_ns) / 1000, **common})
    return events
