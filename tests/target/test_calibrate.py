"""A calibration holds what was measured against what the law says."""

import io

import numpy as np
import pytest
from rich.console import Console

from headrace.errors import RunFailed
from headrace.target import calibrate, live
from headrace.target.law import Law
from tests.target.running import Silent
from tests.target.test_law import lindley

MS = 1_000_000


def test_the_truth_is_the_laws_queue_over_the_plan():
    offsets = np.cumsum(np.random.default_rng(0).exponential(6 * MS, 500)).astype(np.int64)
    law = Law(kind="exponential", service_ns=5 * MS, seed=3)
    truth = calibrate.true_response_ns(law, offsets)
    assert (truth + offsets).tolist() == lindley(offsets, law.service_times_ns()[:500]).tolist()


def test_every_law_is_tried_with_a_photograph_and_a_stall_among_them():
    tried = calibrate.trials(5.0)
    assert {trial.payload_bytes for trial in tried} == {1_024, 750_000}
    assert sum("stall=1s&stall_at=1s" in trial.law for trial in tried) == 1
    assert {trial.law.partition("?")[0] for trial in tried} == {"null://fixed", "null://exponential"}


def test_errors_slip_and_ceilings_are_told(monkeypatch):
    monkeypatch.setattr(calibrate, "trials", lambda _: (calibrate.Trial("null://fixed?service=20ms", 20),))
    monkeypatch.setattr(calibrate, "PAYLOADS", (1_024,))
    made = calibrate.calibrate(1, 0.8, Silent())
    (recovered,), (ceiling,) = made.recovered, made.ceilings
    assert recovered.true_p50_s == pytest.approx(0.02, rel=0.5)
    assert recovered.p50_error > -0.001, "a machine adds time, and takes none away"
    assert recovered.p99_error > -0.001
    assert 0 <= made.slip.p50 <= made.slip.p90 <= made.slip.p99 <= made.slip.max
    assert ceiling.requests_per_s > 0 < ceiling.p50_s <= ceiling.p99_s
    console = Console(width=160, file=io.StringIO())
    for table in live.calibration_tables(made):
        console.print(table)
    assert f"{ceiling.requests_per_s:,.0f}" in console.file.getvalue()


def test_a_trial_that_does_not_count_ends_the_calibration(monkeypatch):
    monkeypatch.setattr(calibrate, "trials", lambda _: (calibrate.Trial("null://fixed?service=1ms&wrong=1", 50),))
    with pytest.raises(RunFailed, match="answers are wrong"):
        calibrate.calibrate(1, 0.5, Silent())
