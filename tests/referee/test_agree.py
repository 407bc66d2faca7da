"""Where tools disagree: what is named, with which reason, and what is let pass."""

from dataclasses import replace

import pytest

from headrace.bench.stats import Distribution
from headrace.referee.agree import Judged, allowed, disagreements, ratio
from headrace.referee.cases import AGAIN, LOADGEN, OURS, PERF_ANALYZER, TRUTH, WAITING, Settings, cases
from headrace.referee.found import Found, Printed

BY_NAME = {case.name: case for case in cases(Settings())}
SERVER = BY_NAME["Server"]
THRESHOLD = 0.05


def spread(p50=0.01, p99=0.02, mean=0.012):
    return Distribution(mean=mean, min=p50 / 2, p50=p50, p90=(p50 + p99) / 2, p95=p99, p99=p99, max=2 * p99)


def found(tool, **more):
    usual = {"requests": 100, "throughput": 100.0, "from_schedule": spread(), "from_send": spread()}
    return Found(tool=tool, **(usual | more))


def judged(*others, again=None):
    return Judged(name="Server", words="", found=(found(OURS), *others, again or found(AGAIN)))


def sentences(*others, again=None, case=SERVER):
    return disagreements(judged(*others, again=again), case, THRESHOLD)


def printed_of(times, throughput=100.0):
    return Printed(throughput=throughput, p50=times.p50, p90=times.p90, p99=times.p99, mean=times.mean)


def test_tools_that_agree_are_not_named():
    assert sentences(found(TRUTH), found(LOADGEN, printed=printed_of(spread())), found(PERF_ANALYZER)) == ()


def test_a_difference_within_the_threshold_is_let_pass():
    assert sentences(found(LOADGEN, throughput=104.0)) == ()
    assert len(sentences(found(LOADGEN, throughput=106.0))) == 1


def test_a_difference_as_large_as_our_own_two_runs_is_noise():
    again = found(AGAIN, from_send=spread(p99=0.024))
    judgement = judged(again=again)
    assert allowed(judgement, "from send", "p99", THRESHOLD) == pytest.approx(0.4)
    assert sentences(found(LOADGEN, from_send=spread(p99=0.027)), again=again) == ()


def test_stamps_at_sending_are_named_as_the_reason():
    late = spread(p50=0.002, p99=0.004, mean=0.0025)
    tool = found(WAITING, from_schedule=None, from_send=late, printed=printed_of(late))
    from_send, printed = sentences(tool)
    assert "p99 4 ms, ours 20 ms (0.2 times)" in from_send
    assert "its clock starts at sending" in from_send
    assert printed.startswith(f"{WAITING}, printed")


def test_stamps_of_an_asynchronous_tool_are_named_where_only_the_schedule_differs():
    base = found(OURS, from_schedule=spread(p99=0.08))
    tool = found(PERF_ANALYZER, from_schedule=None, printed=printed_of(spread()))
    judgement = Judged(name="", words="", found=(base, tool, replace(base, tool=AGAIN)))
    (sentence,) = [each for each in disagreements(judgement, SERVER, THRESHOLD) if "p99" in each]
    assert sentence.endswith("it stamps at sending, and does not say how late that was")


def test_stamps_at_sending_are_no_reason_where_the_times_from_sending_differ_too():
    quick = spread(p50=0.005)
    tool = found(PERF_ANALYZER, from_schedule=None, from_send=quick, printed=printed_of(quick))
    _, printed = sentences(tool)
    assert printed.startswith(f"{PERF_ANALYZER}, printed: p50 5 ms")
    assert "stamps" not in printed


def test_in_a_closed_loop_stamps_at_sending_are_no_reason():
    tool = found(PERF_ANALYZER, from_schedule=None, from_send=spread(p99=0.03))
    (sentence,) = sentences(tool, case=BY_NAME["SingleStream"])
    assert sentence.endswith("(1.5 times)")


def test_a_burst_waits_for_connections_before_it_is_sent():
    (sentence,) = sentences(found(LOADGEN, from_send=spread(p99=0.04), own_cost=None), case=BY_NAME["Offline"])
    assert sentence.endswith("ours sends when a connection is free, and the wait for one is before that")


def test_what_our_adapter_costs_is_named_beside_loadgens_times():
    (sentence,) = sentences(found(LOADGEN, from_send=spread(p50=0.011), own_cost=spread(p50=0.001, p99=0.003)))
    assert "1 ms (p50) to 3 (p99) are our adapter's" in sentence


def test_a_printed_mean_that_its_own_records_refute_is_named():
    told = replace(printed_of(spread()), mean=0.0121)
    (sentence,) = sentences(found(LOADGEN, printed=told))
    assert sentence == f"{LOADGEN}: the mean that it prints, 12.1 ms, is not that of its own records, 12 ms"


def test_a_tool_without_numbers_says_why():
    assert sentences(Found(tool=LOADGEN, error="the sky fell")) == (f"{LOADGEN}: no numbers that count: the sky fell",)


def test_the_truth_is_held_against_us_too():
    (sentence,) = sentences(found(TRUTH, throughput=120.0))
    assert sentence.startswith(f"{TRUTH}: throughput 120/s, ours 100/s (1.2 times)")


def test_what_a_tool_prints_is_set_beside_our_time_from_schedule():
    base = found(OURS, from_schedule=spread(p50=0.02))
    tool = found(LOADGEN, printed=printed_of(spread(p50=0.01)))
    judgement = Judged(name="", words="", found=(base, tool))
    assert ratio(judgement, tool, "printed", "p50") == 0.5
    assert ratio(judgement, tool, "printed", "throughput") == 1.0


def test_no_tool_is_compared_where_ours_failed():
    judgement = Judged(name="", words="", found=(Found(tool=OURS, error="x"), found(LOADGEN)))
    assert disagreements(judgement, SERVER, THRESHOLD) == (f"{OURS}: no numbers that count: x",)
