"""Real runs of the referee against null servers: short, and held to what a busy machine allows."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from headrace.bench.summary import load_summary
from headrace.config import LoadConfig, TargetConfig
from headrace.errors import InvalidOption
from headrace.referee.cases import AGAIN, LOADGEN, OURS, PERF_ANALYZER, TRUTH, WAITING, Settings, cases
from headrace.referee.perf_analyzer import PerfAnalyzer, find
from headrace.referee.report import Report
from headrace.referee.run import Asking, Tools, _wrong_rows, find_tools, referee
from tests import commands
from tests.target import running as target
from tests.target.running import Silent

LAW = "null://fixed?service=40ms"  # long beside what a busy machine adds
ROOM = 0.25
BY_NAME = {case.name: case for case in cases(Settings())}


def perf_analyzer():
    """Return it where it is installed: on PATH, or by `make conformance`."""
    try:
        return find(None)
    except InvalidOption:
        return None


def run(folder, url, *only, tools=None, **settings):
    pytest.importorskip("mlperf_loadgen")
    asking = Asking(
        target=TargetConfig(url=url),
        tools=tools or find_tools(("loadgen",), None),
        settings=Settings(**({"duration_s": 1.5, "rate": 8} | settings)),
        only=only,
    )
    return referee(asking, folder / "out", ("headrace", "referee"), Silent(), overwrite=False)


def test_single_stream_and_server_agree_with_the_truth(tmp_path):
    report = run(tmp_path, LAW, "SingleStream", "Server", seed=3)
    single, server = report.cases
    for judged in (single, server):
        truth, ours, loadgen, again = (judged.of(name) for name in (TRUTH, OURS, LOADGEN, AGAIN))
        assert [each.error for each in (ours, loadgen, again)] == [None] * 3
        for each in (ours, loadgen, again):
            assert each.from_schedule.p50 == pytest.approx(truth.from_schedule.p50, rel=ROOM)
            assert each.from_send.p50 >= 0.04
        assert loadgen.printed.mean == pytest.approx(loadgen.from_schedule.mean, rel=0.01)
        assert loadgen.own_cost.p50 < 0.25 * ours.from_send.p50
    assert server.of(OURS).requests == server.of(LOADGEN).requests == server.of(TRUTH).requests
    assert server.of(OURS).throughput == pytest.approx(server.of(TRUTH).throughput, rel=0.1)


def test_the_plan_of_loadgen_is_kept_by_ours_to_the_nanosecond(tmp_path):
    run(tmp_path, LAW, "Server")
    folder = tmp_path / "out/server"
    plan = pq.read_table(folder / "arrivals.parquet").column("scheduled_ns").to_numpy()
    theirs = pq.read_table(folder / f"{LOADGEN}-logs/queries.parquet").column("scheduled_ns").to_numpy()
    ours = pq.read_table(folder / "headrace/requests.parquet")
    measured = ours.filter([phase == "measured" for phase in ours.column("phase").to_pylist()])
    mine = measured.column("scheduled_ns").to_numpy()
    assert (plan == theirs - theirs[0]).all()
    assert (mine - mine[0] == plan).all()
    assert load_summary(folder / "headrace").options.load.arrivals == Path("../arrivals.parquet")


def test_multi_stream_and_offline_count_samples(tmp_path):
    report = run(tmp_path, LAW, "MultiStream", "Offline", samples=4, rate=20)
    multi, offline = report.cases
    assert multi.of(TRUTH).throughput == pytest.approx(100, rel=0.03)
    for tool in (OURS, LOADGEN):
        assert multi.of(tool).throughput == pytest.approx(100, rel=ROOM)
        assert offline.of(tool).requests == 30
        assert offline.of(tool).throughput == pytest.approx(25, rel=ROOM)


def test_the_folder_has_records_logs_and_a_page(tmp_path):
    report = run(tmp_path, LAW, "SingleStream")
    out = tmp_path / "out"
    assert msgspec.json.decode((out / "referee.json").read_bytes(), type=Report).cases == report.cases
    page = (out / "referee.md").read_text()
    assert "| quantity | truth | headrace | mlcommons-loadgen | headrace, again |" in page
    logs = {path.name for path in (out / f"singlestream/{LOADGEN}-logs").iterdir()}
    assert {"mlperf_log_summary.txt", "mlperf_log_detail.txt", "queries.parquet"} <= logs
    assert json.loads((out / "singlestream/mlcommons-loadgen/summary.json").read_text())["answers"]["wrong_rows"] == 0


def test_wrong_answers_under_loadgen_are_found(tmp_path):
    report = run(tmp_path, f"{LAW}&wrong=0.3", "SingleStream")
    (judged,) = report.cases
    assert "answers are wrong" in judged.of(LOADGEN).error
    assert any(sentence.startswith(f"{LOADGEN}: no numbers that count") for sentence in judged.disagreements)


def test_requests_without_an_answer_do_not_hold_loadgen_for_ever(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    asking = Asking(
        target=TargetConfig(url=f"{LAW}&drop=0.2", request_timeout_s=0.5),
        tools=find_tools(("loadgen",), None),
        settings=Settings(duration_s=1.5),
        only=("SingleStream",),
    )
    (judged,) = referee(asking, tmp_path / "out", (), Silent(), overwrite=False).cases
    assert "never answered" in judged.of(LOADGEN).error


def test_a_stall_is_hidden_by_waiting_threads_and_by_nothing_else(tmp_path):
    analyzer = perf_analyzer()
    if analyzer is None:
        pytest.skip("needs perf_analyzer: make conformance installs it")
    law = "null://fixed?service=1ms&stall=1s&stall_at=500ms"
    tools = Tools(loadgen=None, perf_analyzer=analyzer)
    (judged,) = run(tmp_path, law, "Server", tools=tools, rate=150, duration_s=3).cases
    assert judged.of(TRUTH).from_schedule.p90 > 0.5
    assert judged.of(OURS).from_schedule.p90 > 0.5
    assert judged.of(PERF_ANALYZER).from_send.p90 > 0.5
    assert judged.of(WAITING).printed.p90 < 0.25
    assert any(sentence.startswith(f"{WAITING}, printed") for sentence in judged.disagreements)


def test_missing_tools_are_said_with_their_remedies(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "prefix", "nowhere")
    with pytest.raises(InvalidOption, match=r"pip install 'headrace\[referee\]'; perf_analyzer is not at"):
        find_tools(None, None, find_spec=lambda name: None)
    with pytest.raises(InvalidOption, match=r"pip install 'headrace\[referee\]'"):
        find_tools(("loadgen",), None, find_spec=lambda name: None)
    found = find_tools(None, None, find_spec=lambda name: object())
    assert found.loadgen
    assert "libb64-0d" in found.missing[0]
    assert list(found.versions) == [LOADGEN]


def test_a_binary_that_is_named_must_be_there(tmp_path):
    with pytest.raises(InvalidOption, match="is not at"):
        find_tools(None, Path(tmp_path / "none"))


def asking(url, *, tools, **settings):
    return Asking(target=TargetConfig(url=url, model="null"), tools=tools, settings=Settings(**settings))


def test_a_server_by_its_url_has_no_truth_and_every_tool(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    analyzer = perf_analyzer()
    with commands.start("null-server", "--law", LAW, "--port", 0, cwd=tmp_path) as process:
        address = re.search(r"http://([\d.:]+)/", process.stderr.readline())[1]
        tools = replace(find_tools(("loadgen",), None), perf_analyzer=analyzer)
        made = replace(asking(f"http://{address}", tools=tools, duration_s=1.5, samples=2), only=("MultiStream",))
        (judged,) = referee(made, tmp_path / "out", (), Silent(), overwrite=False).cases
    tools = [OURS, LOADGEN, *([PERF_ANALYZER] if analyzer else []), AGAIN]
    assert [found.tool for found in judged.found] == tools
    assert [found.error for found in judged.found] == [None] * len(tools)
    for found in judged.found:
        assert found.throughput == pytest.approx(50, rel=ROOM)


def test_what_a_server_cannot_be_asked_is_every_tools_error(tmp_path):
    tools = Tools(loadgen=None, perf_analyzer=PerfAnalyzer(tmp_path, "1"))
    made = replace(asking("http://127.0.0.1:9", tools=tools), only=("SingleStream",))
    (judged,) = referee(made, tmp_path / "out", (), Silent(), overwrite=False).cases
    assert "no server answers there" in judged.of(OURS).error
    assert judged.of(PERF_ANALYZER).error == "not run, since our own run does not count"


def test_rows_that_the_model_fixes_are_no_multi_stream(tmp_path):
    outcome = target.measure(tmp_path, LAW, LoadConfig(kind="burst", num_iters=3), rows=2)
    assert _wrong_rows(BY_NAME["SingleStream"], outcome) == "the model takes requests of 2 rows, and this load has 1"
    assert _wrong_rows(replace(BY_NAME["MultiStream"], samples=2), outcome) is None
