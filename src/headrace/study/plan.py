"""Which runs a sweep makes, and in which order: decided, and written down, before the first one starts.

A repeat is a block that holds every cell once, in an order of its own. The machine drifts over hours (heat,
clocks, neighbours); with repeats back to back, drift would look like a difference between cells. Source:
randomised complete block designs; NIST/SEMATECH e-Handbook of Statistical Methods, 5.3.3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import msgspec
import numpy as np

from headrace.config import DESIGN_NAMES, PUBLISHED_DESIGNS, DesignConfig, DesignName, require
from headrace.errors import InvalidOption, OutputError

SCHEMA_VERSION = 1
FILE_NAME = "plan.json"
COMPILE_MODES = ([False], [True], [False, True])  # off, on, both


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """The cells to measure, as the product of four lists, and how often."""

    designs: tuple[DesignName, ...] = PUBLISHED_DESIGNS
    workers: tuple[int, ...] = (1, 2, 3, 4)
    batch_sizes: tuple[int, ...] = (1, 32, 64, 128, 256)
    compile: tuple[bool, ...] = (False, True)
    repeats: int = 10  # blocks; a comparison wants at least 5
    seed: int = 0  # of the order within the blocks
    num_iters: int = 100  # measured requests of each run
    child_options: tuple[str, ...] = ()  # passed on to every `headrace bench` as they are

    def validate(self) -> None:
        """Raise InvalidOption for lists that are empty, repeat themselves or hold what no run could use."""
        for option, values in self._lists():
            require(len(values) > 0, f"{option}: the list is empty; name at least 1 value")
            require(
                len(set(values)) == len(values),
                f"{option} {_joined(values)}: a value stands twice; name each once, and use --repeats to repeat",
            )
        for design in self.designs:
            known = ", ".join(DESIGN_NAMES)
            require(design in DESIGN_NAMES, f"--designs {design}: there is no such design; choose from {known}")
        require(min(self.workers) >= 1, f"--workers {min(self.workers)}: at least 1 worker must predict")
        modes = " ".join("on" if compiled else "off" for compiled in self.compile) or "nothing"
        require(sorted(self.compile) in COMPILE_MODES, f"--compile {modes}: choose off, on or both")
        smallest = min(self.batch_sizes)
        require(smallest >= 1, f"--batch-sizes {smallest}: a request has at least 1 row")
        require(self.repeats >= 1, f"--repeats {self.repeats}: at least 1 is needed")
        require(self.seed >= 0, f"--order-seed {self.seed}: must be 0 or above")
        require(self.num_iters >= 1, f"--num-iters {self.num_iters}: at least 1 request must be measured")

    def _lists(self) -> tuple[tuple[str, Sequence[object]], ...]:
        return (
            ("--designs", self.designs),
            ("--workers", self.workers),
            ("--batch-sizes", self.batch_sizes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run: a cell of one block."""

    name: str  # of its folder; unique within the plan
    design: DesignName
    num_workers: int
    batch_size: int
    compile: bool
    repeat: int

    @property
    def experiment(self) -> str:
        return DesignConfig(name=self.design, num_workers=self.num_workers).experiment


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A combination that the designs refuse, at whatever batch size."""

    design: DesignName
    num_workers: int
    compile: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What plan.json holds. Its `runs` are the order; they are not drawn again on resuming."""

    schema_version: int
    config: SweepConfig
    runs: tuple[PlannedRun, ...]
    left_out: tuple[LeftOut, ...]

    @classmethod
    def of(cls, config: SweepConfig) -> Plan:
        return cls(
            schema_version=SCHEMA_VERSION,
            config=config,
            runs=tuple(plan(config)),
            left_out=tuple(left_out(config)),
        )


def plan(config: SweepConfig) -> list[PlannedRun]:
    """Return every run in order: `repeats` blocks, each with every valid cell once, shuffled by the seed.

    Raises InvalidOption where the options are wrong or every cell is refused.
    """
    config.validate()
    cells = list(_cells(config))
    if not cells:
        reasons = "; ".join(dict.fromkeys(cell.reason for cell in left_out(config)))
        raise InvalidOption(f"no cell of this sweep can run: {reasons}")
    return [run for repeat in range(config.repeats) for run in _block(cells, repeat, config.seed)]


def left_out(config: SweepConfig) -> list[LeftOut]:
    """Return the combinations of design, workers and compile that are not planned, and the reason."""
    combinations = product(config.designs, config.workers, config.compile)
    return [
        LeftOut(design=design, num_workers=workers, compile=compiled, reason=reason)
        for design, workers, compiled in combinations
        if (reason := _refusal(design, workers, compiled))
    ]


def differing_options(planned: SweepConfig, asked: SweepConfig) -> list[str]:
    """Return one line per option that differs, as `name: planned value, not asked value`."""
    pairs = ((field.name, getattr(planned, field.name), getattr(asked, field.name)) for field in fields(planned))
    return [f"{name}: {old}, not {new}" for name, old, new in pairs if old != new]


def load_plan(sweep_dir: Path) -> Plan | None:
    """Read a sweep's plan, or return None where the folder has none. Raises OutputError for a damaged one."""
    path = sweep_dir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); mend that or use another folder") from error
    except msgspec.MsgspecError as error:
        raise OutputError(
            f"{path}: not a plan of version {SCHEMA_VERSION} ({error}); use another folder for a new sweep"
        ) from error


def _cells(config: SweepConfig) -> Iterator[PlannedRun]:
    for design, workers, batch_size, compiled in product(
        config.designs, config.workers, config.batch_sizes, config.compile
    ):
        if _refusal(design, workers, compiled) is None:
            yield _planned(design, workers, batch_size, compiled)


def _planned(design: DesignName, workers: int, batch_size: int, compiled: bool) -> PlannedRun:
    mode = "compiled" if compiled else "eager"
    return PlannedRun(
        name=f"b{batch_size:03d}-{mode}-{design}-w{workers}",
        design=design,
        num_workers=workers,
        batch_size=batch_size,
        compile=compiled,
        repeat=0,
    )


def _block(cells: Sequence[PlannedRun], repeat: int, seed: int) -> Iterator[PlannedRun]:
    """Yield the cells in this block's order. Each block has a generator of its own, whatever came before."""
    for index in np.random.default_rng([seed, repeat]).permutation(len(cells)):
        cell = cells[index]
        yield PlannedRun(
            name=f"r{repeat}-{cell.name}",
            design=cell.design,
            num_workers=cell.num_workers,
            batch_size=cell.batch_size,
            compile=cell.compile,
            repeat=repeat,
        )


def _refusal(design: DesignName, workers: int, compiled: bool) -> str | None:
    try:
        DesignConfig(name=design, num_workers=workers).validate(compiled=compiled)
    except InvalidOption as refused:
        return str(refused)
    return None


def _joined(values: Sequence[object]) -> str:
    return " ".join(str(value) for value in values)
