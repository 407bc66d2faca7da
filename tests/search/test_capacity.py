"""Searches against simulated queues, whose capacity is known, and what the reports say."""

import dataclasses

import numpy as np
import pytest

from headrace.bench.record import STATUSES, empty_records
from headrace.config import LoadConfig
from headrace.errors import InvalidOption
from headrace.search.capacity import SearchConfig
from headrace.search.capacity_report import page
from headrace.search.holds import Bound, judge_rate
from headrace.search.trial import Trial, of_records
from tests.search.queues import Clock, Queue, md1_rate, mm1_rate, searched, stamped, summary

LONG = {"duration_s": 60, "time_s": 1e6, "level_duration_s": 60}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("law", ["M/M/1", "M/D/1"])
def test_the_capacity_of_a_known_law_is_found(law, seed):
    """Of 60 s at about 150 requests/s: 95 % of such searches are within 4.5 % (M/M/1) and 3.5 % (M/D/1)."""
    exponential = law == "M/M/1"
    p99_s = 0.1 if exponential else 0.03
    true = (mm1_rate if exponential else md1_rate)(0.005, p99_s)
    report = searched(Queue(0.005, exponential, seed), p99_s=p99_s, resolution=0.02, **LONG)
    assert report.requests_per_s == pytest.approx(true, rel=0.07)
    assert report.limit == "server"
    assert report.requests_per_s < report.not_held_requests_per_s <= 1.0201 * report.requests_per_s


def test_latency_is_told_at_shares_of_the_capacity_with_its_limits():
    longer = LONG | {"level_duration_s": 400}
    report = searched(Queue(0.005, exponential=True), p99_s=0.1, resolution=0.02, **longer)
    assert [level.percent for level in report.levels] == [50, 70, 80, 90]
    within = []
    for level in report.levels:
        assert level.rate == pytest.approx(report.requests_per_s * level.percent / 100)
        true = -np.log(0.01) / (200 - level.rate)
        assert level.p99_s == pytest.approx(true, rel=0.25)
        within += [level.p99_low_s <= true <= level.p99_high_s] if level.p99_low_s else []
    assert len(within) >= 2, "the longest queues need more yet"
    assert sum(within) >= len(within) - 1, "95 % limits"
    assert "| 50 % |" in page(report)


def test_an_unclear_rate_is_repeated_with_other_arrivals_and_a_clear_one_is_not():
    queue = Queue(0.005, exponential=True)
    report = searched(queue, p99_s=0.1, duration_s=20, repeats=4, time_s=1e6)
    assert {each.trials for each in report.rates} >= {1, 4}
    assert all(each.clear or each.trials == 4 for each in report.rates)
    assert max(each.rate for each in report.rates if each.trials == 1) > report.requests_per_s
    seeds = [load.seed for load in queue.loads if load.kind == "poisson"]
    assert len(set(seeds)) == len(seeds)


def test_the_capacity_itself_had_every_run_that_it_may_have():
    report = searched(Queue(0.005), p99_s=0.03, duration_s=20, repeats=3, time_s=1e6)
    assert next(each.trials for each in report.rates if each.rate == report.requests_per_s) == 3


def test_a_server_that_cannot_hold_the_bound_at_any_rate_is_told_at_once():
    queue = Queue(0.05)
    report = searched(queue, p99_s=0.02, duration_s=10, time_s=1e6)
    assert report.requests_per_s is None
    assert "no rate holds p99 20 ms: one request alone takes 50 ms" in report.verdict
    assert len(queue.loads) == 1


def test_a_server_that_refuses_holds_no_rate_unless_it_may():
    queue = Queue(0.005, refuses=1)
    report = searched(queue, p99_s=0.1, duration_s=10, repeats=1, time_s=1e6)
    assert report.requests_per_s is None
    assert "requests were refused" in report.verdict
    allowed = searched(Queue(0.005, refuses=1), p99_s=0.1, duration_s=10, repeats=1, time_s=1e6, allow_shed=0.01)
    assert allowed.requests_per_s == pytest.approx(md1_rate(0.005, 0.1), rel=0.1)


def test_a_server_faster_than_the_client_can_offer_is_said_to_be_so():
    report = searched(Queue(0.0001, client_rate=2000), p99_s=0.05, duration_s=10, repeats=2, time_s=1e6)
    assert report.limit == "client"
    assert report.requests_per_s == pytest.approx(2000, rel=0.1)
    assert "the client is the limit, and not the server, whose capacity is at least that" in report.verdict


def test_a_late_client_is_no_reason_against_a_rate_that_holds_all_the_same():
    report = searched(Queue(0.005, late_s=0.02), p99_s=0.1, duration_s=20, time_s=1e6)
    held = next(each for each in report.rates if each.rate == report.requests_per_s)
    assert held.left_out == 0
    assert held.p99_s <= 0.1
    assert 0.5 * md1_rate(0.005, 0.1) < held.rate


