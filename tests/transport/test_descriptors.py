"""Descriptors between two sides: whole, in order, never more than fit, and a sleeping reader is woken."""

import multiprocessing
import os
import select
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import PeerGone, TransportFailed
from headrace.transport.descriptors import (
    ANSWER,
    CANCEL,
    DESCRIPTOR_DTYPE,
    ERROR,
    REQUEST,
    Descriptor,
    DescriptorRing,
    ErrorKind,
    cancellation,
    error_entry,
    kind_of,
    pack,
    request,
    require_ordered_memory,
    text_row,
    unpack,
)
from headrace.transport.layout import COUNTERS, DESCRIPTOR, Layout
from headrace.transport.pair import RingPair

WAIT_S = 60
ENTRIES = 4


@pytest.fixture
def wake_fd():
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def ring_of(wake_fd, entries=ENTRIES, find_peer=lambda: None):
    return DescriptorRing(mmap(-1, COUNTERS + entries * DESCRIPTOR), 0, entries, wake_fd, find_peer)


def packed(*indexes):
    return b"".join(pack(Descriptor(index, REQUEST)) for index in indexes)


def indexes_of(data):
    return [descriptor.request for descriptor in unpack(data)]


INT, LONG = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)


@given(st.tuples(LONG, *[INT] * 6, *[LONG] * 4))
def test_one_packed_and_many_in_an_array_are_the_same_bytes(fields):
    descriptor = Descriptor(*fields)
    assert DESCRIPTOR_DTYPE.itemsize == len(pack(descriptor)) == DESCRIPTOR
    assert DESCRIPTOR_DTYPE.names == Descriptor._fields
    assert np.frombuffer(pack(descriptor), DESCRIPTOR_DTYPE)[0].item() == descriptor
    assert list(unpack(pack(descriptor) * 2)) == [descriptor] * 2


@given(LONG, INT, INT, LONG, INT)
def test_a_request_says_what_it_was_made_of(number, first_row, rows, deadline_ns, priority):
    (told,) = unpack(request(number, first_row, rows, deadline_ns, priority))
    assert (told.request, told.kind, told.first_row, told.rows) == (number, REQUEST, first_row, rows)
    assert (told.deadline_ns, told.priority) == (deadline_ns, priority)


def test_a_request_without_deadline_and_priority_is_one_whose_other_fields_are_zero():
    assert request(7, 3, 2) == pack(Descriptor(7, REQUEST, 3, 2))
    assert cancellation(7, 3, 2) == pack(Descriptor(7, CANCEL, 3, 2))


