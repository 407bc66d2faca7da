"""Searches through options whose speed is known: simulated queues in place of runs."""

import dataclasses
import re
import sys

import pytest

from headrace.cli import build_parser
from headrace.errors import InvalidOption, ModelError, RunFailed
from headrace.search import optimiser, tune_report
from headrace.search.capacity import Budget
from headrace.search.finals import FinalsConfig, Races, block, judge_finals
from headrace.search.holds import Bound
from headrace.search.optimiser import WHOLE, OptunaOptimiser
from headrace.search.space import Choice, Space, restricted, usual_space
from headrace.search.tune import TuneConfig, Tuning
from headrace.search.tune_report import Point, pareto
from headrace.tune_options import configurer, tune_config
from tests.search.queues import Clock, Queue, Told, md1_rate, trial_of

BOUND = Bound(p99_s=0.1)
SPACE = Space(workers=(1, 2, 4), max_batch_size=(1, 8), max_queue_delay_us=(0, 2000), precision=("float32", "bf16"))


def mean_s(choice: Choice) -> float:
    """Return the service time of these options: two workers, large batches and bf16 are the fastest."""
    speed = {1: 1.0, 2: 1.8, 4: 1.5}[choice.workers] * (1.3 if choice.max_batch_size == 8 else 1.0)
    return 0.01 / speed / (1.4 if choice.precision == "bf16" else 1.0) + choice.max_queue_delay_us * 1e-6


BEST = Choice(workers=2, max_batch_size=8, max_queue_delay_us=0, precision="bf16")


class Runs:
    """Measures options by simulation."""

    def __init__(self, speed=mean_s, wrong=(), broken=(), overhead_s=2.0):
        self.clock, self.made, self.speed, self.overhead_s = Clock(), [], speed, overhead_s
        self.wrong, self.broken = wrong, broken  # precisions

    def __call__(self, choice, name, load):
        self.made.append((choice, name))
        if choice.precision in self.broken:
            raise ModelError("beyond the precision's tolerance")
        queue = Queue(self.speed(choice), seed=len(self.made), clock=self.clock, overhead_s=self.overhead_s)
        found = queue(name, load)
        wrong = choice.precision in self.wrong
        return dataclasses.replace(found, error="7 answers are not the eager model's" if wrong else "")


def tuning(runs=None, space=SPACE, time_s=3600.0, **options) -> Tuning:
    runs = runs or Runs()
    config = TuneConfig(bound=BOUND, space=space, time_s=time_s, duration_s=10.0, **options)
    return Tuning(
        config=config, measure=runs, in_flight=lambda _: 16, watcher=Told(), budget=Budget(time_s, runs.clock)
    )


def search(found: Tuning) -> Tuning:
    found.search(OptunaOptimiser(found.config.space, seed=0))
    return found


def test_the_fastest_options_of_a_small_space_win_and_all_of_it_is_looked_at():
    found = search(tuning())
    assert found.best.choice == BEST
    assert sorted(each.choice for each in found.tried) == sorted(SPACE.choices())
    assert found.best.goodput_samples_per_s == pytest.approx(md1_rate(mean_s(BEST), 0.1), rel=0.15)


def test_a_large_space_is_searched_in_part_and_comes_near_the_best():
    space = dataclasses.replace(SPACE, max_queue_delay_us=(0, 100, 200, 500, 1000, 2000), compile=(False, True))
    assert space.size > WHOLE
    found = search(tuning(space=space, time_s=1800))
    assert len(found.tried) < space.size
    assert found.best.goodput_samples_per_s > 0.85 * md1_rate(mean_s(BEST), 0.1)


def test_options_that_can_do_less_than_the_best_holds_cost_one_run():
    found = search(tuning())
    given_up = [each for each in found.tried if "at most" in each.left_out]
    assert given_up
    assert all(not each.points for each in given_up)
    assert all(each.saturated_samples_per_s < 1.1 * found.best.saturated_samples_per_s for each in given_up)


