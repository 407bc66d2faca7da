"""Runs against servers by their URL, compared: the server is what differs, as the design is for designs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.bench.record import PHASES, STATUSES, empty_records, write_records
from headrace.bench.summary import TargetFacts
from headrace.config import AccessConfig, InputConfig, LoadConfig, ModelConfig, RunConfig, TargetConfig
from headrace.errors import IncomparableRuns
from headrace.study import samples
from headrace.study.compare import Side, compare, load_side, parse_selection
from headrace.study.compare_page import render_changelog, render_markdown
from headrace.study.finished import RUNS
from headrace.study.samples import MeasuredRun
from headrace.study.tables import write_tables
from tests.study.summaries import summary, throughputs, write_run

OURS, THEIRS = "http://127.0.0.1:8000", "http://127.0.0.1:9000"
FIVE = (98.0, 99.0, 100.0, 101.0, 102.0)
POISSON = LoadConfig(kind="poisson", rate=100, duration_s=4)
MS = 1_000_000


def against(url, *, model="resnet18", inputs=None, load=POISSON, rows=1, **target):
    """A summary of a run against a server."""
    options = RunConfig(
        model=ModelConfig(name=model),
        inputs=InputConfig(kind="random", batch_size=rows),
        load=load,
        target=TargetConfig(url=url, model=model, **target),
    )
    facts = TargetFacts(
        inputs=inputs or {"input": "float32 [1, 3, 224, 224]"},
        payload_bytes=602_000,
        payloads=16,
        compared_with="the server's own",
        connections=8,
        client_cpu_share=(0.1,),
    )
    return replace(summary(), experiment=options.experiment, options=options, torch=None, target=facts)


def side(label, *runs):
    return Side(label=label, runs=tuple(MeasuredRun(summary=run, has_records=True) for run in runs))


BASE = side("base", *throughputs(FIVE, against(OURS)))
CANDIDATE = side("candidate", *throughputs([value * 1.1 for value in FIVE], against(THEIRS, label="other")))


def test_two_servers_are_compared():
    comparison = compare(BASE, CANDIDATE)
    (cell,) = comparison.cells
    words = {row.compared.quantity.name: row.compared.verdict for row in cell.rows}
    assert words["throughput"].startswith("faster by 7.5 to 13 %")
    assert "warm-up latency" not in words, "the servers were there before"
    assert comparison.warnings == ()
    assert f"target.url: {OURS} -> {THEIRS}" in comparison.changed
    assert f"target.url: {OURS} -> {THEIRS}" in render_changelog(comparison)


def test_the_page_says_what_was_sent_and_nothing_of_a_design():
    text = render_markdown(compare(BASE, CANDIDATE))
    assert "model resnet18; input float32 [1, 3, 224, 224]; 4 s of Poisson arrivals at 100 requests/s" in text
    assert "precision" not in text
    assert "torch" not in text


def test_two_versions_on_one_server_are_compared():
    old, new = (side(version, *throughputs(FIVE, against(OURS, version=version))) for version in ("1", "2"))
    assert compare(old, new).changed == ("target.version: 1 -> 2",)


def test_how_the_client_got_in_may_differ():
    other = against(THEIRS, access=AccessConfig(token_file=Path("token"), ca_file=Path("ca.pem")))
    comparison = compare(BASE, side("candidate", *throughputs(FIVE, other)))
    assert "target.access.token_file: None -> token" in comparison.changed


def test_how_answers_were_compared_and_what_inputs_are_called_may_differ():
    other = against(THEIRS, inputs={"data_0": "float32 [1, 3, 224, 224]"}, check_model="m.py:build", tolerance=0.1)
    assert compare(BASE, side("candidate", *throughputs(FIVE, other))).warnings == ()


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        pytest.param(
            against(THEIRS, inputs={"input": "uint8 [1, 224, 224, 3]"}),
            r"payload: float32 \[1, 3, 224, 224\] and uint8 \[1, 224, 224, 3\]",
            id="payload",
        ),
        pytest.param(against(THEIRS, model="resnet50"), "model.name: resnet18 and resnet50", id="model"),
        pytest.param(against(THEIRS, load=replace(POISSON, rate=200)), "load.rate: 100 and 200", id="load"),
        pytest.param(against(THEIRS, same_input=True), "target.same_input: False and True", id="one payload"),
        pytest.param(against(THEIRS, generators=2), "target.generators: 1 and 2", id="client"),
        pytest.param(
            against(THEIRS, shapes={"input": (1, 3, 224, 224)}), "target.shapes.input: none and", id="shapes given"
        ),
        pytest.param(summary(batch_size=1), "measured: a design and a server by its URL", id="a design of ours"),
    ],
)
def test_what_must_be_alike_is_refused_where_it_is_not(other, difference):
    with pytest.raises(IncomparableRuns, match=difference):
        compare(BASE, side("candidate", other))


def test_a_design_and_a_server_are_compared_on_demand_under_a_warning():
    comparison = compare(BASE, side("candidate", *throughputs(FIVE, summary(batch_size=1))), allow_unlike=True)
    assert "a design and a server by its URL" in comparison.warnings[0]
    assert f"target.url: {OURS} -> none" in comparison.changed


def test_runs_of_one_side_are_against_one_server():
    mixed = side("mixed", against(OURS), against(THEIRS))
    with pytest.raises(IncomparableRuns, match=f"http-resnet18 stands for {OURS} and {THEIRS}.*--label"):
        compare(mixed, CANDIDATE, allow_unlike=True)


def test_servers_of_one_label_do_not_stand_in_one_row_of_a_table(tmp_path):
    with pytest.raises(IncomparableRuns, match="http-resnet18 stands for"):
        write_tables([against(OURS), against(THEIRS)], tmp_path)
    assert write_tables([against(OURS, label="a"), against(THEIRS, label="b")], tmp_path)


def test_a_label_selects_a_side_of_a_folder(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / RUNS / name, against(OURS, label=name))
    chosen = load_side(parse_selection(f"{tmp_path}:b"))
    assert [run.experiment for run in chosen.summaries] == ["b"]


def test_a_server_that_was_overloaded_has_no_latency_to_compare(tmp_path):
    for name, service_ms in (("fast", 5), ("slow", 20)):
        for number in range(5):
            write_run(folder := tmp_path / RUNS / f"r{number}-{name}", against(OURS, label=name))
            write_records(one_server(service_ms, number), folder / samples.RECORDS)
    comparison = compare(*(load_side(parse_selection(f"{tmp_path}:{name}")) for name in ("fast", "slow")))
    names = [row.compared.quantity.name for row in comparison.cells[0].rows]
    assert "throughput" in names
    assert not {"average latency", "p99 response time"} & set(names)
    assert any("slow: 5 of 5 runs were sent more than was answered" in warning for warning in comparison.warnings)


def one_server(service_ms, seed):
    """Records of 400 requests, one in 10 ms on average, to a server that takes so long for each."""
    records = empty_records(400)
    records["phase"], records["status"], records["rows"] = PHASES.index("measured"), STATUSES.index("ok"), 1
    gaps = np.random.default_rng(seed).exponential(10 * MS, 400)
    records["scheduled_ns"] = records["issued_ns"] = np.cumsum(gaps).astype(np.int64)
    free = 0
    for record in records:
        free = max(free, int(record["scheduled_ns"])) + service_ms * MS
        record["completed_ns"] = free
    return records