def test_what_the_time_allows_is_the_result():
    short = searched(Queue(0.005), p99_s=0.03, duration_s=10, time_s=60, resolution=0.01)
    assert "the time was used up" in short.verdict
    assert short.requests_per_s is None or short.requests_per_s < short.not_held_requests_per_s
    queue = Queue(0.005, clock=Clock())
    searched(queue, p99_s=0.03, duration_s=10, time_s=200)
    assert queue.clock.ns - 1 <= 200e9


def test_nothing_in_the_report_depends_on_the_order_of_the_trials_at_a_rate():
    queue = Queue(0.005, exponential=True)
    first = searched(queue, p99_s=0.1, duration_s=10, time_s=1e6)
    assert [each.rate for each in first.rates] == sorted(each.rate for each in first.rates)


def trial(response_s, **facts):
    values = {"name": "002-rate-1-1", "kind": "rate", "rate": 1.0, "seed": 0, "rows": 1} | facts
    return Trial(response_s=np.asarray(response_s, dtype=np.float64), **values)


RNG = np.random.default_rng(0)
GOOD, BAD = RNG.uniform(0.01, 0.05, 2000), RNG.uniform(0.01, 0.2, 2000)
BOUND = Bound(p99_s=0.1)


@pytest.mark.parametrize(
    ("trials", "holds", "clear", "limit", "words"),
    [
        ([trial(GOOD)], True, True, "server", "p99 49.6 ms of 100 ms"),
        ([trial(BAD)], False, True, "server", "of 100 ms"),
        ([trial(GOOD[:50])], True, False, "server", "of 100 ms"),
        ([trial(GOOD, failed=1)], False, True, "server", "1 of 2001 requests failed"),
        ([trial(GOOD, refused=1)], False, True, "server", "1 of 2001 requests were refused"),
        ([trial(GOOD, late="late")], True, True, "server", "of 100 ms"),
        ([trial(BAD, late="late")], False, False, "client", "late"),
        ([trial(BAD, late="late"), trial(GOOD)], True, True, "server", "left out, since the client was late: 1 of 2"),
        ([trial(GOOD, unsteady="grew")], False, False, "server", "grew"),
        ([trial(GOOD, unsteady="grew"), trial(GOOD, unsteady="grew")], False, True, "server", "grew"),
        ([trial(GOOD, unsteady="grew"), trial(GOOD)], True, False, "server", "of 100 ms"),
        ([trial([], failed=3)], False, True, "server", "3 of 3 requests failed"),
    ],
    ids=[
        *("good", "bad", "too few to be clear", "one failed", "one refused", "late and holds all the same"),
        *("late and beyond", "a late one beside a good one", "growing once", "growing twice", "growing in one of two"),
        "nothing answered",
    ],
)
def test_a_rate_is_judged_by_all_its_trials(trials, holds, clear, limit, words):
    verdict = judge_rate(1.0, trials, BOUND)
    assert (verdict.holds, verdict.clear, verdict.limit) == (holds, clear, limit)
    assert words in verdict.reason
    assert verdict.least_beyond <= verdict.beyond <= verdict.most_beyond or not len(trials[0].response_s)


def test_requests_that_depend_on_each_other_make_no_verdict_clear():
    blocks = np.repeat(RNG.uniform(0.01, 0.05, 20), 100)
    assert judge_rate(1.0, [trial(RNG.permutation(blocks))], BOUND).clear
    assert not judge_rate(1.0, [trial(blocks)], BOUND).clear


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_s": 5}, "--time 5s: too short for a single rate; it takes 18s"),
        ({"repeats": 0}, "--repeats 0: at least 1"),
        ({"resolution": 0}, "--resolution 0: must be 0.001 to 1"),
        ({"bound": Bound(p99_s=0)}, "--p99 0s: must be above 0"),
        ({"bound": Bound(p99_s=1, allow_shed=1)}, "--allow-shed 1: give a share"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(options, words):
    config = dataclasses.replace(SearchConfig(bound=Bound(p99_s=1)), **options)
    with pytest.raises(InvalidOption, match=words):
        config.validate()


def test_a_client_without_room_in_flight_is_not_late_of_itself():
    """Overloaded, with room for 8: requests wait for the server to answer, and the server is to blame."""
    records = held_back(300, 0.01, room=8)
    wide = summary(LoadConfig(kind="poisson", rate=300, duration_s=5, bound_s=0.1))
    target = dataclasses.replace(wide.options.target, connections=8)
    narrow = dataclasses.replace(wide, options=dataclasses.replace(wide.options, target=target))
    assert "the client sent late" in of_records("000-rate-1", wide, records, 0.1).late
    assert not of_records("000-rate-1", narrow, records, 0.1).late


def held_back(rate, service_s, room):
    """Return the records of a client that has `room` in flight at most, before a server of a fixed service time."""
    due = np.arange(1000) / rate
    issued, ended = np.zeros(1000), np.zeros(1000)
    for number in range(1000):
        issued[number] = max(due[number], ended[number - room] if number >= room else 0)
        ended[number] = max(issued[number], ended[number - 1]) + service_s
    records = stamped(empty_records(1000), due * 1e9, issued * 1e9, ended * 1e9)
    records["phase"], records["rows"], records["status"] = 2, 1, STATUSES.index("ok")
    return records
