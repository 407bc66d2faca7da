"""The simulated engine obeys the laws of queues that are known, batches as the dispatcher does, and loses nothing."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.pipeline.dispatch import Dispatcher
from headrace.planning.simulate import _Engine, poisson, simulate_closed, simulate_open
from tests.pipeline.fakes import FakeLane, FakeSource
from tests.planning.worlds import World, exponential, setup

COUNT = 40_000
MS = 1e-3


def mean_wait(simulated, service_s):
    return float(simulated.latency_s.mean()) - service_s


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_lane_without_batching_waits_as_an_m_d_1_queue(load):
    service_s = 10 * MS
    simulated = simulate_open(
        setup(depth=3), World(lambda rows, running: service_s), poisson(load / service_s, COUNT, seed=1)
    )
    expected = load * service_s / (2 * (1 - load))  # Pollaczek and Khinchine
    assert mean_wait(simulated, service_s) == pytest.approx(expected, rel=0.06)


def m_m_c_wait(servers, load, service_s):
    """Erlang's C formula."""
    offered = load * servers
    last = offered**servers / math.factorial(servers) / (1 - load)
    waits = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    return waits * service_s / (servers * (1 - load))


def test_exponential_batches_on_one_lane_wait_as_an_m_m_1_queue():
    service_s, load = 10 * MS, 0.6
    world = World(lambda rows, running: service_s, noise=exponential(2))
    simulated = simulate_open(setup(), world, poisson(load / service_s, COUNT, seed=3))
    assert mean_wait(simulated, service_s) == pytest.approx(m_m_c_wait(1, load, service_s), rel=0.1)


@pytest.mark.parametrize("servers", [2, 4, 8])
def test_lanes_that_share_nothing_wait_as_an_m_d_c_queue(servers):
    # Equal times, since batches are told in the order of their launch and longer ones would keep others.
    # By Cosmetatos's approximation (1975), which is good to 2 %.
    service_s, load = 10 * MS, 0.8
    world = World(lambda rows, running: service_s)
    simulated = simulate_open(setup(lanes=servers), world, poisson(load * servers / service_s, COUNT, seed=3))
    spread = (1 - load) * (servers - 1) * (math.sqrt(4 + 5 * servers) - 2) / (16 * load * servers)
    expected = m_m_c_wait(servers, load, service_s) / 2 * (1 + spread)
    assert mean_wait(simulated, service_s) == pytest.approx(expected, rel=0.1)


def test_equal_lanes_that_share_a_device_take_as_long_as_processor_sharing_says():
    service_s, load = 10 * MS, 0.5
    world = World(lambda rows, running: service_s * running)
    simulated = simulate_open(setup(lanes=64), world, poisson(load / service_s, COUNT, seed=4))
    assert float(simulated.latency_s.mean()) == pytest.approx(service_s / (1 - load), rel=0.05)


def test_a_closed_loop_answers_what_full_lanes_do():
    world = World(lambda rows, running: (2 + running) * MS)
    simulated = simulate_closed(setup(lanes=4, depth=2), world, 4000, 16)
    assert simulated.samples_per_s == pytest.approx(4 / (6 * MS), rel=0.01)


def test_a_lone_request_takes_its_transport_its_start_and_its_batch():
    world = World(lambda rows, running: 5 * MS, before=1 * MS, idle=2 * MS)
    simulated = simulate_open(setup(), world, np.array([0.5]))
    assert simulated.latency_s == pytest.approx([8 * MS])


def test_a_batchs_beginning_goes_on_while_it_waits_behind_another():
    world = World(lambda rows, running: 5 * MS, idle=2 * MS)
    simulated = simulate_open(setup(depth=2), world, np.array([0.0, 1 * MS]))
    # The second is launched at 1 ms, and could run at 3; the first runs from 2 to 7.
    assert simulated.latency_s == pytest.approx([7 * MS, 11 * MS])


def test_a_batch_is_as_much_slower_as_those_beside_it_weigh_more():
    class Weighed(World):
        def work_s(self, rows):
            return float(rows)

    world = Weighed(lambda rows, running: rows * running * MS)
    simulated = simulate_open(setup(buckets=(1, 3), lanes=2), world, np.array([0.0, 0.0, 0.0, 0.5 * MS]))
    # From 0.5 ms on each would take 4 ms. The larger needs 5/6 of that, and the small one then 1/6 of its own 1 ms.
    assert simulated.latency_s == pytest.approx([23 / 6 * MS] * 3 + [3.5 * MS])


