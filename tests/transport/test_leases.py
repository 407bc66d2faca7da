"""Rows of a table: leased to one at a time, whatever the order of coming and going."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.transport.leases import RowLeases

ROWS = 12


def longest_run(free):
    """Return how many consecutive rows are free, where there are most: what the leases must be able to give."""
    longest = length = 0
    for row in range(ROWS):
        length = length + 1 if row in free else 0
        longest = max(longest, length)
    return longest


# A step leases so many rows, or gives back the lease of that place in the list.
@given(st.lists(st.tuples(st.booleans(), st.integers(1, ROWS + 1)), max_size=80))
def test_no_row_is_leased_twice_and_none_is_refused_while_a_run_is_free(steps):
    leases, held, free = RowLeases(ROWS), [], set(range(ROWS))
    for is_lease, number in steps:
        if is_lease:
            first = leases.lease(number)
            assert (first is None) == (number > longest_run(free))
            if first is not None:
                rows = set(range(first, first + number))
                assert rows <= free
                free -= rows
                held.append((first, number))
        elif held:
            first, count = held.pop(number % len(held))
            leases.release(first, count)
            free |= set(range(first, first + count))
        assert leases.free_rows == len(free)
    for lease in held:
        leases.release(*lease)
    assert leases.lease(ROWS) == 0, "what was given back is one run again"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_leases_one_after_the_other_lie_side_by_side(sizes):
    leases = RowLeases(sum(sizes))
    assert [leases.lease(size) for size in sizes] == [0, *accumulate(sizes[:-1])]
    assert leases.lease(1) is None


def test_leases_go_round_the_table_and_do_not_hurry_back_to_what_has_just_become_free():
    leases = RowLeases(10)
    assert [leases.lease(4), leases.lease(4)] == [0, 4]
    leases.release(0, 4)
    assert [leases.lease(2), leases.lease(3)] == [8, 0]


@pytest.mark.parametrize(
    ("first", "rows"),
    [(0, 2), (6, 2), (5, 2), (2, 4), (1, 2), (0, 8), (3, 4)],
    ids=[
        *("the run before", "the run after", "reaches into the run after", "a release of before", "begins too early"),
        *("spans everything", "ends too late"),
    ],
)
def test_rows_that_are_free_already_cannot_be_given_back(first, rows):
    leases = RowLeases(8)
    for _ in range(4):
        leases.lease(2)
    for free in ((0, 2), (6, 2), (2, 2)):
        leases.release(*free)  # only 4 and 5 are leased now
    with pytest.raises(ValueError, match=f"rows {first} to {first + rows - 1} are given back, but some of them are"):
        leases.release(first, rows)
    leases.release(4, 2)
    assert leases.lease(8) == 0, "the refusal changed nothing"
