import pytest

from headrace.bench.in_flight import descriptor_limit, free_shared_memory, in_flight_limit

GB = 10**9


@pytest.mark.parametrize(
    ("requests", "request_bytes", "free_bytes", "descriptors", "limit", "words"),
    [
        (100, 1000, 10 * GB, 1024, 100, None),
        (100, 192_000_000, 24 * GB, 1024, 62, "192.0 MB each and 24.0 GB"),
        (100, 192_000_000, 1000, 1024, 1, "at most 1 of 100"),
        (5000, 1000, 10 * GB, 1024, 256, "1024 open files"),
    ],
    ids=["all fit", "memory limits", "never less than one", "descriptors limit"],
)
def test_limit(requests, request_bytes, free_bytes, descriptors, limit, words):
    found, note = in_flight_limit(requests, request_bytes, free_bytes, descriptors)
    assert found == limit
    assert (note is None) if words is None else (words in note)


def test_this_machine_answers():
    assert free_shared_memory() > 0
    assert descriptor_limit() > 0
