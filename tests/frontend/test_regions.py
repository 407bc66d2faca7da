"""Shared memory that clients name: what is let in, what is refused, and what happens when a client does not keep it."""

import asyncio
import gc
import os
from pathlib import Path

import pytest

from headrace.control import ChangeRegions, RegionsChanged, RegionSpec
from headrace.errors import InvalidRequest, NotOffered
from headrace.frontend.regions import MAX_REGIONS, UNDER_WAY, Regions, SharedRegions
from headrace.wire.places import RegionPlace, region_place


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "memory").write_bytes(bytes(range(100)))
    return tmp_path


@pytest.fixture
def regions(folder):
    regions = Regions(offered=True, folder=folder)
    regions.register(RegionSpec(name="r", key="/memory", offset=10, byte_size=50))
    return regions


def test_a_region_is_read_and_written_where_it_lies(regions, folder):
    rows = bytearray(4)
    regions.read(RegionPlace("r", 5, 4), memoryview(rows))
    assert rows == bytes([15, 16, 17, 18])
    regions.output(RegionPlace("r", 46, 4), 3).write(memoryview(b"abc"))
    content = (folder / "memory").read_bytes()
    assert content[55:60] == bytes([55, *b"abc", 59])
    assert len(content) == 100


def test_status_tells_what_was_registered(regions):
    spec = RegionSpec(name="r", key="/memory", offset=10, byte_size=50)
    assert regions.status(None) == [spec]
    assert regions.status("r") == [spec]
    with pytest.raises(InvalidRequest, match="there is no shared memory region x"):
        regions.status("x")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"key": "../memory"}, "is no name of shared memory"),
        ({"key": "//memory"}, "is no name of shared memory"),
        ({"key": "/"}, "is no name of shared memory"),
        ({"key": ".."}, "is no name of shared memory"),
        ({"key": "mem\0ory"}, "is no name of shared memory"),
        ({"key": "k" * 300}, "is no name of shared memory"),
        ({"key": "nothing"}, "shared memory nothing of region n cannot be opened"),
        ({"key": "link"}, "cannot be opened"),
        ({"key": "directory"}, "cannot be opened"),
        ({"key": "pipe"}, "has no 10 bytes from 0 on"),
        ({"key": "headrace-ring"}, "begins as memory of the server does"),
        ({"key": "/torch_1_2"}, "begins as memory of the server does"),
        ({"byte_size": 101}, "has no 101 bytes from 0 on"),
        ({"byte_size": 10, "offset": 91}, "has no 10 bytes from 91 on"),
        ({"byte_size": 2**64 - 1, "offset": 1}, "to end before"),
        ({"byte_size": 1, "offset": 2**64 - 1}, "to end before"),
        ({"byte_size": 0}, "at least 1 byte"),
        ({"offset": -1}, "at least 1 byte"),
        ({"name": ""}, "a region's name has 0 characters"),
        ({"name": "r"}, "region r is registered already"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_what_can_be_no_region_is_refused(regions, folder, fields, words):
    (folder / "link").symlink_to(folder / "memory")
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidRequest) as caught:
        regions.register(RegionSpec(**({"name": "n", "key": "memory", "byte_size": 10} | fields)))
    assert words in str(caught.value)
    assert str(folder) not in str(caught.value)
    assert [spec.name for spec in regions.status(None)] == ["r"]


@pytest.mark.parametrize(("offset", "size"), [(0, 51), (50, 1), (2**64, 1)])
def test_places_beyond_a_region_are_refused_also_where_the_file_goes_on(regions, offset, size):
    with pytest.raises(InvalidRequest, match="region r has 50 bytes"):
        regions.window(RegionPlace("r", offset, size))


def test_an_output_that_does_not_fit_is_refused_before_anything_is_computed(regions):
    with pytest.raises(InvalidRequest, match="an output has 9 bytes, and its place in shared memory region r has 8"):
        regions.output(RegionPlace("r", 0, 8), 9)


def test_a_region_in_use_stays_until_it_is_let_go(regions):
    gc.collect()  # what earlier tests left behind
    before = len(list(Path("/proc/self/fd").iterdir()))
    window = regions.window(RegionPlace("r", 0, 2))
    regions.unregister("r")
    rows = bytearray(2)
    window.read_into(memoryview(rows))
    assert rows == bytes([10, 11])
    del window
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1
    with pytest.raises(InvalidRequest, match="there is no shared memory region r"):
        regions.window(RegionPlace("r", 0, 2))


