"""Runs against null servers, as tests want them: short, on a machine that is busy with other things."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headrace.bench.record import PHASES, STATUSES
from headrace.config import InputConfig, LoadConfig, RunConfig, TargetConfig
from headrace.target.run import Files, Outcome, run_target


class Silent:
    def tell(self, text):
        pass

    def stage(self, text):
        pass

    def watch(self, counters, generators, planned):
        pass

    def look(self):
        pass


def measure(folder: Path, url: str, load: LoadConfig, watcher=None, rows: int = 1, **target) -> Outcome:
    config = RunConfig(
        inputs=InputConfig(kind="random", batch_size=rows), load=load, target=TargetConfig(url=url, **target)
    )
    files = Files(output_dir=folder / "run", overwrite=True, calibration=folder / "none.json")
    return run_target(config, files, (), watcher or Silent())


def poisson(rate: float, duration_s: float) -> LoadConfig:
    return LoadConfig(kind="poisson", rate=rate, duration_s=duration_s)


def answered(outcome: Outcome):
    """Return the measured requests that were answered rightly."""
    records = outcome.records
    chosen = (records["phase"] == PHASES.index("measured")) & (records["status"] == STATUSES.index("ok"))
    return records[chosen]


def percentiles(values, *shares):
    return np.percentile(np.asarray(values, dtype=np.float64), shares)
