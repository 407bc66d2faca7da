from collections import Counter
from dataclasses import replace

import pytest

from headrace.errors import IncomparableRuns
from headrace.study.findings import judge, judge_all, render_findings
from headrace.study.published import BATCH_SIZES, Claim, claims, find, load_published
from headrace.study.quantities import AVERAGE, GPU_UTILIZATION, THROUGHPUT, WARMUP
from tests.study.summaries import GPU, metrics, summary, throughputs

PUBLISHED = load_published()
FIVE = (98.0, 99.0, 100.0, 101.0, 102.0)
ORIGINAL = throughputs(FIVE, summary())


def two_workers(factor):
    return throughputs([value * factor for value in FIVE], summary(design="h2d_d2h_threads", workers=2))


def claim(**changes):
    base = Claim(
        step="step",
        wording="two workers are faster",
        base="original",
        candidate="2_predict_workers",
        batch_sizes=(32,),
        compile=False,
        metric=THROUGHPUT,
        better=True,
    )
    return replace(base, **changes)


def test_the_published_tables_are_whole():
    assert len(PUBLISHED) == 35
    assert Counter(row.compile for row in PUBLISHED) == {False: 25, True: 10}
    assert {row.batch_size for row in PUBLISHED} == set(BATCH_SIZES)
    assert all(row.throughput_samples_per_s.n == 10 for row in PUBLISHED)


def test_a_published_row_holds_its_four_quantities():
    row = find(PUBLISHED, "4_predict_workers", 256, compiled=False)
    means = [row.moments(quantity).mean for quantity in (WARMUP, AVERAGE, THROUGHPUT, GPU_UTILIZATION)]
    assert means == [4.252, 14.702, 951.261, 70.716]
    assert row.throughput_samples_per_s.std == 7.986


def test_a_row_that_was_not_published_is_none():
    assert find(PUBLISHED, "executor", 32, compiled=False) is None
    assert find(PUBLISHED, "2_predict_workers", 32, compiled=True) is None


@pytest.mark.parametrize(
    ("candidate", "compiled", "metric", "better", "sizes"),
    [
        pytest.param("executor", False, WARMUP, True, BATCH_SIZES, id="executor warms up faster"),
        pytest.param("executor", True, THROUGHPUT, False, BATCH_SIZES, id="executor is else worse"),
        pytest.param("h2d_d2h_threads", True, WARMUP, True, BATCH_SIZES, id="copy threads warm up faster"),
        pytest.param("h2d_d2h_threads", False, AVERAGE, False, (1, 32, 64), id="copy threads, small"),
        pytest.param("h2d_d2h_threads", False, THROUGHPUT, True, (128, 256), id="copy threads, large"),
        pytest.param("3_predict_workers", False, AVERAGE, False, (1, 32, 64), id="workers, small"),
        pytest.param("4_predict_workers", False, WARMUP, True, (128, 256), id="workers, large"),
    ],
)
def test_the_claims_are_the_published_ones(candidate, compiled, metric, better, sizes):
    found = [
        item
        for item in claims()
        if (item.base, item.candidate, item.compile) == ("original", candidate, compiled)
        and (item.metric.name, item.better) == (metric.name, better)
    ]
    assert [item.batch_sizes for item in found] == [sizes]


def test_several_workers_were_never_claimed_with_compile():
    assert not [item for item in claims() if item.compile and "workers" in item.candidate]


def test_claimed_sizes():
    sizes = {item.metric.name: item.claimed_change for item in claims() if item.claimed_change}
    assert sizes == {"throughput": 300.0, "average latency": -5.0, "warm-up latency": -2.0}


@pytest.mark.parametrize(
    ("metric", "better", "higher"),
    [
        (THROUGHPUT, True, True),
        (THROUGHPUT, False, False),
        (AVERAGE, True, False),
        (AVERAGE, False, True),
        (GPU_UTILIZATION, True, True),
        (GPU_UTILIZATION, False, False),
    ],
)
def test_what_better_means(metric, better, higher):
    assert claim(metric=metric, better=better).claims_higher is higher


