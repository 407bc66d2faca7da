"""`headrace bench`, end to end: whole runs in real processes, and what they leave behind."""

import csv
import io
import json
import platform
from contextlib import ExitStack

import numpy as np
import pytest
from rich.console import Console

from headrace.bench import stats
from headrace.bench.columns import COLUMNS, PUBLISHED
from headrace.bench.present import summary_table
from headrace.bench.record import PHASES, STATUSES, measured, read_records
from headrace.bench.summary import load_summary
from headrace.report import markdown
from headrace.report.model import build
from tests.commands import QUICK, TINY, model_file, run, start

# Enough requests that the window is many of the kernel's 10 ms steps of CPU time.
DESIGNS = {
    "original": ("--design", "original", "--num-iters", "60"),
    "original-ring": ("--design", "original", "--num-iters", "200", "--transport", "ring"),
    "executor": ("--design", "executor", "--num-iters", "60"),
    "executor-ring": ("--design", "executor", "--num-iters", "200", "--transport", "ring", "--ring-slots", "3"),
    "h2d_d2h_threads": ("--design", "h2d_d2h_threads", "--num-iters", "61", "--batch-size", "5"),
    "3_predict_workers": ("--num-workers", "3", "--num-iters", "60", "--batch-size", "1"),
    "3_predict_workers-ring": ("--num-workers", "3", "--num-iters", "200", "--transport", "ring"),
}

