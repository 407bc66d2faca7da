"""What ran when, as lanes of coloured bars: from the profiler's trace of a run, or from the run's own records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.bench.record import Records
from headrace.bench.stats import OK
from headrace.errors import OutputError

TRACE_NAMES = ("trace.json", "trace.json.gz")
DEVICE_KINDS = ("copy in", "compute", "copy out")
HOST_KINDS = ("compute", "copy out")
HOST_STAMPS = ("started_ns", "computed_ns", "responded_ns")
BATCHES_SHOWN = 10  # of each lane
REQUESTS_LOOKED_AT = 20_000  # in the middle of the run
SUB_ROWS = 4  # batches that a lane may have at once in the picture


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a device or a host's stage did. `begin_us` and `length_us` are microseconds of the source."""

    kind: str
    stream: int  # of the device; in spans from records, the lane and its row in the picture
    begin_us: float
    length_us: float

    @property
    def end_us(self) -> float:
        return self.begin_us + self.length_us


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of a short window, with a name for each row; `spans` begin at or after `begin_us` less their length."""

    spans: tuple[Span, ...]
    rows: dict[int, str]  # by stream, from the top down
    begin_us: float
    length_us: float
    source: str

    @property
    def kinds(self) -> tuple[str, ...]:
        present = {span.kind for span in self.spans}
        return tuple(kind for kind in dict.fromkeys((*DEVICE_KINDS, *HOST_KINDS)) if kind in present)


def find_trace(folder: Path) -> Path | None:
    return next((folder / name for name in TRACE_NAMES if (folder / name).is_file()), None)


def read_spans(trace: Path) -> list[Span]:
    """Return the device's copies and kernels, in order of time. Raises OutputError for what is no trace.

    Source of the times: the profiler's records of the device (CUPTI).
    """
    try:
        data = trace.read_bytes()
        events = json.loads(gzip.decompress(data) if trace.suffix == ".gz" else data)["traceEvents"]
        spans = [span for span in map(_device_span, events) if span]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{trace}: no trace of the profiler's ({error}); run again with --profile") from error
    return sorted(spans, key=lambda span: span.begin_us)


def busiest_window(spans: Sequence[Span], length_us: float) -> float:
    """Return where the last window of that length begins that ends while copies in still come."""
    last_copy = max((span.begin_us for span in spans if span.kind == "copy in"), default=spans[-1].begin_us)
    return last_copy - 1.5 * length_us


def device_timeline(spans: Sequence[Span], begin_us: float, length_us: float) -> Timeline:
    """Return what the device's streams did in a window: copies in first, then a row for each lane."""
    shown = tuple(span for span in spans if span.end_us >= begin_us and span.begin_us <= begin_us + length_us)
    streams = {span.stream for span in shown}
    names = {stream: _stream_name(stream, shown) for stream in streams}
    ordered = sorted(streams, key=lambda stream: (names[stream] != "copies in", stream))
    rows = {stream: names[stream] for stream in ordered}
    return Timeline(shown, rows, begin_us, length_us, "the profiler's records of the device")


def join_touching(timeline: Timeline, gap_us: float) -> Timeline:
    """Return the timeline with spans of one row and kind joined that lie closer than `gap_us`, too near to be seen."""
    joined: list[Span] = []
    last: dict[int, int] = {}  # by stream, where its last span is in `joined`
    for span in timeline.spans:
        at = last.get(span.stream)
        before = joined[at] if at is not None else None
        if at is not None and before and before.kind == span.kind and span.begin_us - before.end_us < gap_us:
            length_us = max(before.end_us, span.end_us) - before.begin_us
            joined[at] = Span(span.kind, span.stream, before.begin_us, length_us)
        else:
            last[span.stream] = len(joined)
            joined.append(span)
    return Timeline(tuple(joined), timeline.rows, timeline.begin_us, timeline.length_us, timeline.source)


def host_timeline(records: Records) -> Timeline | None:
    """Return what the workers had under way in the middle of a run, by the host's stamps; None without stamps.

    Batches that a worker has at the same time lie in rows of their own. Requests of one batch share its stamps.
    """
    ran = records["status"] == OK
    for name in HOST_STAMPS:
        ran &= records[name] > 0
    answered = np.flatnonzero(ran)
    if not len(answered):
        return None
    answered = answered[np.argsort(records["started_ns"][answered])]
    skipped = max(0, len(answered) - REQUESTS_LOOKED_AT) // 2
    batches = _distinct_batches(records[answered[skipped : skipped + REQUESTS_LOOKED_AT]])
    begin_ns, end_ns = _middle(batches)
    shown = batches[(batches["responded_ns"] >= begin_ns) & (batches["started_ns"] <= end_ns)]
    free_at: dict[int, list[int]] = {}
    spans = []
    for batch in shown:
        stream = _take_row(free_at.setdefault(int(batch["worker"]), []), batch, int(batch["worker"]))
        stamps = [int(batch[name]) for name in HOST_STAMPS]
        for kind, begin, end in zip(HOST_KINDS, stamps, stamps[1:], strict=False):
            spans.append(Span(kind, stream, (begin - begin_ns) / 1000, (end - begin) / 1000))
    streams = sorted({span.stream for span in spans})
    rows = {each: f"lane {each // SUB_ROWS}" if each % SUB_ROWS == 0 else "" for each in streams}
    return Timeline(
        tuple(spans),
        rows,
        0.0,
        (end_ns - begin_ns) / 1000,
        "the host's stamps of each batch, from the start of its computation to its answer",
    )


def _distinct_batches(records: Records) -> Records:
    ordered = np.sort(records, order=["started_ns", "worker"])
    again = (np.diff(ordered["started_ns"]) == 0) & (np.diff(ordered["worker"]) == 0)
    batches: Records = ordered[np.append(True, ~again)]
    return batches


def _middle(batches: Records) -> tuple[int, int]:
    """Return a window in which each worker has about BATCHES_SHOWN batches."""
    workers = len(np.unique(batches["worker"]))
    count = min(len(batches), BATCHES_SHOWN * workers)
    first = (len(batches) - count) // 2
    return int(batches["started_ns"][first]), int(batches["responded_ns"][first : first + count].max())


def _take_row(free_at: list[int], batch: Records, worker: int) -> int:
    begin, end = int(batch["started_ns"]), int(batch["responded_ns"])
    row = next((at for at, free in enumerate(free_at) if free <= begin), None)
    if row is None and len(free_at) < SUB_ROWS:
        row = len(free_at)
        free_at.append(0)
    row = int(np.argmin(free_at)) if row is None else row
    free_at[row] = max(free_at[row], end)
    return worker * SUB_ROWS + row


def _device_span(event: dict[str, object]) -> Span | None:
    category, name = event.get("cat"), str(event.get("name", ""))
    kind = None
    if category == "kernel":
        kind = "compute"
    elif category == "gpu_memcpy":
        kind = "copy in" if "HtoD" in name else "copy out" if "DtoH" in name else None
    arguments = event.get("args")
    if kind is None or not isinstance(arguments, dict):
        return None
    return Span(kind, int(arguments["stream"]), float(str(event["ts"])), float(str(event["dur"])))


def _stream_name(stream: int, spans: Sequence[Span]) -> str:
    kinds = {span.kind for span in spans if span.stream == stream}
    return "copies in" if kinds == {"copy in"} else f"lane (stream {stream})"
