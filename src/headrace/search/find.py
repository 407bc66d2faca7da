"""`headrace capacity` and `headrace tune` as a whole: make the runs, and write what they say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    bound_s = config.bound.p99_s
    with _shared_folder() as shared:
        runs = (
            DesignRuns(config=run, bound_s=bound_s, place=place, watcher=watcher, shared=shared)
            if run.target is None
            else TargetRuns(config=run, bound_s=bound_s, place=place, watcher=watcher)
        )
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

    with _shared_folder() as shared:

        def run(choice: Choice, name: str, load: LoadConfig) -> Trial:
            own = configure(choice)
            runs = DesignRuns(config=own, bound_s=config.bound.p99_s, place=place, watcher=watcher, shared=shared)
            return runs(name, load)

        tuning = Tuning(
            config=config,
            measure=run,
            in_flight=lambda choice: configure(choice).transport.ring_slots,
            watcher=watcher,
            budget=Budget(config.time_s),
        )
        tuning.search(OptunaOptimiser(config.space, config.seed))
        finals = tuning.finals()
    report = tune_report.tune_report(config, tuning.tried, finals)
    write_report(report, configure(report.winner), place.folder)
    return report


def write_report(report: TuneReport, winner: RunConfig, folder: Path) -> None:
    """Write everything that tells of a search. Raises OutputError."""
    write_whole(folder / tune_report.FILE_NAME, encode(report))
    write_whole(folder / tune_report.PAGE_NAME, tune_report.page(report))
    write_whole(folder / tune_report.DEPLOYMENT_NAME, tune_report.deployment_toml(report, winner))
    tune_report.draw(report, folder / tune_report.PICTURE_NAME)


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """Give a folder for what the runs of one search share. It is gone at the end: compiled programs take 20 MB."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        yield Path(folder)
