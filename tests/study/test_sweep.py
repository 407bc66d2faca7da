import errno
import io
import os
import signal
import sys
from dataclasses import replace

import psutil
import pytest
from rich.console import Console

from headrace.bench.summary import FILE_NAME
from headrace.errors import HeadraceError, InvalidOption, OutputError, RunFailed
from headrace.study.execute import BenchCommand, SubprocessExecutor
from headrace.study.finished import RUNS, load_runs
from headrace.study.plan import PlannedRun, SweepConfig, plan
from headrace.study.progress import RichSweepProgress, duration
from headrace.study.sweep import RunOutcome, SweepStep, estimate_s, run_sweep
from tests.study.summaries import GPU, FakeExecutor, LostExecutor, of_planned, summary, write_run

CONFIG = SweepConfig(
    designs=("original", "h2d_d2h_threads"), workers=(1,), batch_sizes=(1, 32), compile=(False,), repeats=2
)
NAMES = [run.name for run in plan(CONFIG)]


class Steps(list):
    def __call__(self, step):
        self.append(step)


def sweep(folder, execute, config=CONFIG, progress=None):
    return run_sweep(config, folder, execute, Steps() if progress is None else progress, execute.clock)


def fail_from(first, last=10**6):
    return lambda count, _: "it broke\nbadly" if first <= count <= last else None


def interrupt_at(at):
    return lambda count, _: KeyboardInterrupt() if count == at else None


def test_a_sweep_runs_the_plan_in_order_and_writes_tables(tmp_path):
    execute = FakeExecutor()
    outcome = sweep(tmp_path, execute)
    assert execute.started == NAMES
    assert (outcome.total, outcome.succeeded, outcome.skipped, outcome.failures) == (8, 8, 0, ())
    assert {path.name for path in outcome.tables} == {
        "output_1_false.md",
        "output_32_false.md",
        "all.md",
        "runs.csv",
    }
    assert all(path.is_file() for path in outcome.tables)


def test_progress_is_told_before_each_run_and_at_the_end(tmp_path):
    steps = Steps()
    sweep(tmp_path, FakeExecutor(), progress=steps)
    assert [step.done for step in steps] == list(range(9))
    assert [step.name for step in steps] == [*NAMES, None]
    assert [step.time_left_s for step in steps] == [None, *(10.0 * left for left in range(7, -1, -1))]
    assert steps[0].last is None
    assert steps[1].last.planned.name == NAMES[0]


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    first, second = FakeExecutor(interrupt_at(5)), FakeExecutor()
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, first)
    outcome = sweep(tmp_path, second)
    assert first.started == NAMES[:6]
    assert second.started == NAMES[5:]
    assert (outcome.skipped, outcome.succeeded) == (5, 3)
    assert not list((tmp_path / RUNS).glob("*.partial"))


def test_tables_appear_after_each_block(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, FakeExecutor(interrupt_at(6)))
    assert "original 1, h2d_d2h_threads 1" in (tmp_path / "tables" / "output_1_false.md").read_text()


def test_a_finished_sweep_makes_no_run_but_renews_its_tables(tmp_path):
    sweep(tmp_path, FakeExecutor())
    (tmp_path / "tables" / "all.md").unlink()
    execute = FakeExecutor()
    outcome = sweep(tmp_path, execute)
    assert execute.started == []
    assert (outcome.skipped, outcome.succeeded) == (8, 0)
    assert (tmp_path / "tables" / "all.md").is_file()


def test_a_failed_run_is_counted_told_and_tried_again_on_resuming(tmp_path):
    outcome = sweep(tmp_path, FakeExecutor(fail_from(2, 2)))
    assert [(item.planned.name, item.error) for item in outcome.failures] == [(NAMES[2], "it broke")]
    assert "1 failed, not averaged in" in (tmp_path / "tables" / "all.md").read_text()
    again = FakeExecutor()
    outcome = sweep(tmp_path, again)
    assert again.started == [NAMES[2]]
    assert outcome.failures == ()
    assert "failed" not in (tmp_path / "tables" / "all.md").read_text()