GPU_COLUMNS = (
    *("gpu_util", "sm_activity_pct", "sm_occupancy_pct", "tensor_activity_pct", "dram_activity_pct"),
    *("pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s", "gpu_memory_used_bytes", "power_w", "sm_clock_mhz_mean"),
    *("gpu_name", "gpu_driver"),
)
LATENCY_COLUMNS = (
    *("average_latency", "max_latency", "min_latency", "p50_response_s", "p90_response_s", "p99_response_s"),
    *("mean_service_s", "p50_service_s", "p99_service_s"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=DESIGNS, ids=str)
def finished(request, folder):
    """One run of each design: (experiment, how it ended, its folder). All append to one CSV."""
    name = request.param
    options = (*QUICK, *DESIGNS[name], "--model", model_file(folder), "--output-file", "all.csv", "--json")
    ended = run("bench", *options, "--output-dir", name, cwd=folder)
    assert ended.code == 0, ended.err
    return name, ended, folder / name


def test_every_request_is_answered_rightly_once(finished):
    name, _, path = finished
    summary, records = load_summary(path), read_records(path / "requests.parquet")
    assert summary.experiment == name
    assert summary.error is None
    assert (records["status"] == STATUSES.index("ok")).all()
    assert len(measured(records)) == summary.options.load.num_iters
    assert summary.answers.wrong_rows == 0
    assert summary.answers.checked_rows == records["rows"].sum() == len(records) * summary.options.inputs.batch_size
    assert summary.answers.nearest_distinct > 2 * summary.answers.tolerance


def test_a_request_passes_the_stages_in_order(finished):
    records = read_records(finished[2] / "requests.parquet")
    stamps = ("scheduled", "issued", "received", "started", "computed", "responded", "completed")
    times = np.stack([records[f"{stamp}_ns"] for stamp in stamps])
    assert (np.diff(times, axis=0) >= 0).all()
    assert (times > 0).all()


def test_the_summary_follows_from_the_records(finished):
    summary, records = load_summary(finished[2]), read_records(finished[2] / "requests.parquet")
    assert stats.compute(records) == summary.metrics
    assert sum(summary.warmup_parts_s.values()) == pytest.approx(summary.metrics.warmup_latency_s)
    assert min(summary.warmup_parts_s.values()) >= 0


def test_only_the_original_pays_for_a_process_within_its_warm_up(finished):
    parts = load_summary(finished[2]).warmup_parts_s
    assert ("process start and imports" in parts) == finished[0].startswith("original")


def test_every_worker_was_warm_before_the_measured_requests(finished):
    summary = load_summary(finished[2])
    assert summary.workers_warmed >= 1
    told = any("predict threads had answered" in note for note in summary.notes)
    assert told == (summary.workers_warmed < summary.options.design.num_workers)


def test_standard_output_is_the_summary_and_nothing_else(finished):
    assert json.loads(finished[1].out) == json.loads((finished[2] / "summary.json").read_text())


def test_without_a_gpu_its_numbers_are_unknown_and_the_cpus_known(finished):
    activity = load_summary(finished[2]).activity
    assert activity.gpu_utilization_pct is None
    assert activity.sm_activity_pct is None
    assert activity.energy_j is None
    assert 0 < activity.cpu_utilization_pct <= 100
    assert load_summary(finished[2]).environment.gpu_name is None


def test_the_folder_holds_the_runs_files_and_nothing_else(finished):
    assert sorted(path.name for path in finished[2].iterdir()) == [
        "requests.parquet",
        "summary.json",
        "telemetry.parquet",
    ]


def test_runs_append_rows_under_one_header_with_the_published_columns_first(finished, folder):
    lines = (folder / "all.csv").read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert COLUMNS[: len(PUBLISHED)] == PUBLISHED
    assert all(line.count(",") == lines[0].count(",") for line in lines)
    row = dict(zip(COLUMNS, lines[-1].split(","), strict=True))
    assert row["experiment"] == finished[0]
    assert row["compile"] == "False"
    assert {row[column] for column in GPU_COLUMNS} == {""}, "unknown is empty, never 0"
    assert float(row["throughput"]) == load_summary(finished[2]).metrics.throughput_samples_per_s


def test_a_compiled_model_is_checked_against_the_eager_one(tmp_path):
    options = (*QUICK, "--design", "executor", "--compile", "--model", model_file(tmp_path), "--output-dir", "out")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 0, ended.err
    summary = load_summary(tmp_path / "out")
    assert summary.options.model.compile
    assert "compile wrap" in summary.warmup_parts_s
    assert summary.answers.wrong_rows == 0


def test_profiling_shows_threads_and_requests_and_names_no_host(tmp_path):
    options = (*QUICK, "--profile", "--keep-answers", "--model", model_file(tmp_path), "--output-dir", "out")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 0, ended.err
    text = (tmp_path / "out" / "trace.json").read_text()
    assert f'"{platform.node()}"' not in text
    trace = json.loads(text)
    assert not {"host_name", "traceName"} & trace.keys()
    requests = [event for event in trace["traceEvents"] if event.get("cat") == "request"]
    forwards = [event["ts"] for event in requests if event["name"] == "forward (host)" and event["ph"] == "b"]
    operators = [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    assert len(forwards) == len(read_records(tmp_path / "out" / "requests.parquet"))
    convolutions = sorted(event["ts"] for event in operators if event["name"] == "aten::conv2d")
    assert len(convolutions) == len(forwards), "the predict thread's operators are in the trace"
    ends = sorted(event["ts"] for event in requests if event["name"] == "forward (host)" and event["ph"] == "e")
    assert all(begin <= at <= end for begin, at, end in zip(sorted(forwards), convolutions, ends, strict=True)), (
        "both speak of the same time"
    )
    assert np.load(tmp_path / "out" / "answers.npy").shape == (1 + 2 + 6, 4, 10)
    assert any("profiled" in note for note in load_summary(tmp_path / "out").notes)


LATE_FAILURE = (
    TINY
    + """
class Late(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.calls = build_tiny(), 0

    def forward(self, inputs):
        self.calls += 1
        if self.calls == 6:
            raise ValueError("the sixth call fails")
        return self.model(inputs)

build_tiny, build = build, Late
"""
)


def test_a_failed_request_is_told_and_leaves_no_throughput(tmp_path):
    options = (*QUICK, "--model", model_file(tmp_path, LATE_FAILURE), "--output-dir", "out", "--output-file", "o.csv")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 1
    assert "1 of 6 requests failed: ValueError: the sixth call fails" in ended.message
    summary, records = load_summary(tmp_path / "out"), read_records(tmp_path / "out" / "requests.parquet")
    assert summary.error in ended.message
    assert summary.metrics.throughput_samples_per_s is None
    assert [STATUSES[code] for code in records["status"]].count("error") == 1
    assert (records["completed_ns"] > 0).all(), "the others were answered"
    assert not (tmp_path / "o.csv").read_text(), "a run that does not count adds no row"


RANDOM = TINY + "\n_tiny = build\ndef build():\n    return torch.nn.Sequential(_tiny(), Noise())\n"
NOISE = """
class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)
"""


def test_wrong_answers_are_noticed(tmp_path):
    options = (*QUICK, "--model", model_file(tmp_path, RANDOM + NOISE), "--output-dir", "out")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 1
    assert "answers are not the eager model's" in ended.message
    summary = load_summary(tmp_path / "out")
    assert summary.metrics.wrong == 6
    assert summary.metrics.throughput_samples_per_s is None


# Right as long as one thread calls it: what it is given lies, while it waits, where the next caller writes.
RACE = (
    TINY
    + "\n_tiny = build\ndef build():\n    return torch.nn.Sequential(Shared(), _tiny())\n"
    + """
import time

class Shared(torch.nn.Module):
    def forward(self, x):
        self.given = x
        time.sleep(0.005)
        return self.given
"""
)


@pytest.mark.parametrize(("workers", "code"), [("1", 0), ("4", 1)], ids=["one worker", "four, which race"])
def test_a_race_that_mixes_up_answers_is_caught(tmp_path, workers, code):
    options = (*QUICK, "--num-iters", "40", "--num-workers", workers, "--model", model_file(tmp_path, RACE))
    ended = run("bench", *options, "--batch-size", "2", "--output-dir", "out", cwd=tmp_path)
    assert ended.code == code, ended.err
    summary = load_summary(tmp_path / "out")
    assert (summary.metrics.wrong > 0) == (summary.metrics.throughput_samples_per_s is None) == bool(code)


def test_runs_that_share_a_lock_file_do_not_measure_at_the_same_time(tmp_path):
    options = (*QUICK, "--num-iters", "40", "--exclusive", "lock", "--model", model_file(tmp_path))
    with ExitStack() as stack:
        both = [
            stack.enter_context(start("bench", *options, "--output-dir", name, cwd=tmp_path)) for name in ("a", "b")
        ]
        assert [process.communicate(timeout=120) and process.returncode for process in both] == [0, 0]
    windows = []
    for name in ("a", "b"):
        records = read_records(tmp_path / name / "requests.parquet")
        windows.append((int(records["issued_ns"].min()), int(records["completed_ns"].max())))
    first, second = sorted(windows)
    assert first[1] <= second[0]


def test_phases_follow_each_other(finished):
    records = read_records(finished[2] / "requests.parquet")
    for earlier, later in ((0, 1), (1, 2)):
        assert (
            records["completed_ns"][records["phase"] == earlier].max()
            <= records["scheduled_ns"][records["phase"] == later].min()
        ), PHASES[later]


def test_an_overloaded_design_has_no_latency_wherever_its_run_is_shown(tmp_path):
    ended = run(
        *("bench", *QUICK, "--design", "executor", "--model", model_file(tmp_path)),
        *("--load", "poisson", "--rate", "100000", "--num-iters", "400"),
        *("--output-dir", "out", "--output-file", "all.csv", "--json"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    (mark,) = [mark for mark in told["marks"] if "no latency exists" in mark]
    assert told["metrics"]["response_time"] is told["metrics"]["service_time"] is None
    assert told["metrics"]["throughput_samples_per_s"] > 0
    with (tmp_path / "all.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {row[name] for name in LATENCY_COLUMNS} == {""}
    assert mark in row["marks"]
    assert [_cell(load_summary(tmp_path / "out"), name) for name in ("response time", "service time")] == ["-", "-"]
    report = build([tmp_path / "out"])
    (cell,) = report.sections[0].cells
    assert cell.good
    assert (cell.response, cell.service) == (None, None)
    assert mark in markdown.render(report)


def _cell(summary, metric):
    """Return what the console's table says of a metric."""
    console = Console(width=200, file=io.StringIO())
    console.print(summary_table(summary))
    rows = [[cell.strip() for cell in line.split("\u2502")] for line in console.file.getvalue().splitlines()]
    (value,) = [row[2] for row in rows if row[1:2] == [metric]]
    return value