def test_the_first_options_tried_are_the_usual_ones():
    found = search(tuning())
    assert found.tried[0].choice == Choice(workers=1, max_batch_size=1, precision="float32")


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_precision_that_fails_its_answer_check_never_wins(fault):
    runs = Runs(**{fault: ("bf16",)})
    found = search(tuning(runs))
    assert found.best.choice.precision == "float32"
    out = [each for each in found.tried if each.choice.precision == "bf16"]
    assert out
    assert all("eager" in each.left_out or "tolerance" in each.left_out for each in out)
    assert len([choice for choice, _ in runs.made if choice.precision == "bf16"]) == 1, "seen once, and left alone"


def test_a_bound_below_what_one_request_alone_takes_is_told_at_once():
    runs = Runs(lambda _: 0.2)
    with pytest.raises(RunFailed, match=r"--p99 100 ms: nothing can hold it\. float32: one request alone takes 200 ms"):
        search(tuning(runs))
    assert len(runs.made) == 2, "one run for each form of the model"


def test_time_that_is_too_short_for_one_set_of_options_is_told():
    with pytest.raises(InvalidOption, match="--time 10s: too short for a single set of options; it takes 23s"):
        tuning(time_s=10).config.validate()
    with pytest.raises(RunFailed, match="used up before one set of options was measured; a run takes 22 s here"):
        search(tuning(Runs(overhead_s=12.0), time_s=40))


def test_time_is_kept_for_the_finals():
    runs = Runs()
    found = search(tuning(runs, time_s=600))
    spent_s = runs.clock.ns / 1e9
    assert found.finals() is not None
    assert spent_s <= 600 - 2 * 2 * 12
    assert runs.clock.ns / 1e9 <= 600 + 12


def test_the_finals_name_a_clear_winner_and_its_lead():
    found = search(tuning(space=restricted(SPACE, ["max_queue_delay_us=0", "workers=1,2", "max_batch_size=8"], 1)))
    finals = found.finals()
    assert finals.finalists[0].choice == BEST
    assert finals.sure
    assert finals.ratio.low > 1
    assert "the winner wins by far: the second cannot answer half as many" in finals.verdict


def test_a_small_lead_is_told_with_its_interval():
    runs = {
        choice: [trial_of(Queue(mean, exponential=True, seed=block), 120, 20) for block in range(5)]
        for choice, mean in ((Choice(), 0.00805), (BEST, 0.0075))
    }
    finals = judge_finals(120, runs, Bound(p99_s=0.2))
    assert finals.finalists[0].choice == BEST
    assert finals.sure
    assert re.search(r"the winner wins with [\d.]+ to [\d.]+ % more answers within the bound", finals.verdict)


def test_equal_options_cannot_be_told_apart():
    space = restricted(SPACE, ["max_queue_delay_us=0", "precision=bf16", "max_batch_size=8", "workers=1,2"], 1)
    found = search(tuning(Runs(lambda _: 0.005), space=space))
    finals = found.finals()
    assert not finals.sure
    assert "cannot be told apart" in finals.verdict
    assert finals.finalists[0].verdict.holds


