"""Requests that run together: rows in are rows out, in order, and what lies together is copied as one."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.request import Batch, Segment, Ticket

FIRST, SECOND = (types.SimpleNamespace(table=object()) for _ in range(2))


def tickets_of(*places):
    return [Ticket(source, index, first_row, rows, 0) for index, (source, first_row, rows) in enumerate(places)]


@pytest.mark.parametrize(
    ("places", "segments"),
    [
        ([(FIRST, 4, 2)], [(FIRST, 4, 2)]),
        ([(FIRST, 4, 2), (FIRST, 6, 1), (FIRST, 7, 3)], [(FIRST, 4, 6)]),
        ([(FIRST, 4, 2), (FIRST, 7, 1)], [(FIRST, 4, 2), (FIRST, 7, 1)]),
        ([(FIRST, 4, 2), (FIRST, 2, 2)], [(FIRST, 4, 2), (FIRST, 2, 2)]),
        ([(FIRST, 4, 2), (SECOND, 6, 1)], [(FIRST, 4, 2), (SECOND, 6, 1)]),
        ([(FIRST, 0, 1), (SECOND, 5, 1), (FIRST, 1, 1)], [(FIRST, 0, 1), (SECOND, 5, 1), (FIRST, 1, 1)]),
    ],
    ids=["one", "side by side", "with a gap", "in the wrong order", "in two tables", "with another table between"],
)
def test_requests_that_lie_side_by_side_in_one_table_become_one_segment(places, segments):
    batch = Batch.of(tickets_of(*places))
    assert batch.segments == [Segment(source.table, first, rows) for source, first, rows in segments]


PLACES = st.lists(st.tuples(st.sampled_from([FIRST, SECOND]), st.integers(0, 9), st.integers(1, 3)), min_size=1)


@given(PLACES)
def test_the_segments_are_the_requests_rows_in_order(places):
    batch = Batch.of(tickets_of(*places))
    wanted = [(id(source.table), row) for source, first, rows in places for row in range(first, first + rows)]
    assert [(id(each.table), row) for each in batch.segments for row in range(12)[each.slice]] == wanted
    assert batch.rows == len(wanted)
    for segment, part in batch.pieces():
        assert wanted[part] == [(id(segment.table), row) for row in range(12)[segment.slice]]
