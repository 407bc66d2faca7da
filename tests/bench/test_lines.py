"""Lines of watchers: alike in all of them, whole in a log, and as they were given."""

import io
import re

import pytest
from rich.console import Console

from headrace.bench.limits_tables import RichSteps
from headrace.bench.lines import Lines
from headrace.bench.present import RichWatcher
from headrace.search.progress import SearchProgress
from headrace.target.live import LiveWatcher
from tests.study.summaries import FakeClock

LONG = "[cuda] " + "a note in brackets, longer than the log is wide; " * 5


def log():
    return Console(file=io.StringIO(), width=60)


def test_a_stage_is_told_with_the_time_since_the_beginning():
    clock, console = FakeClock(), log()
    lines = Lines(console, clock)
    clock.advance(75.25)
    lines.timed("[a stage]")
    assert console.file.getvalue() == "[  75.2 s] [a stage]\n"


@pytest.mark.parametrize("watcher", [RichWatcher, LiveWatcher, SearchProgress])
def test_a_note_stays_one_line_in_a_log_whatever_it_holds(watcher):
    console = log()
    with watcher(console) as shown:
        shown.tell(LONG)
    assert console.file.getvalue() == f"note: {LONG}\n"


@pytest.mark.parametrize(
    ("watcher", "tell"),
    [
        (RichWatcher, lambda shown: shown.stage(LONG)),
        (LiveWatcher, lambda shown: shown.stage(LONG)),
        (SearchProgress, lambda shown: shown.found(LONG)),
        (RichSteps, lambda shown: shown.step(LONG, 0, 2)),
    ],
)
def test_a_stage_is_one_line_in_a_log(watcher, tell):
    console = log()
    with watcher(console) as shown:
        tell(shown)
    (line,) = console.file.getvalue().splitlines()
    assert re.match(r"\[ +\d+\.\d s\] ", line)
    assert line.endswith(LONG)
