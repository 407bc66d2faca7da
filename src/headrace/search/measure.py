"""Makes a search's runs: of a design, each in fresh processes, or against a server that stays up between them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from headrace.bench import run
from headrace.bench.run import RunFiles, run_benchmark
from headrace.config import LoadConfig, RunConfig
from headrace.errors import OutputError
from headrace.files import writing
from headrace.search.trial import TRIALS, Trial, read_trial
from headrace.target import run as target_run
from headrace.target.run import Files, run_target


class Watcher(run.Watcher, target_run.Watcher, Protocol):
    """Shows either kind of run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a search writes."""

    folder: Path
    command: tuple[str, ...] = ()  # as typed
    calibration: Path | None = None


def prepare_folder(folder: Path, results: Sequence[str], *, overwrite: bool) -> None:
    """Make the folder of a search, or empty one of an earlier search. Raises OutputError."""
    mine = [folder / name for name in (TRIALS, *results)]
    with writing(folder, "mend the permissions, or choose another --output-dir"):
        if folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise OutputError(f"{folder}: exists already; choose another --output-dir, or add --overwrite")
            for path in mine:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
        (folder / TRIALS).mkdir(parents=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignRuns:
    """Runs of one configuration of a design."""

    config: RunConfig  # its load is replaced
    bound_s: float
    place: Place
    watcher: Watcher
    shared: Path  # for what all runs need, reference answers and compiled code; who made this folder removes it

    def __call__(self, name: str, load: LoadConfig) -> Trial:
        """Run, and read what the run's folder says. Raises what `run_benchmark` raises."""
        folder = self.place.folder / TRIALS / name
        model = self.config.model
        if model.compile and model.compile_cache is None:
            model = replace(model, compile_cache=self.shared / "compiled")
        config = replace(self.config, model=model, limits=False, load=_as_here(load, self.config.load))
        run_benchmark(
            config, RunFiles(output_dir=folder, reference_cache=self.shared), self.place.command, self.watcher
        )
        return read_trial(folder, self.bound_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRuns:
    """Runs against a server. It stays up between them; a null server starts anew, being there for the run only."""

    config: RunConfig
    bound_s: float
    place: Place
    watcher: Watcher

    def __call__(self, name: str, load: LoadConfig) -> Trial:
        """Run, and read what the run's folder says. Raises what `run_target` raises."""
        folder = self.place.folder / TRIALS / name
        config = replace(self.config, load=_as_here(load, self.config.load))
        files = Files(output_dir=folder, calibration=self.place.calibration)
        run_target(config, files, self.place.command, self.watcher)
        return read_trial(folder, self.bound_s)


def _as_here(load: LoadConfig, usual: LoadConfig) -> LoadConfig:
    """Return the load with what it shares with all runs."""
    return replace(
        load, num_iters=1, warmup_iters=usual.warmup_iters, stall_timeout_s=usual.stall_timeout_s, keep_answers=False
    )
