import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind, ttest_ind_from_stats

from headrace.errors import IncomparableRuns, InvalidOption, OutputError
from headrace.study import quantities
from headrace.study.compare import Selection, Side, compare, load_side, parse_selection
from headrace.study.compare_page import render_changelog, render_markdown
from headrace.study.compare_report import render_json
from headrace.study.finished import RUNS
from headrace.study.intervals import Runs
from headrace.study.quantities import AVERAGE, GPU_UTILIZATION, P99, THROUGHPUT
from headrace.study.samples import MeasuredRun
from headrace.study.verdict import percent, signed_percent, verdict
from headrace.study.welch import Moments, p_value, ratio_interval
from tests.study.summaries import GPU, metrics, summary, throughputs, write_run

FIVE = (98.0, 99.0, 100.0, 101.0, 102.0)
positive = st.lists(st.floats(0.01, 1e4), min_size=2, max_size=8)


def times(factor, values=FIVE):
    return tuple(value * factor for value in values)


@settings(max_examples=100, deadline=None)
@given(positive, positive)
def test_the_interval_is_welchs_on_the_logarithms(base, candidate):
    # With next to no spread the reference loses its digits.
    assume(np.ptp(base) > 1e-3 * min(base) and np.ptp(candidate) > 1e-3 * min(candidate))
    interval = ratio_interval(base, candidate)
    expected = ttest_ind(np.log(candidate), np.log(base), equal_var=False).confidence_interval(0.95)
    assert math.log(interval.low) == pytest.approx(expected.low, rel=1e-6, abs=1e-9)
    assert math.log(interval.high) == pytest.approx(expected.high, rel=1e-6, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(positive, positive)
def test_exchanging_the_sides_inverts_the_interval(base, candidate):
    forth, back = ratio_interval(base, candidate), ratio_interval(candidate, base)
    assert math.log(forth.ratio) == pytest.approx(-math.log(back.ratio), abs=1e-9)
    assert math.log(forth.low) == pytest.approx(-math.log(back.high), rel=1e-9, abs=1e-9)
    assert forth.low <= forth.ratio <= forth.high


def test_values_without_spread_have_an_interval_without_width():
    interval = ratio_interval([2.0, 2.0], [3.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((1.5, 1.5))


def test_an_interval_wider_than_a_float_ends_at_infinity():
    interval = ratio_interval([1e-60, 1e60], [1e-60, 1e60])
    assert (interval.low, interval.high) == (0.0, math.inf)
    assert str(interval) == "1.000 (0.000 to inf)"


@pytest.mark.parametrize(
    ("base", "candidate"),
    [
        pytest.param(Moments(mean=5.497, std=0.681, n=10), Moments(mean=4.039, std=1.175, n=10), id="apart"),
        pytest.param(Moments(mean=0.369, std=0.010, n=10), Moments(mean=0.407, std=0.033, n=3), id="unequal n"),
        pytest.param(Moments(mean=14.172, std=0.267, n=10), Moments(mean=14.146, std=1.145, n=10), id="close"),
    ],
)
def test_p_is_welchs(base, candidate):
    expected = ttest_ind_from_stats(
        base.mean, base.std, base.n, candidate.mean, candidate.std, candidate.n, equal_var=False
    ).pvalue
    assert p_value(base, candidate) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("other", "expected"), [(2.0, 1.0), (3.0, 0.0)])
def test_p_without_any_spread(other, expected):
    assert p_value(Moments(mean=2, std=0, n=3), Moments(mean=other, std=0, n=3)) == expected


@pytest.mark.parametrize(
    ("quantity", "base", "candidate", "words"),
    [
        pytest.param(THROUGHPUT, FIVE, times(1.1), "faster by 7.5 to 13 % (95 %, 5 and 5 runs)", id="more"),
        pytest.param(THROUGHPUT, FIVE, times(0.9), "slower by 7.9 to 12 % (95 %, 5 and 5 runs)", id="less"),
        pytest.param(AVERAGE, FIVE, times(0.9), "faster by 7.9 to 12 % (95 %, 5 and 5 runs)", id="shorter"),
        pytest.param(AVERAGE, FIVE, times(1.1), "slower by 7.5 to 13 % (95 %, 5 and 5 runs)", id="longer"),
        pytest.param(GPU_UTILIZATION, FIVE, times(1.1), "higher by 7.5 to 13 % (95 %, 5 and 5 runs)", id="busier"),
        pytest.param(GPU_UTILIZATION, FIVE, times(0.9), "lower by 7.9 to 12 % (95 %, 5 and 5 runs)", id="less busy"),
        pytest.param(
            THROUGHPUT,
            FIVE,
            times(1.01),
            "no evidence of a difference (-1.3 to +3.4 %; 95 %, 5 and 5 runs); underpowered: 2 more runs (up to 9) of"
            " each side to tell 2 %",
            id="the interval holds 1, and is too wide",
        ),
        pytest.param(
            THROUGHPUT,
            (99.0, 100.0, 101.0, 100.0, 100.0),
            (100.0, 101.0, 102.0, 101.0, 101.0),
            "no evidence of a difference (-0.03 to +2 %; 95 %, 5 and 5 runs)",
            id="the interval holds 1, and more runs would tell nothing that matters",
        ),
        pytest.param(
            THROUGHPUT,
            (100.0, 100.1, 100.2, 100.1, 100.0),
            (101.0, 101.1, 101.2, 101.1, 101.0),
            "same within 2 % (95 %, 5 and 5 runs)",
            id="a difference too small to matter",
        ),
        pytest.param(
            THROUGHPUT,
            FIVE[:3],
            times(1.2, FIVE[:3]),
            "faster by 17 to 23 % (95 %, 3 and 3 runs); few runs: treat as a hint",
            id="few runs",
        ),
        pytest.param(
            THROUGHPUT,
            (1.0, 100.0),
            (2.0, 80.0),
            "no evidence of a difference (the interval is wider than a factor of 10, so nearly nothing is"
            " known; 95 %, 2 and 2 runs); underpowered: more than 200 more runs of each side to tell 2 %; few runs:"
            " treat as a hint",
            id="hardly an interval",
        ),
        pytest.param(
            THROUGHPUT,
            (100.0,),
            (112.0,),
            "one run each: their spread is unknown, so nothing can be said about the difference beyond these"
            " two values: +12 %",
            id="one run each",
        ),
        pytest.param(
            THROUGHPUT,
            (100.0,),
            (90.0, 94.0),
            "1 and 2 runs: the spread of a single run is unknown, so nothing can be said about the difference"
            " beyond these values: -8 %",
            id="one run on one side",
        ),
        pytest.param(
            P99,
            FIVE[:4],
            times(1.2, FIVE[:4]),
            "4 and 4 runs: too few for an interval of a percentile (it needs 5 each): +20 %",
            id="few percentiles",
        ),
        pytest.param(P99, FIVE, times(1.1), "slower by 7.5 to 13 % (95 %, 5 and 5 runs)", id="percentiles"),
        pytest.param(GPU_UTILIZATION, (0.0, 1.0), (2.0, 2.0), "no ratio can be given: a value is 0 or less", id="zero"),
    ],
)
def test_verdicts_in_words(quantity, base, candidate, words):
    assert verdict(quantity, Runs(values=base), Runs(values=candidate)).verdict == words


def test_a_wider_threshold_makes_more_differences_not_matter():
    compared = verdict(THROUGHPUT, Runs(values=FIVE), Runs(values=times(1.1)), threshold=0.2)
    assert compared.verdict == "same within 20 % (95 %, 5 and 5 runs)"


def test_a_base_that_differs_from_itself_voids_the_comparison():
    drifting = Runs(values=(100.0, 90.0, 101.0, 91.0, 100.5, 90.5))
    compared = verdict(THROUGHPUT, drifting, Runs(values=times(2)))
    assert compared.void
    assert compared.verdict == "void: base differs from itself (-11 to -8.9 % between every other run and the rest)"


def test_a_base_differs_from_itself_in_the_order_of_blocks():
    values, repeats = (100.0, 101.0, 100.5, 90.0, 91.0, 90.5), (0, 2, 4, 1, 3, 5)
    assert verdict(THROUGHPUT, Runs(values=values, repeats=repeats), Runs(values=times(2))).void
    assert not verdict(THROUGHPUT, Runs(values=values), Runs(values=times(2))).void


def test_three_runs_are_not_set_against_themselves():
    compared = verdict(THROUGHPUT, Runs(values=FIVE[:3]), Runs(values=times(2)))
    assert (compared.itself, compared.void) == (None, False)


def test_runs_whose_spread_is_their_own_should_be_longer():
    noisy = Runs(values=FIVE, own_variance=1.0)
    words = verdict(AVERAGE, noisy, replace(noisy, values=times(1.01))).verdict
    assert "underpowered: 2 more runs (up to 9) of each side, or longer ones, to tell 2 %" in words
    calm = Runs(values=FIVE, own_variance=1e-9)
    assert "longer" not in verdict(AVERAGE, calm, replace(calm, values=times(1.01))).verdict


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (4.0, "4"),
        (4.06, "4.1"),
        (12.4, "12"),
        (9.96, "10"),
        (0.3, "0.3"),
        (0.004, "0.004"),
        (0.0, "0"),
        (-3.21, "-3.2"),
    ],
)
def test_percent(value, words):
    assert percent(value) == words


