import csv
from dataclasses import replace

import pytest

from headrace.bench.summary import Activity, AnswerCheck
from headrace.config import DESIGN_NAMES
from headrace.errors import IncomparableRuns
from headrace.study.finished import CellKey, MissingRun, counts, machine, unlike
from headrace.study.plan import PlannedRun
from headrace.study.tables import MEANING, render_all, render_csv, render_table, write_tables
from tests.study.summaries import GPU, TORCH, metrics, summary

KEY = CellKey(compile=False, batch_size=32)

# Sample standard deviations by hand: of 4, 5, 6 it is 1; of 1000, 1200 it is 100 * sqrt 2.
RUNS = [
    summary(numbers=metrics(warmup=4, latency=1, throughput=1000), gpu_utilization=40),
    summary(numbers=metrics(warmup=5, latency=1, throughput=1000), gpu_utilization=41),
    summary(numbers=metrics(warmup=6, latency=1, throughput=1000), gpu_utilization=42),
    summary(error="the backend stopped"),
    summary(design="h2d_d2h_threads", workers=2, numbers=metrics(throughput=1000)),
    summary(design="h2d_d2h_threads", workers=2, numbers=metrics(throughput=1200)),
    summary(design="h2d_d2h_threads", numbers=metrics(warmup=3.5), gpu_utilization=None),
    summary(design="executor", numbers=metrics(throughput=None, wrong=2), error="2 answers were wrong"),
]

EXPECTED = f"""\
## Batch Size 32 Compile false

| Experiment | Warmup_latency (s) | Average_latency (s) | Throughput (samples/sec) | GPU Utilization (%) |
| --- | --- | --- | --- | --- |
| original | 5.000 +/- 1.000 | 1.000 +/- 0.000 | 1000.000 +/- 0.000 | 41.000 +/- 1.000 |
| executor |  |  |  |  |
| h2d_d2h_threads | 3.500 (1 run) | 2.000 (1 run) | 1000.000 (1 run) |  |
| 2_predict_workers | 5.000 +/- 0.000 | 2.000 +/- 0.000 | 1100.000 +/- 141.421 | 40.000 +/- 0.000 |

Runs per row: original 3 (1 failed, not averaged in), executor 0 (1 with wrong answers, not averaged in), \
h2d_d2h_threads 1, 2_predict_workers 2.

Columns: {MEANING}

Machine: Test GPU (driver 580.1); torch 2.11.0; CUDA 13.0; model resnet18, precision tf32; input photos, \
float32 [batch, 3, 250, 250]; 100 requests in a burst; headrace 0.1.0 abcdef0123.
"""


def test_the_published_form():
    assert render_table(KEY, RUNS) == EXPECTED


