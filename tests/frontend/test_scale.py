"""Buckets of histograms: every value has one, none is wide, and batch sizes that matter have their own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.frontend.scale import BATCH_ROWS, RESPONSE_NS

SCALES = {"response times": RESPONSE_NS, "batch sizes": BATCH_ROWS}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@given(value=st.integers(1, 1 << 40))
def test_a_value_lies_in_its_bucket(scale, value):
    index = scale.index(value)
    assert 0 <= index < scale.buckets
    assert scale.lower(index) < value <= scale.upper(index)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_buckets_follow_each_other_without_gap(scale):
    assert scale.lower(0) == 0
    for index in range(scale.buckets - 1):
        assert scale.upper(index) == scale.lower(index + 1)
        assert scale.index(int(scale.upper(index))) == index
    assert math.isinf(scale.upper(scale.buckets - 1))


def test_from_10_us_to_100_s_a_bucket_is_at_most_5_percent_wide():
    for index in range(RESPONSE_NS.index(10_000), RESPONSE_NS.index(100 * 10**9) + 1):
        assert RESPONSE_NS.upper(index) <= 1.05 * RESPONSE_NS.lower(index)


@given(st.one_of(st.integers(1, 64), st.sampled_from([128, 256, 512, 1024, 4096, 65536])))
def test_usual_batch_sizes_are_told_exactly(rows):
    assert BATCH_ROWS.name(BATCH_ROWS.index(rows)) == rows


def test_no_value_at_all_and_too_large_ones_have_a_place():
    assert RESPONSE_NS.index(0) == RESPONSE_NS.index(-5) == 0
    last = RESPONSE_NS.buckets - 1
    assert RESPONSE_NS.index(1 << 62) == last
    assert RESPONSE_NS.name(last) == RESPONSE_NS.lower(last) + 1
