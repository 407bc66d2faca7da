"""What a report says equals what is computed here from the files, by other means, and what is wrong is named."""

import gzip
import json
import math
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.bench.calibration import Calibration, Ceiling, Slip
from headrace.bench.record import RECORD_DTYPE, read_records
from headrace.config import LoadConfig, TargetConfig
from headrace.errors import OutputError
from headrace.report import markdown, page
from headrace.report.cells import machines
from headrace.report.model import build, headline
from headrace.report.read import read_run
from tests.report import made
from tests.study.summaries import GPU

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
THREE_DIGITS = 0.006


def percentile(values, percent):
    """Interpolate between order statistics, in plain Python."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def rows_of(folder):
    """Return the measured requests of a folder as dictionaries, read by nothing of ours."""
    return [row for row in pq.read_table(folder / "requests.parquet").to_pylist() if row["phase"] == "measured"]


class Cells(HTMLParser):
    """Collects the first table's cells."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.within, self.ended = [], False, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if self.ended:
            return
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.within = True

    def handle_endtag(self, tag):
        self.ended = self.ended or tag == "table"
        self.within = self.within and tag not in ("td", "th")

    def handle_data(self, data):
        if self.within and not self.ended:
            self.rows[-1][-1] += data


def shown(text, heading):
    """Return the numbers of a column of the page's table, in seconds or as they stand."""
    first, *rows = Cells(text).rows
    at = first.index(heading)
    numbers = []
    for row in rows:
        value, _, unit = row[at].replace(",", "").partition(" ")
        numbers.append(float(value) * UNITS.get(unit, 1.0))
    return numbers


@pytest.fixture
def repeats(tmp_path):
    """Two repeats of one cell."""
    return [made.run(tmp_path / "sweep" / f"run.{seed}", seed=seed) for seed in (0, 1)]


def test_a_cell_pools_all_values_of_its_runs(repeats):
    values = [row for folder in repeats for row in rows_of(folder)]
    expected = {
        "Response": [(row["completed_ns"] - row["scheduled_ns"]) / 1e9 for row in values],
        "Service": [(row["completed_ns"] - row["issued_ns"]) / 1e9 for row in values],
    }
    text = page.render(build([repeats[0].parent]))
    for kind, times in expected.items():
        for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("p99.9", 99.9)):
            assert shown(text, f"{kind} {name}") == pytest.approx([percentile(times, percent)], rel=THREE_DIGITS)
    delays = [(row["issued_ns"] - row["scheduled_ns"]) / 1e9 for row in values]
    assert shown(text, "Issue delay p99") == pytest.approx([percentile(delays, 99)], rel=THREE_DIGITS)


def test_throughput_is_the_mean_of_the_runs_and_goodput_counts_what_came_in_time(repeats):
    bound_s, rates, good = 0.002, [], []
    for folder in repeats:
        rows = rows_of(folder)
        window_s = (max(row["completed_ns"] for row in rows) - min(row["scheduled_ns"] for row in rows)) / 1e9
        rates.append(sum(row["rows"] for row in rows) / window_s)
        in_time = [row for row in rows if row["completed_ns"] - row["scheduled_ns"] <= bound_s * 1e9]
        good.append(sum(row["rows"] for row in in_time) / window_s)
    report = build([repeats[0].parent], bound_s=bound_s)
    (cell,) = report.sections[0].cells
    assert cell.throughput == pytest.approx(statistics.mean(rates), rel=1e-12)
    assert cell.goodput == pytest.approx(statistics.mean(good), rel=1e-12)
    assert 0 < cell.goodput < cell.throughput
    assert shown(page.render(report), "Throughput, samples/s") == pytest.approx([cell.throughput], rel=THREE_DIGITS)


