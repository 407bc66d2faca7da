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
from headrace.config import LoadConfig, RunConfig
from headrace.report.read import BURST, WITHOUT_PLAN, Run
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
# What says nothing of a server that was named by its URL; where it listens and how it was compared touch no timing.
_OF_DESIGNS = (
    *("model.", "design.", "lanes.", "transport."),
    *("target.url", "target.access.", "target.reference", "target.tolerance"),
)
LOAD_KIND = "load.kind"
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
_ALWAYS_SAID = (
    "model.name",
    "model.precision",
    "model.compile",
    "inputs.wire",
    "load.kind",
)  # where it varies; the rest where unusual
_WORDS = {
    ("model.compile", True): "compiled",
    ("model.compile", False): "not compiled",
    ("profile", True): "profiled",
    ("lanes.fuse_epilogues", None): "fusing auto",
    ("lanes.pointwise_as_matmul", None): "matmul auto",
    ("lanes.stem", "auto"): "stem auto",
    ("lanes.fuse_epilogues", True): "all fused",
    ("lanes.fuse_epilogues", False): "not fused",
    ("lanes.pointwise_as_matmul", True): "1x1 as matmul",
    ("lanes.pointwise_as_matmul", False): "no matmul",
    ("lanes.stem", "keep"): "stem kept",
    ("lanes.stem", "space-to-depth"): "stem s2d",
}
_ABSENT = "absent"
Options = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Trait:
    """What an option of a cell is, in words, and whether that goes without saying."""

    word: str
    usual: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Repeats of one measurement, at least one. `traits` are what it shares with its neighbours along a plot's axis."""

    runs: tuple[Run, ...]
    traits: Mapping[str, Trait]  # by option
    batch_size: int

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(trait.word for trait in self.traits.values())

    @property
    def experiment(self) -> str:
        return self.runs[0].summary.experiment

    @property
    def unusual(self) -> str:
        """Return what tells the cell's series from others of its experiment."""
        told = (trait for name, trait in self.traits.items() if name not in (*_IN_EXPERIMENT, LOAD_KIND))
        return " · ".join(trait.word for trait in told if not trait.usual)

    @property
    def label(self) -> str:
        return " · ".join(part for part in (self.experiment, self.unusual) if part)

    @property
    def load(self) -> LoadConfig:
        return self.runs[0].load

    @property
    def is_open(self) -> bool:
        """Return whether requests were sent by a plan that does not wait for answers."""
        return self.load.kind not in WITHOUT_PLAN

    @property
    def load_in_short(self) -> str:
        """Return what tells the load from others of a plot."""
        load = self.load
        if load.rate is not None:
            return f"{load.kind} {load.rate:,.6g}/s"
        return load.kind if load.concurrency is None else f"{load.concurrency} in flight"

    @property
    def load_words(self) -> str:
        options = self.runs[0].summary.options
        in_ring = options.transport.name == "ring" and self.load.kind == BURST
        return self.load.words + (f", {options.transport.ring_slots} in flight" if in_ring else "")


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
        grouped.setdefault(f"{runs[at].summary.experiment} {sorted(each.items())}", []).append(at)
    cells = [
        Cell(
            runs=tuple(runs[at] for at in places),
            traits=_traits(runs[places[0]], options[places[0]], varying),
            batch_size=runs[places[0]].summary.options.inputs.batch_size,
        )
        for places in grouped.values()
    ]
    return tuple(sorted(cells, key=_order))


def _order(cell: Cell) -> tuple[object, ...]:
    load = cell.load
    rank = experiment_rank(cell.experiment)
    return (rank, cell.label, cell.batch_size, load.kind, load.rate or 0.0, load.concurrency or 0, load.num_iters)


def _options(run: Run) -> dict[str, object]:
    """Return what decides which cell a run is in, by `section.name`."""
    summary = run.summary
    flat: dict[str, object] = {}
    built: object = msgspec.to_builtins(summary.options, enc_hook=str)
    _flatten("", built, flat)
    kept = {name: value for name, value in flat.items() if name not in _IGNORED}
    if summary.options.target is not None:
        return {name: value for name, value in kept.items() if not name.startswith(_OF_DESIGNS)}
    if kept.get("design.name") != "lanes":
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
    """Return the names of the options that differ between the runs that have them."""
    names = dict.fromkeys(name for each in options for name in each)
    values = {name: {str(each[name]) for each in options if name in each} for name in names}
    return tuple(name for name in names if len(values[name]) > 1 or name == "lanes.buckets")


def _traits(run: Run, options: Options, varying: Sequence[str]) -> dict[str, Trait]:
    """Return what a series is, by option, of those that vary: its design first."""
    summary = run.summary
    if summary.options.target is not None or summary.experiment != summary.options.experiment:  # no design of ours
        traits = {"design.name": Trait(summary.experiment, usual=False)}
    else:
        traits = {"design.name": Trait(summary.options.design.experiment, usual=False)}
        for name in ("transport.name", "transport.client"):
            traits[name] = Trait(str(options[name]), usual=False)
    for name in varying:
        if name in _AXES or name in _IN_EXPERIMENT or name not in options:
            continue
        usual = name not in _ALWAYS_SAID and options[name] == _USUAL.get(name, _ABSENT)
        traits[name] = Trait(_words(name, options[name]), usual)
    return traits


def _words(name: str, value: object) -> str:
    if isinstance(value, str | bool | None) and (name, value) in _WORDS:
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