def test_a_run_that_left_no_summary_is_still_in_the_tables(tmp_path):
    execute = LostExecutor(lambda count, _: "killed by SIGKILL" if count == 2 else None)
    outcome = sweep(tmp_path, execute)
    text = (tmp_path / "tables" / "all.md").read_text()
    assert [item.error for item in outcome.failures] == ["killed by SIGKILL"]
    assert f"- {NAMES[2]}: killed by SIGKILL" in text
    assert text.count("1 failed, not averaged in") == 1


def test_a_child_that_ends_well_but_writes_nothing_has_failed(tmp_path):
    execute = FakeExecutor()
    outcome = run_sweep(
        CONFIG,
        tmp_path,
        lambda planned, folder: None if planned.name == NAMES[3] else execute(planned, folder),
        Steps(),
    )
    assert ["without a summary" in item.error for item in outcome.failures] == [True]


def test_a_bad_end_after_a_good_summary_does_not_undo_it(tmp_path):
    def execute(planned, run_dir):
        write_run(run_dir, of_planned(planned))
        return "exit code 1"

    assert run_sweep(CONFIG, tmp_path, execute, Steps()).succeeded == 8


@pytest.mark.parametrize(
    ("script", "ends", "started"),
    [
        pytest.param(fail_from(0), True, 3, id="three failures at the start end it"),
        pytest.param(fail_from(0, 1), False, 8, id="two failures at the start do not"),
        pytest.param(fail_from(1), False, 8, id="failures after a success do not"),
    ],
)
def test_a_hopeless_sweep_ends_early(tmp_path, script, ends, started):
    execute = FakeExecutor(script)
    if ends:
        with pytest.raises(RunFailed, match="first 3 runs all failed, the last one with: it broke"):
            sweep(tmp_path, execute)
    else:
        sweep(tmp_path, execute)
    assert len(execute.started) == started


def test_failures_after_resuming_do_not_end_it(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, FakeExecutor(interrupt_at(1)))
    assert len(sweep(tmp_path, FakeExecutor(fail_from(0))).failures) == 7


def test_another_plan_is_refused_and_told_apart(tmp_path):
    sweep(tmp_path, FakeExecutor())
    with pytest.raises(OutputError, match=r"repeats: 2, not 3.*same options, or choose another folder"):
        sweep(tmp_path, FakeExecutor(), replace(CONFIG, repeats=3))


def test_wrong_options_leave_no_folder(tmp_path):
    with pytest.raises(InvalidOption):
        sweep(tmp_path / "new", FakeExecutor(), replace(CONFIG, repeats=0))
    assert not (tmp_path / "new").exists()


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    def start_another(count, planned):
        with pytest.raises(OutputError, match="another sweep is running"):
            sweep(tmp_path, FakeExecutor())
        return KeyboardInterrupt()

    execute = FakeExecutor(start_another)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, execute)
    assert execute.started == NAMES[:1]  # and the lock was let go of:
    assert sweep(tmp_path, FakeExecutor()).succeeded == 8


def test_a_changed_machine_is_refused(tmp_path):
    sweep(tmp_path, FakeExecutor(fail_from(7)))

    def elsewhere(planned, run_dir):
        write_run(run_dir, replace(of_planned(planned), environment=replace(GPU, gpu_driver="590.2")))

    with pytest.raises(HeadraceError, match=r"GPU driver: 580.1 and 590.2"):
        run_sweep(CONFIG, tmp_path, elsewhere, Steps())


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        sweep(tmp_path / "file", FakeExecutor())


def test_a_full_disk_is_an_output_error(tmp_path):
    def fill(count, planned):
        if count == 3:  # the tables' folder cannot be made at the end of this block
            (tmp_path / "tables").write_text("")

    with pytest.raises(OutputError, match="tables"):
        sweep(tmp_path, FakeExecutor(fill))