@pytest.mark.parametrize(
    ("kind", "http_status"),
    [
        (ErrorKind.DEADLINE, 504),
        (ErrorKind.CANCELLED, 499),
        (ErrorKind.STOPPED, 503),
        (ErrorKind.INVALID, 400),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_errors_kind_says_which_class_it_was(kind, http_status):
    assert kind_of(kind.error_class("told")) is kind
    assert kind.error_class.http_status == http_status


def test_whatever_else_is_raised_is_the_models_and_so_is_an_entry_that_is_only_a_row():
    assert kind_of(KeyError()) is kind_of(PeerGone()) is ErrorKind.MODEL
    assert Descriptor(1, ERROR, entry=12345).error_kind is ErrorKind.MODEL


@given(st.sampled_from(ErrorKind), st.integers(0, 2**28 - 1))
def test_an_errors_kind_and_its_texts_row_share_a_field(kind, row):
    (told,) = unpack(pack(Descriptor(1, ERROR, entry=error_entry(kind, row))))
    assert told.error_kind is kind
    assert text_row(told.entry) == row


def test_descriptors_arrive_in_order_and_whole(wake_fd):
    ring = ring_of(wake_fd)
    sent = [
        Descriptor(2**40 + 7, REQUEST, 2, 5, 3, 8, 1, 1, 2, 3, 2**62),
        Descriptor(-1, ANSWER),
    ]
    for descriptor in sent:
        ring.put(pack(descriptor))
    assert list(unpack(ring.take(0))) == sent
    assert ring.take(0) == b""


@given(st.lists(st.tuples(st.booleans(), st.integers(0, ENTRIES + 1)), max_size=60))
def test_a_ring_is_a_bounded_queue(steps):
    """Whatever the order of puts (True) and takes of several: first in first out, and too much is refused whole."""
    wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    ring, waiting, next_index = ring_of(wake_fd), [], 0
    for put, count in steps:
        if put:
            indexes = range(next_index, next_index + count)
            next_index += count
            if len(waiting) + count > ENTRIES:
                with pytest.raises(TransportFailed, match="the ring is full: 4 descriptors wait to be read"):
                    ring.put(packed(*indexes))
            else:
                ring.put(packed(*indexes))
                waiting += indexes
        else:
            most = max(1, count)
            assert indexes_of(ring.take(0, most)) == waiting[:most]
            del waiting[:most]
    assert indexes_of(ring.take(0)) == waiting
    os.close(wake_fd)


@pytest.fixture
def hasty_threads():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_put_at_the_same_time_lose_nothing(wake_fd, hasty_threads):
    each, together = 2000, threading.Barrier(4)
    ring = ring_of(wake_fd, entries=4 * each)

    def put(begin):
        together.wait(WAIT_S)
        for index in range(begin, begin + each):
            ring.put(packed(index))

    with ThreadPoolExecutor(4) as writers:
        list(writers.map(put, range(0, 4 * each, each)))
    indexes = indexes_of(ring.take(0))
    assert sorted(indexes) == list(range(4 * each))
    for begin in range(0, 4 * each, each):
        own = [index for index in indexes if begin <= index < begin + each]
        assert own == sorted(own), "each thread's stay in order"


def test_a_late_wake_up_is_not_taken_for_work(wake_fd):
    ring = ring_of(wake_fd)
    os.eventfd_write(wake_fd, 1)
    with ThreadPoolExecutor(1) as reader:
        taken = reader.submit(ring.take, WAIT_S)
        while select.select([wake_fd], [], [], 0)[0]:  # until the reader has drained it
            pass
        ring.put(packed(5))
        assert indexes_of(taken.result(WAIT_S)) == [5]


def test_take_gives_up_after_its_time(wake_fd):
    assert ring_of(wake_fd).take(0.01) == b""


ECHO_LAYOUT = Layout(rows=64, inputs=(), outputs=())


def both_rings(pair):
    memory = mmap(pair.memory_fd, pair.layout.total_bytes)
    for direction, wake in enumerate((pair.wake_backend_fd, pair.wake_client_fd)):
        yield DescriptorRing(memory, pair.layout.ring_offset(direction), pair.layout.entries[direction], wake)


def echo(pair, total):
    requests, responses = both_rings(pair)
    while total:
        data = requests.take(WAIT_S)
        responses.put(data)
        total -= len(data) // DESCRIPTOR


def test_no_side_ever_reads_half_a_counter():
    """Two processes at full speed: counters written byte by byte failed this ten times out of ten, at some 256th."""
    total, sent, received = 100_000, 0, 0
    pair = RingPair.create(ECHO_LAYOUT)
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(pair, total), daemon=True)
    process.start()
    requests, responses = both_rings(pair)
    while received < total:
        while sent < min(total, received + ECHO_LAYOUT.rows):
            requests.put(packed(sent))
            sent += 1
        indexes = indexes_of(responses.take(WAIT_S))
        assert indexes == list(range(received, received + len(indexes)))
        assert indexes, "nothing came"
        received += len(indexes)
    process.join(WAIT_S)
    assert process.exitcode == 0
    pair.close()


@pytest.fixture
def dead_peer():
    """What is readable for ever, as the descriptor of a process that has ended is."""
    reader, writer = os.pipe()
    os.close(writer)
    yield reader
    os.close(reader)


def test_a_peer_that_has_gone_is_told_at_once_but_only_when_all_that_it_left_is_read(wake_fd, dead_peer):
    ring = ring_of(wake_fd, find_peer=lambda: dead_peer)
    ring.put(packed(1, 2))
    assert indexes_of(ring.take(WAIT_S, 1)) == [1]
    assert indexes_of(ring.take(WAIT_S, 1)) == [2]
    for _ in range(2):
        with pytest.raises(PeerGone, match="start it and connect again"):
            ring.take(WAIT_S)


def test_what_a_peer_wrote_just_before_it_went_is_read_all_the_same(wake_fd, dead_peer):
    def writes_and_goes():
        ring.put(packed(7))
        return dead_peer

    ring = ring_of(wake_fd, find_peer=writes_and_goes)
    assert indexes_of(ring.take(WAIT_S)) == [7]


def test_a_processor_that_reorders_stores_is_refused():
    require_ordered_memory("x86_64")
    with pytest.raises(TransportFailed, match="this is aarch64; use --transport queue"):
        require_ordered_memory("aarch64")
