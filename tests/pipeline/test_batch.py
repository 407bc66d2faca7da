"""When a batch starts and how large it is: the rule alone, whatever waits."""

from itertools import accumulate, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import LanesConfig
from headrace.pipeline.batch import WORTH_PADDING, BatchingConfig, bucket_of, may_start, powers_of_two, take

CONFIGS = st.builds(
    BatchingConfig,
    buckets=st.sets(st.integers(1, 40), min_size=1, max_size=6).map(lambda rows: tuple(sorted(rows))),
    max_queue_delay_us=st.sampled_from([0, 1, 500]),
)


@st.composite
def situations(draw):
    """A configuration and waiting requests that admission has let in, with the oldest one's time."""
    config = draw(CONFIGS)
    waiting = draw(st.lists(st.integers(1, config.max_batch_size), max_size=50))
    return config, waiting, draw(st.integers(0, 1000))


def largest_prefix(waiting, rows):
    return sum(total <= rows for total in accumulate(waiting))


@given(situations(), st.booleans())
def test_a_batch_is_a_prefix_that_the_largest_bucket_holds(situation, lane_idle):
    config, waiting, waited_us = situation
    count = take(waiting, waited_us, config, lane_idle=lane_idle)
    assert 0 <= count <= len(waiting)
    assert sum(waiting[:count]) <= config.max_batch_size


@given(situations(), st.booleans())
def test_what_fills_the_largest_bucket_starts_at_once_even_behind_a_running_batch(situation, lane_idle):
    config, waiting, _ = situation
    if sum(waiting) >= config.max_batch_size:
        assert take(waiting, 0, config, lane_idle=lane_idle) == largest_prefix(waiting, config.max_batch_size)


@given(situations())
def test_a_part_of_a_batch_never_starts_on_a_busy_lane(situation):
    config, waiting, waited_us = situation
    if sum(waiting) < config.max_batch_size:
        assert take(waiting, waited_us, config, lane_idle=False) == 0


@given(situations())
def test_an_idle_lane_never_waits_while_something_has_waited_long_enough(situation):
    config, waiting, waited_us = situation
    if waiting and waited_us >= config.max_queue_delay_us:
        assert take(waiting, waited_us, config, lane_idle=True) > 0


@given(situations())
def test_a_part_of_a_batch_waits_until_exactly_the_delay(situation):
    config, waiting, _ = situation
    delay_us = config.max_queue_delay_us
    if waiting and sum(waiting) < config.max_batch_size:
        assert take(waiting, delay_us - 0.001, config, lane_idle=True) == 0
        assert take(waiting, delay_us, config, lane_idle=True) > 0


@given(situations())
def test_a_part_of_a_batch_is_all_that_waits_or_fills_a_smaller_bucket_as_well_as_it_can(situation):
    config, waiting, _ = situation
    total = sum(waiting)
    if not waiting or total >= config.max_batch_size:
        return
    count = take(waiting, config.max_queue_delay_us, config, lane_idle=True)
    smaller = max((bucket for bucket in config.buckets if bucket < total), default=0)
    if total >= WORTH_PADDING * bucket_of(total, config) or not largest_prefix(waiting, smaller):
        assert count == len(waiting)
    else:
        assert count == largest_prefix(waiting, smaller)


@pytest.mark.parametrize(
    ("waiting", "count"),
    [
        ([1], 1),
        ([1] * 3, 3),
        ([1] * 5, 4),
        ([1] * 6, 6),
        ([5], 1),
        ([3, 2], 1),
        ([2, 3, 2], 3),
        ([2, 3], 1),
        ([4, 1], 1),
        ([5, 5], 1),
        ([8, 8], 1),
        ([], 0),
    ],
    ids=[
        *("one row", "three of four", "five of eight are four and one", "six of eight", "one large request"),
        *("three and then two", "seven of eight", "two and then three", "four and then one"),
        *("what does not fit waits", "full", "nothing"),
    ],
)
def test_an_idle_lane_gets_a_batch_that_is_worth_its_padding(waiting, count):
    assert take(waiting, 0, BatchingConfig(buckets=(1, 2, 4, 8)), lane_idle=True) == count


def test_a_batch_takes_no_more_than_it_needs_to_look_at():
    assert take(repeat(1), 0, BatchingConfig(buckets=(1, 8)), lane_idle=False) == 8


@given(situations(), st.booleans())
def test_what_may_not_start_is_not_taken(situation, lane_idle):
    config, waiting, waited_us = situation
    if take(waiting, waited_us, config, lane_idle=lane_idle):
        assert may_start(sum(waiting), config, lane_idle=lane_idle)


@given(situations(), st.booleans())
def test_what_may_start_is_taken_once_it_has_waited(situation, lane_idle):
    config, waiting, _ = situation
    if may_start(sum(waiting), config, lane_idle=lane_idle):
        assert take(waiting, config.max_queue_delay_us, config, lane_idle=lane_idle)


@given(CONFIGS, st.data())
def test_the_bucket_is_the_smallest_that_fits(config, data):
    rows = data.draw(st.integers(1, config.max_batch_size))
    assert bucket_of(rows, config) == min(bucket for bucket in config.buckets if bucket >= rows)


@pytest.mark.parametrize(
    ("max_batch_size", "buckets"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9))],
)
def test_the_usual_buckets_are_powers_of_two_and_the_largest(max_batch_size, buckets):
    assert powers_of_two(max_batch_size) == buckets
    LanesConfig(buckets=buckets).validate()