def done(batch_size, seconds, *, compiled=False, error=None):
    return RunOutcome(planned=cell(batch_size, compiled=compiled), duration_s=seconds, error=error)


def cell(batch_size, *, compiled=False):
    return PlannedRun(name="cell", design="original", num_workers=1, batch_size=batch_size, compile=compiled, repeat=0)


@pytest.mark.parametrize(
    ("remaining", "seen", "expected"),
    [
        pytest.param([cell(1)], [], None, id="nothing known"),
        pytest.param([cell(1)], [done(1, 5, error="broke")], None, id="only a failure known"),
        pytest.param([], [done(1, 5)], 0, id="nothing left"),
        pytest.param([cell(1), cell(1)], [done(1, 4), done(1, 6)], 10, id="the cell's mean"),
        pytest.param([cell(64)], [done(1, 4), done(32, 6)], 4 + 2 * 63 / 31, id="a line through other cells"),
        pytest.param([cell(1)], [done(32, 7)], 7, id="one other cell"),
        pytest.param([cell(1)], [done(32, 5), done(64, 50)], 5, id="never below the shortest seen"),
        pytest.param([cell(1)], [done(1, 9, compiled=True)], 9, id="the other compile mode, for want of better"),
        pytest.param([cell(1)], [done(1, 90, compiled=True), done(1, 5)], 5, id="its own compile mode first"),
    ],
)
def test_time_left(remaining, seen, expected):
    assert estimate_s(remaining, seen) == (expected if expected is None else pytest.approx(expected))


def test_progress_without_a_terminal_is_a_line_per_finished_run(tmp_path):
    screen = io.StringIO()
    with RichSweepProgress(Console(file=screen, width=200)) as progress:
        sweep(tmp_path, FakeExecutor(fail_from(1, 1)), progress=progress)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[0] == f"1/8 {NAMES[0]}: ok (10.0 s, about 70 s left)"
    assert lines[1] == f"2/8 {NAMES[1]}: failed: it broke (10.0 s, about 60 s left)"
    assert lines[7] == f"8/8 {NAMES[7]}: ok (10.0 s)"


def test_progress_on_a_terminal_shows_the_bar():
    screen = io.StringIO()
    with RichSweepProgress(Console(file=screen, width=120, force_terminal=True)) as progress:
        progress(SweepStep(done=3, total=8, name="r0-cell", time_left_s=7200.0, last=None))
    assert "r0-cell" in screen.getvalue()
    assert "3/8" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(7.4, "7 s"), (119, "119 s"), (1800, "30 min"), (9000, "2 h 30 min")])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_childs_command_line(tmp_path):
    command = BenchCommand(SweepConfig(num_iters=50, child_options=("--device", "cuda:1")))
    planned = next(run for run in plan(CONFIG) if run.batch_size == 32 and run.design == "h2d_d2h_threads")
    run_dir = tmp_path / "runs" / planned.name
    assert list(command(planned, run_dir)) == [
        *(sys.executable, "-m", "headrace", "bench", "--design", "h2d_d2h_threads", "--num-workers", "1"),
        *("--batch-size", "32", "--num-iters", "50", "--no-compile", "--output-dir", str(run_dir), "--json"),
        *("--reference-cache", str(tmp_path / "references"), "--device", "cuda:1"),
    ]


def python(*lines):
    return lambda _, run_dir: (sys.executable, "-S", "-c", "\n".join(lines), str(run_dir))


def shell(script):
    """A stand-in that starts in a millisecond; $1 is the run's folder."""
    return lambda _, run_dir: ("/bin/sh", "-c", script, "sh", str(run_dir))


# Deaf to requests to end, as is its descendant, whose number it tells.
STUBBORN = "trap '' INT TERM; sleep 60 & echo $! > $1.pid; "


