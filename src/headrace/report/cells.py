"""Which runs are repeats of one another, and what a table or a plot calls them.

Runs are alike if nothing differs but what touches no timing. Machines are told apart by the facts that decide
(`bench.environment.differences`), and are never in one table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.bench.environment import differences
from headrace.config import RunConfig
from headrace.report.read import BURST, LoadFacts, Run
from headrace.study.finished import experiment_rank

# What touches no timing, or differs between repeats: where files lie, how long to wait for what never comes, seeds.
_IGNORED = (
    "device",
    "limits",
    "telemetry_interval_s",
    "model.model_dir",
    "model.download",
    "model.compile_cache",
    "inputs.memory_limit_bytes",
    "load.keep_answers",
    "load.seed",
    "load.stall_timeout_s",
    "load.request_timeout_s",
    "load.warmup_iters",
)
_IN_EXPERIMENT = ("design.name", "design.num_workers", "transport.name", "transport.client")
# What a plot has as its axis. Everything else makes another series.
_AXES = (
    "inputs.batch_size",
    "load.num_iters",
    "load.rate",
    "load.concurrency",
    "load.duration_s",
    "transport.ring_slots",  # follows from batch size and lanes, unless it was given
)
_ALWAYS_SAID = ("model.name", "model.precision", "model.compile", "inputs.wire")  # where it varies; the rest where unusual
_WORDS = {
    ("model.compile", True): "compiled",
    ("model.compile", False): "not compiled",
    ("profile", True): "profiled",
    ("lanes.fuse_epilogues", True): "fused",
    ("lanes.fuse_epilogues", False): "not fused",
    ("lanes.pointwise_as_matmul", True): "1x1 as matmul",
    ("lanes.pointwise_as_matmul", False): "no matmul",
    ("lanes.stem", "keep"): "stem kept",
    ("lanes.stem", "space-to-depth"): "stem s2d",
}
_ABSENT = "absent"
Options = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Repeats of one measurement, at least one. `series` is what it shares with its neighbours along a plot's axis."""

    runs: tuple[Run, ...]
    series: tuple[str, ...]  # words
    batch_size: int
    load: LoadFacts

    @property
    def label(self) -> str:
        return " · ".join(self.series)

    @property
    def load_words(self) -> str:
        load = self.load
        count = "" if load.num_iters is None else f" of {load.num_iters:,}"
        if load.kind == BURST:
            options = self.runs[0].summary.options
            in_ring = f", {options.transport.ring_slots} in flight" if options.transport.name == "ring" else ""
            return f"burst{count}{in_ring}"
        if load.kind == "closed":
            return f"closed, {load.concurrency} in flight"
        return load.kind if load.rate is None else f"{load.kind}, {load.rate:,.4g}/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Runs of one machine, driver, torch and Python, as cells."""

    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        first = self.runs[0].summary
        return first.environment.device_name(first.options.device)


def machines(runs: Sequence[Run]) -> tuple[Machine, ...]:
    """Tell runs apart by machine, in order of name, and group each machine's into cells."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((group for group in groups if _same_machine(group[0], run)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    return tuple(Machine(runs=tuple(group), cells=_cells(group)) for group in groups)


def _same_machine(a: Run, b: Run) -> bool:
    kinds = {run.summary.options.device_kind for run in (a, b)}
    return len(kinds) == 1 and not differences(a.summary.environment, b.summary.environment)


def _cells(runs: Sequence[Run]) -> tuple[Cell, ...]:
    options = [_options(run) for run in runs]
    varying = _varying(options)
    grouped: dict[str, list[int]] = {}
    for at, each in enumerate(options):
        key = f"{runs[at].summary.experiment} {runs[at].summary.options.inputs.batch_size} {sorted(each.items())}"
        grouped.setdefault(key, []).append(at)
    cells = [
        Cell(
            runs=tuple(runs[at] for at in places),
            series=_series(runs[places[0]], options[places[0]], varying),
            batch_size=runs[places[0]].summary.options.inputs.batch_size,
            load=runs[places[0]].load,
        )
        for places in grouped.values()
    ]
    return tuple(sorted(cells, key=_order))


def _order(cell: Cell) -> tuple[object, ...]:
    load = cell.load
    rank = experiment_rank(cell.runs[0].summary.experiment)
    return (rank, cell.label, cell.batch_size, load.kind, load.rate or 0.0, load.concurrency or 0, load.num_iters or 0)


def _options(run: Run) -> dict[str, object]:
    """Return what decides which cell a run is in, by `section.name`."""
    summary = run.summary
    flat: dict[str, object] = {}
    built: object = msgspec.to_builtins(summary.options, enc_hook=str)
    _flatten("", built, flat)
    kept = {name: value for name, value in flat.items() if name not in _IGNORED}
    if summary.options.design.name != "lanes":
        kept = {name: value for name, value in kept.items() if not name.startswith("lanes.")}
    elif kept.get("lanes.buckets") == (summary.options.inputs.batch_size,):
        del kept["lanes.buckets"]  # follows from the batch size
    return kept


def _flatten(prefix: str, value: object, into: dict[str, object]) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _flatten(f"{prefix}.{name}".lstrip("."), item, into)
    else:
        into[prefix] = tuple(value) if isinstance(value, list) else value


def _varying(options: Sequence[Options]) -> tuple[str, ...]:
    """Return the names of the options that differ between runs, or that only some have."""
    names = dict.fromkeys(name for each in options for name in each)
    return tuple(name for name in names if len({str(each.get(name, _ABSENT)) for each in options}) > 1)


def _series(run: Run, options: Options, varying: Sequence[str]) -> tuple[str, ...]:
    """Return the words that tell a series from the others: its experiment, and what is unusual about it."""
    words = [run.summary.experiment]
    if "load.kind" in varying:
        words.append(run.load.kind)
    for name in varying:
        if name in _AXES or name in _IN_EXPERIMENT or name == "load.kind" or name not in options:
            continue
        if name in _ALWAYS_SAID or options[name] != _USUAL.get(name, _ABSENT):
            words.append(_words(name, options[name]))
    return tuple(words)


def _words(name: str, value: object) -> str:
    if (name, value) in _WORDS:
        return _WORDS[name, value]
    leaf = name.rpartition(".")[2].replace("_", " ")
    if name == "lanes.buckets" and isinstance(value, tuple):
        return "buckets " + "/".join(str(each) for each in value)
    if name in _ALWAYS_SAID:
        return Path(str(value)).name
    if isinstance(value, bool):
        return leaf if value else f"no {leaf}"
    if isinstance(value, int | float) or value is None:
        return f"{leaf} {value}"
    return f"{leaf} {Path(str(value)).name}" if isinstance(value, str) else f"{leaf} {value!r}"


def _usual() -> dict[str, object]:
    flat: dict[str, object] = {}
    built: object = msgspec.to_builtins(RunConfig(), enc_hook=str)
    _flatten("", built, flat)
    return {name: value for name, value in flat.items() if name != "lanes.buckets"}  # said unless they follow


_USUAL = _usual()