def test_one_file_per_batch_size_and_compile_mode(tmp_path):
    runs = [*RUNS, summary(batch_size=256), summary(compiled=True)]
    assert [path.name for path in write_tables(runs, tmp_path)] == [
        "output_32_false.md",
        "output_256_false.md",
        "output_32_true.md",
        "all.md",
        "runs.csv",
    ]
    assert (tmp_path / "output_32_false.md").read_text() == EXPECTED
    assert "## Batch Size 32 Compile true" in (tmp_path / "output_32_true.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_writing_again_replaces(tmp_path):
    write_tables([summary(error="broke")], tmp_path)
    write_tables([summary()], tmp_path)
    assert "failed" not in (tmp_path / "all.md").read_text()


def test_a_run_without_a_summary_is_counted_and_told():
    planned = PlannedRun(name="r0-lost", design="executor", num_workers=1, batch_size=64, compile=False, repeat=0)
    text = render_all([summary()], [MissingRun(planned=planned, error="killed by SIGKILL")])
    assert "Runs per row: executor 0 (1 failed, not averaged in)." in text
    assert "- r0-lost: killed by SIGKILL" in text


def test_the_wide_form_leaves_empty_what_is_unknown_and_averages_no_percentile():
    activity = Activity(sm_activity_pct=30.0, pcie_rx_bytes_per_s=4.5e9, power_w=250.0)
    runs = [replace(summary(numbers=metrics(latency=latency)), activity=activity) for latency in (1, 2, 9)]
    line = next(line for line in render_all(runs).splitlines() if line.startswith("| original | 2.000 ("))
    assert line == (
        "| original | 2.000 (1.000 to 9.000) | 3.600 (1.800 to 16.200) | 30.000 +/- 0.000 |  |"
        " 4.500 +/- 0.000 |  | 250.000 +/- 0.000 |  |"
    )


def test_the_page_lists_what_does_not_count_and_every_note_once():
    noted = replace(summary(), notes=("random weights",))
    text = render_all([*RUNS, noted, noted])
    assert "original, batch size 32, started 2025-01-01T00:00:00+00:00: the backend stopped" in text
    assert text.count("- random weights") == 1


def test_the_page_says_when_the_code_changed_between_runs():
    other = summary(environment=replace(GPU, git_revision="1234567890", git_dirty=True))
    assert "2 revisions of the code" in render_all([summary(), other])
    assert "headrace 0.1.0 1234567890 with local changes, 0.1.0 abcdef0123" in machine([summary(), other])


def test_the_csv_has_a_row_per_run_and_nothing_for_unknown():
    rows = list(csv.DictReader(render_csv(RUNS).splitlines()))
    assert len(rows) == len(RUNS)
    assert [row["experiment"] for row in rows[:1]] == ["original"]
    assert (rows[3]["throughput"], rows[3]["error"]) == ("", "the backend stopped")
    assert rows[6]["gpu_util"] == ""


@pytest.mark.parametrize(
    ("other", "told"),
    [
        pytest.param(summary(environment=replace(GPU, gpu_driver="590")), "GPU driver", id="another driver"),
        pytest.param(
            replace(summary(), torch=replace(TORCH, cudnn=90000)),
            "cudnn: 91000 and 90000",
            id="another cuDNN",
        ),
        pytest.param(
            replace(summary(), options=replace(summary().options, device="cpu")),
            "device",
            id="another device",
        ),
        pytest.param(
            replace(summary(), options=replace(summary().options, profile=True)),
            "profile: False and True",
            id="profiled",
        ),
    ],
)
def test_unlike_runs_are_refused(tmp_path, other, told):
    with pytest.raises(IncomparableRuns, match=told):
        write_tables([summary(), other], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(summary(design="h2d_d2h_threads", workers=4), id="design and workers"),
        pytest.param(summary(batch_size=1, compiled=True), id="cell"),
        pytest.param(summary(environment=replace(GPU, git_revision="other")), id="revision"),
        pytest.param(replace(summary(), torch=None), id="torch's facts unknown"),
        pytest.param(replace(summary(), torch=replace(TORCH, threads=4)), id="threads per worker"),
        pytest.param(replace(summary(), options=replace(summary().options, device="cuda:1")), id="number of the GPU"),
    ],
)
def test_what_is_compared_may_differ(other):
    assert unlike([summary(), other]) == ()


def test_the_environments_differences_are_asked_for_every_run():
    odd = replace(GPU, headrace="odd")

    def differences(a, b):
        return ("one is odd",) if "odd" in (a.headrace, b.headrace) else ()

    runs = [summary(), summary(), summary(environment=odd)]
    assert unlike(runs, differences) == ("one is odd",)
    assert unlike(runs[:2], differences) == ()


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        pytest.param(summary(), True, id="good"),
        pytest.param(summary(error="broke"), False, id="failed"),
        pytest.param(summary(numbers=metrics(wrong=1)), False, id="a wrong answer"),
        pytest.param(summary(numbers=metrics(throughput=None)), False, id="no throughput"),
        pytest.param(
            replace(
                summary(),
                answers=AnswerCheck(checked_rows=9, wrong_rows=1, tolerance=0.1, max_error=1, nearest_distinct=None),
            ),
            False,
            id="a wrong row",
        ),
    ],
)
def test_which_runs_count(run, expected):
    assert counts(run) is expected


def test_experiments_stand_in_the_published_order():
    runs = [summary(design="h2d_d2h_threads", workers=n) for n in (10, 4, 3, 2)]
    runs += [summary(design=name) for name in reversed(DESIGN_NAMES)]
    rows = render_table(KEY, runs).splitlines()[4:12]
    assert [row.split()[1] for row in rows] == [
        *("original", "executor", "h2d_d2h_threads"),
        *("2_predict_workers", "3_predict_workers", "4_predict_workers", "10_predict_workers"),
        "1_lanes",
    ]