def execute(executor, tmp_path):
    return executor(cell(1), tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param("print('fine')", None, id="ended well"),
        pytest.param(
            "print('headrace: no such model'); print('{}'); raise SystemExit(2)",
            "no such model (exit code 2)",
            id="the command's own error",
        ),
        pytest.param("raise ValueError('odd')", "ValueError: odd (exit code 1)", id="a traceback's last line"),
        pytest.param("raise SystemExit(3)", "exit code 3", id="silent failure"),
        pytest.param("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL", id="killed"),
    ],
)
def test_how_a_child_ended(tmp_path, code, expected):
    assert execute(SubprocessExecutor(command=python(code)), tmp_path) == expected
    assert (tmp_path / "run.log").is_file()


def test_a_child_beyond_its_time_limit_is_killed_with_its_descendants(tmp_path):
    executor = SubprocessExecutor(command=shell(STUBBORN + "wait"), time_limit_s=0.5, grace_s=0.1, linger_s=0.5)
    assert execute(executor, tmp_path) == "stopped after 0.5 s, the limit of a run; raise it with --run-timeout"
    assert not alive(descendant(tmp_path))


def test_a_child_asked_to_end_may_clean_up(tmp_path):
    command = shell("trap 'touch $1.clean; exit' TERM; sleep 60 & wait")
    execute(SubprocessExecutor(command=command, time_limit_s=0.5, linger_s=0.2), tmp_path)
    assert (tmp_path / "run.clean").is_file()


def test_what_outlives_the_child_is_killed(tmp_path):
    assert execute(SubprocessExecutor(command=shell(STUBBORN), linger_s=0.5), tmp_path) is None
    assert not alive(descendant(tmp_path))


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, even where the tests themselves were started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_child_and_passes_on(tmp_path):
    command = shell(STUBBORN + "kill -INT $PPID; wait")
    with pytest.raises(KeyboardInterrupt):
        execute(SubprocessExecutor(command=command, time_limit_s=20, grace_s=0.1, linger_s=0.5), tmp_path)
    assert not alive(descendant(tmp_path))


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_while_the_child_starts_waits_until_it_can_be_ended(tmp_path):
    before = set(psutil.Process().children(recursive=True))

    def interrupted(planned, run_dir):
        signal.raise_signal(signal.SIGINT)
        return shell(STUBBORN + "wait")(planned, run_dir)

    with pytest.raises(KeyboardInterrupt):
        execute(SubprocessExecutor(command=interrupted, time_limit_s=20, grace_s=0.1, linger_s=0.5), tmp_path)
    assert (tmp_path / "run.log").is_file()  # it was started, and is gone:
    new = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in new if process.status() != "zombie"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_command_that_does_not_exist_fails_the_sweep(tmp_path):
    executor = SubprocessExecutor(command=lambda *_: ("/nonexistent/python",))
    with pytest.raises(RunFailed, match="cannot be started"):
        execute(executor, tmp_path)


def test_a_log_that_cannot_be_written_is_an_output_error(tmp_path):
    executor = SubprocessExecutor(command=python("pass"))
    with pytest.raises(OutputError, match=os.strerror(errno.ENOENT)):
        executor(cell(1), tmp_path / "missing" / "run")


def descendant(tmp_path):
    return int((tmp_path / "run.pid").read_text())


def alive(pid):
    """A killed orphan may stay a zombie where nobody reaps it."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_runs_are_loaded_from_a_run_or_a_sweep(tmp_path):
    write_run(tmp_path / RUNS / "b", summary(design="h2d_d2h_threads"))
    write_run(tmp_path / RUNS / "a", summary(design="h2d_d2h_threads", workers=2))
    write_run(tmp_path / RUNS / "c", summary())
    assert [run.experiment for run in load_runs(tmp_path)] == [
        "original",
        "h2d_d2h_threads",
        "2_predict_workers",
    ]
    assert [run.experiment for run in load_runs(tmp_path / RUNS / "c")] == ["original"]


def test_a_folder_without_runs_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(OutputError, match=f"no finished run there; name the folder of a run.*{FILE_NAME}"):
        load_runs(tmp_path)
