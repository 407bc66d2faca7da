"""Changes of shared memory regions, brought to all frontends: the asker hears when all have made them, or why not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.control import ChangeRegions, RegionsChanged, RegionSpec
from headrace.errors import InvalidRequest
from headrace.region_changes import RegionChanges

SPEC = RegionSpec(name="r", key="k", byte_size=1)


class Frontend:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def send(self, word):
        self.told.append(word)

    @property
    def number(self):
        """Of the change that it was told of last."""
        return self.told[-1].number


@pytest.fixture
def frontends():
    return [Frontend(), Frontend(), Frontend()]


def test_the_asker_hears_when_all_have_made_the_change(frontends):
    changes = RegionChanges()
    asker = frontends[0]
    changes.asked(asker, ChangeRegions(5, "r", SPEC), frontends)
    number = asker.number
    assert all(frontend.told == [ChangeRegions(number, "r", SPEC)] for frontend in frontends)
    for frontend in frontends[1:]:
        changes.made(frontend, RegionsChanged(number, None))
        assert len(asker.told) == 1
    changes.made(asker, RegionsChanged(number, None))
    assert asker.told[1:] == [RegionsChanged(5, None)]
    assert list(changes.regions.values()) == [SPEC]


def test_a_frontend_that_dies_is_not_waited_for(frontends):
    changes = RegionChanges()
    changes.asked(frontends[0], ChangeRegions(5, "r", SPEC), frontends)
    for frontend in frontends[:2]:
        changes.made(frontend, RegionsChanged(frontend.number, None))
    changes.gone(frontends[2])
    assert frontends[0].told[1:] == [RegionsChanged(5, None)]


def test_what_only_some_could_register_is_taken_back(frontends):
    changes = RegionChanges()
    changes.asked(frontends[0], ChangeRegions(5, "r", SPEC), frontends)
    number = frontends[0].number
    error = InvalidRequest("cannot be opened")
    for frontend, why in zip(frontends, (None, error, None), strict=True):
        changes.made(frontend, RegionsChanged(number, why))
    assert [word.spec for word in frontends[2].told] == [SPEC, None]
    assert frontends[0].told[-1] == RegionsChanged(5, error)
    assert changes.regions == {}
    changes.made(frontends[2], RegionsChanged(frontends[2].number, None))


def test_a_second_region_of_the_same_name_leaves_the_first(frontends):
    changes = RegionChanges()
    changes.regions["r"] = SPEC
    other = RegionSpec(name="r", key="other", byte_size=1)
    changes.asked(frontends[0], ChangeRegions(5, "r", other), frontends[:1])
    changes.made(frontends[0], RegionsChanged(frontends[0].number, InvalidRequest("registered already")))
    assert changes.regions == {"r": SPEC}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["register", "unregister", "all"])), max_size=20))
def test_a_new_frontend_begins_with_what_the_others_have(steps):
    changes, frontend, has = RegionChanges(), Frontend(), {}
    for name, what in steps:
        spec = RegionSpec(name=name, key=name, byte_size=1) if what == "register" else None
        changes.asked(frontend, ChangeRegions(0, None if what == "all" else name, spec), [frontend])
        error = InvalidRequest("registered already") if what == "register" and name in has else None
        changes.made(frontend, RegionsChanged(frontend.number, error))
        if what == "register":
            has.setdefault(name, spec)
        elif what == "all":
            has.clear()
        else:
            has.pop(name, None)
        assert changes.regions.keys() == has.keys()