@pytest.mark.parametrize(("ratio", "words"), [(1.12, "+12"), (0.955, "-4.5"), (1.0, "0")])
def test_signed_percent(ratio, words):
    assert signed_percent(ratio) == words


@pytest.mark.parametrize(
    ("text", "path", "experiment"),
    [
        ("results/a", "results/a", None),
        ("results/a:original", "results/a", "original"),
        ("results/a:12_predict_workers", "results/a", "12_predict_workers"),
        ("a:b/c:executor", "a:b/c", "executor"),
    ],
)
def test_selections(text, path, experiment):
    selection = parse_selection(text)
    assert (str(selection.path), selection.experiment) == (path, experiment)
    assert str(selection) == text


def test_a_folder_with_a_colon_in_its_name_is_found(tmp_path):
    folder = tmp_path / "12:30"
    folder.mkdir()
    assert parse_selection(str(folder)) == Selection(path=folder)


def test_a_mistyped_experiment_is_refused():
    with pytest.raises(InvalidOption, match="'2_workers' is no experiment; after the colon stands one of original"):
        parse_selection("results/a:2_workers")


def test_a_side_is_read_and_restricted(tmp_path):
    for name, workers in (("a", 1), ("b", 2), ("c", 2)):
        write_run(tmp_path / RUNS / name, summary(design="h2d_d2h_threads", workers=workers))
    side = load_side(Selection(path=tmp_path, experiment="2_predict_workers"))
    assert [run.experiment for run in side.summaries] == ["2_predict_workers"] * 2
    with pytest.raises(InvalidOption, match="no run of original; it has h2d_d2h_threads, 2_predict_workers"):
        load_side(Selection(path=tmp_path, experiment="original"))
    with pytest.raises(OutputError, match="no finished run"):
        load_side(Selection(path=tmp_path / "other"))


