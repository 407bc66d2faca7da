"""A plan from runs: sizes that follow from the parts, what is refused, and the command from end to end."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest

from headrace import cli
from headrace.bench.summary import TargetFacts
from headrace.config import TargetConfig
from headrace.errors import InvalidOption
from headrace.plan_options import ask
from headrace.planning.calibrate import calibrate
from headrace.planning.fleet import Ask, Bytes, choose, fleet, limits, most_requests_per_s, setups
from headrace.planning.observe import observe
from headrace.planning.picture import gpu_counts
from tests.planning.worlds import H100, made_records, setup, summary_of, write_run

MS = 1e-3
UNKNOWN = Bytes(sent=None, answered=None)


def run_of(rows, service_s, count=200):
    completed = np.cumsum(np.full(count, service_s + MS))
    records = made_records(completed - service_s, completed, rows)
    return observe(f"rows {rows}", summary_of(records, rows=rows), records)


@pytest.fixture(scope="module")
def model():
    """A batch of 1 row takes 2 ms and one of 8 takes 4 ms, when it has the device to itself."""
    return calibrate([run_of(1, 2 * MS), run_of(8, 4 * MS)])


@pytest.fixture(scope="module")
def best(model):
    return choose(model, setups((1, 8), 1, [1], 1), Ask(rate=1, bound_s=40 * MS))[0]


def test_full_batches_on_all_lanes_are_the_most_that_an_engine_does(model):
    assert most_requests_per_s(model, setup(buckets=(1,))) == pytest.approx(500, rel=0.01)
    assert most_requests_per_s(model, setup(buckets=(1, 8))) == pytest.approx(2000, rel=0.01)


def test_with_room_in_the_bound_large_batches_win_and_without_it_small_ones(model):
    tried = setups((1, 8), 1, [1], 1)
    assert {each.batching.buckets for each in tried} == {(1,), (1, 8)}
    roomy = choose(model, tried, Ask(rate=1, bound_s=40 * MS))[0]
    tight = choose(model, tried, Ask(rate=1, bound_s=3.5 * MS))[0]
    assert roomy.setup.batching.max_batch_size == 8
    assert roomy.requests_per_s > 1200
    assert roomy.latency.p99 <= 40 * MS
    assert tight.requests_per_s < 200
    assert tight.latency.p99 <= 3.5 * MS


def test_a_bound_that_a_lone_request_exceeds_is_refused_with_the_smallest_possible(model):
    with pytest.raises(InvalidOption, match=r"no number of GPUs .* p99 of 2\.\d+ ms"):
        choose(model, setups((1, 8), 1, [1], 1), Ask(rate=1, bound_s=1 * MS))


def test_a_fleet_grows_with_the_rate_and_its_share_keeps_the_bound(model, best):
    asked = Ask(rate=1e5, bound_s=40 * MS, gpu_hour_cost=3.0)
    one, ten = (fleet(model, best, rate, asked, UNKNOWN) for rate in (1e5, 1e6))
    assert one.gpus == -(-1e5 // best.requests_per_s)
    assert ten.gpus == pytest.approx(10 * one.gpus, abs=10)
    assert one.latency.p99 <= 40 * MS * 1.05  # the share of each is a little below what was found to do
    assert one.gpu_hours_per_million == pytest.approx(one.gpus / 3600 * 10)
    assert one.cost_per_million == pytest.approx(3 * one.gpu_hours_per_million)
    assert one.bound_by == "GPUs"
    assert one.proxies is None


def test_a_failed_node_slows_a_large_fleet_and_stops_a_small_one(model, best):
    asked = Ask(rate=1, bound_s=40 * MS, gpus_per_node=4)
    small = fleet(model, best, 3 * best.requests_per_s, asked, UNKNOWN)
    large = fleet(model, best, 400 * best.requests_per_s, asked, UNKNOWN)
    assert small.degraded is None
    assert small.gpus_with_spare == small.gpus + 4
    assert large.degraded is not None
    assert large.degraded.p50 >= large.latency.p50 * 0.97


def test_the_network_and_the_proxies_are_counted_and_the_first_limit_is_named(model, best):
    asked = Ask(rate=10_000, bound_s=40 * MS, network_bits_per_s=8e6, proxy_rate=700)
    size = Bytes(sent=1000.0, answered=50.0)  # 1000 requests/s of a node
    found = fleet(model, best, asked.rate, asked, size)
    assert (found.nodes, found.gpus, found.proxies, found.bound_by) == (10, 80, 15, "network")
    assert found.network_share == pytest.approx(1)
    assert found.degraded is None, "the other nodes' networks cannot carry it"
    assert list(limits(best, asked, size)) == ["one proxy", "network of a node", "8 GPUs of a node"]


def test_a_delay_is_taken_only_where_it_serves_more(best):
    assert best.setup.batching.max_queue_delay_us in (0, 5000, 10000)


def test_the_picture_has_fewer_and_more_gpus_than_the_plan():
    assert gpu_counts(1) == [1, 2]
    assert gpu_counts(8) == [4, 6, 8, 12, 16]


def command(capsys, *words):
    """Return the exit code and what was printed."""
    code, handler = 0, signal.getsignal(signal.SIGTERM)
    try:
        cli.main(["plan", *map(str, words)])
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return code, *capsys.readouterr()


RUNS = ("--runs", H100 / "bf16-b8.0", H100 / "bf16-b32.0")


def test_the_command_writes_page_picture_and_json_with_the_models_own_error(tmp_path, capsys):
    folder = tmp_path / "plan"
    asked = ("--rate", 50000, "--p99", "25ms", "--rows", 8, "--network", "25Gbps", "--json", "--lanes", 4, 32)
    code, out, _ = command(capsys, *asked, "--output-dir", folder, *RUNS)
    plan = json.loads(out)
    assert code == 0
    assert [each["rate"] for each in plan["fleets"]] == [5e4, 1e6, 1e7, 1e8]
    assert len(plan["checked"]) == 2
    assert any("error of predicted throughput on 2 configurations" in note for note in plan["notes"])
    assert plan["bytes"]["sent"] == 8 * 3 * 250 * 250 * 4
    assert json.loads((folder / "plan.json").read_text()) == plan
    page = (folder / "plan.md").read_text()
    assert "p99 within 25 ms" in page
    assert "When one node of 8 GPUs fails" in page
    assert "each configuration predicted from all others" in page
    assert (folder / "plan.png").stat().st_size > 10_000


def test_the_command_marks_what_lies_beyond_the_runs(capsys):
    code, out, _ = command(capsys, "--rate", 1000, "--p99", "50ms", "--lanes", 20, "--rates", 2000, *RUNS[:2])
    assert code == 0
    assert "EXTRAPOLATED" in out
    assert "batches at once: measured were up to" in " ".join(out.split())


def test_a_terminal_shows_what_was_predicted_beyond_the_target_and_no_wide_table(capsys):
    code, out, _ = command(capsys, "--rate", 1000, "--p99", "500ms", "--rows", 8, "--rates", 2000, *RUNS)
    assert code == 0
    missed = sum("MISSED" in line for line in out.splitlines())
    assert ("Predicted beyond the target when held out" in " ".join(out.split())) == bool(missed)
    assert "each configuration predicted from all others" not in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rate", 0, "--p99", "25ms"), "--rate 0: must be above 0"),
        (("--rate", -5, "--p99", "25ms"), "--rate -5: must be above 0"),
        (("--rate", "nan", "--p99", "25ms"), "--rate nan: must be above 0"),
        (("--rate", 5, "--p99", "0ms"), "--p99 0: must be above 0"),
        (("--rate", 5, "--p99", "25ms", "--gpus-per-node", 0), "--gpus-per-node 0: must be at least 1"),
        (("--rate", 5, "--p99", "25ms", "--proxy-rate", "fast"), "--proxy-rate fast: neither a number"),
        (("--rate", 5, "--p99", "25ms", "--network", "25"), "is no network rate; write it as 25Gbps"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(words, message, capsys):
    code, _, err = command(capsys, *words, "--runs", "nowhere")
    assert code == 2
    assert message in " ".join(err.split())


def test_a_run_through_a_proxy_says_what_one_does(tmp_path):
    records = made_records(np.arange(1, 101) * 0.01, np.arange(1, 101) * 0.01 + 0.005)
    through = write_run(tmp_path / "proxy", records, summary_of(records))
    words = ["plan", "--rate", "5000", "--p99", "25ms", "--proxy-rate", str(through), "--runs", "r"]
    assert ask(cli.build_parser().parse_args(words)).proxy_rate == pytest.approx(100 / 0.995, rel=0.001)


def test_runs_of_a_server_by_its_url_are_planned_from_requests_alone(tmp_path, capsys):
    for number, gap in enumerate((0.01, 0.02)):
        issued = np.arange(1, 301) * gap
        records = made_records(issued, issued + 0.005)
        for stage in ("received_ns", "started_ns", "computed_ns", "responded_ns", "batch_rows"):
            records[stage] = 0
        summary = summary_of(records, target=TargetConfig(url="http://127.0.0.1:8000", model="m"))
        load = replace(summary.options.load, kind="constant", concurrency=None, rate=1 / gap)
        facts = TargetFacts(
            inputs={}, payload_bytes=2000, payloads=1, compared_with="", connections=1, client_cpu_share=()
        )
        write_run(
            tmp_path / str(number), records, replace(summary, options=replace(summary.options, load=load), target=facts)
        )
    code, out, err = command(capsys, "--rate", 1000, "--p99", "25ms", "--json", "--rates", 2000, "--runs", tmp_path)
    assert code == 0, err
    plan = json.loads(out)
    assert any("the runs show no stages of the server" in note for note in plan["notes"])
    assert plan["bytes"]["sent"] == 2000
    # One request at a time is all that was seen: a queue of one server, at most 200/s.
    assert 7 <= plan["fleets"][0]["gpus"] <= 10
