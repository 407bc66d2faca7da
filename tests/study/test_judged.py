"""The judgment on the published experiment: of a claim, there and here, and as a page made from committed runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

from headrace.study.compare import ComparedRow
from headrace.study.intervals import Runs
from headrace.study.published import claims
from headrace.study.quantities import THROUGHPUT
from headrace.study.verdict import verdict
from headrace.study.welch import Moments

ROOT = Path(__file__).parents[2]
RUNS = "benchmarks/results/nvidia-h100-80gb/published-designs"
SPEC = importlib.util.spec_from_file_location("judged", ROOT / "benchmarks" / "judged.py")
judged = importlib.util.module_from_spec(SPEC)
sys.modules["judged"] = judged
SPEC.loader.exec_module(judged)

BETTER = next(claim for claim in claims() if claim.metric is THROUGHPUT and claim.better)
FIVE = (98.0, 99.0, 100.0, 101.0, 102.0)


def trial(factor=1.0, *, base=None, candidate=None):
    values = tuple(value * factor for value in FIVE)
    compared = verdict(THROUGHPUT, Runs(values=FIVE), Runs(values=values))
    row = ComparedRow(compared=compared, base=100.0, candidate=100.0 * factor)
    return judged.Trial(claim=BETTER, batch_size=128, base=base, candidate=candidate, row=row)


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.2, "held"), (0.8, "did not hold"), (1.01, "could not be told"), (1.0, "could not be told")],
)
def test_a_claim_holds_by_the_verdict_that_compare_gives(factor, outcome):
    assert trial(factor).outcome == outcome


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        pytest.param(120.0, 5.0, "supported", id="larger than chance"),
        pytest.param(80.0, 5.0, "the opposite", id="the other way"),
        pytest.param(101.0, 5.0, "not to be told", id="smaller than ten runs can tell"),
        pytest.param(105.0, 6.0, "not to be told", id="not so small, and the spread is wide"),
    ],
)
def test_whether_ten_runs_could_tell_it(mean, std, words):
    base, candidate = Moments(mean=100.0, std=5.0, n=10), Moments(mean=mean, std=std, n=10)
    assert trial(base=base, candidate=candidate).there == words


def test_what_was_not_published_cannot_be_judged_there():
    assert trial(base=Moments(mean=100.0, std=5.0, n=10)).there == "no table published"
    assert trial(base=Moments(mean=100.0, std=5.0, n=10)).smallest > 1.05


def test_the_committed_page_is_the_one_that_its_runs_make(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path(RUNS)
    page = (path / "judged.md").read_text(encoding="utf-8")
    trials, comparisons = judged.judge_all(path)
    command = f"python benchmarks/judged.py {RUNS} --output {RUNS}/judged.md"
    assert judged.render(trials, comparisons, command) == page