def side(label, *runs):
    """A side whose runs kept records that say what the summaries say."""
    return Side(label=label, runs=tuple(MeasuredRun(summary=run, has_records=True) for run in runs))


BASE = side("base", *throughputs(FIVE, summary()))
CANDIDATE = side("candidate", *throughputs(times(1.1), summary(design="h2d_d2h_threads", workers=2)))


def test_two_designs_are_compared_cell_by_cell():
    base = side("base", *BASE.summaries, *throughputs(FIVE, summary(batch_size=256)))
    comparison = compare(base, CANDIDATE)
    (cell,) = comparison.cells
    words = {row.compared.quantity.name: row.compared.verdict for row in cell.rows}
    assert cell.key.batch_size == 32
    assert words["throughput"].startswith("faster by")
    assert list(words) == [
        "warm-up latency",
        "average latency",
        "p99 response time",
        "throughput",
        "GPU utilization",
    ]
    assert comparison.intervals == 5
    assert comparison.warnings == ("only on one side, so not compared: batch size 256, no compile",)


def test_the_page_says_all_that_a_reader_must_know():
    text = render_markdown(compare(BASE, CANDIDATE))
    assert "## batch size 32, no compile" in text
    row = "| throughput (samples/s) | 5 and 5 | 100.000 | 110.000 | 1.100 (1.075 to 1.126) | 1.000 (0.952 to 1.051) |"
    assert f"{row} faster by" in text
    assert "5 intervals were computed. At 95 %, about 1 in 20" in text
    assert "| SM activity" not in text


def test_sweeps_are_matched_by_experiment():
    def sweep(label, factor):
        runs = [
            *throughputs(times(factor), summary()),
            *throughputs(times(factor), summary(design="executor")),
        ]
        return side(label, *runs)

    comparison = compare(sweep("before", 1), sweep("after", 1.1))
    assert [cell.experiment for cell in comparison.cells] == ["original", "executor"]
    assert "## executor, batch size 32, no compile" in render_markdown(comparison)