def test_a_request_waits_for_company_as_long_as_the_delay_says():
    world = World(lambda rows, running: 5 * MS)
    alone = simulate_open(setup(buckets=(1, 2), delay_us=3000), world, np.array([0.0]))
    pair = simulate_open(setup(buckets=(1, 2), delay_us=3000), world, np.array([0.0, 1 * MS]))
    assert alone.latency_s == pytest.approx([8 * MS])
    assert pair.latency_s == pytest.approx([6 * MS, 5 * MS])


@pytest.mark.timeout(60)
def test_a_wait_for_company_ends_whatever_rounding_leaves_of_it():
    world = World(lambda rows, running: 5 * MS)
    offsets = np.cumsum(np.random.default_rng(0).uniform(0.1, 1, 20_000))
    simulated = simulate_open(setup(buckets=(1, 2), delay_us=12_500), world, offsets)
    assert simulated.latency_s == pytest.approx(np.full(20_000, 17.5 * MS), rel=1e-4)


def test_a_pause_stops_the_host_and_not_the_device():
    world = World(lambda rows, running: 10 * MS, pauses=[(5 * MS, 20 * MS)])
    simulated = simulate_open(setup(), world, np.array([0.0, 1 * MS]))
    # The first is done after 10 ms, and told with the pause's end at 25; only then can the second start.
    assert simulated.latency_s == pytest.approx([25 * MS, 34 * MS])


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 8), min_size=1, max_size=60),
    lanes=st.integers(1, 3),
    depth=st.integers(1, 3),
    pauses=st.lists(st.tuples(st.floats(0.001, 20), st.floats(0.001, 20)), max_size=3),
)
def test_every_request_is_answered_once_and_never_before_it_was_computed(gaps, lanes, depth, pauses):
    world = World(lambda rows, running: (2 + rows) * MS, pauses=[(at * MS, long * MS) for at, long in pauses])
    offsets = np.cumsum(gaps) * MS
    simulated = simulate_open(setup(buckets=(1, 2, 4), lanes=lanes, depth=depth), world, offsets)
    assert simulated.issued_s == pytest.approx(offsets)
    assert (simulated.latency_s >= 3 * MS - 1e-9).all()


class Recording(_Engine):
    """Notes every launch: when, which lane in the order of its making, and how many requests."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lanes = list(self._levels[0])
        self.log = []

    def _launch(self, level, count):
        lane = self._levels[level][0]
        super()._launch(level, count)
        self.log.append((self.lanes.index(lane), count, self._launched[-1].rows))


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    lanes=st.integers(1, 3),
    depth=st.integers(1, 3),
    rows=st.integers(1, 4),
)
def test_the_dispatcher_itself_makes_the_same_batches_from_the_same_arrivals_and_ends(gaps, lanes, depth, rows):
    shape = setup(rows=rows, buckets=(1, 2, 4, 8), lanes=lanes, depth=depth)
    # Moments are thousandths of primes apart, so that no arrival falls on an end.
    arrivals = np.cumsum(gaps) * 1.0007 * MS
    engine = Recording(shape, World(lambda rows, running: (7.0311 + 3 * rows) * MS), len(arrivals))
    act, answer = engine._arrive, engine._device
    real_lanes = [FakeLane() for _ in range(lanes)]
    dispatcher = Dispatcher(real_lanes, shape.batching, depth)
    source = FakeSource()

    def arrive(event):
        act(event)
        dispatcher.submit([source.ticket(request, rows) for request in event.value])

    def device(event):
        before = [lane.queue[0] if lane.queue else None for lane in engine.lanes]
        answer(event)
        for number, batch in enumerate(before):
            if batch is not None and batch.done:
                real_lanes[number].end()
        dispatcher._finish_done()

    engine._arrive, engine._device = arrive, device
    for request, at_s in enumerate(arrivals):
        engine.after(float(at_s), lambda event: engine.issue([event.value]), request)
    engine.env.run()
    assert sum(count for _, count, _ in engine.log) == len(arrivals)
    for number, lane in enumerate(real_lanes):
        simulated = [(count, bucket) for which, count, bucket in engine.log if which == number]
        assert simulated == [(len(batch.tickets), batch.bucket) for batch in lane.launched]


def test_a_seed_repeats_and_another_one_differs():
    first, again, other = (poisson(100, 50, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
