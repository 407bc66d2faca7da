"""Coroutines on a thread that blocks: values, errors, limits and interruptions reach them as on an event loop."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.client.waiting import ThreadWaits, run

WAIT_S = 60


@pytest.fixture
def waits():
    waits = ThreadWaits()
    yield waits
    waits.close()


async def value_of(future):
    return await future


def test_a_coroutine_that_awaits_several_futures_gets_their_values(waits):
    first, second = waits.create_future(), waits.create_future()

    async def both():
        return await first, await second

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run, waits.wait(both(), WAIT_S))
        for number, future in enumerate((first, second)):
            with waits.lock:
                future.set_result(number)
        assert waiting.result(WAIT_S) == (0, 1)


def test_an_error_is_raised_where_it_is_awaited(waits):
    future = waits.create_future()
    future.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        run(waits.wait(value_of(future), None))


@pytest.mark.parametrize("limit_s", [0.0, 0.01])
def test_a_limit_cancels_what_was_awaited_and_the_coroutine_ends(waits, limit_s):
    future = waits.create_future()
    ended = []

    async def outer():
        try:
            await future
        finally:
            ended.append(future.cancelled())

    with pytest.raises(TimeoutError):
        run(waits.wait(outer(), limit_s))
    assert ended == [True]


def test_a_readable_descriptor_calls_back_until_it_is_removed(waits):
    reader, writer = os.pipe()
    called = threading.Event()

    def readable():
        os.read(reader, 1)
        waits.remove_reader(reader)
        called.set()

    with waits.lock:
        waits.add_reader(reader, readable)
    os.write(writer, b"12")
    assert called.wait(WAIT_S)
    waits.close()
    assert os.read(reader, 2) == b"2"
    os.close(reader)
    os.close(writer)


def test_closing_twice_does_no_harm(waits):
    waits.close()


def test_a_coroutine_that_would_suspend_is_our_own_bug(waits):
    with pytest.raises(AssertionError, match="suspended"):
        run(value_of(waits.create_future()))
