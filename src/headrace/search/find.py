"""`headrace capacity` as a whole: makes the runs, reads them back, and writes what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from headrace.bench.summary import encode
from headrace.config import RunConfig
from headrace.search import capacity_report, measure
from headrace.search.capacity import Budget, Search, SearchConfig
from headrace.search.capacity import Watcher as SearchWatcher
from headrace.search.capacity_report import CapacityReport
from headrace.search.measure import DesignRuns, Place, TargetRuns, prepare_folder
from headrace.search.trial import read_trials
from headrace.study.finished import write_atomically


class Watcher(SearchWatcher, measure.Watcher, Protocol):
    """Shows the search and its runs."""


def find_capacity(
    run: RunConfig, config: SearchConfig, place: Place, watcher: Watcher, *, overwrite: bool = False
) -> CapacityReport:
    """Search, and write the folder. Raises what a run raises where it has nothing to write."""
    results = (capacity_report.FILE_NAME, capacity_report.PAGE_NAME)
    prepare_folder(place.folder, results, overwrite=overwrite)
    kind = DesignRuns if run.target is None else TargetRuns
    runs = kind(config=run, bound_s=config.bound.p99_s, place=place, watcher=watcher)
    Search(config, runs, watcher, Budget(config.time_s)).run()
    report = read_report(place.folder, run.experiment, config)
    write_atomically(place.folder / capacity_report.FILE_NAME, encode(report).decode())
    write_atomically(place.folder / capacity_report.PAGE_NAME, capacity_report.page(report))
    return report


def read_report(folder: Path, experiment: str, config: SearchConfig) -> CapacityReport:
    """Return the report of a search's runs, from their folders alone. Raises OutputError."""
    return capacity_report.capacity_report(experiment, config, read_trials(folder, config.bound.p99_s))
