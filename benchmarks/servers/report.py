"""From the raw results of a comparison to its table: `python benchmarks/servers/report.py DIR`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
CEILING_SHARE = 0.5  # of what the null server answers, from which on the client may be what limits
HEAD = (
    "| server | requests/s | samples/s | p50 ms | p99 ms | errors | answers checked | wrong | server's cores"
    " | busiest client process | RSS MiB | PSS MiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
STEADY = (0.9, 1.1)  # of Little's law; outside of it the window was too short for such latencies


def read(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def table(folder: Path) -> str:
    """Return Markdown: for each load a table of servers, medians over the repeats, with the least and the most."""
    records = read(folder)
    measured = [record for record in records if record["status"] == "measured"]
    loads = dict.fromkeys((record["rows"], record["connections"]) for record in measured)
    parts = []
    for rows, connections in loads:
        found = [record for record in measured if (record["rows"], record["connections"]) == (rows, connections)]
        names = dict.fromkeys(record["server"] for record in found)
        ceiling = max((record["requests_per_s"] for record in found if record["server"] == "null"), default=None)
        lines = [_line(name, [record for record in found if record["server"] == name], ceiling) for name in names]
        parts.append(f"### {connections} connections, {rows} rows a request\n\n{HEAD}\n" + "\n".join(lines))
    return "\n\n".join([*parts, _ready(records), *_missing(records)]) + "\n"


def one_line(record: Record) -> str:
    """Return what a record says, for the screen."""
    what = f"{record['server']} (repeat {record['repeat']})"
    if record["status"] == "ready":
        return f"{what}: ready after {record['ready_s']:.1f} s"
    what += f", {record['connections']} connections, {record['rows']} rows"
    if record["status"] != "measured":
        return f"{what}: {record['status']}: {record['reason']}"
    p50, p99 = (record[name] if record[name] is not None else float("nan") for name in ("p50_ms", "p99_ms"))
    return (
        f"{what}: {record['requests_per_s']:.0f} requests/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms,"
        f" errors {record['errors']}, wrong {record['wrong']} of {record['checked']}"
    )


def _line(name: str, records: Sequence[Record], ceiling: float | None) -> str:
    faults = sum(sum(record["errors"].values()) for record in records)
    steady = all(STEADY[0] <= record["occupancy"] <= STEADY[1] for record in records)
    sound = steady and not faults
    throughput, samples = (_spread(records, key, ".0f") for key in ("requests_per_s", "samples_per_s"))
    if name != "null" and _client_limited(records, ceiling):
        name += ", client-limited"
    if not steady:
        name += ", not steady"
    cells = [
        name,
        throughput if sound else f"({throughput})",
        samples if sound else f"({samples})",
        _spread(records, "p50_ms", ".2f"),
        _spread(records, "p99_ms", ".2f"),
        str(faults),
        str(sum(record["checked"] for record in records)),
        str(sum(record["wrong"] for record in records)),
        _spread(records, "server_cores", ".2f"),
        f"{max(max(record['client_cores']) for record in records):.2f}",
        *(f"{max(record[key] for record in records) / 2**20:.0f}" for key in ("rss_bytes", "pss_bytes")),
    ]
    return "| " + " | ".join(cells) + " |"


def _client_limited(records: Sequence[Record], ceiling: float | None) -> bool:
    if any(record["client_busy"] for record in records):
        return True
    most = max(float(record["requests_per_s"]) for record in records)
    return ceiling is not None and most > CEILING_SHARE * ceiling


def _spread(records: Sequence[Record], key: str, form: str) -> str:
    values = [record[key] for record in records if record[key] is not None]
    if not values:
        return ""
    middle = format(statistics.median(values), form)
    least, most = format(min(values), form), format(max(values), form)
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def _ready(records: Sequence[Record]) -> str:
    lines = ["### Start", "", "| server | ready after s | how its workers run the model |", "|---|---|---|"]
    found = [record for record in records if record["status"] == "ready"]
    for name in dict.fromkeys(record["server"] for record in found):
        own = [record for record in found if record["server"] == name]
        said = dict.fromkeys(worker["model"] for record in own for worker in record["workers_said"])
        lines.append(f"| {name} | {_spread(own, 'ready_s', '.1f')} | {'; '.join(said)} |")
    return "\n".join(lines)


def _missing(records: Sequence[Record]) -> list[str]:
    left_out = [record for record in records if record["status"] in ("skipped", "failed")]
    if not left_out:
        return []
    lines = [f"- {one_line(record).splitlines()[0]}" for record in left_out]
    return ["### Not measured\n\n" + "\n".join(lines)]


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1])))