@pytest.mark.parametrize(
    ("better", "candidates", "verdict"),
    [
        pytest.param(True, two_workers(1.2), "held", id="claimed better, is better"),
        pytest.param(True, two_workers(0.8), "did not hold", id="claimed better, is worse"),
        pytest.param(False, two_workers(0.8), "held", id="claimed worse, is worse"),
        pytest.param(False, two_workers(1.2), "did not hold", id="claimed worse, is better"),
        pytest.param(True, two_workers(1.001), "could not be told", id="no difference seen"),
        pytest.param(True, two_workers(1.2)[:1], "could not be told", id="one run"),
        pytest.param(True, [], "could not be told", id="not measured"),
    ],
)
def test_verdicts(better, candidates, verdict):
    found = judge(claim(better=better), 32, [*ORIGINAL, *candidates], PUBLISHED)
    assert found.verdict == verdict


def test_a_shorter_latency_is_better():
    fast = [summary(design="executor", numbers=metrics(latency=latency)) for latency in (0.9, 1.0, 1.1)]
    slow = [summary(numbers=metrics(latency=latency)) for latency in (1.9, 2.0, 2.1)]
    assert judge(claim(metric=AVERAGE, candidate="executor"), 32, [*fast, *slow], PUBLISHED).verdict == "held"


def test_only_runs_of_the_claims_cell_are_judged():
    elsewhere = [*two_workers(1.2), *throughputs(FIVE, summary(batch_size=64, compiled=True))]
    found = judge(claim(), 32, elsewhere, PUBLISHED)
    assert (found.base, len(found.candidate)) == ((), 5)


@pytest.mark.parametrize(
    ("changes", "size", "support"),
    [
        pytest.param({"metric": WARMUP}, 256, "yes (p < 0.001)", id="plain"),
        pytest.param({"better": False}, 256, "no, the opposite (p < 0.001)", id="opposite"),
        pytest.param({"better": False}, 32, "not beyond chance (p = 0.070)", id="p is 0.07"),
        pytest.param({"candidate": "executor"}, 32, "no table published", id="no table"),
    ],
)
def test_whether_the_published_numbers_support_the_claim(changes, size, support):
    assert judge(claim(**changes), size, [], PUBLISHED).support == support


def test_failed_runs_are_not_judged():
    runs = [*ORIGINAL, *(replace(run, error="broke") for run in two_workers(1.2))]
    assert {item.verdict for item in judge_all(runs)} == {"could not be told"}


def test_every_claim_is_tried_at_every_batch_size_it_names():
    assert len(judge_all([summary()])) == sum(len(item.batch_sizes) for item in claims())


def in_batches_of_256(run):
    return replace(run, options=replace(run.options, inputs=replace(run.options.inputs, batch_size=256)))


@pytest.fixture(scope="module")
def page():
    at_256 = [in_batches_of_256(run) for run in [*ORIGINAL, *two_workers(1.2)]]
    return render_findings([*ORIGINAL, *two_workers(1.2), *at_256, summary(error="broke")])


def test_the_page_names_the_machine_and_counts_the_runs(page):
    assert "Machine: Test GPU (driver 580.1)" in page
    assert "Runs: 20 count, 1 failed, 0 had wrong answers." in page
    assert "Other than published: input photos (published: random)." in page


def test_the_summary_says_where_each_claim_held(page):
    summary_row = next(line for line in page.splitlines() if "slightly worse" in line and "2_predict" in line)
    held, did_not, untold = [cell.strip() for cell in summary_row.split("|")[3:6]]
    assert held == ""
    assert did_not == "throughput 32"
    assert untold.startswith("average latency 1, 32, 64; throughput 1, 64")


def test_each_row_gives_the_numbers_there_and_here(page):
    row = (
        "| throughput (samples/s) | 32 | 394.178 +/- 81.705 -> 334.981 +/- 50.292 | not beyond chance"
        " (p = 0.070) | 100.000 -> 120.000 | 5 and 5 | 1.200 (1.173 to 1.228) | did not hold |"
    )
    assert row in page


def test_claimed_sizes_stand_beside_the_tables_own(page):
    assert "Claimed change of throughput: about +300 samples/s. Published tables: +291.651. Here: +20.000" in page
    assert "Claimed change of average latency: about -5 s. Published tables: -9.589. Here: +0.000" in page


def test_the_page_says_what_chance_does_and_that_absolute_values_do_not_compare(page):
    assert "about 1 in 20" in page
    assert "absolute values cannot be compared" in page


def test_unlike_runs_are_refused():
    with pytest.raises(IncomparableRuns, match="GPU driver"):
        render_findings([summary(), summary(environment=replace(GPU, gpu_driver="590"))])
