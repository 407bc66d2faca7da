"""Whatever a client sends, however it is cut: nothing is raised, all is answered or closed, and all rows come back."""

import asyncio
import gzip
from itertools import pairwise

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.frontend.http.stream import Stream
from tests.frontend.fakes import FakeLink, FakeTransport, front_of, settle
from tests.frontend.requests import BINARY, HEADER, JSON, N, X, binary, chunked, get, sized

GOOD = {
    "binary": binary(),
    "JSON": sized(JSON),
    "chunked": chunked(JSON, 50),
    "chunked binary": chunked(BINARY + N + X, 33, HEADER),
    "gzip": sized(gzip.compress(JSON), "Content-Encoding: gzip", "Accept-Encoding: gzip"),
    "expects": sized(BINARY + N + X, HEADER, "Expect: 100-continue"),
    "metadata": get("/v2/models/m"),
    "wrong shape": sized(JSON.replace(b"[2]", b"[3]")),
    "wrong binary": sized(BINARY + N + X + b"more", HEADER),
    "not found": sized(b"some body", path="/nothing"),
}
STATUS = {"wrong shape": 400, "wrong binary": 400, "not found": 404}


def statuses(transport):
    """Return the statuses of the answers that were written, 100 left out; raises where they are no HTTP."""
    found = []

    class Reader:
        def on_message_complete(self):
            if parser.get_status_code() != 100:
                found.append(parser.get_status_code())

    parser = httptools.HttpResponseParser(Reader())
    parser.feed_data(bytes(transport.written))
    return found


def run(test):
    """Run a test; what reached the loop's exception handler fails it."""
    failures = []

    async def guarded():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await test()
        await settle()

    asyncio.run(guarded())
    assert not failures


def connect(front, room=None):
    stream = Stream(front._serve, front._lost)
    transport = FakeTransport(stream, room)
    stream.connection_made(transport)
    return transport


async def send(transport, data, cuts):
    """Send `data` cut at `cuts`; what is not taken yet is offered again."""
    bounds = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    rest = b""
    for begin, end in pairwise(bounds):
        rest = bytes(rest) + data[begin:end]
        rest = transport.feed(rest)
        await settle()
    for _ in range(100):
        if not len(rest) or transport.is_closed:
            return
        rest = transport.feed(rest)
        await settle()
    raise AssertionError("the server has stopped reading")


names = st.lists(st.sampled_from(sorted(GOOD)), min_size=1, max_size=4)
cuts = st.lists(st.integers(0, 10_000), max_size=12)


@given(names=names, cuts=cuts, rows=st.sampled_from([8, 2]))
@settings(max_examples=150, deadline=None)
def test_requests_cut_anywhere_are_answered_in_order(names, cuts, rows):
    async def test():
        link = FakeLink(rows)
        transport = connect(front_of(link))
        await send(transport, b"".join(GOOD[name] for name in names), cuts)
        assert link.leases.free_rows == rows
        got = statuses(transport)
        wanted = [STATUS.get(name, 200) for name in names]
        # What came in the same bytes as a chunked body's end may be left unanswered, if the connection is closed.
        assert got == wanted[: len(got)]
        assert got == wanted or (transport.is_closed and names[len(got) - 1].startswith("chunked"))

    run(test)


mutations = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3)), max_size=4)


@given(name=st.sampled_from(sorted(GOOD)), mutations=mutations, cuts=cuts, leaves=st.booleans())
@settings(max_examples=400, deadline=None)
def test_damaged_requests_raise_nothing_and_leak_nothing(name, mutations, cuts, leaves):
    data = GOOD[name]
    for at, new, removed in mutations:
        place = at % len(data)
        data = data[:place] + new + data[place + removed :]
    check_garbage(data or b"x", cuts, leaves)


@given(data=st.binary(min_size=1, max_size=400), cuts=cuts, leaves=st.booleans())
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_raise_nothing_and_leak_nothing(data, cuts, leaves):
    check_garbage(data, cuts, leaves)


def check_garbage(data, cuts, leaves):
    async def test():
        link = FakeLink()
        front = front_of(link)
        transport = connect(front)
        await send(transport, data, cuts)
        statuses(transport)
        if leaves:
            transport.close()
            await settle()
        else:
            await front.close()
            await settle()
        assert transport.is_closed
        assert link.leases.free_rows == 8
        assert not front._connections

    run(test)


@given(cuts=cuts, stop=st.integers(0, 600), room=st.integers(0, 300))
@settings(max_examples=150, deadline=None)
def test_a_client_that_leaves_at_any_point_gives_its_rows_back(cuts, stop, room):
    async def test():
        link = FakeLink(gate=asyncio.Event())
        front = front_of(link)
        transport = connect(front, room)
        await send(transport, GOOD["binary"][:stop], cuts)
        if stop % 2:
            link.gate.set()
            await settle()
        transport.close()
        await settle()
        assert link.leases.free_rows == 8
        assert not front._connections

    run(test)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_a_request_sent_byte_by_byte_is_answered(name):
    async def test():
        transport = connect(front_of(FakeLink()))
        await send(transport, GOOD[name], range(len(GOOD[name])))
        assert statuses(transport) == [STATUS.get(name, 200)]

    run(test)