def test_one_experiment_against_several_is_ambiguous():
    several = side("several", *BASE.summaries, *CANDIDATE.summaries)
    with pytest.raises(IncomparableRuns, match=r"base holds one experiment \(original\).*PATH:EXPERIMENT"):
        compare(BASE, several)


def test_no_cell_in_common_is_refused():
    other = side("other", summary(batch_size=64, compiled=True))
    with pytest.raises(IncomparableRuns, match="base has batch size 32, no compile, other has batch size 64"):
        compare(BASE, other)


def test_failed_and_wrong_runs_are_told_and_not_averaged_in():
    wrong = summary(numbers=metrics(throughput=None, wrong=3), error="3 answers were wrong")
    base = side("base", *BASE.summaries, summary(error="broke"), wrong, wrong)
    comparison = compare(base, CANDIDATE)
    assert comparison.warnings == (
        "base: 1 of 8 runs failed; not averaged in",
        "base: 2 of 8 runs had wrong answers; not averaged in",
    )
    assert {len(row.compared.base.values) for row in comparison.cells[0].rows} == {5}


def test_a_side_without_a_good_run_is_refused():
    with pytest.raises(IncomparableRuns, match="base has no run that counts"):
        compare(side("base", summary(error="broke")), CANDIDATE)


def unlike_candidate():
    run = CANDIDATE.summaries[0]
    load = replace(run.options.load, num_iters=50)
    model = replace(run.options.model, precision="float32")
    options = replace(run.options, load=load, model=model)
    return side("candidate", replace(run, options=options, environment=replace(GPU, gpu_name="Other GPU")))


def test_unlike_runs_are_refused_with_every_difference():
    with pytest.raises(IncomparableRuns) as refused:
        compare(BASE, unlike_candidate())
    for difference in (
        "load.num_iters: 100 and 50",
        "model.precision: tf32 and float32",
        "GPU: Test GPU and Other GPU",
        "--allow-unlike",
    ):
        assert difference in str(refused.value)


def test_unlike_runs_are_compared_on_demand_under_a_warning():
    text = render_markdown(compare(BASE, unlike_candidate(), allow_unlike=True))
    warning = text.index("UNLIKE RUNS, so a difference may have this cause: load.num_iters: 100 and 50")
    assert warning < text.index("## batch size 32")


def test_every_compared_quantity_can_be_read():
    run = summary(sm_activity=20.0)
    assert [quantity.values([run]) for quantity in quantities.COMPARED] == [
        *((5.0,), (2.0,), (pytest.approx(3.6),), (1000.0,), (40.0,), (20.0,))
    ]


def test_the_json_says_what_the_page_says():
    read = json.loads(render_json(compare(BASE, CANDIDATE)))
    (cell,) = read["cells"]
    throughput = next(row for row in cell["quantities"] if row["name"] == "throughput")
    assert (cell["batch_size"], cell["compile"], cell["experiment"]) == (32, False, None)
    assert throughput["ratio"] == {
        "ratio": pytest.approx(1.1),
        "low": pytest.approx(1.075, abs=1e-3),
        "high": pytest.approx(1.126, abs=1e-3),
    }
    assert (throughput["base_runs"], throughput["void"], throughput["underpowered"]) == ([*FIVE], False, False)
    assert throughput["verdict"].startswith("faster by")
    assert read["changed_options"] == [
        "design.name: original -> h2d_d2h_threads",
        "design.num_workers: 1 -> 2",
        "load.warmup_iters: 2 -> 4",
    ]


def test_the_changelog_entry_says_what_changed_and_what_happened():
    other = replace(GPU, git_revision="1234567890abcdef")
    after = [replace(run, environment=other) for run in CANDIDATE.summaries]
    lines = render_changelog(compare(BASE, side("after", *after))).splitlines()
    assert lines[0] == "### Changed"
    assert lines[2].startswith(
        "- `after` against `base`: headrace 0.1.0 abcdef0123 -> 0.1.0 1234567890; design.name: original ->"
        " h2d_d2h_threads; design.num_workers: 1 -> 2; "
    )
    assert "Test GPU (driver 580.1)" in lines[3]
    assert lines[4].startswith("  - batch size 32, no compile: warm-up latency ")
    assert "throughput 100.000 -> 110.000 samples/s, ratio 1.100 (1.075 to 1.126): faster by 7.5 to 13 %" in lines[4]
