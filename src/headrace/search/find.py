"""`headrace capacity` and `headrace tune` as a whole: make the runs, and write what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from headrace.bench.summary import encode
from headrace.config import LoadConfig, RunConfig
from headrace.files import write_whole
from headrace.search import capacity_report, measure, tune_report
from headrace.search.capacity import Budget, Search, SearchConfig
from headrace.search.capacity import Watcher as SearchWatcher
from headrace.search.capacity_report import CapacityReport
from headrace.search.measure import DesignRuns, Place, TargetRuns, prepare_folder
from headrace.search.optimiser import OptunaOptimiser, require_optuna
from headrace.search.space import Choice
from headrace.search.trial import Trial, read_trials
from headrace.search.tune import TuneConfig, Tuning
from headrace.search.tune_report import TuneReport


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
    write_whole(place.folder / capacity_report.FILE_NAME, encode(report))
    write_whole(place.folder / capacity_report.PAGE_NAME, capacity_report.page(report))
    return report


def read_report(folder: Path, experiment: str, config: SearchConfig) -> CapacityReport:
    """Return the report of a search's runs, from their folders alone. Raises OutputError."""
    return capacity_report.capacity_report(experiment, config, read_trials(folder, config.bound.p99_s))


Configure = Callable[[Choice], RunConfig]  # raises InvalidOption for options that cannot go together


def find_options(
    configure: Configure, config: TuneConfig, place: Place, watcher: Watcher, *, overwrite: bool = False
) -> TuneReport:
    """Search, and write the folder. Raises RunFailed where no options hold the bound, and what a run raises."""
    require_optuna()
    results = (
        tune_report.FILE_NAME,
        tune_report.PAGE_NAME,
        tune_report.DEPLOYMENT_NAME,
        tune_report.PICTURE_NAME,
    )
    prepare_folder(place.folder, results, overwrite=overwrite)

    def run(choice: Choice, name: str, load: LoadConfig) -> Trial:
        return DesignRuns(config=configure(choice), bound_s=config.bound.p99_s, place=place, watcher=watcher)(
            name, load
        )

    tuning = Tuning(
        config=config,
        measure=run,
        in_flight=lambda choice: configure(choice).transport.ring_slots,
        watcher=watcher,
        budget=Budget(config.time_s),
    )
    tuning.search(OptunaOptimiser(config.space, config.seed))
    report = tune_report.tune_report(config, tuning.tried, tuning.finals())
    write_report(report, configure(report.winner), place.folder)
    return report


def write_report(report: TuneReport, winner: RunConfig, folder: Path) -> None:
    """Write everything that tells of a search. Raises OutputError."""
    write_whole(folder / tune_report.FILE_NAME, encode(report))
    write_whole(folder / tune_report.PAGE_NAME, tune_report.page(report))
    write_whole(folder / tune_report.DEPLOYMENT_NAME, tune_report.deployment_toml(report, winner))
    tune_report.draw(report, folder / tune_report.PICTURE_NAME)
