"""Which engine a request goes to, played through in simulated time: engines that run batches on lanes, as ours do."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.clock import NS_PER_S
from headrace.routing import KNOWN_AFTER, STALE_NS, STALE_TIMES, EngineLoad, Spread, by_expected_answer

MS = 1_000_000
BATCH = 8


@dataclass
class Engine:
    """Runs batches of up to BATCH rows, one after the other. A batch takes `base_ns`, and `row_ns` for each row."""

    base_ns: int
    row_ns: int
    waiting: list = field(default_factory=list)  # requests: [rows, load when sent, time when sent]
    running: list = field(default_factory=list)

    def start(self):
        """Return how long the next batch takes, having started it; None if there is nothing, or one runs."""
        if self.running or not self.waiting:
            return None
        rows = 0
        while self.waiting and rows + self.waiting[0][0] <= BATCH:
            rows += self.waiting[0][0]
            self.running.append(self.waiting.pop(0))
        return self.base_ns + rows * self.row_ns


def play(engines, clients, rows=1, requests=3000):
    """Let so many clients send one request after the other; return how many each engine answered, and the time."""
    loads = [EngineLoad(BATCH) for _ in engines]
    spread, events, answered, ties = Spread(), [], Counter(), count()
    now_ns = sent = 0

    def send():
        number = spread.order(loads, rows, now_ns)[0]
        loads[number].rows += rows
        engines[number].waiting.append([rows, loads[number].rows, now_ns])
        begin(number)

    def begin(number):
        took_ns = engines[number].start()
        if took_ns is not None:
            heapq.heappush(events, (now_ns + took_ns, next(ties), number))

    for _ in range(clients):
        heapq.heappush(events, (0, next(ties), None))
    while sent < requests:
        now_ns, _, number = heapq.heappop(events)
        if number is None:
            sent += 1
            send()
            continue
        done, engines[number].running = engines[number].running, []
        for size, load, at_ns in done:
            loads[number].rows -= size
            loads[number].answered(load, now_ns - at_ns, now_ns)
            answered[number] += 1
            heapq.heappush(events, (now_ns, next(ties), None))
        begin(number)
    return answered, now_ns


@pytest.mark.parametrize("clients", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("row_ns", [0, MS], ids=["a batch takes as long as a row", "work adds up"])
def test_engines_that_are_alike_get_alike(clients, row_ns):
    answered, _ = play([Engine(MS, row_ns), Engine(MS, row_ns)], clients)
    assert min(answered[0], answered[1]) > 0.4 * answered.total()


@pytest.mark.parametrize("factor", [2, 4, 10])
def test_under_load_each_engine_gets_as_much_as_it_can_answer(factor):
    answered, took_ns = play([Engine(0, MS * factor), Engine(0, MS)], 64)
    assert answered[1] / answered[0] == pytest.approx(factor, rel=0.3)
    both_ns = 3000 / (1 / (MS * factor) + 1 / MS)
    assert took_ns < 1.15 * both_ns, "neither idles"


def test_one_client_after_the_other_is_sent_where_it_is_fast():
    answered, _ = play([Engine(10 * MS, 0), Engine(MS, 0)], 1)
    assert answered[1] > 0.95 * answered.total()


def test_a_batching_engine_is_not_passed_over_for_having_little_to_do():
    """By rows over time alone, the one that is given most seems fastest, and is given more."""
    loads = [EngineLoad(BATCH), EngineLoad(BATCH)]
    for rows, load in ((8, loads[0]), (1, loads[1])):
        for _ in range(100):
            load.answered(rows, MS, 0)
        load.rows = rows
    assert by_expected_answer(loads, 1, 0, 0) == [1, 0]


def test_an_engine_that_nothing_is_known_of_is_taken_to_be_like_the_others():
    loads = [EngineLoad(BATCH), EngineLoad(BATCH), EngineLoad(BATCH)]
    for _ in range(KNOWN_AFTER):
        loads[0].answered(1, MS, 0)
        loads[1].answered(1, 100 * MS, 0)
    assert by_expected_answer(loads, 1, 0, 0) == [0, 2, 1]


def test_one_slow_answer_alone_sends_nobody_away():
    fresh, known = EngineLoad(BATCH), EngineLoad(BATCH)
    for _ in range(KNOWN_AFTER):
        known.answered(1, MS, 0)
    fresh.answered(1, 1000 * MS, 0)
    assert fresh.pace(0) is None
    before = known.pace(0)
    known.answered(1, 1000 * MS, 0)
    assert known.pace(0) < 2 * before


def test_an_engine_that_becomes_slow_is_soon_known_as_that():
    load = EngineLoad(BATCH)
    for _ in range(100):
        load.answered(1, MS, 0)
    before = load.pace(0)
    for _ in range(100):
        load.answered(1, 100 * MS, 0)
    assert load.pace(0) > 50 * before


def test_engines_take_turns_where_nothing_tells_them_apart():
    loads = [EngineLoad(BATCH) for _ in range(3)]
    spread = Spread()
    assert [spread.order(loads, 1, 0)[0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_an_engine_that_was_slow_is_tried_again():
    loads = [EngineLoad(BATCH), EngineLoad(BATCH)]
    spread = Spread()
    for load in loads:
        for _ in range(KNOWN_AFTER):
            load.answered(1, 100 * MS if load is loads[0] else MS, 0)
    chosen = []
    for number in range(2 * STALE_TIMES):
        now_ns = number * NS_PER_S
        loads[1].answered(1, MS, now_ns)
        chosen.append(spread.order(loads, 1, now_ns)[0])
    assert set(chosen[:STALE_TIMES]) == {1}
    assert 0 in chosen[STALE_TIMES:]
    assert loads[0].pace(0) is not None, "not sooner than that"
    assert loads[0].pace(STALE_NS + 1) is None
    loads[0].answered(1, MS, STALE_NS + 1)
    for _ in range(KNOWN_AFTER):
        loads[0].answered(1, MS, STALE_NS + 1)
    assert loads[0].pace(STALE_NS + 1) == pytest.approx(loads[1].pace(0)), "what it was is forgotten"


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.lists(st.tuples(st.integers(1, 64), st.integers(1, NS_PER_S)), max_size=5)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 32),
    st.integers(0, 10),
)
def test_every_engine_is_named_once_whatever_was_seen_of_it(seen, rows, turn):
    loads = []
    for held, answers in seen:
        load = EngineLoad(BATCH)
        load.rows = held
        for load_rows, took_ns in answers:
            load.answered(load_rows, took_ns, 1)
        loads.append(load)
    order = by_expected_answer(loads, rows, 1, turn)
    assert sorted(order) == list(range(len(loads)))
