"""`headrace capacity` against null servers of known law, and for a design: real processes, few and short runs.

What is found must lie where searches with as short runs end when they are simulated, with no machine under them. A busy
machine adds to response times and takes nothing away, so it may find less.
"""

import json

import msgspec
import pytest

from headrace.bench.summary import encode
from headrace.config import InputConfig, LoadConfig, RunConfig, TargetConfig
from headrace.search.capacity import SearchConfig
from headrace.search.capacity_report import CapacityReport
from headrace.search.find import find_capacity, read_report
from headrace.search.holds import Bound
from headrace.search.measure import Place
from tests import commands
from tests.search.queues import Queue, md1_rate, mm1_rate, searched
from tests.target.running import Silent

SHORT = {"duration_s": 3.0, "level_duration_s": 1.0, "repeats": 2, "resolution": 0.05, "time_s": 50.0}
NOISE = 0.15  # of the capacity, at most, that other programs on two busy cores may cost


class Quiet(Silent):
    """Watches a search and its runs, and says nothing."""

    def step(self, text, left_s):
        pass

    def found(self, text):
        pass

    def progress(self, issued, answered, total):
        pass


def search(folder, url: str, p99_s: float) -> CapacityReport:
    run = RunConfig(
        inputs=InputConfig(kind="random", batch_size=1), load=LoadConfig(num_iters=1), target=TargetConfig(url=url)
    )
    config = SearchConfig(bound=Bound(p99_s=p99_s), **SHORT)
    place = Place(folder=folder / "found", calibration=folder / "none.json")
    return find_capacity(run, config, place, Quiet())


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("url", "mean_s", "p99_s"),
    [("null://fixed?service=10ms", 0.01, 0.1), ("null://exponential?mean=10ms&seed=3", 0.01, 0.2)],
    ids=["M/D/1", "M/M/1"],
)
def test_the_capacity_of_a_server_of_known_law_is_found(tmp_path, url, mean_s, p99_s):
    exponential = "exponential" in url
    report = search(tmp_path, url, p99_s)
    simulated = [
        searched(Queue(mean_s, exponential, seed), p99_s=p99_s, seed=100 * seed, **SHORT).requests_per_s
        for seed in range(40)
    ]
    true = (mm1_rate if exponential else md1_rate)(mean_s, p99_s)
    assert min(simulated) < true < max(simulated), "short runs, and off to neither side"
    assert min(simulated) * (1 - NOISE) <= report.requests_per_s <= max(simulated)
    assert read_report(tmp_path / "found", "null-null", report.options) == report, "the folders say it all"
    written = msgspec.json.decode((tmp_path / "found" / "capacity.json").read_bytes(), type=CapacityReport)
    assert written == report
    assert "hold p99" in (tmp_path / "found" / "capacity.md").read_text()
    assert encode(report).decode() == (tmp_path / "found" / "capacity.json").read_text()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where the commands put temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.timeout(120)
def test_a_design_that_cannot_hold_a_bound_is_told_so_by_the_command(tmp_path, temporary):
    ended = commands.run(
        *("capacity", "--p99", "1us", "--design", "lanes", "--model", commands.model_file(tmp_path), "--json"),
        *("--device", "cpu", "--image-size", 48, "--batch-size", 2, "--input", "random", "--distinct-images", 4),
        *("--duration", "500ms", "--output-dir", "found"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["requests_per_s"] is None
    assert "no rate holds p99 0.001 ms: one request alone takes" in told["verdict"]
    assert told["trials"] == ["000-alone"]
    assert (tmp_path / "found" / "trials" / "000-alone" / "requests.parquet").is_file()
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"trials", "capacity.json", "capacity.md"}
    assert list(temporary.glob("headrace-*")) == [], "what the runs shared has gone"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--p99", "20ms", "--url", "null://fixed", "--time", "1s"), "--time 1s: too short for a single rate"),
        (("--p99", "20ms", "--url", "null://fixed", "--compile"), "--compile: is about a design of ours"),
        (
            ("--p99", "20ms", "--url", "null://fixed", "--output-dir", "."),
            "exists already; choose another --output-dir",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, words, message):
    (tmp_path / "file").write_text("")
    ended = commands.call("capacity", *words, cwd=tmp_path)
    assert ended.code in (1, 2)
    assert message in ended.message