def test_stages_sum_to_the_response_time_and_batches_to_the_requests(repeats):
    (cell,) = build(repeats).sections[0].cells
    values = [row for folder in repeats for row in rows_of(folder)]
    mean_s = statistics.mean(row["completed_ns"] - row["scheduled_ns"] for row in values) / 1e9
    assert sum(cell.stages_s) == pytest.approx(mean_s)
    assert sum(size * many for size, many in cell.batches.items()) == pytest.approx(sum(row["rows"] for row in values))
    assert set(cell.batches) == {4, 8}


def test_gpu_activity_is_of_the_samples_between_first_issue_and_last_answer(repeats):
    (cell,) = build(repeats[:1]).sections[0].cells
    rows = rows_of(repeats[0])
    first, last = min(row["issued_ns"] for row in rows), max(row["completed_ns"] for row in rows)
    samples = pq.read_table(repeats[0] / "telemetry.parquet").to_pylist()
    within = [each["gpu_utilization_pct"] for each in samples if first <= each["at_ns"] <= last]
    assert cell.runs[0].gpu_pct == pytest.approx(statistics.mean(within))


def test_efficiency_is_computed_from_the_records_and_names_what_binds(repeats):
    (cell,) = build(repeats).sections[0].cells
    assert cell.binds == "compute"
    assert cell.efficiency == pytest.approx(cell.throughput / 8000.0)


def test_percentiles_beyond_the_number_of_values_are_left_out(tmp_path):
    load = LoadConfig(kind="poisson", rate=500.0, num_iters=150)
    made.run(tmp_path / "run", config=made.options(load=load))
    (cell,) = build([tmp_path]).sections[0].cells
    assert set(cell.response.percentiles) == {"p50", "p90", "p99"}
    assert "–" in headline([cell]).rows[0]  # noqa: RUF001


def test_a_summary_that_disagrees_with_its_records_is_named_and_does_not_count(tmp_path):
    made.run(tmp_path / "honest", seed=1)
    of = made.records()
    told = made.summary(of, made.options())
    better = replace(told.metrics, throughput_samples_per_s=2 * told.metrics.throughput_samples_per_s)
    made.write_run(tmp_path / "flattering", of, replace(told, metrics=better))
    report = build([tmp_path])
    (cell,) = report.sections[0].cells
    assert [run.counts for run in cell.runs] == [False, True]
    assert "the summary disagrees with the records: throughput_samples_per_s" in page.render(report)
    assert cell.throughput == cell.runs[1].throughput


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("error", "7 of 1,500 requests failed"),
        ("wrong", "7 of 1,500 requests wrongly answered"),
        ("unanswered", "7 of 1,500 requests never answered"),
        ("shed", "7 of 1,500 requests refused for want of room"),
    ],
)
def test_requests_without_a_right_answer_are_counted_and_take_the_run_out(tmp_path, status, words):
    of = made.damaged(made.records(), status, 7)
    made.write_run(tmp_path / "run", of, made.summary(of, made.options()))
    report = build([tmp_path])
    (cell,) = report.sections[0].cells
    assert cell.throughput is None
    assert cell.response is None
    for text in (page.render(report), markdown.render(report)):
        assert words in text
    assert shown(page.render(report), "Shed" if status == "shed" else "Errors") == [7]


def test_a_runs_own_error_and_notes_are_shown(tmp_path):
    made.run(tmp_path / "bad", error="a process died")
    made.run(tmp_path / "good", notes=("random weights",))
    text = page.render(build([tmp_path]))
    assert "<b>bad</b>: a process died" in text
    assert "random weights <small>(good)</small>" in text


def test_stamps_out_of_order_take_the_run_out(tmp_path):
    of = made.records()
    of["computed_ns"][5] = of["started_ns"][5] - 1
    made.write_run(tmp_path / "run", of, made.summary(of, made.options()))
    assert "1 requests have computed_ns before the stage in front of it" in page.render(build([tmp_path]))


def test_runs_of_unlike_machines_are_never_in_one_table(tmp_path):
    made.run(tmp_path / "a")
    made.run(tmp_path / "b", environment=replace(GPU, gpu_driver="581.2"))
    report = build([tmp_path])
    assert [len(section.cells) for section in report.sections] == [1, 1]
    assert "unlike machines, which are not compared" in page.render(report)