def test_finalists_take_turns_with_the_same_arrivals():
    runs = Runs()
    found = search(tuning(runs))
    before = len(runs.made)
    finals = found.finals()
    order = [choice for choice, name in runs.made[before:]]
    pairs = [set(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert all(pair == {each.choice for each in finals.finalists} for pair in pairs)
    assert {tuple(block([1, 2], number, 0)) for number in range(10)} == {(1, 2), (2, 1)}


def test_a_winner_that_answered_is_above_one_that_did_not():
    quick, slow = trial_of(Queue(0.001), 50, 5), trial_of(Queue(1.0), 50, 5)
    finals = judge_finals(50, {BEST: [quick, quick], Choice(): [slow, slow]}, BOUND)
    assert finals.finalists[0].choice == BEST
    assert "wins" in finals.verdict


def test_finals_without_time_for_two_runs_of_each_are_left_out():
    races = Races(config=FinalsConfig(), bound=BOUND, seed=0, race=lambda *_: None, fits=lambda runs: runs < 4)
    assert races.run([BEST, Choice()], 10) is None


def test_pareto_keeps_what_no_other_beats_in_both():
    def at(p99_s, goodput):
        return Point(trial="", requests_per_s=1, goodput_samples_per_s=goodput, p99_s=p99_s, holds=True, reason="")

    points = [at(0.01, 10), at(0.02, 8), at(0.03, 30), at(0.03, 20), at(0.1, 30), at(0.2, 40)]
    assert [(each.p99_s, each.goodput_samples_per_s) for each in pareto(points)] == [(0.01, 10), (0.03, 30), (0.2, 40)]


def test_the_report_has_a_page_and_a_picture(tmp_path):
    found = search(tuning())
    report = tune_report.tune_report(found.config, found.tried, found.finals())
    page = tune_report.page(report)
    assert str(BEST) in page
    assert page.count("\n| workers=") == len(found.tried) + 2
    assert tune_report.draw(report, tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrkers=1", "there is no such key; did you mean workers?"),
        ("zzz=1", "there are: workers, max_batch_size"),
        ("workers", "write it as KEY=VALUE"),
        ("workers=1,1", "a value stands twice"),
        ("workers=0", "0 is not a whole number of 1 to 65536"),
        ("precision=int3", "precisions are tf32"),
        ("compile=yes", "compile is on or off"),
        ("max_batch_size=2", "below --batch-size 4"),
    ],
)
def test_a_search_that_means_nothing_is_refused(text, message):
    with pytest.raises(InvalidOption, match=message.replace("?", r"\?")):
        restricted(SPACE, [text], 4)


def test_values_that_are_given_take_the_place_of_the_usual_ones():
    space = restricted(usual_space("cuda", 16, 1, 0.02), ["workers=3", "compile=on,off", "max-queue-delay-us=7"], 1)
    assert (space.workers, space.compile, space.max_queue_delay_us) == ((3,), (True, False), (7,))
    with pytest.raises(InvalidOption, match="workers is given twice"):
        restricted(space, ["workers=1", "workers=2"], 1)


def test_usual_values_suit_the_device_and_the_bound():
    cpu, gpu = usual_space("cpu", 2, 4, 0.02), usual_space("cuda", 16, 1, 0.02)
    assert cpu.workers == (1, 2)
    assert min(cpu.max_batch_size) == 4
    assert cpu.compile == (False,)
    assert "fp16" in gpu.precision
    assert max(usual_space("cpu", 2, 1, 0.004).max_queue_delay_us) <= 1000


def test_without_optuna_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(optimiser.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidOption, match=r"pip install 'headrace\[tune\]'"):
        OptunaOptimiser(SPACE, 0)


def test_optuna_is_not_imported_before_it_is_needed():
    from tests import commands  # noqa: PLC0415

    code = (
        "import sys, headrace.cli; headrace.cli.build_parser();"
        " sys.exit('optuna' in sys.modules or 'torch' in sys.modules)"
    )
    assert (
        commands.subprocess.run([sys.executable, "-c", code], env=commands.environment(), check=False).returncode == 0
    )


def test_the_command_makes_a_run_of_every_usual_set_of_options():
    args = build_parser().parse_args(["tune", "--p99", "20ms", "--device", "cpu", "--batch-size", "4"])
    config, configure = tune_config(args), configurer(args)
    for choice in config.space.choices():
        run = configure(choice)
        assert run.design.num_workers == choice.workers
        assert (run.lanes.buckets[-1], run.model.precision) == (choice.max_batch_size, choice.precision)
        assert run.design.name == "lanes"
