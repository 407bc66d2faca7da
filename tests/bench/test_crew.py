"""Whatever a child does, the supervisor is told at once, and nobody is left behind."""

import signal

import psutil
import pytest

from headrace.bench.crew import Crew
from headrace.errors import ModelError, RunFailed
from headrace.processes import Ready
from tests.bench.crew_children import Job

CHILDREN = "tests.bench.crew_children"


@pytest.fixture
def crew():
    crew = Crew(lambda: None)
    yield crew
    crew.stop()


def start(crew, function):
    return crew.start(function, f"{CHILDREN}:{function}", Job)


def test_words_reach_the_supervisor_and_the_child(crew):
    member = start(crew, "says_ready_and_waits")
    assert crew.expect(member, Ready, 60) == Ready(("noted",))
    member.report.send("go")
    member.process.join(60)
    assert member.process.exitcode == 0


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("fails", ModelError, "wrong keys"),
        ("is_killed", RunFailed, "was killed by signal 9"),
        ("exits_with_7", RunFailed, "ended with exit code 7"),
        ("ends_in_silence", RunFailed, "ended without reporting"),
    ],
)
def test_a_childs_end_wakes_whoever_waits_for_it(crew, function, error, words):
    member = start(crew, function)
    with pytest.raises(error, match=words):
        crew.expect(member, Ready, 60)


def test_a_childs_end_wakes_whoever_waits_for_another(crew):
    waiting = start(crew, "says_ready_and_waits")
    crew.expect(waiting, Ready, 60)
    start(crew, "is_killed")
    with pytest.raises(RunFailed, match="the is_killed process was killed"):
        crew.expect(waiting, Ready, 60)


def test_a_silent_child_is_not_waited_for_longer_than_asked(crew):
    member = start(crew, "says_ready_and_waits")
    crew.expect(member, Ready, 60)
    with pytest.raises(RunFailed, match=r"said nothing for 0\.2 s"):
        crew.expect(member, Ready, 0.2)


def test_ctrl_c_does_not_reach_a_child_before_it_can_ignore_it(crew):
    member = start(crew, "says_whether_ctrl_c_is_held_back")
    assert crew.expect(member, Ready, 60) == Ready(("True",))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "we still hear it"


def test_stop_leaves_no_process(crew):
    member = start(crew, "says_ready_and_sleeps")
    ready = crew.expect(member, Ready, 60)
    crew.stop()
    assert not psutil.pid_exists(int(ready.notes[0]))