def test_runs_that_differ_in_an_option_are_cells_of_their_own_and_say_it(tmp_path):
    for precision in ("bf16", "fp16"):
        made.run(tmp_path / precision, config=made.options(precision=precision))
    runs = [read_run(name, tmp_path / name) for name in ("bf16", "fp16")]
    (machine,) = machines(runs)
    assert [cell.label for cell in machine.cells] == ["2_lanes-ring · bf16", "2_lanes-ring · fp16"]


def test_runs_that_differ_in_where_files_lie_are_repeats(tmp_path):
    config = made.options()
    moved = replace(config, model=replace(config.model, model_dir=Path("/elsewhere")))
    made.run(tmp_path / "a", config=config)
    made.run(tmp_path / "b", config=moved, seed=1)
    assert [len(cell.runs) for cell in build([tmp_path]).sections[0].cells] == [2]


def test_calibration_is_shown_where_a_summary_has_it(tmp_path):
    slip = Slip(p50=1e-6, p90=2e-6, p99=3e-6, max=4e-6)
    ceiling = Ceiling(payload_bytes=100, requests_per_s=12345.0, p50_s=1e-4, p99_s=2e-4)
    calibration = Calibration(
        schema_version=1,
        machine="one",
        made_at="2025-01-01T00:00:00+00:00",
        headrace="0.1.0",
        generators=1,
        recovered=(),
        slip=slip,
        ceilings=(ceiling,),
    )
    for seed in (0, 1):
        made.run(tmp_path / f"run.{seed}", seed=seed, calibration=calibration)
    for text in (page.render(build([tmp_path])), markdown.render(build([tmp_path]))):
        assert text.count("12345.0") == 1
        assert "Calibration" in text


def test_marks_are_shown_and_a_growing_backlog_leaves_no_latency(tmp_path):
    of = made.records()
    late_ns = np.arange(len(of)) * 4_000_000  # the server answers a third of what is sent
    for name in made.STAMPS[1:]:
        of[name] += late_ns
    made.write_run(tmp_path / "run", of, made.summary(of, made.options(), marks=("a mark of the run's own",)))
    report = build([tmp_path])
    (cell,) = report.sections[0].cells
    assert cell.throughput > 0
    assert cell.response is None
    assert cell.detail is not None, "that it grows is seen"
    text = markdown.render(report)
    assert "the backlog grew all through the run" in text
    assert "a mark of the run's own" in text


def test_a_server_named_by_its_url_is_called_by_its_label(tmp_path):
    for rate, url in ((200.0, "http://127.0.0.1:8000"), (400.0, "http://127.0.0.1:9000")):
        load = LoadConfig(kind="poisson", rate=rate, num_iters=400)
        target = TargetConfig(url=url, model="m", label="mine")
        made.run(tmp_path / f"{rate:g}", config=replace(made.options(load=load), target=target))
    report = build([tmp_path])
    assert {cell.cell.label for cell in report.sections[0].cells} == {"mine"}
    assert "Response time against offered load: p50, p99" in page.render(report)


def test_the_committed_results_agree_with_their_records():
    report = build([RESULTS / "cpu-amd-epyc-2" / "transports"])
    assert len(report.runs) == 40
    assert all(run.counts for run in report.runs), "as their own page says"


def test_markdown_has_the_pages_table(repeats):
    report = build(repeats)
    table = [line for line in markdown.render(report).splitlines() if line.startswith("| 2_lanes-ring |")]
    cells = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert cells == Cells(page.render(report)).rows[1]


def test_a_folder_without_runs_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(OutputError, match="no finished run there; name the folder of a run"):
        build([tmp_path])


def spoil_records(folder):
    (folder / "requests.parquet").write_bytes(b"PAR1 but not for long PAR1")


