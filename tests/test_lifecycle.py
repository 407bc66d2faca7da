"""What the supervisor decides, told to a fake that does it: no processes here."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import ModelConfig
from headrace.errors import EngineStopped, ModelError, QueueFull, RunFailed, TransportFailed, UnknownModel
from headrace.lifecycle import FIRST_DELAY_S, LAST_DELAY_S, MAX_CHANGES, STEADY_S, Asked, BackOff, Lifecycle
from headrace.repository import Found, Versions
from headrace.serve_config import ServedModelConfig

S = 1_000_000_000
LIMIT_S = 10


def found(version, source="a:b", name="m", engines=1):
    model = ModelConfig(name=source)
    return Found(ServedModelConfig(name=name, version=str(version), model=model, engines_per_device=engines))


@dataclass
class World:
    """Does what is decided: `links` is what each frontend sends to, `leaving` what it lets go of."""

    repository: dict[str, list[Found]]
    wanted: dict[str, list[Found]]
    log: list[tuple] = field(default_factory=list)
    running: dict[int, Found] = field(default_factory=dict)
    warm: set[int] = field(default_factory=set)
    doomed: set[int] = field(default_factory=set)  # stopped or killed, and not yet ended
    links: dict[int, set[int]] = field(default_factory=dict)
    leaving: set[tuple[int, int]] = field(default_factory=set)  # frontend and backend
    unseen: set[tuple[int, int]] = field(default_factory=set)  # frontend and serial
    answers: dict[int, object] = field(default_factory=dict)
    models: dict[int, object] = field(default_factory=dict)
    engines: dict[int, int] = field(default_factory=dict)  # which of its version's engines each backend is
    offered: dict[tuple[str, int], int] = field(default_factory=dict)  # at the door
    no_memory: bool = False
    now_ns: int = 0

    def __post_init__(self):
        self.lifecycle = Lifecycle(self, self.look, LIMIT_S, lambda: self.now_ns)

    def look(self, name):
        if name not in self.repository:
            raise UnknownModel("no such")
        return Versions(tuple(self.repository[name]), tuple(self.wanted[name]))

    def start(self, backend, what, engine):
        assert backend not in self.running, "one process each"
        self.running[backend] = what
        self.engines[backend] = engine
        self.log.append(("start", what.version))

    def offer(self, backend):
        assert backend in self.warm
        self.offered[self.running[backend].version, self.engines[backend]] = backend

    def connect(self, backend, frontend):
        if self.no_memory:
            raise TransportFailed("no memory in /srv/x")
        assert backend in self.warm
        assert backend not in self.links[frontend]
        self.links[frontend].add(backend)
        self.log.append(("connect", self.running[backend].version, frontend))

    def retire(self, backend, frontend):
        self.links[frontend].remove(backend)
        self.leaving.add((frontend, backend))
        self.log.append(("retire", self.running[backend].version, frontend))

    def publish(self, frontend, models):
        self.models[frontend] = models
        self.unseen.add((frontend, models.serial))

    def stop(self, backend):
        self.doomed.add(backend)
        self.log.append(("stop", self.running[backend].version))

    def kill(self, backend):
        self.doomed.add(backend)
        self.log.append(("kill", self.running[backend].version))

    def answer(self, asked, error):
        assert asked.number not in self.answers, "answered once"
        self.answers[asked.number] = error

    def tell(self, text):
        self.log.append(("tell", text))

    # What happens

    def listen(self, frontend):
        self.links[frontend] = set()
        self.lifecycle.frontend_listening(frontend)

    def frontend_dies(self, frontend):
        del self.links[frontend]
        self.leaving = {each for each in self.leaving if each[0] != frontend}
        self.unseen = {each for each in self.unseen if each[0] != frontend}
        self.lifecycle.frontend_ended(frontend)

    def is_warm(self, version):
        (backend,) = (n for n, what in self.running.items() if what.version == str(version) and n not in self.warm)
        self.warm_up(backend)

    def warm_up(self, backend):
        self.warm.add(backend)
        self.lifecycle.backend_ready(backend)

    def number_of(self, version):
        return max(number for number, what in self.running.items() if what.version == str(version))

    def dies(self, backend, error=None, code=-9):
        if error is not None:
            self.lifecycle.backend_failed(backend, error)
        del self.running[backend]
        self.warm.discard(backend)
        self.doomed.discard(backend)
        for links in self.links.values():
            links.discard(backend)
        self.lifecycle.backend_ended(backend, code)

    def let_go(self):
        """Frontends let go of what they were to retire."""
        for frontend, backend in sorted(self.leaving):
            self.leaving.discard((frontend, backend))
            self.lifecycle.retired(frontend, backend)

    def see(self):
        for frontend, serial in sorted(self.unseen):
            self.unseen.discard((frontend, serial))
            self.lifecycle.seen(frontend, serial)

    def end_doomed(self):
        for backend in sorted(self.doomed):
            self.dies(backend, code=0)

    def load(self, number, *wanted, known=()):
        self.repository["m"] = [*known, *wanted]
        self.wanted["m"] = list(wanted)
        self.lifecycle.change("load", "m", Asked(0, number))

    def states(self, frontend=0):
        return {status.version: status.state for status in self.models[frontend].versions}

    def deeds(self):
        return [entry for entry in self.log if entry[0] != "tell"]


@pytest.fixture
def world():
    """Version 1 is served, and two frontends listen."""
    world = World({"m": [found(1)]}, {"m": [found(1)]})
    world.lifecycle.begin(["m"])
    world.listen(0)
    world.listen(1)
    world.is_warm(1)
    world.see()
    world.log.clear()
    return world


def test_a_new_version_is_connected_everywhere_before_the_old_one_is_retired(world):
    world.load(7, found(2), known=[found(1)])
    assert world.states() == {"1": "READY", "2": "LOADING"}
    world.is_warm(2)
    assert world.deeds() == [
        ("start", "2"),
        *[("connect", "2", 0), ("connect", "2", 1)],
        *[("retire", "1", 0), ("retire", "1", 1)],
    ]
    assert world.states() == {"1": "UNLOADING", "2": "READY"}


def test_a_load_is_answered_when_all_frontends_have_switched_and_not_before(world):
    world.load(7, found(2))
    world.is_warm(2)
    serial = world.models[0].serial
    world.lifecycle.seen(0, serial)
    world.lifecycle.seen(1, serial - 1)
    assert not world.answers
    world.lifecycle.seen(1, serial)
    assert world.answers == {7: None}


def test_an_old_backend_ends_only_when_the_last_frontend_has_let_go_of_it(world):
    world.load(7, found(2), known=[found(1)])
    world.is_warm(2)
    world.log.clear()
    world.lifecycle.retired(0, 1)
    assert not world.log
    world.lifecycle.retired(1, 1)
    assert world.deeds() == [("stop", "1")]
    world.end_doomed()
    assert world.states() == {"1": "UNAVAILABLE", "2": "READY"}
    assert world.models[0].versions[0].reason == "unloaded"


def test_an_old_backend_that_frontends_never_let_go_of_is_killed_at_the_limit(world):
    world.load(7, found(2))
    world.is_warm(2)
    assert world.lifecycle.due_ns() == LIMIT_S * S
    world.now_ns = LIMIT_S * S
    world.lifecycle.tick()
    assert ("kill", "1") in world.log
    assert world.lifecycle.due_ns() is None


def test_a_version_that_fails_to_load_changes_nothing_and_the_answer_says_why_without_paths(world):
    world.load(7, found(2, "/srv/my models/m/2/model.py:build"))
    world.dies(2, ModelError("--model /srv/my models/m/2/model.py:build: raised in /etc/x"), code=0)
    assert isinstance(world.answers[7], ModelError)
    assert str(world.answers[7]) == "--model (path): raised in (path)"
    assert world.states() == {"1": "READY", "2": "UNAVAILABLE"}
    assert "raised in (path)" in world.models[0].versions[1].reason
    assert [entry for entry in world.deeds() if entry[0] != "start"] == []


def test_a_version_that_dies_while_it_loads_is_a_failure_to_try_again(world):
    world.load(7, found(2))
    world.dies(2)
    assert isinstance(world.answers[7], EngineStopped)
    assert world.links == {0: {1}, 1: {1}}


def test_several_new_versions_come_in_together_or_not_at_all(world):
    world.load(7, found(2), found(3))
    world.is_warm(2)
    assert world.links == {0: {1}, 1: {1}}
    world.dies(3, ModelError("no"))
    assert world.deeds() == [("start", "2"), ("start", "3"), ("kill", "2")]
    assert isinstance(world.answers[7], ModelError)
    world.end_doomed()
    assert world.links == {0: {1}, 1: {1}}


def test_a_ring_that_cannot_be_made_fails_the_load(world):
    world.load(7, found(2))
    world.no_memory = True
    world.is_warm(2)
    assert isinstance(world.answers[7], TransportFailed)
    assert "/srv" not in str(world.answers[7])
    assert world.links == {0: {1}, 1: {1}}


def test_what_is_unchanged_is_left_alone(world):
    world.load(7, found(1))
    assert world.deeds() == []
    world.see()
    assert world.answers == {7: None}


def test_a_version_whose_files_changed_is_loaded_anew_beside_itself(world):
    world.load(7, replace(found(1), served=replace(found(1).served, image_size=99)))
    assert world.states() == {"1": "READY"}
    world.is_warm(1)
    assert world.links == {0: {2}, 1: {2}}


def test_an_unload_stops_requests_and_then_the_backend(world):
    world.lifecycle.change("unload", "m", Asked(0, 7))
    assert world.links == {0: set(), 1: set()}
    world.see()
    assert world.answers == {7: None}, "before the last request has been answered"
    world.let_go()
    world.end_doomed()
    assert world.states() == {"1": "UNAVAILABLE"}
    assert not any(status.required for status in world.models[0].versions)


def test_changes_of_a_model_come_one_after_the_other(world):
    world.load(7, found(2))
    world.lifecycle.change("unload", "m", Asked(0, 8))
    world.is_warm(2)
    assert world.links[0] == {2}
    world.see()
    assert world.links[0] == set()
    world.see()
    assert list(world.answers) == [7, 8]


def test_changes_that_wait_have_a_limit(world):
    for number in range(MAX_CHANGES + 1):
        world.load(number, found(2))
    assert [*world.answers] == [MAX_CHANGES]
    assert isinstance(world.answers[MAX_CHANGES], QueueFull)


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_an_unknown_model_is_refused(world, verb):
    world.lifecycle.change(verb, "other", Asked(1, 7))
    assert isinstance(world.answers[7], UnknownModel)
    assert world.deeds() == []


def test_a_dead_backend_is_started_anew_after_a_delay_and_connected_again(world):
    world.dies(1)
    assert world.states() == {"1": "UNAVAILABLE"}
    assert world.models[0].versions[0].required
    assert world.models[0].versions[0].reason == "the backend ended (exit code -9), and is started anew"
    world.lifecycle.tick()
    assert world.deeds() == []
    world.now_ns = int(FIRST_DELAY_S * S)
    world.lifecycle.tick()
    assert world.states() == {"1": "LOADING"}
    world.is_warm(1)
    assert world.links == {0: {1}, 1: {1}}


def test_a_frontend_that_comes_back_is_connected_to_what_is_ready(world):
    world.load(7, found(2), known=[found(1)])
    world.is_warm(2)
    world.frontend_dies(1)
    world.listen(1)
    assert world.links[1] == {2}, "and not to what is retiring"


def test_a_frontend_that_dies_is_not_waited_for(world):
    world.load(7, found(2))
    world.is_warm(2)
    world.lifecycle.seen(1, world.models[1].serial)
    world.lifecycle.retired(1, 1)
    world.frontend_dies(0)
    assert ("stop", "1") in world.log
    world.lifecycle.change("load", "m", Asked(1, 9))
    world.see()
    assert world.answers == {9: None}, "who asked for the first has died with its frontend"


def test_changes_that_wait_for_each_other_all_end_when_the_last_frontend_dies(world):
    world.load(7, found(2))
    world.lifecycle.change("unload", "m", Asked(5, 8))
    world.lifecycle.change("unload", "m", Asked(5, 9))
    world.is_warm(2)
    world.frontend_dies(0)
    assert not world.answers
    world.frontend_dies(1)
    assert world.answers == {8: None, 9: None}
    world.end_doomed()
    assert not world.running


def test_a_frontend_that_comes_while_a_load_is_half_done_gets_no_part_of_it(world):
    world.load(7, found(2), found(3))
    world.is_warm(2)
    world.frontend_dies(1)
    world.listen(1)
    assert world.links[1] == {1}


@pytest.mark.parametrize(("error", "kind"), [(ModelError("no"), ModelError), (None, RunFailed)])
def test_a_server_whose_first_models_cannot_all_be_loaded_does_not_start(error, kind):
    world = World({"m": [found(1)]}, {"m": [found(1)]})
    world.lifecycle.begin(["m"])
    with pytest.raises(kind):
        world.dies(1, error)


def test_a_server_has_begun_when_all_first_models_are_ready():
    models = {"m": [found(1)], "n": [found(4, name="n")]}
    world = World(models, models)
    world.lifecycle.begin(["m", "n"])
    world.listen(0)
    assert all(status.required for status in world.models[0].versions)
    world.is_warm(1)
    assert not world.lifecycle.has_begun
    world.is_warm(4)
    assert not world.lifecycle.has_begun, "no frontend has heard of it"
    world.see()
    assert world.lifecycle.has_begun


def test_delays_grow_to_a_limit_and_a_steady_process_begins_anew():
    back_off = BackOff()
    delays = [back_off.delay_s(1) for _ in range(9)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == LAST_DELAY_S
    assert back_off.delay_s(STEADY_S + 1) == FIRST_DELAY_S


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["load", "warm", "fail", "let go", "see", "end", "restart frontend"]),
        st.integers(1, 4),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_in_whatever_order_every_frontend_always_has_a_version_to_send_to(steps):
    world = World({"m": [found(1)]}, {"m": [found(1)]})
    world.lifecycle.begin(["m"])
    world.listen(0)
    world.listen(1)
    world.is_warm(1)
    asked = 0
    for what, which in steps:
        cold = sorted(number for number in world.running if number not in world.warm | world.doomed)
        if what == "load":
            asked += 1
            world.repository["m"] = world.wanted["m"] = [found(which)]
            world.lifecycle.change("load", "m", Asked(5, asked))
        elif what == "warm" and cold:
            world.warm_up(cold[0])
        elif what == "fail" and cold:
            world.dies(cold[0], ModelError("no"))
        elif what == "restart frontend":
            world.frontend_dies(which % 2)
            world.listen(which % 2)
        else:
            {"let go": world.let_go, "see": world.see, "end": world.end_doomed}.get(what, lambda: None)()
        for links in world.links.values():
            assert links, "a request would find no version"
            assert not links & world.doomed, "a request would go to a backend that is to end"
    for _ in range(4 * (asked + 1)):  # everything comes to rest
        for number in sorted(world.running):
            if number not in world.warm | world.doomed:
                world.warm_up(number)
        world.see()
        world.let_go()
        world.end_doomed()
    assert sorted(world.answers) == list(range(1, asked + 1))
    assert world.links[0] == world.links[1] == set(world.running), "one process, and both send to it"
    assert len(world.running) == 1


@pytest.fixture
def pair():
    """Version 1 has two engines, and two frontends listen."""
    version = found(1, engines=2)
    world = World({"m": [version]}, {"m": [version]})
    world.lifecycle.begin(["m"])
    world.listen(0)
    world.listen(1)
    world.warm_up(1)
    assert world.links == {0: set(), 1: set()}, "not before all are warm"
    world.warm_up(2)
    world.see()
    world.log.clear()
    return world


def engines(world, version="1"):
    (status,) = (status for status in world.models[0].versions if status.version == version)
    return status.state, status.engines_ready, status.engines, status.is_degraded


def test_a_version_has_a_backend_for_each_engine(pair):
    assert pair.links == {0: {1, 2}, 1: {1, 2}}
    assert pair.engines == {1: 0, 2: 1}
    assert pair.offered == {("1", 0): 1, ("1", 1): 2}
    assert engines(pair) == ("READY", 2, 2, False)
    assert pair.models[0].live == {1, 2}


def test_one_engine_that_dies_leaves_the_version_serving_and_is_started_anew_alone(pair):
    pair.dies(2)
    assert engines(pair) == ("READY", 1, 2, True)
    assert pair.models[0].versions[0].reason == "1 of 2 engines: the backend ended (exit code -9), and is started anew"
    assert pair.models[0].live == {1}
    assert (
        "tell",
        "the backend of m version 1 (engine 1) ended (exit code -9); it is started anew in 0.5 s",
    ) in pair.log
    pair.now_ns += int(FIRST_DELAY_S * S)
    pair.lifecycle.tick()
    assert pair.engines[2] == 1
    assert engines(pair) == ("READY", 1, 2, True)
    pair.warm_up(2)
    assert pair.links == {0: {1, 2}, 1: {1, 2}}
    assert engines(pair) == ("READY", 2, 2, False)
    assert [deed for deed in pair.deeds() if deed[0] != "connect"] == [("start", "1")]


def test_without_any_engine_a_version_is_not_there(pair):
    pair.dies(1)
    pair.dies(2)
    assert engines(pair) == ("UNAVAILABLE", 0, 2, False)
    pair.now_ns += int(FIRST_DELAY_S * S)
    pair.lifecycle.tick()
    pair.warm_up(1)
    assert engines(pair) == ("READY", 1, 2, True)


def test_a_switch_waits_for_all_engines_of_the_new_version_and_retires_all_of_the_old(pair):
    pair.load(7, found(2, engines=2), known=[found(1, engines=2)])
    pair.warm_up(3)
    assert pair.links[0] == {1, 2}, "one of two is not enough"
    pair.warm_up(4)
    assert pair.links == {0: {3, 4}, 1: {3, 4}}
    pair.see()
    assert pair.answers == {7: None}
    pair.let_go()
    assert pair.doomed == {1, 2}
    pair.end_doomed()
    assert sorted(pair.running) == [3, 4]


def test_a_switch_whose_second_engine_fails_leaves_the_old_version_with_all_its_engines(pair):
    pair.load(7, found(2, engines=2), known=[found(1, engines=2)])
    pair.warm_up(3)
    pair.dies(4, ModelError("no memory"))
    assert isinstance(pair.answers[7], ModelError)
    assert pair.doomed == {3}
    assert pair.links == {0: {1, 2}, 1: {1, 2}}
    assert pair.offered == {("1", 0): 1, ("1", 1): 2}, "clients never heard of the other"
    assert engines(pair) == ("READY", 2, 2, False)


def test_a_load_while_an_engine_is_gone_brings_it_in(pair):
    version = found(1, engines=2)
    pair.dies(2)
    pair.load(7, version)
    assert pair.deeds() == [("start", "1")]
    pair.warm_up(3)
    pair.see()
    assert pair.answers == {7: None}
    assert pair.engines[3] == 1
    assert pair.links == {0: {1, 3}, 1: {1, 3}}
    assert pair.lifecycle.due_ns() is None, "the one that waited is not started as well"


def test_another_number_of_engines_is_another_backend_for_each(pair):
    pair.load(7, found(1, engines=3))
    for number in (3, 4, 5):
        pair.warm_up(number)
    assert pair.links == {0: {3, 4, 5}, 1: {3, 4, 5}}


DEATHS = st.lists(
    st.tuples(st.sampled_from(["load", "warm", "die", "wait", "let go", "see", "end"]), st.integers(0, 4)), max_size=40
)


@given(DEATHS)
@settings(max_examples=200, deadline=None)
def test_whoever_dies_all_engines_come_back_and_frontends_hear_how_many_there_are(steps):
    version = found(1, engines=2)
    world = World({"m": [version]}, {"m": [version]})
    world.lifecycle.begin(["m"])
    world.listen(0)
    world.warm_up(1)
    world.warm_up(2)
    asked = 0
    for what, which in steps:
        cold = sorted(number for number in world.running if number not in world.warm | world.doomed)
        serving = sorted(world.links[0])
        if what == "load":
            asked += 1
            world.repository["m"] = world.wanted["m"] = [found(which + 1, engines=2)]
            world.lifecycle.change("load", "m", Asked(5, asked))
        elif what == "warm" and cold:
            world.warm_up(cold[which % len(cold)])
        elif what == "die" and (cold or serving):
            world.dies((cold + serving)[which % len(cold + serving)])
        elif what == "wait":
            world.now_ns += int(LAST_DELAY_S * S)
            world.lifecycle.tick()
        else:
            {"let go": world.let_go, "see": world.see, "end": world.end_doomed}.get(what, lambda: None)()
        assert world.models[0].live == world.links[0]
        ready = sum(status.engines_ready for status in world.models[0].versions)
        assert ready == len(world.links[0])
    for _ in range(4 * (asked + 1)):
        world.now_ns += int(LAST_DELAY_S * S)
        world.lifecycle.tick()
        for number in sorted(world.running):
            if number not in world.warm | world.doomed:
                world.warm_up(number)
        world.see()
        world.let_go()
        world.end_doomed()
    assert sorted(world.answers) == list(range(1, asked + 1))
    assert world.links[0] == set(world.running)
    assert sorted(world.engines[number] for number in world.running) == [0, 1]