def test_a_file_that_was_shortened_fails_the_request_that_reads_it(regions, folder):
    os.truncate(folder / "memory", 12)
    with pytest.raises(InvalidRequest, match="region r ended before its tensor"):
        regions.read(RegionPlace("r", 0, 4), memoryview(bytearray(4)))


def test_the_number_of_regions_is_limited(regions):
    for number in range(MAX_REGIONS - 1):
        regions.register(RegionSpec(name=str(number), key="memory", byte_size=1))
    with pytest.raises(InvalidRequest, match="which is the limit"):
        regions.register(RegionSpec(name="one more", key="memory", byte_size=1))
    regions.unregister(None)
    assert regions.status(None) == []


def test_a_new_process_begins_with_the_regions_that_are_still_there(folder):
    regions = Regions(offered=True, folder=folder)
    regions.restore([RegionSpec(name=name, key=name, byte_size=1) for name in ("gone", "memory")])
    assert [spec.name for spec in regions.status(None)] == ["memory"]


def test_where_regions_are_switched_off_nothing_is_opened(folder):
    regions = Regions(offered=False, folder=folder)
    with pytest.raises(NotOffered, match="--system-shared-memory"):
        regions.register(RegionSpec(name="r", key="memory", byte_size=1))
    with pytest.raises(NotOffered, match="--system-shared-memory"):
        regions.window(RegionPlace("r", 0, 1))
    regions.unregister(None)
    assert regions.status(None) == []


@pytest.mark.parametrize(
    "parameters",
    [
        {"shared_memory_region": 5, "shared_memory_byte_size": 1},
        {"shared_memory_region": "", "shared_memory_byte_size": 1},
        {"shared_memory_region": "r"},
        {"shared_memory_region": "r", "shared_memory_byte_size": True},
        {"shared_memory_region": "r", "shared_memory_byte_size": 1, "shared_memory_offset": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": 1.5},
    ],
    ids=str,
)
def test_a_place_that_is_none_is_refused(parameters):
    with pytest.raises(InvalidRequest, match="input x: shared_memory_"):
        region_place("input x", parameters)


def test_a_tensor_without_a_region_has_no_place():
    assert region_place("input x", {"shared_memory_offset": 3}) is None


def test_a_change_is_answered_when_all_frontends_have_made_it(folder):
    async def run():
        told = []
        shared = SharedRegions(Regions(offered=True, folder=folder), told.append)
        change = asyncio.ensure_future(shared.register(RegionSpec(name="r", key="memory", byte_size=1)))
        await asyncio.sleep(0)
        assert isinstance(told[0], ChangeRegions)
        shared.heard(ChangeRegions(70, "r", told[0].spec))
        assert told[1] == RegionsChanged(70, None)
        assert not change.done()
        shared.heard(RegionsChanged(told[0].number, None))
        await change
        assert [spec.name for spec in shared.own.status(None)] == ["r"]

    asyncio.run(run())


def test_a_change_that_a_frontend_could_not_make_fails(folder):
    async def run():
        told = []
        shared = SharedRegions(Regions(offered=True, folder=folder), told.append)
        change = asyncio.ensure_future(shared.register(RegionSpec(name="r", key="nothing", byte_size=1)))
        await asyncio.sleep(0)
        shared.heard(told[0])
        assert "cannot be opened" in str(told[1].error)
        shared.heard(told[1])
        with pytest.raises(InvalidRequest, match="cannot be opened"):
            await change

    asyncio.run(run())


def test_few_changes_are_under_way_at_once_whether_their_callers_stay_or_leave(folder):
    async def run():
        told = []
        shared = SharedRegions(Regions(offered=True, folder=folder), told.append)
        changes = [asyncio.ensure_future(shared.unregister(str(number))) for number in range(UNDER_WAY + 1)]
        await asyncio.sleep(0)
        for change in changes[:UNDER_WAY]:
            change.cancel()
        await asyncio.sleep(0)
        assert [word.name for word in told] == [str(number) for number in range(UNDER_WAY)]
        for word in told[:UNDER_WAY]:
            shared.heard(RegionsChanged(word.number, None))
        await asyncio.sleep(0)
        shared.heard(RegionsChanged(told[UNDER_WAY].number, None))
        await changes[UNDER_WAY]

    asyncio.run(run())


def test_what_can_be_no_region_is_not_even_told_to_others(folder):
    async def run():
        told = []
        shared = SharedRegions(Regions(offered=True, folder=folder), told.append)
        with pytest.raises(InvalidRequest, match="is no name of shared memory"):
            await shared.register(RegionSpec(name="r", key="a/b", byte_size=1))
        assert told == []

    asyncio.run(run())