def drop_column(folder):
    table = pq.read_table(folder / "requests.parquet")
    pq.write_table(table.drop_columns(["completed_ns"]), folder / "requests.parquet")


def unknown_status(folder):
    table = pq.read_table(folder / "requests.parquet")
    words = pa.array(["perhaps"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index("status"), "status", words), folder / "requests.parquet")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_records, "requests.parquet: cannot be read as Parquet"),
        (lambda folder: (folder / "requests.parquet").unlink(), "requests.parquet: cannot be read as Parquet"),
        (drop_column, "requests.parquet: has no column completed_ns"),
        (unknown_status, "requests.parquet: cannot be read as Parquet"),
        (lambda folder: (folder / "telemetry.parquet").write_bytes(b"no"), "telemetry.parquet: cannot be read"),
        (lambda folder: (folder / "summary.json").write_text("{"), "summary.json: not a run summary"),
        (lambda folder: (folder / "summary.json").unlink(), "summary.json: no run summary there"),
        (lambda folder: (folder / "trace.json").write_text("{"), "trace.json: no trace of the profiler's"),
    ],
    ids=["damaged", "missing", "a column less", "a strange word", "telemetry", "summary", "no summary", "trace"],
)
def test_a_damaged_run_is_left_out_by_name_and_alone_refused(tmp_path, spoil, words):
    made.run(tmp_path / "good", seed=1)
    spoil(made.run(tmp_path / "bad"))
    report = build([tmp_path])
    assert [each.name for each in report.unreadable] == ["bad"]
    assert words in report.unreadable[0].reason
    assert [run.run.name for run in report.runs] == ["good"]
    assert "<b>bad</b>" in page.render(report)
    with pytest.raises(OutputError, match="no run can be read"):
        build([tmp_path / "bad"])


def device_events():
    copies = [
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": at, "dur": 20, "args": {"stream": 7}}
        for at in range(0, 9000, 100)
    ]
    kernels = [{"cat": "kernel", "name": "k", "ts": at, "dur": 50, "args": {"stream": 9}} for at in range(50, 9000, 90)]
    return [*copies, *kernels, {"cat": "cpu_op", "name": "x", "ts": 1, "dur": 2}]


@pytest.mark.parametrize("packed", [False, True])
def test_a_profiled_run_shows_its_devices_streams(tmp_path, packed):
    folder = made.run(tmp_path / "run")
    data = json.dumps({"traceEvents": device_events()}).encode()
    (folder / ("trace.json.gz" if packed else "trace.json")).write_bytes(gzip.compress(data) if packed else data)
    (cell,) = build([folder]).sections[0].cells
    assert list(cell.detail.timeline.rows.values()) == ["copies in", "lane (stream 9)"]
    assert cell.detail.timeline.kinds == ("copy in", "compute")


def test_a_run_without_a_trace_shows_its_workers_as_lanes(tmp_path):
    (cell,) = build([made.run(tmp_path / "run")]).sections[0].cells
    names = [name for name in cell.detail.timeline.rows.values() if name]
    assert names == ["lane 0", "lane 1"]


def test_of_a_cell_the_run_with_the_longest_response_is_shown_over_time(repeats):
    (cell,) = build([repeats[0].parent]).sections[0].cells
    longest = {}
    for folder in repeats:
        times = [row["completed_ns"] - row["scheduled_ns"] for row in rows_of(folder)]
        longest[folder.name] = max(times) / 1e9
    assert cell.detail.run_name == max(longest, key=longest.get)
    assert cell.response.max_s == pytest.approx(max(longest.values()))
    assert cell.detail.response.high.max() == pytest.approx(max(longest.values()))


def test_records_are_read_as_they_were_written(tmp_path):
    of = made.damaged(made.records(), "wrong", 3)
    made.write_run(tmp_path / "run", of, made.summary(of, made.options()))
    read = read_records(tmp_path / "run" / "requests.parquet")
    assert read.dtype == RECORD_DTYPE
    np.testing.assert_array_equal(read, of)
